"""How much a channel matters: magnitude, random, Taylor.

An importance maps the `View`s of a group's channels to one score per channel; channels of low
score are removed. A new one is one more function here and a line in `IMPORTANCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from liftplace_jax.families.unet.channels import View


def magnitude(views: list[View]) -> np.ndarray:
    """Sum of squared weights over all coupled layers but the normalisations."""
    return sum(np.square(v.weight, dtype=np.float64).sum(axis=1) for v in views if not v.is_norm)


def taylor(views: list[View]) -> np.ndarray:
    """Sum of (w dw)^2 over coupled layers, plus |w dw| of normalisation weights.

    Source: Diff_Pruning_EXP/torch_pruning importance "taylor". Needs gradients.
    """
    total = 0.0
    for view in views:
        if view.gradient is None:
            raise ValueError("importance 'taylor' needs gradients of the diffusion loss")
        product = view.weight.astype(np.float64) * view.gradient
        total = total + (np.abs(product) if view.is_norm else np.square(product)).sum(axis=1)
    return total


def random(seed: int) -> Callable[[list[View]], np.ndarray]:
    """Scores drawn from `seed`."""
    generator = np.random.default_rng(seed)
    return lambda views: generator.random(len(views[0].weight))


IMPORTANCES: dict[str, Callable[[int], Callable[[list[View]], np.ndarray]]] = {
    "magnitude": lambda seed: magnitude,
    "random": random,
    "taylor": lambda seed: taylor,
}
"""Name -> maker, called with the experiment's seed."""


def taylor_gradients(
    loss_and_gradient: Callable[[int], tuple[jax.Array, Any]],
    timesteps: Iterable[int],
    threshold: float,
) -> tuple[Any, int]:
    """Gradients of the diffusion loss summed over timesteps, as Diff-Pruning stops the sum.

    Timesteps are taken in order (0 first: the loss is largest there) until the loss falls below
    `threshold` times the largest loss seen; the steps after that hold mostly noise.

    Args:
      loss_and_gradient: timestep -> (loss, pytree of gradients).
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
        total = gradient if total is None else jax.tree.map(lambda a, b: a + b, total, gradient)
        used += 1
    if not used:
        raise ValueError("taylor_gradients needs at least one timestep")
    return total, used
