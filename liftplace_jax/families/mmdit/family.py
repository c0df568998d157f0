"""The multimodal diffusion transformer as a family."""

from __future__ import annotations

from ml_collections import ConfigDict

from liftplace_jax.compress import DepthPruner
from liftplace_jax.families.family import Family
from liftplace_jax.families.mmdit import cost, diffusers
from liftplace_jax.families.mmdit.config import MMDiTConfig
from liftplace_jax.families.mmdit.published import PUBLISHED_MMDITS


def preset(config: ConfigDict) -> None:
    """Rectified flow and our choice of losses and optimizer: none is published for this family.

    The flow is SD3's: logit-normal timesteps, shift 3, 28 Euler steps where diffusers has them,
    guidance 5; a tenth of the captions is dropped, of all encoders together. The losses are
    those of the published Stable Diffusion students, on the velocity, with their optimizer.
    """
    config.process.update(kind="flow", timesteps="logit_normal", reduction="mean", shift=3.0)
    config.distill.update(task_scale=1.0, scale=1.0, feature_scale=1.0)
    config.distill.feature.update(
        reduction="mean", layers="sum", adapters=False, schedule="constant"
    )
    config.distill.loss.variant = "sd"
    for run in (config.teacher, config.distill):
        run.batch_size = 128
        run.ema_decay = 0.9999
        run.optimizer.update(name="adamw", learning_rate=5e-5, weight_decay=1e-2, grad_clip=1.0)
    config.text.dropout = 0.1
    config.evaluation.update(sampler="euler", skip_type="diffusers", sample_steps=28, guidance=5.0)


def miniature(config: ConfigDict) -> None:
    """16x16 images (latents of 4x4) and a small network."""
    if config.compress.layers[0].isdigit():
        raise ValueError("runlocal has 4 blocks: leave the numbers of layers=... out")
    share = 4 / config.model.depth
    config.compress.depth = max(1, round(share * config.compress.depth))
    config.model.update(
        image_size=4, depth=4, num_heads=2, head_size=16, position_size=8, context_tokens=8
    )
    if config.model.dual_attention_layers:
        config.model.dual_attention_layers = (0, 1)
    config.data.image_size = 16
    config.evaluation.repeat_prompts = True  # a few will do


MMDIT = Family(
    config=MMDiTConfig,
    macs=cost.macs,
    parameters=cost.parameters,
    pruners=(DepthPruner(),),
    format=diffusers.FORMAT,
    published=PUBLISHED_MMDITS,
    default_model=dict(
        image_size=8,
        depth=6,
        num_heads=4,
        head_size=16,
        patch_size=2,
        in_channels=4,
        context_dim=64,
        pooled_dim=64,
        position_size=16,
        context_tokens=24,
    ),
    preset=preset,
    miniature=miniature,
    frozen=(diffusers.POSITIONS,),
)
