"""The weight w of the fine term: adaptive (the paper's), or a schedule's value.

Each function returns a float32 scalar in 0..1. A schedule's value is passed to the losses as
`weight=cosine_weight(step, total_steps)`. Steps may be traced, their total not; a number that is
none raises a ValueError which names it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from liftplace_jax.losses.arguments import check_choice, real_number, whole_number

DIRECTIONS = ("increase", "decrease")


def adaptive_weight(slope, intercept, share=None, *, axis_name: str | None = None) -> jax.Array:
    """w = 1 - min(1, mean|b1 - 1| + mean|b0|), without gradient (paper, "LIFT").

    Args:
      slope: (batch, rows, groups).
      intercept: (batch, rows, groups).
      share: None for equal groups, or (groups,) summing to 1: each group's share of the elements.
      axis_name: inside `shard_map` or `pmap`, the mapped axis over which the batch is split; under
        plain `jit` the arrays are global already and nothing is needed.
    """
    drift = jax.lax.stop_gradient(jnp.abs(slope - 1) + jnp.abs(intercept))
    if share is not None:
        share = jnp.asarray(share).astype(drift.dtype)
    drift = jnp.mean(drift) if share is None else jnp.mean(jnp.sum(drift * share, axis=-1))
    if axis_name is not None:
        drift = jax.lax.pmean(drift, axis_name)
    return 1 - jnp.minimum(1, drift)


def constant_weight(value: float) -> jax.Array:
    """A fixed w."""
    return jnp.asarray(real_number("value", value, 0), jnp.float32)


def linear_weight(step, total_steps: int, direction: str = "increase") -> jax.Array:
    """0 to 1 ("increase") or 1 to 0 ("decrease") over `total_steps`, then held."""
    return _directed(_progress(step, total_steps), direction)


def cosine_weight(step, total_steps: int, direction: str = "increase") -> jax.Array:
    """Half a cosine from 0 to 1 ("increase") or 1 to 0 ("decrease"), then held."""
    return _directed(0.5 * (1 - jnp.cos(jnp.pi * _progress(step, total_steps))), direction)


def learnable_weight(logit) -> jax.Array:
    """sigmoid(logit), trained along with the student (published ablation: starts at 0.3)."""
    return jax.nn.sigmoid(jnp.asarray(logit, jnp.float32))


def _progress(step, total_steps):
    step = jnp.asarray(real_number("step", step, -(2.0**63)), jnp.float32)
    total_steps = whole_number("total_steps", total_steps, -(2**63), 2**63)
    if total_steps <= 0:
        return jnp.zeros((), jnp.float32)
    return jnp.clip(step / total_steps, 0, 1)


def _directed(value, direction):
    check_choice("direction", direction, DIRECTIONS)
    return value if direction == "increase" else 1 - value
