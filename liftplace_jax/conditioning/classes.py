"""A condition that is a class: an integer label."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.conditioning.conditioning import Conditioning, Shown, refuse_texts

COLUMN = "label"


@dataclasses.dataclass(frozen=True)
class Classes:
    """Labels 0..count - 1; see `Conditioning`. A condition is (B,) int32.

    Attributes:
      count: number of classes.
      null_label: the label that says nothing; None if the network was trained without one.
      dropout: share of training labels that become `null_label`.
    """

    count: int
    null_label: int | None
    dropout: float

    columns: ClassVar[Mapping[str, jax.ShapeDtypeStruct]] = {
        COLUMN: jax.ShapeDtypeStruct((), jnp.int32)
    }

    def bound(self, encoding: Callable[[bool], Any] | None, dropout: float = 0.0) -> Self:
        del dropout
        refuse_texts(encoding)
        return self

    def of(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.asarray(batch[COLUMN])

    def drop(self, key: jax.Array, condition: jax.Array) -> jax.Array:
        if not self.dropout:
            return condition
        dropped = jax.random.bernoulli(key, self.dropout, condition.shape)
        return jnp.where(dropped, self.null(condition), condition)

    def null(self, condition: jax.Array) -> jax.Array:
        if self.null_label is None:
            raise ValueError("needs a network with a null label: one trained with class_dropout")
        return jnp.full_like(condition, self.null_label)

    def draw(self, key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (), 0, self.count)

    def embed(self, frozen: Mapping[str, Any], condition: jax.Array) -> jax.Array:
        del frozen
        return condition

    def inputs(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.int32)

    def shown(self, most: int) -> Shown:
        classes = np.unique(np.linspace(0, self.count - 1, most).round().astype(np.int32))
        return Shown(classes, classes)

    def check_data(self, sources: Iterable[Any]) -> None:
        first, *others = sources = list(sources)
        for source in sources:
            if source.num_classes != self.count:
                reason = getattr(source, "without_classes", "") or (
                    "the classes of a folder of images are the subfolders of each split"
                )
                raise ValueError(
                    f"{source.name} has {source.num_classes or 'no'} classes, "
                    f"config.model.num_classes is {self.count} ({reason})"
                )
            source.check_labels = True
        for other in others:
            if other.classes != first.classes:
                differ = sorted(set(first.classes).symmetric_difference(other.classes))
                raise ValueError(
                    f"{first.name} and {other.name} have different classes: {differ[:5]} are in "
                    "one of them alone"
                )

    def check_student(self, student: Conditioning) -> None:
        for field, name in (("count", "num_classes"), ("null_label", "null_label")):
            found, wanted = getattr(student, field, 0), getattr(self, field)
            if found != wanted:
                raise ValueError(f"it has {name} {found}, config.model.{name} is {wanted}")
