"""Precision, recall, density and coverage of generated features (k nearest neighbours)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 64  # rows of the distance matrix that are held at a time


def _squared_distances(row, others):
    """(D,), (N, D) -> (N,) in float32, from differences: |x|^2 - 2xy + |y|^2 would cancel."""
    return jnp.sum((others - row) ** 2, axis=-1)


def _radii(features, k):
    """Squared distance of each feature to its k-th nearest other one."""

    def radius(row):
        nearest, _ = jax.lax.top_k(-_squared_distances(row, features), k + 1)  # itself included
        return -nearest[k]

    return jax.lax.map(radius, features, batch_size=_CHUNK)


@functools.partial(jax.jit, static_argnames="k")
def _prdc(real, fake, k):
    """Real balls around each fake feature; whether each real one is recalled, and covered."""
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)

    def of_fake(row):
        return jnp.sum(_squared_distances(row, real) < real_radii)

    def of_real(inputs):
        row, radius = inputs
        distances = _squared_distances(row, fake)
        return jnp.any(distances < fake_radii), jnp.min(distances) < radius

    hits = jax.lax.map(of_fake, fake, batch_size=_CHUNK)
    return hits, *jax.lax.map(of_real, (real, real_radii), batch_size=_CHUNK)


def precision_recall(real, fake, k=5):
    """Improved precision and recall, density and coverage.

    A ball around each feature reaches to its k-th nearest neighbour in its own set. Precision:
    share of fake features inside a ball of the real ones; recall: the other way round
    (Kynkaanniemi et al. 2019). Density: mean number of real balls around a fake feature, over k;
    coverage: share of real balls with a fake feature inside (Naeem et al. 2020, package `prdc`).

    Args:
      real: (N, D) features of real images.
      fake: (M, D) features of generated images.
      k: number of neighbours.

    Returns:
      {"precision", "recall", "density", "coverage"}: floats in 0..1, density >= 0.

    Raises:
      ValueError: shapes that do not fit, k < 1, no more than k features, non-finite features.
    """
    real, fake = (np.asarray(array, np.float32) for array in (real, fake))
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {real.shape} and {fake.shape}")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise ValueError(
            f"k = {k} neighbours need k >= 1 and more than k features on each side, "
            f"got {len(real)} real and {len(fake)} generated"
        )
    for name, array in (("real", real), ("generated", fake)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} features have non-finite values")
    hits, recalled, covered = map(np.asarray, _prdc(real, fake, k))
    return {
        "precision": float(np.mean(hits > 0)),
        "recall": float(np.mean(recalled)),
        "density": float(np.mean(hits) / k),
        "coverage": float(np.mean(covered)),
    }
