"""Distillation losses as pure functions; they need jax alone."""

from liftplace_jax.losses.baselines import (
    feature_kd_loss,
    init_adapters,
    mask_outliers,
    output_kd_loss,
)
from liftplace_jax.losses.fit import Fit, least_squares_fit
from liftplace_jax.losses.grouping import Groups, error_groups
from liftplace_jax.losses.lift_place import (
    PUBLISHED,
    LiftTerms,
    lift_loss,
    lift_terms,
    place_loss,
)
from liftplace_jax.losses.weighting import (
    adaptive_weight,
    constant_weight,
    cosine_weight,
    learnable_weight,
    linear_weight,
)

__all__ = [
    "PUBLISHED",
    "Fit",
    "Groups",
    "LiftTerms",
    "adaptive_weight",
    "constant_weight",
    "cosine_weight",
    "error_groups",
    "feature_kd_loss",
    "init_adapters",
    "learnable_weight",
    "least_squares_fit",
    "lift_loss",
    "lift_terms",
    "linear_weight",
    "mask_outliers",
    "output_kd_loss",
    "place_loss",
]
