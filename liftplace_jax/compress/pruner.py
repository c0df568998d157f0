"""The contract of pruners: how students are made out of teachers.

A pruner knows its own fields of config.compress and nothing of experiments: what it needs of data,
devices and training comes as `Tools`. A new pruner is one class, and one line in its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax.host.ranges import Range

Tensors = Mapping[str, np.ndarray]


class TeacherNetwork(Protocol):
    """What a pruner sees of a teacher: `nn.network.Network`."""

    @property
    def config(self) -> Any: ...

    @property
    def graphdef(self) -> nnx.GraphDef: ...

    @property
    def params(self) -> Any: ...


class Student(NamedTuple):
    """A pruned teacher.

    Attributes:
      config: its architecture.
      tensors: its weights, by published name, in PyTorch's layouts.
      record: why it became this, as JSON types, for pruned/layers.json; None: nothing to tell.
    """

    config: Any
    tensors: Tensors
    record: Mapping[str, Any] | None = None


class Search(NamedTuple):
    """A training whose result decides what is pruned.

    Attributes:
      fields: of the training, as `configuration.training_config`.
      init: (key, the teacher's parameters) -> what is trained.
      apply: (graphdef, the teacher's parameters, step, steps in all) -> a network of what is
        trained, as of `network.make_apply`.
      metrics: (what is trained, step, steps in all) -> more metrics.
    """

    fields: Any
    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[nnx.GraphDef, Any, jax.Array, int], Callable[..., Any]]
    metrics: Callable[[Any, jax.Array, int], dict[str, jax.Array]]


class Tools(Protocol):
    """What pruners get of an experiment.

    Attributes:
      seed: of the experiment.
    """

    @property
    def seed(self) -> int: ...

    def tensors(self, params: Any) -> Tensors:
        """Parameters by published name."""
        ...

    def noised(self, count: int, batch_size: int) -> Iterator[tuple[jax.Array, ...]]:
        """`count` batches of noised training data, (x, t, condition, target), on the mesh."""
        ...

    def gradients(self, teacher: TeacherNetwork, batch_size: int, threshold: float) -> Tensors:
        """Gradients of the diffusion loss, see `taylor_gradients`, by published name."""
        ...

    def search(self, search: Search) -> Any:
        """Trains, or goes on; returns the averaged parameters, as NumPy arrays."""
        ...


class Pruner(Protocol):
    """One way to make students of one family.

    Attributes:
      name: config.compress.pruner.
      ranges: dotted field -> range, of its numbers but those of trainings.
    """

    @property
    def name(self) -> str: ...

    @property
    def ranges(self) -> Mapping[str, Range]: ...

    def defaults(self, training: Callable[..., ConfigDict]) -> ConfigDict:
        """The pruner's fields of config.compress, with their defaults.

        Args:
          training: `configuration.training_config`, for fields that are trainings.
        """
        ...

    def trainings(self, fields: Any) -> tuple[str, ...]:
        """Names of the fields of config.compress that are trainings which will run."""
        ...

    def predict(self, fields: Any, teacher: Any) -> Any:
        """The student's config, as far as it can be known from the teacher's alone.

        Raises:
          ValueError: a field does not fit; names it.
        """
        ...

    def prune(self, fields: Any, teacher: TeacherNetwork, tools: Tools) -> Student:
        """Makes the student."""
        ...
