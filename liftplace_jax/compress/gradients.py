"""Gradients of the diffusion loss, summed over the timesteps, for importances."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def taylor_gradients(
    loss_and_gradient: Callable[[int], tuple[jax.Array, Any]],
    timesteps: Iterable[int],
    threshold: float,
) -> tuple[Any, int]:
    """Gradients of the diffusion loss summed over timesteps, as Diff-Pruning stops the sum.

    Timesteps are taken in order (0 first: the loss is largest there) until the loss falls below
    `threshold` times the largest loss seen; the steps after that hold mostly noise.

    Args:
      loss_and_gradient: timestep -> (loss, pytree of gradients, which are given up).
      timesteps: which, in order.
      threshold: in [0, 1); 0 takes every timestep (Diff-Pruning uses 0.05).

    Returns:
      (summed gradients, number of timesteps used).

    Raises:
      ValueError: threshold out of range, no timesteps, or a loss that is not finite.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    total, largest, used = None, 0.0, 0
    for t in timesteps:
        loss, gradient = loss_and_gradient(t)
        loss = float(loss)
        if not np.isfinite(loss):
            raise ValueError(f"the diffusion loss at timestep {t} is {loss}")
        largest = max(largest, loss)
        if loss < threshold * largest:
            break
        total = gradient if total is None else _plus(total, gradient)
        used += 1
    if not used:
        raise ValueError("taylor_gradients needs at least one timestep")
    return total, used


@functools.partial(jax.jit, donate_argnums=0)
def _plus(total, more):
    return jax.tree.map(jnp.add, total, more)
