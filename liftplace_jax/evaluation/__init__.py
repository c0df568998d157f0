"""How good samples are: Frechet distance, precision and recall, error to the teacher."""

from liftplace_jax.evaluation.evaluate import (
    Samples,
    collect,
    output_error,
    reference,
    score,
    to_uint8,
)
from liftplace_jax.evaluation.features import FEATURES, Extractor, feature_extractor
from liftplace_jax.evaluation.frechet import (
    Moments,
    covariance,
    frechet_distance,
    frechet_distance_in_graph,
    frechet_from_moments,
    moments_merge,
    moments_update,
    moments_zero,
)
from liftplace_jax.evaluation.metrics import precision_recall

__all__ = [
    "FEATURES",
    "Extractor",
    "Moments",
    "Samples",
    "collect",
    "covariance",
    "feature_extractor",
    "frechet_distance",
    "frechet_distance_in_graph",
    "frechet_from_moments",
    "moments_merge",
    "moments_update",
    "moments_zero",
    "output_error",
    "precision_recall",
    "reference",
    "score",
    "to_uint8",
]
