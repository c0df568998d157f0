"""Scores of features beside the Frechet distance: precision and recall, kernel distance, Inception
Score."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

INCEPTION_RULES = {
    "adm": {"split_size": 5000},
    "torch_fidelity": {"splits": 10, "shuffle_seed": 2020},
}
"""Named ways to split: those of the ADM evaluator, and torch-fidelity's defaults."""
_CHUNK = 64  # rows of the distance matrix that are held at a time
# Features of the same image differ in the last bits between batch sizes and devices, which changed
# distances by 6e-7 of themselves and made up to 2e-7 of a feature's norm where there was none
# (digits, CPU). A set compared with itself is full of such ties.
_TIE = 1e-5  # squared distances that differ by less, as a share, are equal
_SAME = 4e-6  # features that differ by less, as a share of their norm, are equal


def _squared_distances(row, others):
    """(D,), (N, D) -> (N,) in float32, from differences: |x|^2 - 2xy + |y|^2 would cancel."""
    return jnp.sum((others - row) ** 2, axis=-1)


def _radii(features, k):
    """What a squared distance to a feature must be below, to be below that of its k-th nearest
    other one, and not equal to it but for rounding."""

    def radius(row):
        nearest, _ = jax.lax.top_k(-_squared_distances(row, features), k + 1)  # itself included
        same = -nearest[k] <= _SAME**2 * jnp.sum(row**2)
        return jnp.where(same, 0, -nearest[k] * (1 - _TIE))

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
    (Kynkaanniemi et al. 2019; the ADM evaluator takes k = 3). Density: mean number of real balls
    around a fake feature, over k; coverage: share of real balls with a fake feature inside (Naeem
    et al. 2020, package `prdc`). What lies on the surface of a ball, but for rounding (1e-5 of the
    squared radius), is outside: so a set compared with itself has density 1, whatever batch size
    its features were made in.

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


def kernel_distance(real, fake, *, subset_size=1000, subsets=100, seed=0):
    """Kernel inception distance: unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Args:
      real: (N, D) features of real images.
      fake: (M, D) features of generated images.
      subset_size: rows of each side in a subset, drawn without replacement; at least 2. If it is
        N and M, all rows are taken, in order.
      subsets: number of subsets.
      seed: of the subsets.

    Returns:
      {"kid", "kid_std"}: mean and standard deviation over subsets (Binkowski et al. 2018; defaults
      of torch-fidelity but for the seed).

    Raises:
      ValueError: shapes that do not fit, or fewer features than subset_size.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {real.shape} and {fake.shape}")
    if subset_size < 2 or subsets < 1 or min(len(real), len(fake)) < subset_size:
        raise ValueError(
            f"{subsets} subsets of {subset_size} need at least so many features on each side and a "
            f"size of at least 2, got {len(real)} real and {len(fake)} generated"
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        rows = [
            features
            if len(features) == subset_size
            else features[rng.choice(len(features), subset_size, replace=False)]
            for features in (real, fake)
        ]
        values.append(_squared_mmd(*(features.astype(np.float64) for features in rows)))
    return {"kid": float(np.mean(values)), "kid_std": float(np.std(values))}


def _squared_mmd(x, y):
    n, dim = x.shape
    kxx, kyy, kxy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum(k.sum() - np.trace(k) for k in (kxx, kyy)) / (n * (n - 1))
    return within - 2 * kxy.mean()


def inception_score(logits, *, split_size=5000, splits=None, shuffle_seed=None):
    """Inception Score: exp of the mean KL divergence of p(class | image) from p(class).

    Args:
      logits: (N, classes) of generated images, in the order they were drawn.
      split_size: rows of a split; the last one may be shorter. The ADM evaluator takes 5,000.
      splits: instead of `split_size`, the number of splits, as equal as can be.
      shuffle_seed: of NumPy's RandomState, which shuffles the rows first; None: they stay.

    Returns:
      {"inception_score", "inception_score_std"}: mean and standard deviation over splits
      (Salimans et al. 2016).

    Raises:
      ValueError: logits of another rank, a split size below 1, or splits without rows.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or not len(logits) or split_size < 1:
        raise ValueError(f"want (N, classes) and split_size >= 1, got {logits.shape}, {split_size}")
    count = len(logits)
    if splits is not None and not 1 <= splits <= count:
        raise ValueError(f"{count} images do not make {splits} splits: take as many at least")
    if shuffle_seed is not None:
        logits = logits[np.random.RandomState(shuffle_seed).permutation(count)]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    if splits is None:
        bounds = [*range(0, count, split_size), count]
    else:
        bounds = [number * count // splits for number in range(splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        part = log_p[start:stop]
        p = np.exp(part)
        divergence = np.sum(p * (part - np.log(p.mean(axis=0))), axis=1)
        scores.append(np.exp(divergence.mean()))
    return {"inception_score": float(np.mean(scores)), "inception_score_std": float(np.std(scores))}
