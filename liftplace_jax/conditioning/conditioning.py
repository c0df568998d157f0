"""The contract of conditions, and the condition that says nothing.

A condition is a pytree of arrays whose first axis is the batch (None where there is none). What the
network is handed is made of it by `embed`, once for teacher and student; most kinds hand it over as
it is. A new kind is one more file beside this one, and a config of a network that has it
(`DenoiserConfig.conditioning`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np

Condition = Any


class Shown(NamedTuple):
    """Conditions under which a report shows samples.

    Attributes:
      titles: (K,) a name for each.
      condition: of K samples.
      by_row: whether titles are too long to stand above columns.
    """

    titles: np.ndarray
    condition: Condition
    by_row: bool = False


class Conditioning(Protocol):
    """What is known of a network's condition; hashable, a constant of jitted functions.

    Attributes:
      columns: name -> shape and dtype, for one example, of what data must carry for it
        (`check_sources`).
    """

    columns: Mapping[str, jax.ShapeDtypeStruct]

    def bound(self, encoding: Callable[[bool], Any] | None, dropout: float = 0.0) -> Self:
        """This condition of an experiment whose texts are encoded so.

        Args:
          encoding: whether a pooled vector is needed -> `text.Encoding`; None: of no texts.
          dropout: share of training texts that are dropped.

        Raises:
          ValueError: the network is told texts and there is no encoding, or it fits the network
            not; or there is one, and the network is told none.
        """
        ...

    def of(self, batch: Mapping[str, Any]) -> Condition:
        """The condition of a batch of data."""

    def drop(self, key: jax.Array, condition: Condition) -> Condition:
        """For training: some of the examples are told nothing, so that guidance is possible."""

    def null(self, condition: Condition) -> Condition:
        """What says nothing, as many as `condition` has.

        Raises:
          ValueError: the network was not trained with it.
        """

    def draw(self, key: jax.Array) -> Condition:
        """A condition for one sample, without the batch axis."""

    def embed(self, frozen: Mapping[str, Any], condition: Condition) -> Any:
        """What the network is handed.

        Args:
          frozen: arrays of frozen encoders by their use; kinds without any take none of it.
          condition: as of `of`, `drop`, `null` or `draw` under vmap.
        """

    def inputs(self, count: int) -> Any:
        """What `embed` makes of so many conditions, as `jax.ShapeDtypeStruct`."""

    def shown(self, most: int) -> Shown | None:
        """What a report shows, at most `most`; None: nothing but samples as they come."""

    def check_data(self, sources: Iterable[Any]) -> None:
        """Checks that data sets, which have the columns, have the condition.

        It also sees to it that the condition is checked as it is read.

        Raises:
          ValueError: one does not; names it.
        """

    def check_student(self, student: Conditioning) -> None:
        """Checks that a student can be told what its teacher, of this conditioning, is told.

        Raises:
          ValueError: it cannot; names what differs.
        """


class Unconditional:
    """A network that is told nothing; see `Conditioning`."""

    columns: Mapping[str, jax.ShapeDtypeStruct] = {}

    def bound(self, encoding: Callable[[bool], Any] | None, dropout: float = 0.0) -> Self:
        del dropout
        refuse_texts(encoding)
        return self

    def of(self, batch: Mapping[str, jax.Array]) -> None:
        del batch

    def drop(self, key: jax.Array, condition: None) -> None:
        del key, condition

    def null(self, condition: None) -> None:
        raise ValueError("needs a network that is told something: set it to 1")

    def draw(self, key: jax.Array) -> None:
        del key

    def embed(self, frozen: Mapping[str, Any], condition: None) -> None:
        del frozen, condition

    def inputs(self, count: int) -> None:
        del count

    def shown(self, most: int) -> None:
        del most

    def check_data(self, sources: Iterable[Any]) -> None:
        del sources

    def check_student(self, student: Conditioning) -> None:
        if student != self:
            raise ValueError(f"it has the condition {student}, the teacher has none")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return "none"


UNCONDITIONAL = Unconditional()


def refuse_texts(encoding: Any) -> None:
    """Raises a ValueError if there are texts, for a network that is told none."""
    if encoding is not None:
        raise ValueError("is for networks that are told texts, config.model is of another kind")


def check_sources(conditioning: Conditioning, sources: Iterable[Any]) -> None:
    """Checks that data sets carry what a network is told.

    Args:
      conditioning: the network's.
      sources: each has a `name` and `columns` (see `data.Source`).

    Raises:
      ValueError: one lacks a column, or has another of that name; or `check_data` refuses it.
    """
    sources = list(sources)
    for source in sources:
        found = source.columns
        for name, wanted in conditioning.columns.items():
            if name not in found:
                raise ValueError(
                    f"{source.name} has no column {name!r}, which config.model is told; it has "
                    f"{', '.join(found) or 'none'}"
                )
            if (found[name].shape, found[name].dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{source.name} has a column {name!r} of {found[name].shape} "
                    f"{found[name].dtype}, config.model is told {wanted.shape} {wanted.dtype}"
                )
    conditioning.check_data(sources)
