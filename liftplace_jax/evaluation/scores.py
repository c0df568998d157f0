"""Comparison of generated samples with real ones, or with a reference file."""

import numpy as np

from liftplace_jax.evaluation.frechet import Moments, frechet_distance, statistics
from liftplace_jax.evaluation.metrics import inception_score, kernel_distance, precision_recall
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


def score(real, generated, *, k=5, allow_few=False):
    """Compares generated samples with real ones.

    Args:
      real: `Samples` of `reference`, or a `Reference` of a file.
      generated: `Samples` of `collect`.
      k: neighbours of precision and recall, which look at the first 10,000 of each side.
      allow_few: accept fewer samples than feature dimensions.

    Returns:
      {"label": what "frechet" is called, "frechet", "num_samples", "num_reference" (None if a file
      does not say)}; with spatial features on both
      sides "sfid"; with logits "inception_score" and its "_std"; with the real features
      "precision", "recall", "density", "coverage", "k", "kid", "kid_std" and "kid_subset" (at most
      1,000).

    Raises:
      ValueError: no features, features of different extractors, or too few samples.
    """
    extractor = generated.extractor
    if extractor is None or (not isinstance(real, Reference) and real.extractor is None):
        raise ValueError("samples without features cannot be compared: name an extractor")
    if isinstance(real, Reference):
        check_reference(real, extractor)
    elif real.extractor is not extractor:
        raise ValueError(
            f"features come from different extractors: {real.extractor.name!r} and "
            f"{extractor.name!r}"
        )
    theirs, ours = (statistics_of(s, allow_few=allow_few) for s in (real, generated))
    result = {
        "label": extractor.label,
        "frechet": frechet_distance(*theirs["features"], *ours["features"]),
        "num_samples": int(generated.moments.count),
    }
    if "spatial" in theirs and "spatial" in ours:
        result["sfid"] = frechet_distance(*theirs["spatial"], *ours["spatial"])
    if generated.logits is not None:
        result |= inception_score(generated.logits)
    count = real.info.get("count") if isinstance(real, Reference) else int(real.moments.count)
    result["num_reference"] = count
    if real.features is not None:
        result |= _with_rows(real.features, generated.features, k)
    return result


def _with_rows(real, generated, k):
    rows = [features[:NEIGHBOUR_ROWS] for features in (real, generated)]
    subset = min(KID_SUBSET, *map(len, rows))
    return {
        **precision_recall(*rows, k), "k": k,
        **kernel_distance(real, generated, subset_size=subset), "kid_subset": subset,
    }  # fmt: skip


def check_reference(reference, extractor):
    """Raises a ValueError if a `Reference` was made with other features than an extractor's."""
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


def moments_of(samples):
    """`Moments` of the features of `Samples`, or of a `Reference` (as if of two samples)."""
    if not isinstance(samples, Reference):
        return samples.moments
    mean, covariance = samples.statistics["features"]
    shift = mean.astype(np.float32)
    rest = [(mean - shift).astype(np.float32), covariance.astype(np.float32)]
    return Moments(np.int32(2), shift, *rest, np.zeros_like(rest[1]))
