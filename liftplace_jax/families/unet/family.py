"""The DDPM U-Net as a family."""

from __future__ import annotations

from ml_collections import ConfigDict

from liftplace_jax.families.family import Family
from liftplace_jax.families.unet import cost
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.pruning import ChannelPruner
from liftplace_jax.families.unet.published import PUBLISHED_UNETS


def preset(config: ConfigDict) -> None:
    """What the published pixel-space experiments share."""
    config.data.flip = True
    config.compress.importance = "taylor"


def miniature(config: ConfigDict) -> None:
    """16x16 images and a small network."""
    config.model.update(
        image_size=16, ch=16, ch_mult=config.model.ch_mult[:2], num_res_blocks=1,
        attn_resolutions=(8,), num_groups=4,
    )  # fmt: skip
    config.data.image_size = 16
    config.compress.taylor_batch_size = 8


UNET = Family(
    UNetConfig, cost.macs, cost.parameters, (ChannelPruner(),), PUBLISHED_UNETS, preset, miniature
)
