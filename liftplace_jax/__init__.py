"""LIFT and PLACE: stable knowledge distillation for lightweight diffusion models, in JAX.

`import liftplace_jax` brings the losses and needs jax alone; models, data and training are
imported by name (`liftplace_jax.families`, ...).
"""

from liftplace_jax.losses import (
    PUBLISHED,
    LiftTerms,
    feature_kd_loss,
    lift_loss,
    output_kd_loss,
    place_loss,
)

__version__ = "0.1.0"

__all__ = [
    "PUBLISHED",
    "LiftTerms",
    "__version__",
    "feature_kd_loss",
    "lift_loss",
    "output_kd_loss",
    "place_loss",
]
