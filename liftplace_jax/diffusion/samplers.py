"""Samplers of the Gaussian process by name; DDIM and ancestral, each one compiled scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.diffusion.multistep import dpmpp_2m_sample, pndm_sample
from liftplace_jax.diffusion.process import Noise, Predict
from liftplace_jax.diffusion.spacing import SPACINGS, steps_down, timestep_sequence
from liftplace_jax.diffusion.tables import reverse_steps
from liftplace_jax.diffusion.variational import interpolate_log_variance

if TYPE_CHECKING:
    from liftplace_jax.diffusion.gaussian import GaussianDiffusion


def ddim_sample(
    predict: Predict,
    x_T: jax.Array,
    process: GaussianDiffusion,
    *,
    steps: int,
    skip_type: str = "uniform",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    eta: float = 0.0,
    key: jax.Array | None = None,
    noise: Noise | None = None,
    clip: float | None = None,
    return_trajectory: bool = False,
):
    """DDIM (Song et al. 2021, equations 12 and 16); a learned variance plays no part in it.

    Args:
      predict: (x_t (B, ..., C), t (B,) int32) -> the network's prediction, of x_t's shape; of 2 C
        channels where the process learns the variance.
      x_T: (B, ..., C) standard normal start.
      process: the diffusion process, which also says what is predicted.
      steps: network evaluations.
      skip_type: see `timestep_sequence`.
      steps_offset: see `timestep_sequence`.
      set_alpha_to_one: whether the last step ends at the data; if not, at the noise of timestep 0,
        as Stable Diffusion's does.
      eta: 0 is deterministic, 1 has the variance of ancestral sampling.
      key: random key, needed if eta > 0 and no noise is given.
      noise: (steps, B, ...) standard normal draws, the first for the noisiest step; or a function
        from the number of the step, 0 for the noisiest, to (B, ...) of them.
      clip: limits predicted data to [-clip, clip], and the noise follows; None does not.
      return_trajectory: whether to return the path too.

    Returns:
      (B, ...) float32 samples; with the trajectory also a dict of (steps, B, ...) arrays in order
      of time spent: "x", the state after each step, and "x0", the data predicted in it.

    Raises:
      ValueError: bad steps, skip_type, eta or noise shape, or no randomness where it is needed.
    """
    t, end = steps_down(process.num_timesteps, steps, skip_type, steps_offset)
    least = -1 if set_alpha_to_one else 0
    now, after = process.alphas_cumprod_at(t), process.alphas_cumprod_at(np.maximum(end, least))
    sigma = eta * np.sqrt((1 - now / after) * (1 - after) / (1 - now))
    direction = 1 - after - sigma**2
    if not (eta >= 0 and direction.min() >= -1e-12):  # NaN neither
        raise ValueError(f"eta {eta} is out of range: its noise must fit into each step's variance")
    update = {
        "of_x0": np.sqrt(after),
        "of_epsilon": np.sqrt(np.maximum(direction, 0)),
        "of_x": np.zeros(steps),
        "sigma": sigma,
    }
    return _scan(update, t, predict, x_T, process, key, noise, clip, return_trajectory)


def ancestral_sample(
    predict: Predict,
    x_T: jax.Array,
    process: GaussianDiffusion,
    *,
    steps: int,
    skip_type: str = "uniform",
    variance: str | None = None,
    key: jax.Array | None = None,
    noise: Noise | None = None,
    clip: float | None = 1.0,
    return_trajectory: bool = False,
):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), also over a part of the timesteps.

    Args:
      predict: (x_t (B, ..., C), t (B,) int32) -> the network's prediction, of x_t's shape; of 2 C
        channels where the process learns the variance.
      x_T: (B, ..., C) standard normal start.
      process: the diffusion process, which also says what is predicted.
      steps: network evaluations.
      skip_type: see `timestep_sequence`; not those of diffusers.
      variance: of each step, "fixedlarge", "fixedsmall" (the posterior's) or, if the process
        learns it, "learned"; default: "learned" if it does, else "fixedlarge".
      key: random key, needed if no noise is given.
      noise: as of `ddim_sample`; the last step, at t = 0, adds none.
      clip: limits predicted data to [-clip, clip]; None does not.
      return_trajectory: whether to return the path too.

    Returns:
      As `ddim_sample`.

    Raises:
      ValueError: bad steps, skip_type, variance or noise shape, or no randomness.
    """
    if skip_type in SPACINGS:
        raise ValueError(f"skip_type {skip_type!r} is not for ancestral sampling")
    t = timestep_sequence(process.num_timesteps, steps, skip_type)
    reverse = reverse_steps(
        process.alphas_cumprod_at(t), process.alphas_cumprod_at(np.append(-1, t[:-1]))
    )
    spreads = {"fixedlarge": np.sqrt(reverse.beta), "fixedsmall": np.sqrt(reverse.variance)}
    learns = process.variance == "learned_range"
    if learns:
        spreads["learned"] = np.ones(steps)
    if variance is None:
        variance = "learned" if learns else "fixedlarge"
    if variance not in spreads:
        raise ValueError(f"unknown variance {variance!r}; known: {sorted(spreads)}")

    update = {
        "of_x0": reverse.of_x0,
        "of_epsilon": np.zeros(steps),
        "of_x": reverse.of_x,
        "sigma": np.where(t == 0, 0.0, spreads[variance]),
    }
    if variance == "learned":
        update["log_least"], update["log_most"] = reverse.log_range
    update = {name: table[::-1] for name, table in update.items()}
    return _scan(update, t[::-1], predict, x_T, process, key, noise, clip, return_trajectory)


SAMPLERS = {
    "ddim": ddim_sample,
    "ancestral": ancestral_sample,
    "pndm": pndm_sample,
    "dpmpp_2m": dpmpp_2m_sample,
}
FIELDS = {
    "ddim": ("skip_type", "eta", "steps_offset", "set_alpha_to_one"),
    "ancestral": ("skip_type",),
    "pndm": ("skip_type", "steps_offset", "set_alpha_to_one"),
    "dpmpp_2m": ("skip_type", "steps_offset"),
}
"""Fields of config.evaluation that each reads, beside sample_steps."""


def get_sampler(name: str) -> Callable:
    """The sampler of a name.

    Raises:
      ValueError: unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {sorted(SAMPLERS)}")
    return SAMPLERS[name]


def _scan(update, t, predict, x_T, process, key, noise, clip, return_trajectory):
    """x <- of_x0 * x0 + of_epsilon * epsilon + of_x * x + sigma * noise, over the timesteps t.

    With bounds log_least and log_most, sigma is a factor of the learned standard deviation.
    """
    noisy = bool(np.any(update["sigma"] > 0))
    if noisy and key is None and noise is None:
        raise ValueError("this sampler is random: give key or noise")
    drawn = noise is not None and not callable(noise)
    if noise is not None and not callable(noise) and noise.shape != (len(t), *x_T.shape):
        raise ValueError(f"noise must have shape {(len(t), *x_T.shape)}, not {noise.shape}")

    def step(x, c):
        batch_t = jnp.full(x.shape[:1], c["t"])
        prediction, spread = process.split(predict(x, batch_t))
        x0 = process.to_x0(prediction, x, batch_t)
        epsilon = process.to_epsilon(prediction, x, batch_t)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            epsilon = (x - c["signal"] * x0) / c["spread"]
        following = c["of_x0"] * x0 + c["of_epsilon"] * epsilon + c["of_x"] * x
        sigma = c["sigma"]
        if "log_most" in c:
            bounds = c["log_least"], c["log_most"]
            sigma = sigma * jnp.exp(0.5 * interpolate_log_variance(spread, *bounds))
        if noisy and drawn:
            following += sigma * c["noise"]
        elif noisy and noise is not None:
            following += sigma * noise(c["index"])
        elif noisy and key is not None:
            step_key = jax.random.fold_in(key, c["index"])
            following += sigma * jax.random.normal(step_key, x.shape)
        return following, {"x": following, "x0": x0} if return_trajectory else None

    alpha = process.alphas_cumprod_at(t)
    floats = update | {"signal": np.sqrt(alpha), "spread": np.sqrt(1 - alpha)}
    scanned = {name: jnp.asarray(value, jnp.float32) for name, value in floats.items()}
    scanned |= {"t": jnp.asarray(t), "index": jnp.arange(len(t))}
    if drawn:
        scanned["noise"] = jnp.asarray(noise, jnp.float32)
    sample, trajectory = jax.lax.scan(step, jnp.asarray(x_T, jnp.float32), scanned)
    return (sample, trajectory) if return_trajectory else sample
