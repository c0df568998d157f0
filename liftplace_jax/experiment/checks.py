"""What can be known of a config before anything is computed: every field is in its range."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from liftplace_jax import evaluation
from liftplace_jax.experiment.configuration import (
    check_choice,
    check_positive,
    training_config,
)
from liftplace_jax.families.registry import family_named
from liftplace_jax.host.buckets import on_this_machine
from liftplace_jax.losses import PUBLISHED
from liftplace_jax.losses.weighting import DIRECTIONS
from liftplace_jax.nn.layers import REMAT_POLICIES
from liftplace_jax.training.features import read_layer_map
from liftplace_jax.training.objective import FEATURE_SCHEDULES, METHODS, REDUCTIONS, WEIGHTS
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.profiling import TRANSFER_GUARDS, read_profile_steps

DTYPES = ("float32", "bfloat16")


@contextlib.contextmanager
def under(prefix: str) -> Iterator[None]:
    """Puts the config's part before the message of a ValueError, which starts with the field."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.{prefix}{error}") from error


def check_config(config: ConfigDict) -> None:
    """Checks every field that can be judged without a network.

    Raises:
      ValueError: names the first field that cannot be, and what it may be.
    """
    for method in config.method.split("+") if config.method != "all" else ():
        if method not in METHODS:
            check_choice("method", config.method, [*METHODS, "all"])
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ValueError(f"config.seeds must be different numbers >= 0, got {config.seeds}")
    seeds_of = {"seed": [config.seed], "seeds": config.seeds,
                "evaluation.seed": [config.evaluation.seed]}  # fmt: skip
    for field, seeds in seeds_of.items():
        if not all(0 <= seed < 2**31 for seed in seeds):
            raise ValueError(f"config.{field} must be in 0..2^31 - 1, got {seeds}")
    _check_training(config, "teacher", config.teacher)
    _check_training(config, "distill", config.distill)
    _check_compress(config)
    check_positive(config, "distill.loss.group_size")
    check_positive(config, "input_threads")
    if config.data_cache:
        on_this_machine(config.data_cache, "config.data_cache")
    if config.memory_cache_mb < 0:
        raise ValueError(f"config.memory_cache_mb must be >= 0, got {config.memory_cache_mb}")
    if config.transfer_guard is not None:
        check_choice("transfer_guard", config.transfer_guard, TRANSFER_GUARDS)
    read_profile_steps(config.profile_steps)
    check_choice("process.reduction", config.process.reduction, REDUCTIONS)
    check_choice("distill.feature.reduction", config.distill.feature.reduction, REDUCTIONS)
    check_choice("distill.feature.layers", config.distill.feature.layers, REDUCTIONS)
    check_choice("distill.feature.schedule", config.distill.feature.schedule, FEATURE_SCHEDULES)
    check_choice("distill.loss.variant", config.distill.loss.variant, PUBLISHED)
    check_choice("distill.weight.name", config.distill.weight.name, WEIGHTS)
    check_choice("distill.weight.direction", config.distill.weight.direction, DIRECTIONS)
    if not 0 < config.distill.weight.value < 1 and config.distill.weight.name == "learnable":
        raise ValueError("config.distill.weight.value of a learnable weight must be in (0, 1)")
    read_layer_map(config.distill.layer_map)
    _check_evaluation(config)
    if config.data.name == "folder" and not config.data.path:
        raise ValueError("config.data.path must be the folder of images of config.data.name=folder")
    if bool(config.latents.autoencoder) != bool(config.latents.path):
        raise ValueError(
            "config.latents.autoencoder and config.latents.path belong together: set both (latent "
            "diffusion) or neither (images)"
        )
    if config.data.path and config.data.name != "folder":
        raise ValueError(
            f"config.data.path is for config.data.name=folder only, which is {config.data.name!r}"
        )


def _check_compress(config):
    """Fields and ranges are the pruner's."""
    with under("model: "):
        family = family_named(config.model.get("model"))
    with under("compress."):
        pruner = family.pruner(config.compress.pruner)
    known = {*pruner.defaults(training_config), "pruner", "checkpoint", "entry"}
    others = sorted(set(config.compress) - known)
    if others:
        raise ValueError(
            f"config.compress has {', '.join(others)}, which pruner {pruner.name!r} does not know; "
            f"its fields: {sorted(known)}"
        )
    for name, part in config.compress.items():
        if isinstance(part, ConfigDict):
            _check_training(config, f"compress.{name}", part)


def _check_training(config, room, fields):
    check_choice(f"{room}.dtype", fields.dtype, DTYPES)
    if fields.remat is not None:
        check_choice(f"{room}.remat", fields.remat, REMAT_POLICIES)
    names = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every")
    check_positive(config, *(f"{room}.{name}" for name in names))
    if fields.batch_size % fields.accumulation:
        raise ValueError(
            f"config.{room}.accumulation {fields.accumulation} does not divide "
            f"config.{room}.batch_size {fields.batch_size}"
        )
    if not 0 <= fields.ema_decay < 1:
        raise ValueError(f"config.{room}.ema_decay must be in [0, 1), got {fields.ema_decay}")
    with under(f"{room}."):
        make_optimizer(fields.optimizer, fields.steps)


def _check_evaluation(config):
    names = ("num_samples", "batch_size", "sample_steps", "neighbours", "curve_samples")
    check_positive(config, *(f"evaluation.{name}" for name in names))
    if config.evaluation.features:
        check_choice("evaluation.features", config.evaluation.features, evaluation.FEATURES)
    every = config.evaluation.curve_every
    if every < 0 or (every and not config.evaluation.features):
        raise ValueError(
            f"config.evaluation.curve_every must be >= 0, and needs config.evaluation.features, "
            f"got {every}"
        )
    for room in ("teacher", "distill") if every else ():
        if every % config[room].log_every:
            raise ValueError(
                f"config.evaluation.curve_every {every} is no multiple of config.{room}.log_every "
                f"{config[room].log_every}"
            )
    if config.evaluation.clip is not None:
        check_positive(config, "evaluation.clip")
        if config.latents.autoencoder:
            raise ValueError("config.evaluation.clip is for pixels: latents have no range, unset")
    if not 0 <= config.evaluation.guidance < math.inf:
        raise ValueError(
            f"config.evaluation.guidance must be a number >= 0, got {config.evaluation.guidance}"
        )
    if config.evaluation.neighbours >= config.evaluation.num_samples:
        raise ValueError(
            f"config.evaluation.neighbours {config.evaluation.neighbours} must be below "
            f"config.evaluation.num_samples {config.evaluation.num_samples}"
        )
