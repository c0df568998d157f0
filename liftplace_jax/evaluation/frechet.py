"""Frechet distance between two Gaussians fitted to features, from moments gathered on the devices.

|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6). The trace of the root is
the sum of the roots of the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.linalg.lapack import dpotrf  # pyright: ignore[reportAttributeAccessIssue] (compiled)
from threadpoolctl import threadpool_limits

SOLVE_THREADS = 2
# A covariance that was stored in float32 is symmetric and positive semidefinite but for this share
# of its largest variance.
_ROUNDING = 1e-4


class Moments(NamedTuple):
    """Count, mean and scatter of features seen so far, a float32 pytree.

    The mean is kept relative to `shift`, the first feature seen, so that features far from zero
    lose no digits: their mean is `shift + mean`.

    Attributes:
      count: () int32 number of features.
      shift: (D,) the first feature.
      mean: (D,) mean of feature - shift.
      m2: (D, D) sum of the outer products of the centred features.
      m2_low: (D, D) what rounding has taken from m2 so far (compensated summation).
    """

    count: jax.Array
    shift: jax.Array
    mean: jax.Array
    m2: jax.Array
    m2_low: jax.Array


def moments_zero(dim):
    """Moments of no features of `dim` numbers."""
    shapes = ((dim,), (dim,), (dim, dim), (dim, dim))
    # Each an array of its own, so that all of them can be donated.
    return Moments(jnp.zeros((), jnp.int32), *(jnp.zeros(s, jnp.float32) for s in shapes))


def moments_update(moments, features, mask):
    """Adds a batch.

    Under jit with the batch sharded over devices the result is that of the global batch.

    Args:
      moments: `Moments` so far.
      features: (B, D).
      mask: (B,) bool, False for rows that do not count (padding).

    Returns:
      `Moments` including the rows with mask True.

    Raises:
      ValueError: shapes that do not fit.
    """
    if features.ndim != 2 or features.shape[1] != moments.mean.shape[0]:
        raise ValueError(f"features {features.shape} do not fit moments of {moments.mean.shape}")
    if mask.shape != features.shape[:1]:
        raise ValueError(f"mask {mask.shape} does not fit features {features.shape}")
    count = mask.sum(dtype=jnp.int32)
    shift = features[jnp.argmax(mask)].astype(jnp.float32)
    rows = jnp.where(mask[:, None], features.astype(jnp.float32) - shift, 0)
    mean = rows.sum(0) / jnp.maximum(count, 1)
    rows = jnp.where(mask[:, None], rows - mean, 0)
    m2 = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return moments_merge(moments, Moments(count, shift, mean, m2, jnp.zeros_like(m2)))


def moments_merge(a, b):
    """Moments of the union of two sets (Chan, Golub and LeVeque 1979)."""
    count = a.count + b.count
    weight = b.count / jnp.maximum(count, 1)
    shift = jnp.where(a.count > 0, a.shift, b.shift)
    # Two nearby shifts subtract without error, two large means would not.
    mean_a, mean_b = (jnp.where(m.count > 0, m.shift - shift + m.mean, 0) for m in (a, b))
    delta = mean_b - mean_a
    m2, low = _exact_sum(a.m2, b.m2)
    m2, lower = _exact_sum(m2, (a.count * weight) * jnp.outer(delta, delta))
    return Moments(count, shift, mean_a + weight * delta, m2, a.m2_low + b.m2_low + low + lower)


def _exact_sum(a, b):
    """The rounded sum and what rounding took from it (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def covariance(moments):
    """(D, D) unbiased covariance, m2 / (n - 1); zero for fewer than two features."""
    return moments.m2 / jnp.maximum(moments.count - 1, 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance in float64 NumPy: the number to report.

    Args:
      mu1: (D,) mean of the first set.
      sigma1: (D, D) covariance of the first set.
      mu2: (D,) mean of the second set.
      sigma2: (D, D) covariance of the second set.

    Returns:
      The distance, a float; rounding can make that of equal sets slightly negative.

    Raises:
      ValueError: shapes that do not fit, values that are not finite or no real numbers, or no
        covariances: negative variances, asymmetric, or not positive semidefinite.
    """
    mu1, sigma1 = check_statistics(mu1, sigma1, "1")
    mu2, sigma2 = check_statistics(mu2, sigma2, "2")
    if mu1.shape != mu2.shape:
        raise ValueError(f"feature dimensions differ: {mu1.shape[0]} and {mu2.shape[0]}")
    values = _product_eigenvalues(sigma1, sigma2)
    traces, most = zip(*((np.trace(s), np.diag(s).max()) for s in (sigma1, sigma2)), strict=True)
    if values.min() < -_ROUNDING * max(traces[0] * most[1], traces[1] * most[0]):
        raise ValueError("sigma1 or sigma2 is not positive semidefinite: it is no covariance")
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return float(np.sum((mu1 - mu2) ** 2) + trace)


def _product_eigenvalues(a, b):
    """Eigenvalues of a @ b, both symmetric and positive semidefinite."""
    # Few threads: half of the work is products of a matrix with a vector, which gain little from
    # more, and where other work keeps the cores busy, threads wait for each other.
    with threadpool_limits(SOLVE_THREADS, user_api="blas"):
        try:
            # Those of L.T @ b @ L, a = L @ L.T: four times as fast as with the root of a.
            # Transposed, they lie in LAPACK's order.
            options = {"driver": "gv", "eigvals_only": True, "check_finite": False}
            return scipy.linalg.eigh(b.T, a.T, type=2, **options)
        except np.linalg.LinAlgError:  # a is singular and has no such L
            values, vectors = np.linalg.eigh(a)
            if values[0] < -_ROUNDING * np.diag(a).max():
                message = "sigma1 is not positive semidefinite: it is no covariance"
                raise ValueError(message) from None
            root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
            product = root @ b @ root
            return np.linalg.eigvalsh((product + product.T) / 2)


def check_statistics(mean, covariance, suffix="", thorough=False):
    """A mean (D,) and a covariance (D, D) as float64 NumPy, where they can be such.

    Args:
      mean: an array.
      covariance: an array.
      suffix: of their names, in messages.
      thorough: whether to see that all directions, not the axes alone, have variances; takes D^3.

    Raises:
      ValueError: they cannot; the message says what is wrong with which.
    """
    names = f"mu{suffix}", f"sigma{suffix}"
    for name, array in zip(names, (mean, covariance), strict=True):
        if np.iscomplexobj(array):
            raise ValueError(f"{name} has complex numbers, want real ones")
    mean, covariance = (np.asarray(array, np.float64) for array in (mean, covariance))
    dim = mean.shape[0] if mean.ndim == 1 else -1
    if (mean.shape, covariance.shape) != ((dim,), (dim, dim)) or not dim:
        raise ValueError(
            f"{names[0]} and {names[1]} must be (D,) and (D, D) with one D, got {mean.shape} and "
            f"{covariance.shape}"
        )
    for name, array in zip(names, (mean, covariance), strict=True):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has non-finite values; were the features finite?")
    variances = np.diag(covariance)
    slack = _ROUNDING * np.abs(variances).max()
    if variances.min() < -slack:
        raise ValueError(
            f"{names[1]} has negative variances ({np.sum(variances < -slack)} of {dim}, down to "
            f"{variances.min():.3g}): it is no covariance"
        )
    if np.abs(covariance - covariance.T).max() > slack:
        raise ValueError(f"{names[1]} is not symmetric: it is no covariance")
    if thorough and not _is_positive(covariance, slack):
        raise ValueError(f"{names[1]} is not positive semidefinite: it is no covariance")
    return mean, covariance


def _is_positive(matrix, slack):
    shifted = (matrix + matrix.T) / 2
    shifted[np.diag_indices(len(shifted))] += slack or 1  # all zeros is a covariance, too
    with threadpool_limits(SOLVE_THREADS, user_api="blas"):
        return dpotrf(shifted, overwrite_a=True)[1] == 0


def frechet_from_moments(a, b, *, allow_few=False):
    """Frechet distance of two `Moments`, solved in float64 on the host.

    Args:
      a: `Moments` of the first set.
      b: `Moments` of the second set.
      allow_few: accept fewer samples than feature dimensions. Such a covariance is singular and the
        distance depends strongly on the number of samples.

    Returns:
      The distance, a float.

    Raises:
      ValueError: different dimensions, too few samples, or non-finite moments.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature dimensions differ: {a.mean.shape[0]} and {b.mean.shape[0]}")
    both = [statistics(moments, allow_few=allow_few) for moments in (a, b)]
    return frechet_distance(*both[0], *both[1])


def statistics(moments, *, allow_few=False):
    """Mean (D,) and covariance (D, D) in float64 NumPy.

    Args:
      moments: `Moments`.
      allow_few: as of `frechet_from_moments`.

    Raises:
      ValueError: too few samples.
    """
    count, shift, mean, m2, low = (np.asarray(leaf, np.float64) for leaf in moments)
    if count < 2 or (count < len(mean) and not allow_few):
        raise ValueError(
            f"{int(count)} samples for {len(mean)} feature dimensions: take at least as many "
            "samples as dimensions, or allow_few=True (two at the very least)"
        )
    return shift + mean, (m2 + low) / (count - 1)


def frechet_distance_in_graph(a, b):
    """Frechet distance of two `Moments` in float32, inside jit: for curves, not for reports.

    Nothing can be checked here: non-finite features give NaN. Relative to the traces of the
    covariances it is about 1e-6 off, 1e-4 where they are singular.

    Args:
      a: `Moments` of the first set.
      b: `Moments` of the second set.

    Returns:
      () float32.
    """
    sigma1, sigma2 = covariance(a), covariance(b)
    with jax.default_matmul_precision("highest"):
        # tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2). In float32 they
        # are 100 times more accurate than roots of the eigenvalues of the squared product.
        roots = jnp.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False)
    trace = jnp.trace(sigma1) + jnp.trace(sigma2) - 2 * roots.sum()
    return jnp.sum((a.shift - b.shift + a.mean - b.mean) ** 2) + trace


def _root(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T
