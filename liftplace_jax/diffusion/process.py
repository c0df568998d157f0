"""The contract of processes: between data and noise, and back.

A new process is one file beside this one, and one line in `diffusion.PROCESSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

Predict = Callable[[jax.Array, jax.Array], jax.Array]
Noise = jax.Array | Callable[[jax.Array], jax.Array]


class Process(Protocol):
    """What training, sampling and judging know of a process; hashable, a constant under jit.

    Data x0, noise and noised data x_t are (B, ..., C); t is (B,), of the process' own kind
    (integer timesteps, or numbers from 0 to T), which networks take as it is.

    Attributes:
      kind: its name, config.process.kind.
      fields: those of config.process that it reads.
      samplers: names of its samplers, the first is the usual one, with the fields of
        config.evaluation that each reads, beside sample_steps.
      outputs: channels that the network predicts for each channel of the data.
    """

    kind: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    samplers: ClassVar[Mapping[str, tuple[str, ...]]]

    @classmethod
    def from_config(cls, fields: Any) -> Self:
        """The process of config.process.

        Raises:
          ValueError: a field is out of its range.
        """
        ...

    @property
    def outputs(self) -> int: ...

    def draw_t(self, key: jax.Array, batch: int) -> jax.Array:
        """(batch,): the t of a training batch."""
        ...

    def at(self, level: jax.Array | float) -> jax.Array:
        """t at levels in [0, 1), from the data to the noise: for scoring, reports, importances."""
        ...

    def sweep(self) -> np.ndarray:
        """(N,) t from the data to the noise, evenly, for what looks at all of them."""
        ...

    def add_noise(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t."""
        ...

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should predict at x_t; of x0's shape."""
        ...

    def weight(self, t: jax.Array) -> jax.Array | None:
        """(B,) factor of each example's loss on data; None: 1."""
        ...

    def split(self, prediction: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """A network's output as (what compares with `target`, the rest or None)."""
        ...

    def to_x0(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The data that a prediction (the first part of `split`) amounts to."""
        ...

    def bound(
        self,
        prediction: jax.Array,
        x0: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        teacher: jax.Array | None = None,
    ) -> jax.Array | None:
        """(B,) loss of the rest of `split`, from data or from a teacher; None: there is none."""
        ...

    def sampling(self, fields: Any) -> dict[str, Any]:
        """What else there is to say of a sampler: its evaluations of the network, and more.

        Args:
          fields: config.evaluation.

        Returns:
          {"evaluations": for a sample, guidance not counted, ...}, plain JSON types.

        Raises:
          ValueError: a field does not fit.
        """
        ...

    def sampler(self, fields: Any, clip: float | None = None) -> Callable[..., jax.Array]:
        """(predict, x_T, noise=) -> samples, one compiled scan.

        `predict` is (x_t, t) -> prediction; `noise` a function from the number of a step to
        (B, ...) standard normal draws, called by samplers that are random.

        Args:
          fields: config.evaluation.
          clip: limits predicted data to [-clip, clip] at each step; infinite: nothing does; None:
            the sampler's default.

        Raises:
          ValueError: a field does not fit (some when the sampler is called).
        """
        ...

    def scheduler(self, fields: Any) -> dict[str, Any]:
        """The scheduler_config.json of diffusers' scheduler that samples as `sampler` does.

        Args:
          fields: config.evaluation; the number of steps is no part of it.

        Raises:
          ValueError: diffusers has no such sampler; names the field.
        """
        ...

    def misfits(self, scheduler: Mapping[str, Any]) -> list[str]:
        """What keeps a network that was made for a scheduler of diffusers from being of this
        process: a line for each of its fields that says something else, such as the prediction.

        Args:
          scheduler: the content of its scheduler_config.json; absent fields have its defaults.
        """
        ...


def count_evaluations(sample: Callable[..., Any], outputs: int = 1) -> int:
    """How often a sampler calls its network: the length of the path that it would go.

    Args:
      sample: as of `Process.sampler`, with an option return_trajectory.
      outputs: of the process.
    """
    _, path = jax.eval_shape(
        lambda x: sample(
            lambda x, t: jnp.tile(x, outputs), x, noise=lambda step: 0.0, return_trajectory=True
        ),
        jax.ShapeDtypeStruct((1, 1), jnp.float32),
    )
    return len(path["x"])


def mirrored(values: jax.Array, batch: int, end: Any) -> jax.Array:
    """(batch,) values: those drawn, batch // 2 + 1, then `end` minus each, the surplus cut."""
    half = batch // 2 + 1
    # Looked up, not joined: devices that share the batch would have to send their part of them.
    index = jnp.arange(batch)
    return jnp.where(index < half, values[index % half], end - values[index % half])


def check_same_shape(name: str, value: jax.Array, other_name: str, other: jax.Array) -> None:
    """Raises a ValueError that names both if the shapes of two arrays differ."""
    if value.shape != other.shape:
        raise ValueError(f"{name} has shape {value.shape}, {other_name} {other.shape}")
