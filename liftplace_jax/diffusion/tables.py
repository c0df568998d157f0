"""Tables of the Gaussian process: variances over the timesteps, and what follows from them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def _cosine(num_timesteps: int) -> np.ndarray:
    steps = np.arange(num_timesteps + 1) / num_timesteps
    alphas_cumprod = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


def _quad(num_timesteps: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, num_timesteps) ** 2


_SCHEDULES = {
    "linear": lambda n, start, end: np.linspace(start, end, n),
    "quad": _quad,
    "scaled_linear": _quad,
    "const": lambda n, start, end: np.full(n, end),
    "jsd": lambda n, start, end: 1 / np.linspace(n, 1, n),
    "sigmoid": lambda n, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, n))),
    "cosine": lambda n, start, end: _cosine(n),
}


def beta_schedule(
    name: str, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """Variances of the noise added at each timestep.

    The first five are those of "Diff_Pruning runners/diffusion.py", cosine is Nichol & Dhariwal
    (2021), equation 17, at most 0.999. "scaled_linear", of Stable Diffusion with betas from 0.00085
    to 0.012, is diffusers' name of "quad".

    Args:
      name: "linear", "quad", "const", "jsd", "sigmoid", "cosine" or "scaled_linear".
      num_timesteps: T.
      beta_start: beta at t = 0 (not used by const, jsd and cosine).
      beta_end: beta at t = T - 1 (not used by jsd and cosine).

    Returns:
      (T,) float64.

    Raises:
      ValueError: unknown name, T below 1, or not 0 < beta_start <= beta_end <= 1.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown beta schedule {name!r}; known: {sorted(_SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, not {num_timesteps}")
    if not 0 < beta_start <= beta_end <= 1:
        raise ValueError(f"need 0 < beta_start <= beta_end <= 1, not {beta_start}, {beta_end}")
    return _SCHEDULES[name](num_timesteps, beta_start, beta_end)


class ReverseSteps(NamedTuple):
    """q(x_after | x_now, x_0) = N(of_x0 x_0 + of_x x_now, variance) of several steps.

    Attributes:
      of_x0: (steps,) float64, as all of them (Ho et al. 2020, equation 7).
      of_x: (steps,).
      variance: (steps,), 0 where the step ends at the data.
      beta: (steps,), 1 - a_now / a_after, the variance's upper bound.
    """

    of_x0: np.ndarray
    of_x: np.ndarray
    variance: np.ndarray
    beta: np.ndarray

    @property
    def log_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of a learned log variance: the posterior's and log beta (Nichol & Dhariwal 2021).

        The first step, whose posterior has no variance, takes the second one's, as in
        "TinyFusion_EXP/diffusion/gaussian_diffusion.py"; a single step takes its beta.
        """
        first = self.variance[1:2] if len(self.variance) > 1 else self.beta
        lower = np.append(first, self.variance[1:])
        return np.log(np.maximum(lower, 1e-20)), np.log(np.maximum(self.beta, 1e-20))


def reverse_steps(now: np.ndarray, after: np.ndarray) -> ReverseSteps:
    """The reverse steps between noise levels.

    Args:
      now: (steps,) float64 a_t where each step starts, in ascending order of t.
      after: (steps,) where it ends; 1 is the data.
    """
    beta = 1 - now / after
    rest = (1 - after) / (1 - now)
    return ReverseSteps(
        np.sqrt(after) * beta / (1 - now), np.sqrt(1 - beta) * rest, beta * rest, beta
    )


def take(table: np.ndarray, t: jax.Array, x: jax.Array) -> jax.Array:
    """A (T,) table at the timesteps t, (B,): float32, broadcastable to x, (B, ...).

    Raises:
      ValueError: t is not one per sample.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape {x.shape[:1]}, one per sample, not {t.shape}")
    return jnp.asarray(table, jnp.float32)[t].reshape((-1,) + (1,) * (x.ndim - 1))
