"""The diffusion process and its samplers."""

from liftplace_jax.diffusion.gaussian import PREDICTIONS, GaussianDiffusion, beta_schedule
from liftplace_jax.diffusion.samplers import (
    SAMPLERS,
    ancestral_sample,
    ddim_sample,
    get_sampler,
    timestep_sequence,
)

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "GaussianDiffusion",
    "ancestral_sample",
    "beta_schedule",
    "ddim_sample",
    "get_sampler",
    "timestep_sequence",
]
