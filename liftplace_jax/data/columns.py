"""What a source carries of every example beside its image: named columns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

LABEL = "label"
RESERVED = ("image", "moments", "mirrored", "index", "mask")
"""What batches call what is no column."""


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """A value of every example of a source.

    Attributes:
      spec: shape and dtype of one example's value.
      read: (B,) indices in [0, len) -> (B, *spec.shape) values; called from several threads.
      identity: JSON types that tell these values from others of the same shape, such as whose
        tokens they are: fingerprints and shards have it. None: nothing to tell.
    """

    spec: jax.ShapeDtypeStruct
    read: Callable[[np.ndarray], Any]
    identity: Any = None

    @classmethod
    def of(cls, values: np.ndarray, identity: Any = None) -> Self:
        """The column whose example i has values[i]."""
        spec = jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
        return cls(spec, values.__getitem__, identity)

    def get(self, indices: np.ndarray) -> np.ndarray:
        """(B, *spec.shape) values, of the dtype of `spec`.

        Raises:
          ValueError: `read` gives others.
        """
        values = np.asarray(self.read(indices))
        shape = (len(indices), *self.spec.shape)
        if values.shape != shape or values.dtype != self.spec.dtype:
            raise ValueError(
                f"it has values {values.shape} of {values.dtype}, want {shape} of {self.spec.dtype}"
            )
        return values


class Columned:
    """A source with columns: those that it reads itself, and those that were given to it."""

    name: str
    _own_columns: Mapping[str, jax.ShapeDtypeStruct]
    _own_identities: Mapping[str, Any] = {}
    _given: Mapping[str, Column] = {}

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype of one example's value, of all that `get` gives beside images."""
        return dict(self._own_columns) | {name: c.spec for name, c in self._given.items()}

    @property
    def column_identities(self) -> dict[str, Any]:
        """Name -> what tells the values from others, of the columns that say it."""
        given = {name: c.identity for name, c in self._given.items() if c.identity is not None}
        return dict(self._own_identities) | given

    def with_column(self, name: str, column: Column) -> Self:
        """The same source with one more column; what is kept in memory is shared.

        Args:
          name: a new one.
          column: as long as the source.

        Raises:
          ValueError: the name is taken.
        """
        if name in self.columns or name in RESERVED:
            raise ValueError(f"{self.name} has {name!r} already: give the column another name")
        new = copy.copy(self)
        new._given = {**self._given, name: column}
        return new

    def _read_given(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, column in self._given.items():
            try:
                found[name] = column.get(indices)
            except ValueError as error:
                raise ValueError(f"{self.name}, column {name!r}: {error}") from error
        return found
