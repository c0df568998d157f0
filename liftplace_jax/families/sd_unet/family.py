"""The U-Net of Stable Diffusion as a family."""

from __future__ import annotations

from ml_collections import ConfigDict

from liftplace_jax.families.family import Family
from liftplace_jax.families.sd_unet import cost, diffusers
from liftplace_jax.families.sd_unet.config import SDUNetConfig
from liftplace_jax.families.sd_unet.pruning import BlockPruner
from liftplace_jax.families.sd_unet.published import PUBLISHED_SD_UNETS


def preset(config: ConfigDict) -> None:
    """The published process, losses, optimizer and guidance.

    Source: "BK_SDM_EXP/scripts/train_main_sd2.sh, src/kd_t2i.py, src/generate.py".
    """
    config.process.update(
        schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timesteps="uniform",
        reduction="mean",
    )
    config.data.flip = True
    config.distill.update(task_scale=1.0, scale=1.0, feature_scale=1.0)
    config.distill.feature.update(reduction="mean", layers="sum", adapters=False)
    config.distill.loss.variant = "sd"
    for run in (config.teacher, config.distill):
        run.batch_size = 128
        run.optimizer.update(
            name="adamw", learning_rate=5e-5, weight_decay=1e-2, grad_clip=1.0, schedule="constant"
        )
    config.distill.write_pipeline = True
    config.text.dropout = 0.1
    config.evaluation.update(
        sampler="pndm",
        sample_steps=25,
        skip_type="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        guidance=7.5,
    )


def miniature(config: ConfigDict) -> None:
    """32x32 images (latents of 8x8) and a narrow network of the same blocks."""
    levels = len(config.model.widths)
    config.model.update(
        image_size=8,
        widths=(16, *(levels - 1) * (32,)),
        heads=levels * (2,),
        context_dim=16,
        num_groups=8,
    )
    config.data.image_size = 32
    config.evaluation.repeat_prompts = True  # a few will do
    config.process.num_timesteps = 1000  # as the pipelines say whose networks it takes


SD_UNET = Family(
    config=SDUNetConfig,
    macs=cost.macs,
    parameters=cost.parameters,
    pruners=(BlockPruner(),),
    format=diffusers.FORMAT,
    published=PUBLISHED_SD_UNETS,
    default_model=dict(
        image_size=8,
        in_channels=1,
        out_channels=1,
        widths=(32, 64),
        layers=(2, 2),
        heads=(4, 4),
        down_attention=(True, False),
        up_attention=(False, True),
        mid_block=True,
        context_dim=32,
        linear_projection=True,
        num_groups=8,
    ),
    preset=preset,
    miniature=miniature,
)
