"""Between what an encoder gives and what a denoising network sees."""

from typing import Any

import numpy as np


def to_latents(mean: Any, shift: float | np.floating, scale: float | np.floating) -> Any:
    """What a network sees of what an encoder gives: (mean - shift) * scale."""
    return (mean - shift) * scale


def from_latents(latents: Any, shift: float, scale: float) -> Any:
    """The inverse of `to_latents`: what a decoder takes."""
    return latents / scale + shift
