"""Samplers that remember what the network said before: PNDM and DPM-Solver++, each one scan."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.diffusion.process import Noise, Predict
from liftplace_jax.diffusion.spacing import SPACINGS, steps_down, timestep_sequence

if TYPE_CHECKING:
    from liftplace_jax.diffusion.gaussian import GaussianDiffusion

ADAMS_BASHFORTH = np.array(
    [
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)
"""Weights of the present prediction and the three before it: of the first four evaluations, which
know fewer, and of all others. The second evaluation ends the first step a second time."""


def pndm_sample(
    predict: Predict,
    x_T: jax.Array,
    process: GaussianDiffusion,
    *,
    steps: int,
    skip_type: str = "uniform",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    key: jax.Array | None = None,
    noise: Noise | None = None,
    clip: float | None = None,
    return_trajectory: bool = False,
):
    """PNDM's linear multistep method (Liu et al. 2022, equations 11 and 12), PLMS for short.

    The Runge-Kutta steps of the paper are left out, as in Stable Diffusion: the first step is
    taken twice, so that there is one evaluation more than steps. Predictions are combined as they
    are, also those of v, as diffusers' PNDMScheduler does.

    Args:
      predict: (x_t (B, ..., C), t (B,) int32) -> the network's prediction, of x_t's shape; of 2 C
        channels where the process learns the variance, which plays no part.
      x_T: (B, ..., C) standard normal start.
      process: the diffusion process, which also says what is predicted.
      steps: network evaluations but one.
      skip_type: see `timestep_sequence`; Stable Diffusion's is "leading".
      steps_offset: see `timestep_sequence`; Stable Diffusion's is 1.
      set_alpha_to_one: whether the last step ends at the data; if not, at the noise of timestep 0,
        as Stable Diffusion's does.
      key: not used, as nothing is random.
      noise: not used.
      clip: limits the data that each step leads to to [-clip, clip], and the noise follows; None
        does not.
      return_trajectory: whether to return the path too.

    Returns:
      (B, ...) float32 samples; with the trajectory also a dict of (evaluations, B, ...) arrays:
      "x", the state after each, and "x0", the data that its step leads to.

    Raises:
      ValueError: bad steps, skip_type or steps_offset.
    """
    del key, noise
    t, end = steps_down(process.num_timesteps, steps, skip_type, steps_offset)
    start, again = t, np.arange(steps) < 0
    if steps > 1:
        first = t[1] + process.num_timesteps // steps if skip_type in SPACINGS else t[0]
        start, end = np.insert(t, 1, first), np.insert(end, 1, t[1])
        t, again = np.insert(t, 1, t[1]), np.arange(steps + 1) == 1
    after = process.alphas_cumprod_at(np.maximum(end, -1 if set_alpha_to_one else 0))
    now = process.alphas_cumprod_at(start)
    scanned = {
        "weights": ADAMS_BASHFORTH[np.minimum(np.arange(len(t)), 4)],
        "signal": np.sqrt(now),
        "spread": np.sqrt(1 - now),
        "of_x0": np.sqrt(after),
        "of_epsilon": np.sqrt(1 - after),
    }
    scanned = {name: jnp.asarray(table, jnp.float32) for name, table in scanned.items()}
    scanned |= {"t": jnp.asarray(t), "start": jnp.asarray(start), "again": jnp.asarray(again)}

    def step(carry, c):
        x, before, history = carry
        prediction = jnp.asarray(predict(x, jnp.full(x.shape[:1], c["t"])), jnp.float32)
        prediction, _ = process.split(prediction)
        known = (prediction, *history)
        terms = (weight * p for weight, p in zip(c["weights"], known, strict=True))
        combined = functools.reduce(jnp.add, terms)
        origin = jnp.where(c["again"], before, x)
        batch_t = jnp.full(x.shape[:1], c["start"])
        x0 = process.to_x0(combined, origin, batch_t)
        epsilon = process.to_epsilon(combined, origin, batch_t)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            epsilon = (origin - c["signal"] * x0) / c["spread"]
        following = c["of_x0"] * x0 + c["of_epsilon"] * epsilon
        history = tuple(
            jnp.where(c["again"], old, new) for old, new in zip(history, known[:3], strict=True)
        )
        return (following, x, history), {"x": following, "x0": x0} if return_trajectory else None

    x_T = jnp.asarray(x_T, jnp.float32)
    nothing = jnp.zeros_like(x_T)
    (sample, *_), path = jax.lax.scan(step, (x_T, nothing, (nothing,) * 3), scanned)
    return (sample, path) if return_trajectory else sample


def dpmpp_2m_sample(
    predict: Predict,
    x_T: jax.Array,
    process: GaussianDiffusion,
    *,
    steps: int,
    skip_type: str = "uniform",
    steps_offset: int = 0,
    key: jax.Array | None = None,
    noise: Noise | None = None,
    clip: float | None = None,
    return_trajectory: bool = False,
):
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), the second order from two evaluations.

    The first and last steps are of first order; the last ends at the data. As diffusers'
    DPMSolverMultistepScheduler with its defaults: midpoint, final_sigmas_type zero.

    Args:
      predict: as of `pndm_sample`.
      x_T: (B, ..., C) standard normal start.
      process: the diffusion process, which also says what is predicted.
      steps: network evaluations.
      skip_type: see `timestep_sequence`, with above_data.
      steps_offset: see `timestep_sequence`.
      key: not used, as nothing is random.
      noise: not used.
      clip: limits predicted data to [-clip, clip]; None does not.
      return_trajectory: whether to return the path too.

    Returns:
      As `pndm_sample`.

    Raises:
      ValueError: bad steps, skip_type or steps_offset, or a timestep would be visited twice.
    """
    del key, noise
    t = timestep_sequence(process.num_timesteps, steps, skip_type, steps_offset, above_data=True)
    t = t[::-1]
    if not np.all(np.diff(t) < 0):
        raise ValueError(f"{steps} steps of skip_type {skip_type!r} visit a timestep twice: fewer")
    now = process.alphas_cumprod_at(t)
    after = np.append(now[1:], 1.0)
    with np.errstate(divide="ignore"):  # no noise, or nothing else, is infinitely far away
        log_ratio, log_ratio_after = (np.log(a / (1 - a)) / 2 for a in (now, after))
        width = log_ratio_after - log_ratio
    of_x0 = -np.sqrt(after) * np.expm1(-width)
    of_change = np.zeros(steps)
    of_change[1:-1] = of_x0[1:-1] / 2 * width[1:-1] / width[:-2]
    scanned = {"of_x": np.sqrt((1 - after) / (1 - now)), "of_x0": of_x0, "of_change": of_change}
    scanned = {name: jnp.asarray(table, jnp.float32) for name, table in scanned.items()}
    scanned["t"] = jnp.asarray(t)

    def step(carry, c):
        x, before = carry
        batch_t = jnp.full(x.shape[:1], c["t"])
        prediction, _ = process.split(jnp.asarray(predict(x, batch_t), jnp.float32))
        x0 = process.to_x0(prediction, x, batch_t)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
        following = c["of_x"] * x + c["of_x0"] * x0 + c["of_change"] * (x0 - before)
        return (following, x0), {"x": following, "x0": x0} if return_trajectory else None

    x_T = jnp.asarray(x_T, jnp.float32)
    (sample, _), path = jax.lax.scan(step, (x_T, jnp.zeros_like(x_T)), scanned)
    return (sample, path) if return_trajectory else sample
