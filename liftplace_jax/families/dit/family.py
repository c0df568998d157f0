"""The diffusion transformer as a family."""

from __future__ import annotations

from ml_collections import ConfigDict

from liftplace_jax.compress import DepthPruner
from liftplace_jax.families.dit import cost, diffusers
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.dit.published import PUBLISHED_DITS
from liftplace_jax.families.family import Family


def preset(config: ConfigDict) -> None:
    """The published process, losses, optimizer and guidance.

    Source: "TinyFusion_EXP/train_masked_kd.py, diffusion/gaussian_diffusion.py".
    """
    config.process.update(variance="learned_range", timesteps="uniform", reduction="mean")
    config.distill.update(task_scale=0.1, scale=0.9, feature_scale=0.01)
    config.distill.feature.update(
        mask_sigma=2.0, reduction="mean", layers="mean", adapters=False, schedule="linear"
    )
    config.distill.loss.variant = "dit"
    for run in (config.teacher, config.distill):
        run.optimizer.update(name="adamw", learning_rate=2e-4, grad_clip=0.0)
    config.evaluation.guidance = 1.5


def miniature(config: ConfigDict) -> None:
    """16x16 images (latents of 4x4) and a small network."""
    if config.compress.layers[0].isdigit():
        raise ValueError("runlocal has 4 blocks: leave the numbers of layers=... out")
    share = 4 / config.model.depth
    config.compress.depth = max(1, round(share * config.compress.depth))
    config.model.update(image_size=4, hidden_size=32, depth=4, num_heads=2)
    config.data.image_size = 16


DIT = Family(
    config=DiTConfig,
    macs=cost.macs,
    parameters=cost.parameters,
    pruners=(DepthPruner(),),
    format=diffusers.FORMAT,
    published=PUBLISHED_DITS,
    default_model=dict(
        image_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=64,
        depth=8,
        num_heads=4,
        num_classes=10,
    ),
    preset=preset,
    miniature=miniature,
    frozen=("pos_embed",),
)
