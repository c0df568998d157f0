"""Comparison of generated samples with real ones, or with a reference file."""

from typing import Any

import numpy as np

from liftplace_jax.evaluation.clip_score import clip_score
from liftplace_jax.evaluation.frechet import Moments, frechet_distance, statistics
from liftplace_jax.evaluation.metrics import (
    INCEPTION_RULES,
    inception_score,
    kernel_distance,
    precision_recall,
)
from liftplace_jax.evaluation.references import Reference

NEIGHBOUR_ROWS = 10_000  # of each side, as the ADM evaluator's reference batches have
KID_SUBSET = 1000


def statistics_of(samples, *, allow_few=False):
    """Mean and covariance by kind, "features" and perhaps "spatial", in float64.

    Args:
      samples: `Samples`, or a `Reference`.
      allow_few: accept fewer samples than feature dimensions.

    Raises:
      ValueError: too few samples.
    """
    if isinstance(samples, Reference):
        return samples.statistics
    moments = {"features": samples.moments, "spatial": samples.spatial}
    return {k: statistics(m, allow_few=allow_few) for k, m in moments.items() if m is not None}


def score(real, generated, *, k=5, allow_few=False, extractor=None, inception_rule="adm"):
    """Compares generated samples with real ones.

    Args:
      real: `Samples` of `reference`, or a `Reference` of a file.
      generated: `Samples` of `collect`, or a `Reference`.
      k: neighbours of precision and recall, which look at the first 10,000 of each side.
      allow_few: accept fewer samples than feature dimensions.
      extractor: what made the features, where `generated` is a file's.
      inception_rule: a name of INCEPTION_RULES, how the Inception Score splits the samples.

    Returns:
      {"label": what "frechet" is called, "frechet", "num_samples", "num_reference" (None if a file
      does not say)}; with spatial features on both
      sides "sfid"; with logits "inception_score" and its "_std"; with cosines what `clip_score`
      says; with features on both sides
      "precision", "recall", "density", "coverage", "k", "kid", "kid_std" and "kid_subset" (at most
      1,000).

    Raises:
      ValueError: no features, features of different extractors, or too few samples.
    """
    sides = (real, generated)
    extractor = extractor or getattr(generated, "extractor", None)
    if extractor is None or any(getattr(side, "extractor", extractor) is None for side in sides):
        raise ValueError("samples without features cannot be compared: name an extractor")
    for side in sides:
        if isinstance(side, Reference):
            check_reference(side, extractor)
        elif side.extractor is not extractor:
            raise ValueError(
                f"features come from different extractors: {side.extractor.name!r} and "
                f"{extractor.name!r}"
            )
    theirs, ours = (statistics_of(s, allow_few=allow_few) for s in (real, generated))
    result = {
        "label": extractor.label,
        "frechet": frechet_distance(*theirs["features"], *ours["features"]),
        "num_samples": _count(generated),
        "num_reference": _count(real),
    }
    if "spatial" in theirs and "spatial" in ours:
        result["sfid"] = frechet_distance(*theirs["spatial"], *ours["spatial"])
    if getattr(generated, "logits", None) is not None:
        result |= inception_score(generated.logits, **INCEPTION_RULES[inception_rule])
    if getattr(generated, "cosines", None) is not None:
        result |= clip_score(generated.cosines)
    if real.features is not None and generated.features is not None:
        result |= _with_rows(real.features, generated.features, k)
    return result


def _count(side):
    """How many images there were; None if a file does not say."""
    return side.info.get("count") if isinstance(side, Reference) else int(side.moments.count)


def _with_rows(real, generated, k):
    rows = [features[:NEIGHBOUR_ROWS] for features in (real, generated)]
    subset = min(KID_SUBSET, *map(len, rows))
    return {
        **precision_recall(rows[0], rows[1], k),
        "k": k,
        **kernel_distance(real, generated, subset_size=subset),
        "kid_subset": subset,
    }


def check_reference(reference, extractor, k=0):
    """Raises a ValueError if a `Reference` was made with other features than an extractor's.

    Or if it has some features, but too few for precision and recall with k neighbours.
    """
    # A file of pytorch-fid or ADM does not say what made it.
    name = reference.info.get("extractor", extractor.name)
    if name != extractor.name:
        raise ValueError(
            f"the reference was made with features {name!r}, the samples with {extractor.name!r}: "
            "use the same"
        )
    dim = len(reference.statistics["features"][0])
    if dim != extractor.dim:
        raise ValueError(
            f"the reference has {dim} features, {extractor.name!r} makes {extractor.dim}"
        )
    if reference.features is not None and len(reference.features) <= k:
        raise ValueError(
            f"the reference has features of {len(reference.features)} images, {k} neighbours need "
            "more"
        )


def moments_of(samples):
    """`Moments` of the features of `Samples`, or of a `Reference` (as if of two samples)."""
    if not isinstance(samples, Reference):
        return samples.moments
    mean, covariance = samples.statistics["features"]
    shift = mean.astype(np.float32)
    scatter = covariance.astype(np.float32)
    off = (mean - shift).astype(np.float32)
    parts: Any = np.int32(2), shift, off, scatter, np.zeros_like(scatter)
    return Moments(*parts)
