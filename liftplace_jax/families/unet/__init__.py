"""The DDPM U-Net of the pixel-space experiments; students by channels."""

from liftplace_jax.families.unet.channels import prune_unet, pruned_config
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.model import UNet
from liftplace_jax.families.unet.published import PUBLISHED_UNETS

__all__ = ["PUBLISHED_UNETS", "UNet", "UNetConfig", "prune_unet", "pruned_config"]
