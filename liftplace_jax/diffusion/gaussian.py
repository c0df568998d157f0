"""The Gaussian diffusion process: noising, and what a network may predict."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.diffusion import samplers, schedulers, variational
from liftplace_jax.diffusion.process import check_same_shape, count_evaluations, mirrored
from liftplace_jax.diffusion.tables import ReverseSteps, beta_schedule, reverse_steps, take

PREDICTIONS = ("epsilon", "v", "x0")
VARIANCES = ("fixed", "learned_range")
TIMESTEPS = ("antithetic", "uniform")


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I), a_t = prod_{s <= t} (1 - beta_s).

    A `Process`. Hashable: a constant of jitted functions. Tables are float64, used as float32.
    Timesteps are integers in 0..T-1; a traced one outside is not noticed.

    Attributes:
      betas: T variances in (0, 1]; any sequence, kept as a tuple.
      prediction: what the network predicts: "epsilon" (the noise), "v" = sqrt(a_t) noise -
        sqrt(1 - a_t) x_0 (Salimans & Ho 2022), or "x0".
      variance: of a reverse step: "fixed", or "learned_range": the network has twice the channels
        of the data, the second half says where between its bounds each log variance lies (`split`,
        `diffusion.variational`).
      timesteps: how training draws them: "antithetic" (published for pixels) or "uniform" (for
        DiT).

    Raises:
      ValueError: betas is empty or out of range, or prediction, variance or timesteps unknown.
    """

    betas: Sequence[float] | np.ndarray
    prediction: str = "epsilon"
    variance: str = "fixed"
    timesteps: str = "antithetic"

    kind: ClassVar[str] = "gaussian"
    fields: ClassVar[tuple[str, ...]] = (
        "schedule", "num_timesteps", "beta_start", "beta_end", "prediction", "variance", "timesteps"
    )  # fmt: skip
    samplers: ClassVar[Mapping[str, tuple[str, ...]]] = samplers.FIELDS

    @classmethod
    def from_config(cls, fields: Any) -> GaussianDiffusion:
        """The process of config.process: schedule, num_timesteps, beta_start, beta_end,
        prediction, variance, timesteps.

        Raises:
          ValueError: a field is out of its range.
        """
        betas = beta_schedule(
            fields.schedule, fields.num_timesteps, fields.beta_start, fields.beta_end
        )
        return cls(betas, fields.prediction, fields.variance, fields.timesteps)

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if not self.betas or not all(0 < beta <= 1 for beta in self.betas):
            raise ValueError("betas must be a non-empty sequence of numbers in (0, 1]")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; known: {PREDICTIONS}")
        if self.variance not in VARIANCES:
            raise ValueError(f"unknown variance {self.variance!r}; known: {VARIANCES}")
        if self.timesteps not in TIMESTEPS:
            raise ValueError(f"unknown timesteps {self.timesteps!r}; known: {TIMESTEPS}")

    @property
    def outputs(self) -> int:
        """Channels that the network predicts for each channel of the data."""
        return 2 if self.variance == "learned_range" else 1

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
        mean, spread = jnp.split(prediction, 2, axis=-1)
        return mean, spread

    def _signal_and_noise(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sqrt(a_t) and sqrt(1 - a_t), float32, broadcastable to x."""
        a = self.alphas_cumprod
        return take(np.sqrt(a), t, x), take(np.sqrt(1 - a), t, x)

    def add_noise(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
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
        check_same_shape("noise", noise, "x0", x0)
        signal, sigma = self._signal_and_noise(x0, t)
        return signal * x0 + sigma * noise

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should predict for `add_noise(x0, t, noise)`; of x0's shape."""
        check_same_shape("noise", noise, "x0", x0)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        signal, sigma = self._signal_and_noise(x0, t)
        return signal * noise - sigma * x0

    def to_x0(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The clean data that a prediction at x_t, (B, ...), and t, (B,), amounts to."""
        check_same_shape("prediction", prediction, "x_t", x_t)
        if self.prediction == "x0":
            return prediction
        signal, sigma = self._signal_and_noise(x_t, t)
        if self.prediction == "v":
            return signal * x_t - sigma * prediction
        return (x_t - sigma * prediction) / signal

    def to_epsilon(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The noise that a prediction at x_t, (B, ...), and t, (B,), amounts to."""
        check_same_shape("prediction", prediction, "x_t", x_t)
        if self.prediction == "epsilon":
            return prediction
        signal, sigma = self._signal_and_noise(x_t, t)
        if self.prediction == "v":
            return sigma * x_t + signal * prediction
        return (x_t - signal * prediction) / sigma

    def draw_t(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,) int32: the timesteps of a training batch."""
        draw = {"antithetic": self.antithetic_timesteps, "uniform": self.uniform_timesteps}
        return draw[self.timesteps](key, batch)

    def at(self, level: jax.Array | float) -> jax.Array:
        """int32 timesteps at levels in [0, 1), from the data to the noise: floor(level * T)."""
        return jnp.floor(jnp.asarray(level) * self.num_timesteps).astype(jnp.int32)

    def sweep(self) -> np.ndarray:
        """All timesteps, from the data to the noise, for what looks at each of them."""
        return np.arange(self.num_timesteps, dtype=np.int32)

    def weight(self, t: jax.Array) -> None:
        """Factor of each example's loss on data; None: 1."""
        del t

    def bound(
        self,
        prediction: jax.Array,
        x0: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        teacher: jax.Array | None = None,
    ) -> jax.Array | None:
        """What trains a learned variance: (B,) bits per dimension; None where it is fixed.

        Args:
          prediction: (B, ..., outputs * C), whole, as a network gives it.
          x0: (B, ..., C) data.
          x_t: `add_noise` of it.
          t: (B,) timesteps.
          teacher: a teacher's whole prediction, which then takes the place of the data.
        """
        if self.variance == "fixed":
            return None
        if teacher is None:
            return variational.vb_loss(self, prediction, x0, x_t, t)
        return variational.vb_kd_loss(self, prediction, teacher, x0, x_t, t)

    def sampling(self, fields: Any) -> dict[str, Any]:
        """As of `Process.sampling`."""
        return {"evaluations": count_evaluations(self.sampler(fields), self.outputs)}

    def sampler(self, fields: Any, clip: float | None = None) -> Callable[..., jax.Array]:
        """A sampler, as of `Process.sampler`; fields: sampler, sample_steps and those of
        `samplers`; one that is missing has the sampler's default."""
        sample = samplers.get_sampler(fields.sampler)
        options = {name: fields[name] for name in self.samplers[fields.sampler] if name in fields}
        if clip is not None:
            options["clip"] = clip if np.isfinite(clip) else None
        return functools.partial(sample, process=self, steps=fields.sample_steps, **options)

    def scheduler(self, fields: Any) -> dict[str, Any]:
        """As of `Process.scheduler`."""
        return schedulers.gaussian_scheduler(self, fields)

    def misfits(self, scheduler: Mapping[str, Any]) -> list[str]:
        """As of `Process.misfits`."""
        return schedulers.gaussian_misfits(self, scheduler)

    def antithetic_timesteps(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,) int32 uniform timesteps; the second half mirrors the first, T - 1 - t.

        As in "Diff_Pruning runners/diffusion.py": batch // 2 + 1 are drawn, the mirrored ones
        follow, the surplus is cut.
        """
        t = jax.random.randint(key, (batch // 2 + 1,), 0, self.num_timesteps)
        return mirrored(t, batch, self.num_timesteps - 1)

    def uniform_timesteps(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,) int32 independent uniform timesteps."""
        return jax.random.randint(key, (batch,), 0, self.num_timesteps)
