"""The diffusion transformer of the latent-space experiments; students by depth."""

from liftplace_jax.families.dit.config import DiTConfig, published_layer_map
from liftplace_jax.families.dit.model import DiT
from liftplace_jax.families.dit.published import PUBLISHED_DITS

__all__ = ["PUBLISHED_DITS", "DiT", "DiTConfig", "published_layer_map"]
