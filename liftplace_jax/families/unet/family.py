"""The DDPM U-Net as a family."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from liftplace_jax.families.family import Family
from liftplace_jax.families.unet import cost, diffusers
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.pruning import ChannelPruner
from liftplace_jax.families.unet.published import PUBLISHED_UNETS


def preset(config: ConfigDict) -> None:
    """What the published pixel-space experiments share."""
    config.data.image_size = config.model.image_size
    config.data.flip = True
    config.compress.importance = "taylor"
    for run in (config.teacher, config.distill):
        run.log_every = 100
        run.checkpoint_every = 5000
    config.evaluation.features = config_dict.placeholder(str)
    config.evaluation.num_samples = 50_000
    config.evaluation.sample_steps = 100


def miniature(config: ConfigDict) -> None:
    """16x16 images and a small network."""
    config.model.update(
        image_size=16,
        ch=16,
        ch_mult=config.model.ch_mult[:2],
        num_res_blocks=1,
        attn_resolutions=(8,),
        num_groups=4,
    )
    config.data.image_size = 16
    config.compress.taylor_batch_size = 8


UNET = Family(
    config=UNetConfig,
    macs=cost.macs,
    parameters=cost.parameters,
    pruners=(ChannelPruner(),),
    format=diffusers.FORMAT,
    published=PUBLISHED_UNETS,
    default_model=dict(
        image_size=8,
        in_channels=1,
        out_channels=1,
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
        resamp_with_conv=True,
        num_groups=8,
        min_channels_per_group=1,
    ),
    preset=preset,
    miniature=miniature,
)
