"""What published experiments of a family share, and their runs in miniature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from liftplace_jax.experiment.configuration import experiment_config, optimizer_config
from liftplace_jax.families.unet.published import PUBLISHED_UNETS


def pixel_unet_config(
    arg: str | None, name: str, unet: str, *, ratio: float, steps: Mapping[float, int]
) -> tuple[ConfigDict, ConfigDict]:
    """What the published pixel-space experiments share.

    Args:
      arg: as of `experiment_config`, with ratio and normalisation.
      name: of the experiment.
      unet: of `PUBLISHED_UNETS`.
      ratio: the default share of channels removed.
      steps: student's training steps by ratio; a ratio between two takes those of the larger, one
        beyond the last those of the last.

    Returns:
      (config, the arguments as read).
    """
    config, args = experiment_config(
        arg, name, method="lift_place_feature_kd", ratio=ratio, normalisation="published"
    )
    model = PUBLISHED_UNETS[unet]
    for field in dataclasses.fields(model):
        if field.name != "widths":
            config.model[field.name] = getattr(model, field.name)
    config.data.image_size = model.image_size
    config.data.flip = True
    config.compress.importance = "taylor"
    config.distill.steps = steps[min((r for r in steps if r >= args.ratio), default=max(steps))]
    for run in (config.teacher, config.distill):
        run.log_every = 100
        run.checkpoint_every = 5000
    config.evaluation.features = config_dict.placeholder(str)
    config.evaluation.num_samples = 50_000
    config.evaluation.sample_steps = 100
    return config, args


def unet_runlocal(config: ConfigDict) -> ConfigDict:
    """The same experiment on 16x16 images, with a small network and few steps: under a minute."""
    config.model.update(
        image_size=16, ch=16, ch_mult=config.model.ch_mult[:2], num_res_blocks=1,
        attn_resolutions=(8,), num_groups=4,
    )  # fmt: skip
    config.data.image_size = 16
    config.compress.taylor_batch_size = 8
    _short(config)
    return config


def dit_config(
    arg: str | None, name: str, **arguments: Any
) -> tuple[ConfigDict, ConfigDict]:
    """What the DiT experiments share: the published process, losses and guidance.

    Args:
      arg: as of `experiment_config`.
      name: of the experiment.
      arguments: as of `experiment_config`.

    Returns:
      (config, the arguments as read). The model is to be set.

    Source: "TinyFusion_EXP/train_masked_kd.py, diffusion/gaussian_diffusion.py".
    """
    config, args = experiment_config(arg, name, method="lift_place_feature_kd", **arguments)
    # On the command line a comma separates arguments.
    config.compress.layers = args.layers.replace("+", ",")
    config.process.update(variance="learned_range", timesteps="uniform", reduction="mean")
    config.distill.update(task_scale=0.1, scale=0.9, feature_scale=0.01)
    config.distill.feature.update(
        mask_sigma=2.0, reduction="mean", layers="mean", adapters=False, schedule="linear"
    )
    config.distill.loss.variant = "dit"
    for run in (config.teacher, config.distill):
        run.optimizer = optimizer_config(name="adamw", learning_rate=2e-4, grad_clip=0.0)
    config.evaluation.guidance = 1.5
    return config, args


def dit_runlocal(config: ConfigDict) -> ConfigDict:
    """The same experiment on 16x16 images (latents of 4x4), with a small network and few steps."""
    if config.compress.layers[0].isdigit():
        raise ValueError("runlocal has 4 blocks: leave the numbers of layers=... out")
    share = 4 / config.model.depth
    config.compress.depth = max(1, round(share * config.compress.depth))
    config.model.update(image_size=4, hidden_size=32, depth=4, num_heads=2)
    config.data.image_size = 16
    _short(config)
    return config


def _short(config: ConfigDict) -> None:
    """Few steps, timesteps and samples."""
    config.process.num_timesteps = 20
    for run in (config.teacher, config.distill, config.compress.learned):
        run.steps = 30
        run.batch_size = 16
        run.ema_decay = 0.9
        run.optimizer.learning_rate = 2e-3
        run.log_every = 10
        run.checkpoint_every = 20
    config.evaluation.update(num_samples=64, batch_size=32, sample_steps=10)
    config.tensorboard = False
