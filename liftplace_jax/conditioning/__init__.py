"""What a network is told beside the noisy image and the timestep: nothing, a class, or a text."""

from liftplace_jax.conditioning.classes import Classes
from liftplace_jax.conditioning.conditioning import (
    UNCONDITIONAL,
    Conditioning,
    Shown,
    Unconditional,
    check_sources,
)
from liftplace_jax.conditioning.text import Encoding, Text

__all__ = [
    "UNCONDITIONAL",
    "Classes",
    "Conditioning",
    "Encoding",
    "Shown",
    "Text",
    "Unconditional",
    "check_sources",
]
