"""The Gaussian diffusion process: noise schedules, noising, and what a network may predict."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

PREDICTIONS = ("epsilon", "v", "x0")


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


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I), a_t = prod_{s <= t} (1 - beta_s).

    Hashable: a constant of jitted functions. Tables are float64, used as float32. Timesteps are
    integers in 0..T-1; a traced one outside is not noticed.

    Attributes:
      betas: T variances in (0, 1]; any sequence, kept as a tuple.
      prediction: what the network predicts: "epsilon" (the noise), "v" = sqrt(a_t) noise -
        sqrt(1 - a_t) x_0 (Salimans & Ho 2022), or "x0".

    Raises:
      ValueError: betas is empty or out of range, or prediction unknown.
    """

    betas: tuple[float, ...]
    prediction: str = "epsilon"

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if not self.betas or not all(0 < beta <= 1 for beta in self.betas):
            raise ValueError("betas must be a non-empty sequence of numbers in (0, 1]")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; known: {PREDICTIONS}")

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

    def log_variance(self, kind: str) -> np.ndarray:
        """(T,) float64 log variance of x_{t-1} given x_t.

        Args:
          kind: "fixedlarge", log beta_t, or "fixedsmall", that of the posterior q(x_{t-1} | x_t,
            x_0), at least log 1e-20 (it is 0 at t = 0).

        Raises:
          ValueError: unknown kind.
        """
        betas = np.array(self.betas)
        if kind == "fixedlarge":
            return np.log(betas)
        if kind == "fixedsmall":
            previous = np.append(1.0, self.alphas_cumprod[:-1])
            posterior = betas * (1 - previous) / (1 - self.alphas_cumprod)
            return np.log(np.maximum(posterior, 1e-20))
        raise ValueError(f"unknown variance {kind!r}; known: ('fixedlarge', 'fixedsmall')")

    def _signal_and_noise(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sqrt(a_t) and sqrt(1 - a_t), float32, broadcastable to x."""
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape {x.shape[:1]}, one per sample, not {t.shape}")
        shape = (-1,) + (1,) * (x.ndim - 1)
        signal = jnp.asarray(np.sqrt(self.alphas_cumprod), jnp.float32)
        noise = jnp.asarray(np.sqrt(1 - self.alphas_cumprod), jnp.float32)
        return signal[t].reshape(shape), noise[t].reshape(shape)

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
        t = jax.random.randint(key, (batch // 2 + 1,), 0, self.num_timesteps)
        return jnp.concatenate([t, self.num_timesteps - 1 - t])[:batch]


def _check_same_shape(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} has shape {value.shape}, {other_name} {other.shape}")
