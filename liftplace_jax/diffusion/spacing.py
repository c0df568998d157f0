"""Which timesteps a sampler of the Gaussian process visits, and where each of its steps ends."""

from __future__ import annotations

import numpy as np

SPACINGS = ("leading", "trailing", "linspace")
"""Those of diffusers' schedulers (Lin et al. 2024, table 2)."""
SKIP_TYPES = ("uniform", "quad", "spaced", *SPACINGS)


def timestep_sequence(
    num_timesteps: int,
    steps: int,
    skip_type: str = "uniform",
    steps_offset: int = 0,
    above_data: bool = False,
) -> np.ndarray:
    """The visited timesteps, ascending.

    Args:
      num_timesteps: T.
      steps: how many, at most T.
      skip_type: "uniform", multiples of T / steps, or "quad", squares from 0 to 0.8 T (an early
        timestep may repeat), as in "Diff_Pruning runners/diffusion.py"; "spaced", equally far
        apart from 0 to T - 1 up to rounding, as in "TinyFusion_EXP/diffusion/respace.py"; those
        of diffusers: "leading", multiples of T // steps, "trailing", down from T - 1, "linspace",
        from 0 to T - 1.
      steps_offset: added to the timesteps of "leading"; Stable Diffusion's is 1.
      above_data: of one timestep more the lowest is left out, with "leading" and "linspace", as
        diffusers' DPM-Solver does.

    Returns:
      (steps,) int32.

    Raises:
      ValueError: unknown skip_type, steps not in 1..T, or not dividing T for "uniform", or an
        offset that is not for this skip_type or leads beyond T - 1.
    """
    if skip_type not in SKIP_TYPES:
        raise ValueError(f"unknown skip_type {skip_type!r}; known: {SKIP_TYPES}")
    above_data = above_data and skip_type in ("leading", "linspace")
    most = num_timesteps - above_data
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be in 1..{most} (num_timesteps), not {steps}")
    if steps_offset and skip_type != "leading":
        raise ValueError(f"steps_offset {steps_offset} is for skip_type 'leading', not {skip_type}")
    if skip_type == "uniform":
        if num_timesteps % steps:
            raise ValueError(
                f"steps {steps} must divide num_timesteps {num_timesteps} for uniform skips"
            )
        return np.arange(0, num_timesteps, num_timesteps // steps, dtype=np.int32)
    if skip_type == "quad":
        return (np.linspace(0, np.sqrt(num_timesteps * 0.8), steps) ** 2).astype(np.int32)
    if skip_type == "spaced":
        # Added up, not multiplied: halves are rounded as in the published tables.
        stride = (num_timesteps - 1) / max(steps - 1, 1)
        return np.round(np.cumsum([0.0] + [stride] * (steps - 1))).astype(np.int32)
    if skip_type == "trailing":
        below = np.arange(steps) * (num_timesteps / steps)
        return (np.round(num_timesteps - below) - 1).astype(np.int32)[::-1]
    count = steps + above_data
    if skip_type == "linspace":
        t = np.round(np.linspace(0, num_timesteps - 1, count)).astype(np.int32)
    else:
        t = np.arange(count, dtype=np.int32) * (num_timesteps // count) + steps_offset
        if t[-1] >= num_timesteps:
            raise ValueError(
                f"steps_offset {steps_offset} with {steps} steps leads to timestep {t[-1]}, the "
                f"last one is {num_timesteps - 1}"
            )
    return t[1:] if above_data else t


def steps_down(
    num_timesteps: int, steps: int, skip_type: str, steps_offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where steps to the data start and end.

    A step ends where the next one starts; those of diffusers' spacings are T // steps wide
    whatever the distance to the next timestep, as its schedulers have it.

    Args:
      num_timesteps: T.
      steps: how many.
      skip_type: as of `timestep_sequence`.
      steps_offset: as of `timestep_sequence`.

    Returns:
      Two (steps,) arrays of timesteps, descending; below 0 is the data.

    Raises:
      ValueError: as `timestep_sequence`.
    """
    start = timestep_sequence(num_timesteps, steps, skip_type, steps_offset)[::-1]
    if skip_type in SPACINGS:
        return start, start - num_timesteps // steps
    return start, np.append(start[1:], np.int32(-1))
