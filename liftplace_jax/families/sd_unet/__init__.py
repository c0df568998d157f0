"""The text-conditional U-Net of Stable Diffusion 1.x and 2.x; students by blocks."""

from liftplace_jax.families.sd_unet.config import SDUNetConfig
from liftplace_jax.families.sd_unet.model import SDUNet
from liftplace_jax.families.sd_unet.published import PUBLISHED_SD_UNETS

__all__ = ["PUBLISHED_SD_UNETS", "SDUNet", "SDUNetConfig"]
