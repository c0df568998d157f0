"""What a network is told beside the noisy image and the timestep: nothing, or a class."""

from liftplace_jax.conditioning.classes import Classes
from liftplace_jax.conditioning.conditioning import (
    UNCONDITIONAL,
    Conditioning,
    Shown,
    Unconditional,
    check_sources,
)

__all__ = ["UNCONDITIONAL", "Classes", "Conditioning", "Shown", "Unconditional", "check_sources"]
