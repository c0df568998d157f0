"""The multimodal diffusion transformer of Stable Diffusion 3; students by depth."""

from liftplace_jax.families.mmdit.config import MMDiTConfig
from liftplace_jax.families.mmdit.model import MMDiT
from liftplace_jax.families.mmdit.published import PUBLISHED_MMDITS

__all__ = ["PUBLISHED_MMDITS", "MMDiT", "MMDiTConfig"]
