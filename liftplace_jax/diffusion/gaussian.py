"""The Gaussian diffusion process: noise schedules, noising, and what a network may predict."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PREDICTIONS = ("epsilon", "v", "x0")
VARIANCES = ("fixed", "learned_range")
TIMESTEPS = ("antithetic", "uniform")


def _cosine(num_timesteps: int) -> np.ndarray:
    steps = np.arange(num_timesteps + 1) / num_timesteps
    alphas_cumprod = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


_SCHEDULES = {
    "linear": lambda n, start, end: np.linspace(start, end, n),
    "quad": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,
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
    (2021), equation 17, at most 0.999.

    Args:
      name: "linear", "quad", "const", "jsd", "sigmoid" or "cosine".
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
        return tuple(np.log(np.maximum(bound, 1e-20)) for bound in (lower, self.beta))


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


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I), a_t = prod_{s <= t} (1 - beta_s).

    Hashable: a constant of jitted functions. Tables are float64, used as float32. Timesteps are
    integers in 0..T-1; a traced one outside is not noticed.

    Attributes:
      betas: T variances in (0, 1]; any sequence, kept as a tuple.
      prediction: what the network predicts: "epsilon" (the noise), "v" = sqrt(a_t) noise -
        sqrt(1 - a_t) x_0 (Salimans & Ho 2022), or "x0".
      variance: of a reverse step: "fixed", or "learned_range": the network has twice the channels
        of the data, the second half says where between its bounds each log variance lies (`split`,
        `diffusion.variational`).

    Raises:
      ValueError: betas is empty or out of range, or prediction or variance unknown.
    """

    betas: tuple[float, ...]
    prediction: str = "epsilon"
    variance: str = "fixed"

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if not self.betas or not all(0 < beta <= 1 for beta in self.betas):
            raise ValueError("betas must be a non-empty sequence of numbers in (0, 1]")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; known: {PREDICTIONS}")
        if self.variance not in VARIANCES:
            raise ValueError(f"unknown variance {self.variance!r}; known: {VARIANCES}")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64: a_t."""
        return np.cumprod(1 - np.array(self.betas))

    def alphas_cumprod_at(self, t: np.ndarray) -> np.ndarray:
        """float64 a_t at concrete timesteps, -1 being the data itself: 1."""
        return np.append(1.0, self.alphas_cumprod)[np.asarray(t) + 1]

    @functools.cached_property
    def reverse(self) -> ReverseSteps:
        """From every timestep t to t - 1; tables of shape (T,)."""
        t = np.arange(self.num_timesteps)
        return reverse_steps(self.alphas_cumprod_at(t), self.alphas_cumprod_at(t - 1))

    def log_variance(self, kind: str) -> np.ndarray:
        """(T,) float64 log variance of x_{t-1} given x_t.

        Args:
          kind: "fixedlarge", log beta_t, or "fixedsmall", that of the posterior q(x_{t-1} | x_t,
            x_0), at least log 1e-20 (it is 0 at t = 0).

        Raises:
          ValueError: unknown kind.
        """
        if kind == "fixedlarge":
            return np.log(self.reverse.beta)
        if kind == "fixedsmall":
            return np.log(np.maximum(self.reverse.variance, 1e-20))
        raise ValueError(f"unknown variance {kind!r}; known: ('fixedlarge', 'fixedsmall')")

    def split(self, prediction: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """A network's output as (what it predicts, what it says of the variance).

        Args:
          prediction: (B, ..., C), or (B, ..., 2 C) where the variance is learned.

        Returns:
          Two arrays (B, ..., C); the second is None where the variance is fixed.

        Raises:
          ValueError: an odd number of channels has no halves.
        """
        if self.variance == "fixed":
            return prediction, None
        if prediction.shape[-1] % 2:
            raise ValueError(
                f"a network with learned variance has twice the data's channels, its prediction "
                f"has shape {prediction.shape}"
            )
        return tuple(jnp.split(prediction, 2, axis=-1))

    def _signal_and_noise(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sqrt(a_t) and sqrt(1 - a_t), float32, broadcastable to x."""
        a = self.alphas_cumprod
        return take(np.sqrt(a), t, x), take(np.sqrt(1 - a), t, x)

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Noises clean data to timestep t.

        Args:
          x0: (B, ...) data.
          t: (B,) integer timesteps.
          noise: standard normal, of x0's shape.

        Returns:
          x_t, of x0's shape.

        Raises:
          ValueError: shapes differ.
        """
        _check_same_shape("noise", noise, "x0", x0)
        signal, sigma = self._signal_and_noise(x0, t)
        return signal * x0 + sigma * noise

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should predict for `q_sample(x0, t, noise)`; of x0's shape."""
        _check_same_shape("noise", noise, "x0", x0)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        signal, sigma = self._signal_and_noise(x0, t)
        return signal * noise - sigma * x0

    def to_x0(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The clean data that a prediction at x_t, (B, ...), and t, (B,), amounts to."""
        _check_same_shape("prediction", prediction, "x_t", x_t)
        if self.prediction == "x0":
            return prediction
        signal, sigma = self._signal_and_noise(x_t, t)
        if self.prediction == "v":
            return signal * x_t - sigma * prediction
        return (x_t - sigma * prediction) / signal

    def to_epsilon(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The noise that a prediction at x_t, (B, ...), and t, (B,), amounts to."""
        _check_same_shape("prediction", prediction, "x_t", x_t)
        if self.prediction == "epsilon":
            return prediction
        signal, sigma = self._signal_and_noise(x_t, t)
        if self.prediction == "v":
            return sigma * x_t + signal * prediction
        return (x_t - signal * prediction) / sigma

    def antithetic_timesteps(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,) int32 uniform timesteps; the second half mirrors the first, T - 1 - t.

        As in "Diff_Pruning runners/diffusion.py": batch // 2 + 1 are drawn, the mirrored ones
        follow, the surplus is cut.
        """
        half = batch // 2 + 1
        t = jax.random.randint(key, (half,), 0, self.num_timesteps)
        # Looked up, not joined: devices that share the batch would have to send their part of t.
        index = jnp.arange(batch)
        return jnp.where(index < half, t[index % half], self.num_timesteps - 1 - t[index % half])

    def uniform_timesteps(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,) int32 independent uniform timesteps."""
        return jax.random.randint(key, (batch,), 0, self.num_timesteps)


def take(table: np.ndarray, t: jax.Array, x: jax.Array) -> jax.Array:
    """A (T,) table at the timesteps t, (B,): float32, broadcastable to x, (B, ...).

    Raises:
      ValueError: t is not one per sample.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape {x.shape[:1]}, one per sample, not {t.shape}")
    return jnp.asarray(table, jnp.float32)[t].reshape((-1,) + (1,) * (x.ndim - 1))


def _check_same_shape(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} has shape {value.shape}, {other_name} {other.shape}")
