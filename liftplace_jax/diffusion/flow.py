"""Rectified flow: a straight path between data and noise, and its samplers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.diffusion import schedulers
from liftplace_jax.diffusion.process import (
    Noise,
    Predict,
    check_same_shape,
    count_evaluations,
    mirrored,
)

TIMESTEPS = ("antithetic", "uniform", "logit_normal", "mode", "cosmap")
SKIP_TYPES = ("uniform", "diffusers")
SAMPLERS = ("euler", "heun")
_OF_TIMESTEPS = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}


@dataclasses.dataclass(frozen=True)
class Flow:
    """x_s = (1 - s) x_0 + s noise; the network predicts the velocity noise - x_0.

    A `Process`. A timestep is t = s T, any number in [0, T], as Stable Diffusion 3's networks take
    it: the factor T is here, and networks embed what they get.

    Attributes:
      num_timesteps: T.
      timesteps: how training draws s, before the shift: "uniform"; "antithetic", uniform in
        mirrored pairs; "logit_normal"; "mode"; "cosmap", uniform with a weight (`weight`) (Esser et
        al. 2024, section 3.1).
      shift: towards the noise, s <- shift s / (1 + (shift - 1) s), in training and sampling; 1: as
        drawn.
      logit_mean: of log(s / (1 - s)) with "logit_normal". Above 0 there is more noise; in the
        training script of diffusers, which counts from the other end, less.
      logit_std: its standard deviation.
      mode_scale: of "mode", in [-1, 2 / (pi - 2)]; above 0 the middle is drawn more often.

    Raises:
      ValueError: a field is out of its range, or is for another way to draw timesteps.
    """

    num_timesteps: int = 1000
    timesteps: str = "uniform"
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    kind: ClassVar[str] = "flow"
    fields: ClassVar[tuple[str, ...]] = (
        "num_timesteps", "timesteps", "shift", "logit_mean", "logit_std", "mode_scale"
    )  # fmt: skip
    samplers: ClassVar[Mapping[str, tuple[str, ...]]] = {name: ("skip_type",) for name in SAMPLERS}

    @property
    def outputs(self) -> int:
        """See `Process.outputs`."""
        return 1

    @classmethod
    def from_config(cls, fields: Any) -> Flow:
        """The process of config.process, by the names of the attributes.

        Raises:
          ValueError: as the class.
        """
        return cls(**{name: fields[name] for name in cls.fields})

    def __post_init__(self):
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, not {self.num_timesteps}")
        if self.timesteps not in TIMESTEPS:
            raise ValueError(f"unknown timesteps {self.timesteps!r}; known: {TIMESTEPS}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a number above 0, not {self.shift}")
        if not (math.isfinite(self.logit_mean) and 0 < self.logit_std < math.inf):
            raise ValueError(
                f"logit_mean must be a number and logit_std one above 0, not {self.logit_mean}, "
                f"{self.logit_std}"
            )
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"mode_scale must be in [-1, 2 / (pi - 2)], not {self.mode_scale}")
        for name, timesteps in _OF_TIMESTEPS.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and self.timesteps != timesteps:
                raise ValueError(
                    f"{name} is for timesteps {timesteps!r}, not {self.timesteps!r}: leave it at "
                    f"{default}"
                )

    def shifted(self, s: Any) -> Any:
        """shift s / (1 + (shift - 1) s), of levels s in [0, 1], arrays or numbers."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def draw_t(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,) float32 in [0, T]: the timesteps of a training batch."""
        return self.num_timesteps * self.shifted(self._draw(key, batch))

    def _draw(self, key, batch):
        if self.timesteps == "logit_normal":
            normal = jax.random.normal(key, (batch,))
            return jax.nn.sigmoid(self.logit_mean + self.logit_std * normal)
        if self.timesteps == "antithetic":
            return mirrored(jax.random.uniform(key, (batch // 2 + 1,)), batch, 1.0)
        u = jax.random.uniform(key, (batch,))
        if self.timesteps == "mode":
            s = 1 - u - self.mode_scale * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)
            return jnp.clip(s, 0.0, 1.0)  # of rounding
        return u

    def at(self, level: jax.Array | float) -> jax.Array:
        """float32 timesteps at levels in [0, 1), from the data to the noise: level * T."""
        return jnp.asarray(level, jnp.float32) * self.num_timesteps

    def sweep(self) -> np.ndarray:
        """(T,) float32 from the data to the noise: 0.5, 1.5, ..., T - 0.5."""
        return np.arange(self.num_timesteps, dtype=np.float32) + np.float32(0.5)

    def add_noise(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_s at s = t / T.

        Args:
          x0: (B, ...) data.
          t: (B,) timesteps in [0, T].
          noise: standard normal, of x0's shape.

        Raises:
          ValueError: shapes differ.
        """
        check_same_shape("noise", noise, "x0", x0)
        s = self._level(t, x0)
        return (1 - s) * x0 + s * noise

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The velocity noise - x0, the same at all t; of x0's shape."""
        del t
        check_same_shape("noise", noise, "x0", x0)
        return noise - x0

    def weight(self, t: jax.Array) -> jax.Array | None:
        """(B,) factor of each example's loss on data: 2 / (pi (1 - 2s + 2s^2)) with "cosmap".

        It makes of uniform s in expectation what drawing from that density would. None: 1.
        """
        if self.timesteps != "cosmap":
            return None
        s = t / self.num_timesteps
        return 2 / (math.pi * (1 - 2 * s + 2 * s**2))

    def split(self, prediction: jax.Array) -> tuple[jax.Array, None]:
        """(a network's output, nothing else)."""
        return prediction, None

    def to_x0(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The clean data that a velocity at x_t, (B, ...), and t, (B,), amounts to."""
        check_same_shape("prediction", prediction, "x_t", x_t)
        return x_t - self._level(t, x_t) * prediction

    def bound(
        self,
        prediction: jax.Array,
        x0: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        teacher: jax.Array | None = None,
    ) -> None:
        """None: there is no variance to learn."""
        del prediction, x0, x_t, t, teacher

    def sampling(self, fields: Any) -> dict[str, Any]:
        """As of `Process.sampling`."""
        return {"evaluations": count_evaluations(self.sampler(fields)), "shift": self.shift}

    def sampler(self, fields: Any, clip: float | None = None) -> Callable[..., jax.Array]:
        """A sampler, as of `Process.sampler`; fields: sampler, sample_steps, skip_type."""
        sample: Any = functools.partial(
            flow_sample,
            process=self,
            steps=fields.sample_steps,
            skip_type=fields.skip_type,
            method=_known(fields.sampler),
            clip=None if clip is None or not np.isfinite(clip) else clip,
        )
        return sample

    def scheduler(self, fields: Any) -> dict[str, Any]:
        """As of `Process.scheduler`."""
        return schedulers.flow_scheduler(self, fields)

    def misfits(self, scheduler: Mapping[str, Any]) -> list[str]:
        """As of `Process.misfits`."""
        return schedulers.flow_misfits(self, scheduler)

    def levels(self, steps: int, skip_type: str = "uniform") -> np.ndarray:
        """Where the steps of a sampler start, and where the last one ends.

        Args:
          steps: how many.
          skip_type: "uniform", equally far apart from 1 to 0, then shifted; or "diffusers", as its
            flow-match schedulers have it: equally far apart from 1 to the shifted 1 / T, then
            shifted (the low end a second time), then 0.

        Returns:
          (steps + 1,) float64, descending from 1 to 0.

        Raises:
          ValueError: unknown skip_type, or steps not in 1..T.
        """
        if skip_type not in SKIP_TYPES:
            raise ValueError(f"unknown skip_type {skip_type!r}; known: {SKIP_TYPES}")
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(
                f"steps must be in 1..{self.num_timesteps} (num_timesteps), not {steps}"
            )
        if skip_type == "uniform":
            return self.shifted(np.linspace(1, 0, steps + 1))
        least = self.shifted(1 / self.num_timesteps)
        return np.append(self.shifted(np.linspace(1, least, steps)), 0.0)

    def _level(self, t, x):
        """s, float32, broadcastable to x."""
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape {x.shape[:1]}, one per sample, not {t.shape}")
        s = jnp.asarray(t, jnp.float32) / self.num_timesteps
        return s.reshape((-1,) + (1,) * (x.ndim - 1))


def flow_sample(
    predict: Predict,
    x_T: jax.Array,
    process: Flow,
    *,
    steps: int,
    skip_type: str = "uniform",
    method: str = "euler",
    key: jax.Array | None = None,
    noise: Noise | None = None,
    clip: float | None = None,
    return_trajectory: bool = False,
):
    """Integrates dx = velocity ds from the noise, s = 1, to the data, s = 0; one compiled scan.

    Args:
      predict: (x_t (B, ..., C), t (B,) float32) -> the velocity, of x_t's shape.
      x_T: (B, ..., C) standard normal start.
      process: the flow.
      steps: steps in s.
      skip_type: see `Flow.levels`.
      method: "euler", one evaluation a step; or "heun", which takes the mean of the velocities at
        both ends of each step but the last: 2 steps - 1 evaluations.
      key: not used, as nothing is random.
      noise: not used.
      clip: limits the data that each velocity amounts to to [-clip, clip], and the velocity
        follows; None does not.
      return_trajectory: whether to return the path too.

    Returns:
      (B, ...) float32 samples; with the trajectory also a dict of (evaluations, B, ...) arrays:
      "x", the state after each, and "x0", the data predicted in it.

    Raises:
      ValueError: bad steps, skip_type or method.
    """
    del key, noise
    levels = process.levels(steps, skip_type)
    start, width, second = levels[:-1], np.diff(levels), np.zeros(steps, bool)
    if _known(method) == "heun":
        # After each step but the last: evaluated where it ended, and taken anew.
        start = np.append(levels[0], np.repeat(levels[1:-1], 2))
        width = np.append(np.repeat(width[:-1], 2), width[-1])
        second = np.arange(2 * steps - 1) % 2 == 1
    scanned = {"s": jnp.asarray(start, jnp.float32), "width": jnp.asarray(width, jnp.float32)}
    scanned["second"] = jnp.asarray(second)

    def step(carry, c):
        x, before, slope = carry
        batch_t = jnp.full(x.shape[:1], c["s"] * process.num_timesteps)
        velocity = jnp.asarray(predict(x, batch_t), jnp.float32)
        x0 = x - c["s"] * velocity
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            velocity = (x - x0) / c["s"]
        following = jnp.where(
            c["second"], before + c["width"] * (slope + velocity) / 2, x + c["width"] * velocity
        )
        return (following, x, velocity), {"x": following, "x0": x0} if return_trajectory else None

    x_T = jnp.asarray(x_T, jnp.float32)
    nothing = jnp.zeros_like(x_T)
    (sample, *_), path = jax.lax.scan(step, (x_T, nothing, nothing), scanned)
    return (sample, path) if return_trajectory else sample


def _known(sampler: str) -> str:
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {sorted(SAMPLERS)}")
    return sampler
