"""Processes between data and noise, the variational bound, samplers and guidance."""

from collections.abc import Mapping
from typing import Any

from liftplace_jax.diffusion.flow import Flow, flow_sample
from liftplace_jax.diffusion.gaussian import (
    PREDICTIONS,
    TIMESTEPS,
    VARIANCES,
    GaussianDiffusion,
)
from liftplace_jax.diffusion.guidance import guided
from liftplace_jax.diffusion.multistep import dpmpp_2m_sample, pndm_sample
from liftplace_jax.diffusion.process import Process
from liftplace_jax.diffusion.samplers import (
    SAMPLERS,
    ancestral_sample,
    ddim_sample,
    get_sampler,
)
from liftplace_jax.diffusion.spacing import timestep_sequence
from liftplace_jax.diffusion.tables import beta_schedule
from liftplace_jax.diffusion.variational import (
    Normal,
    p_mean_variance,
    q_posterior,
    vb_kd_loss,
    vb_loss,
)

_ALL: tuple[type[Process], ...] = (GaussianDiffusion, Flow)
PROCESSES: Mapping[str, type[Process]] = {process.kind: process for process in _ALL}
"""config.process.kind -> the process."""


def make_process(fields: Any) -> Process:
    """The process of config.process.

    Raises:
      ValueError: there is no such kind, or a field is out of its range.
    """
    if fields.kind not in PROCESSES:
        raise ValueError(f"unknown kind {fields.kind!r}; known: {sorted(PROCESSES)}")
    return PROCESSES[fields.kind].from_config(fields)


__all__ = [
    "PREDICTIONS",
    "PROCESSES",
    "SAMPLERS",
    "TIMESTEPS",
    "VARIANCES",
    "Flow",
    "GaussianDiffusion",
    "Normal",
    "Process",
    "ancestral_sample",
    "beta_schedule",
    "ddim_sample",
    "dpmpp_2m_sample",
    "flow_sample",
    "get_sampler",
    "guided",
    "make_process",
    "p_mean_variance",
    "pndm_sample",
    "q_posterior",
    "timestep_sequence",
    "vb_kd_loss",
    "vb_loss",
]
