"""A condition that is a text: token ids that a frozen encoder reads, or its states."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from liftplace_jax.conditioning.conditioning import Conditioning, Shown

EMPTY = "empty"
"""Of a condition, beside its columns: which of the texts are replaced by the null text."""
FROZEN = "text"
"""Of the frozen arrays: {"params": of the encoder, "null": the null text's columns}."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How data become what a network is told of a text; hashable, without arrays.

    Attributes:
      columns: (name, shape, dtype's name) of what data carry of one text.
      apply: (encoder's params, {column: (B, ...)}) -> what the network takes: states (B, T, D)
        or, with a pooled vector, {"context": (B, T, D), "pooled": (B, P)}; float32.
      length: T.
      width: D.
      pooled_width: P; None: there is no pooled vector.
      origin: (column, its `data.Column.identity` as JSON) of whose values they are.
    """

    columns: tuple[tuple[str, tuple[int, ...], str], ...]
    apply: Callable[[Any, Mapping[str, jax.Array]], Any]
    length: int
    width: int
    pooled_width: int | None = None
    origin: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Text:
    """Texts; see `Conditioning`. A condition is {column: (B, ...), EMPTY: (B,) bool}.

    A config says the widths; `bound` adds the rest. The text that says nothing is none of its
    fields but of the frozen arrays, so that it may be the empty one in training and a negative
    prompt where samples are drawn.

    Attributes:
      width: D, of the states that the network attends to.
      pooled_width: P, of the pooled vector that it takes beside them; None: it takes none.
      encoding: of the data; None: not bound yet.
      dropout: share of training texts that become the null text, in [0, 1).
    """

    width: int
    pooled_width: int | None = None
    encoding: Encoding | None = None
    dropout: float = 0.0

    def bound(self, encoding: Callable[[bool], Encoding] | None, dropout: float = 0.0) -> Text:
        if encoding is None:
            raise ValueError("must be set: the network is told texts, as a frozen encoder has them")
        found = encoding(self.pooled_width is not None)
        for field, name in (("width", "states"), ("pooled_width", "pooled vectors")):
            made, wanted = getattr(found, field), getattr(self, field)
            if made != wanted:
                raise ValueError(
                    f"has an encoder of {name} of width {made}, config.model takes {wanted}"
                )
        return dataclasses.replace(self, encoding=found, dropout=dropout)

    @property
    def columns(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        if self.encoding is None:
            return {}
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, shape, dtype in self.encoding.columns
        }

    def of(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        condition = {name: jnp.asarray(batch[name]) for name in self.columns}
        count = len(next(iter(condition.values())))
        return condition | {EMPTY: jnp.zeros(count, bool)}

    def drop(self, key: jax.Array, condition: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        if not self.dropout:
            return condition
        empty = condition[EMPTY]
        dropped = jax.random.bernoulli(key, self.dropout, empty.shape)
        return {**condition, EMPTY: empty | dropped}

    def null(self, condition: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return {**condition, EMPTY: jnp.ones_like(condition[EMPTY])}

    def draw(self, key: jax.Array) -> dict[str, jax.Array]:
        """The null text: others are prompts, which nobody draws."""
        del key
        zeros = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in self.columns.items()}
        return zeros | {EMPTY: jnp.ones((), bool)}

    def embed(self, frozen: Mapping[str, Any], condition: Mapping[str, jax.Array]) -> Any:
        arrays, empty = frozen[FROZEN], condition[EMPTY]

        def filled(name):
            values = condition[name]
            mask = empty.reshape(-1, *(1,) * (values.ndim - 1))
            return jnp.where(mask, jnp.asarray(arrays["null"][name], values.dtype), values)

        assert self.encoding is not None, "`bound` gave it"
        columns = {name: filled(name) for name in self.columns}
        return self.encoding.apply(arrays.get("params"), columns)

    def inputs(self, count: int) -> Any:
        length = 1 if self.encoding is None else self.encoding.length
        states = jax.ShapeDtypeStruct((count, length, self.width), jnp.float32)
        if self.pooled_width is None:
            return states
        pooled = jax.ShapeDtypeStruct((count, self.pooled_width), jnp.float32)
        return {"context": states, "pooled": pooled}

    def shown(self, most: int) -> Shown | None:
        del most

    def check_data(self, sources: Iterable[Any]) -> None:
        assert self.encoding is not None, "`bound` gave it"
        for source in sources:
            for name, wanted in self.encoding.origin:
                found = json.dumps(source.column_identities.get(name), sort_keys=True)
                if found != wanted:
                    raise ValueError(
                        f"{source.name}: its column {name!r} was made by {found}, config.text says "
                        f"{wanted}: encode the data anew, or change config.text"
                    )

    def check_student(self, student: Conditioning) -> None:
        for field in ("width", "pooled_width"):
            found, wanted = getattr(student, field, None), getattr(self, field)
            if found != wanted:
                raise ValueError(f"it takes text of {field} {found}, the teacher's is {wanted}")
