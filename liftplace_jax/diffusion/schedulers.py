"""Processes as diffusers' schedulers: the content of a pipeline's scheduler_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from liftplace_jax.diffusion.spacing import SPACINGS
from liftplace_jax.diffusion.tables import beta_schedule
from liftplace_jax.host.outside import shown

if TYPE_CHECKING:
    from liftplace_jax.diffusion.flow import Flow
    from liftplace_jax.diffusion.gaussian import GaussianDiffusion

_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
# Sampler -> diffusers' class, and what makes it ours.
_GAUSSIAN = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ancestral": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
}
_FLOW = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
# diffusers' names of schedules that are ours; it has others.
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
# What all its schedulers of Gaussian processes take an absent field for.
_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
}  # fmt: skip
_ADVICE = "set config.process to what the network was trained with"


Betas = Sequence[float] | np.ndarray


def gaussian_scheduler(process: GaussianDiffusion, fields: Any) -> dict[str, Any]:
    """See `Process.scheduler`."""
    if fields.sampler not in _GAUSSIAN:
        raise ValueError(f"unknown sampler {fields.sampler!r}; known: {sorted(_GAUSSIAN)}")
    name, own = _GAUSSIAN[fields.sampler]
    # "uniform" is "leading" where it divides T; "spaced" is "linspace" but for halves.
    spacing = {"uniform": "leading", "spaced": "linspace"} | {name: name for name in SPACINGS}
    if fields.skip_type not in spacing:
        raise ValueError(f"skip_type {fields.skip_type!r}: no scheduler of diffusers has it")
    if name == "PNDMScheduler" and process.prediction == "x0":
        raise ValueError("sampler 'pndm': diffusers' does not know networks that predict x0")
    found = {
        "_class_name": name,
        "num_train_timesteps": process.num_timesteps,
        **_described_betas(process.betas),
        "prediction_type": _PREDICTIONS[process.prediction],
        "timestep_spacing": spacing[fields.skip_type],
        **own,
    }
    for field in ("steps_offset", "set_alpha_to_one"):
        if field in process.samplers[fields.sampler]:
            found[field] = fields[field]
    if process.variance == "learned_range" and fields.sampler in ("ancestral", "dpmpp_2m"):
        found["variance_type"] = "learned_range"
    return found


def _described_betas(betas: Betas) -> dict[str, Any]:
    # Read back from the table: of scaled_linear the ends are squares of roots.
    start, end = (float(f"{beta:.12g}") for beta in (betas[0], betas[-1]))
    for theirs, ours in _SCHEDULES.items():
        if start <= end and np.allclose(
            beta_schedule(ours, len(betas), start, end), betas, rtol=1e-9, atol=0
        ):
            return {"beta_schedule": theirs, "beta_start": start, "beta_end": end}
    return {"trained_betas": list(betas)}


def gaussian_misfits(process: GaussianDiffusion, scheduler: Mapping[str, Any]) -> list[str]:
    """See `Process.misfits`."""
    found = _DEFAULTS | dict(scheduler)
    if _is_flow(found):
        return [f"{_named(found)} is of a flow: {_ADVICE} (kind=flow)"]
    misfits = []
    theirs, ours = found["prediction_type"], _PREDICTIONS[process.prediction]
    if theirs != ours:
        fitting = [
            f" ({name!r})" for name, theirs_of in _PREDICTIONS.items() if theirs_of == theirs
        ]
        misfits.append(
            f"prediction_type {shown(theirs)}{''.join(fitting)}, config.process.prediction is "
            f"{process.prediction!r}: {_ADVICE}"
        )
    count = found["num_train_timesteps"]
    if count != process.num_timesteps:
        misfits.append(
            f"num_train_timesteps {shown(count)}, config.process.num_timesteps is "
            f"{process.num_timesteps}: {_ADVICE}"
        )
    elif not _same_betas(found, process.betas):
        if found["trained_betas"] is not None:
            said = "trained_betas"
        else:
            names = ("beta_schedule", "beta_start", "beta_end")
            said = ", ".join(f"{name} {shown(found[name])}" for name in names)
        misfits.append(
            f"{said}: its betas differ from those of config.process (schedule, beta_start, "
            f"beta_end): {_ADVICE}"
        )
    if found["rescale_betas_zero_snr"]:
        misfits.append("rescale_betas_zero_snr True: no such process is known here")
    return misfits


def _same_betas(found: Mapping[str, Any], betas: Betas) -> bool:
    given = found["trained_betas"]
    try:
        if given is None:
            given = beta_schedule(
                _SCHEDULES[found["beta_schedule"]],
                len(betas),
                found["beta_start"],
                found["beta_end"],
            )
        given = np.asarray(given, np.float64)
    except (KeyError, TypeError, ValueError):
        return False
    return given.shape == (len(betas),) and np.allclose(given, betas, rtol=1e-5, atol=0)


def flow_scheduler(process: Flow, fields: Any) -> dict[str, Any]:
    """See `Process.scheduler`."""
    if fields.sampler not in _FLOW:
        raise ValueError(f"unknown sampler {fields.sampler!r}; known: {sorted(_FLOW)}")
    return {
        "_class_name": _FLOW[fields.sampler],
        "num_train_timesteps": process.num_timesteps,
        "shift": process.shift,
    }


def flow_misfits(process: Flow, scheduler: Mapping[str, Any]) -> list[str]:
    """See `Process.misfits`. Its shift is of sampling alone: training may have another one."""
    if not _is_flow(scheduler):
        return [f"{_named(scheduler)} is of a Gaussian process: {_ADVICE} (kind=gaussian)"]
    count = scheduler.get("num_train_timesteps", 1000)
    if count == process.num_timesteps:
        return []
    return [
        f"num_train_timesteps {shown(count)}, config.process.num_timesteps is "
        f"{process.num_timesteps}: {_ADVICE}"
    ]


def _named(scheduler: Mapping[str, Any]) -> str:
    return f"_class_name {shown(scheduler.get('_class_name'))}"


def _is_flow(scheduler: Mapping[str, Any]) -> bool:
    # Other classes may be told to be of a flow.
    return "FlowMatch" in str(scheduler.get("_class_name")) or bool(
        scheduler.get("use_flow_sigmas") or scheduler.get("prediction_type") == "flow_prediction"
    )
