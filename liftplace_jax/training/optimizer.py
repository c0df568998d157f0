"""Optimizer and learning-rate schedule from a config, all of it optax."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from liftplace_jax.host.ranges import SHARE, Range, factor, positive, whole
from liftplace_jax.host.sharding import parameter_name

RANGES = {
    "learning_rate": positive(1.0, why="Adam moves every parameter by about as much"),
    "b1": SHARE,
    "b2": SHARE,
    "eps": positive(1.0),
    "weight_decay": factor(10.0),
    "grad_clip": factor(optional=True),  # 0 or None: none
    "warmup_steps": whole(0),
    "final_scale": Range(float, 0.0, 1.0),
}
"""Of its numbers, config.teacher.optimizer and the like."""
OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw}
SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant, or a decay to `final_scale`.

    Args:
      config: learning_rate, schedule (SCHEDULES), warmup_steps, final_scale (share of the
        learning rate that is left at the end).
      total_steps: when the decay ends.

    Raises:
      ValueError: unknown schedule, or a warm-up longer than the training.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule must be one of {SCHEDULES}: {config.schedule!r}")
    if not 0 <= config.warmup_steps <= total_steps:
        raise ValueError(
            f"optimizer.warmup_steps must be in 0..{total_steps}, got {config.warmup_steps}"
        )
    peak, steps = config.learning_rate, max(1, total_steps - config.warmup_steps)
    decay = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, steps, alpha=config.final_scale),
        "linear": optax.linear_schedule(peak, peak * config.final_scale, steps),
    }[config.schedule]
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: ConfigDict, total_steps: int, frozen: Collection[str] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its schedule.

    Args:
      config: name ("adam" or "adamw"), b1, b2, eps, weight_decay (adamw; of all but the frozen),
        grad_clip (global norm; 0 or None for none), and the schedule's fields.
      total_steps: see `make_schedule`.
      frozen: full names of parameters that the model never trains: they must not decay.

    Raises:
      ValueError: unknown name or schedule, a number out of its range, or weight decay with plain
        adam; names the field.
    """
    for field, limits in RANGES.items():
        limits.check(f"optimizer.{field}", config[field])
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name must be one of {sorted(OPTIMIZERS)}: {config.name!r}")
    if config.name == "adam" and config.weight_decay:
        raise ValueError("optimizer.weight_decay needs optimizer.name='adamw'")
    schedule = make_schedule(config, total_steps)
    extra = {}
    if config.name == "adamw":
        extra["weight_decay"] = config.weight_decay
    if config.weight_decay:
        extra["mask"] = functools.partial(_decays, frozen=frozenset(frozen))
    optimizer = OPTIMIZERS[config.name](
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, **extra
    )
    if config.grad_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer)
    return optimizer, schedule


def _decays(params: Any, frozen: Collection[str]) -> Any:
    """Which parameters decay: the same tree of booleans."""
    return jax.tree.map_with_path(
        lambda path, _: parameter_name(path).removeprefix("student.") not in frozen, params
    )
