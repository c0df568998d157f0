"""How good samples are: Frechet distance, precision and recall, error to the teacher."""

from liftplace_jax.evaluation.clip_score import ClipScorer, clip_score, load_clip
from liftplace_jax.evaluation.extractor import Extractor
from liftplace_jax.evaluation.features import FEATURES, feature_extractor
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
from liftplace_jax.evaluation.handling import BK_SDM, Handling, Look
from liftplace_jax.evaluation.inception_features import load_inception
from liftplace_jax.evaluation.metrics import (
    INCEPTION_RULES,
    inception_score,
    kernel_distance,
    precision_recall,
)
from liftplace_jax.evaluation.references import Reference, load_reference, save_reference
from liftplace_jax.evaluation.resize import resize_bilinear
from liftplace_jax.evaluation.samples import Samples, collect, reference, to_uint8
from liftplace_jax.evaluation.scores import check_reference, moments_of, score, statistics_of
from liftplace_jax.evaluation.teacher_error import output_error

__all__ = [
    "BK_SDM",
    "FEATURES",
    "INCEPTION_RULES",
    "ClipScorer",
    "Extractor",
    "Handling",
    "Look",
    "Moments",
    "Reference",
    "Samples",
    "check_reference",
    "clip_score",
    "collect",
    "covariance",
    "feature_extractor",
    "frechet_distance",
    "frechet_distance_in_graph",
    "frechet_from_moments",
    "inception_score",
    "kernel_distance",
    "load_clip",
    "load_inception",
    "load_reference",
    "moments_merge",
    "moments_of",
    "moments_update",
    "moments_zero",
    "output_error",
    "precision_recall",
    "reference",
    "resize_bilinear",
    "save_reference",
    "score",
    "statistics_of",
    "to_uint8",
]
