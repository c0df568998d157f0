"""The diffusion process, its variational bound, its samplers and guidance."""

from liftplace_jax.diffusion.gaussian import (
    PREDICTIONS,
    TIMESTEPS,
    VARIANCES,
    GaussianDiffusion,
    beta_schedule,
)
from liftplace_jax.diffusion.guidance import guided
from liftplace_jax.diffusion.samplers import (
    SAMPLERS,
    ancestral_sample,
    ddim_sample,
    get_sampler,
    timestep_sequence,
)
from liftplace_jax.diffusion.variational import (
    Normal,
    p_mean_variance,
    q_posterior,
    vb_kd_loss,
    vb_loss,
)

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "TIMESTEPS",
    "VARIANCES",
    "GaussianDiffusion",
    "Normal",
    "ancestral_sample",
    "beta_schedule",
    "ddim_sample",
    "get_sampler",
    "guided",
    "p_mean_variance",
    "q_posterior",
    "timestep_sequence",
    "vb_kd_loss",
    "vb_loss",
]
