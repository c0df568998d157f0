"""How much a channel matters: magnitude, random, Taylor.

An importance maps the `View`s of a group's channels to one score per channel; channels of low
score are removed. A new one is one more function here and a line in `IMPORTANCES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from liftplace_jax.families.unet.channels import View


def magnitude(views: list[View]) -> np.ndarray:
    """Sum of squared weights over all coupled layers but the normalisations."""
    weights = [v.weight for v in views if not v.is_norm]
    return sum(
        (np.square(w, dtype=np.float64).sum(axis=1) for w in weights),
        start=np.zeros(len(views[0].weight)),
    )


def taylor(views: list[View]) -> np.ndarray:
    """Sum of (w dw)^2 over coupled layers, plus |w dw| of normalisation weights.

    Source: Diff_Pruning_EXP/torch_pruning importance "taylor". Needs gradients.
    """
    total = np.zeros(len(views[0].weight))
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
