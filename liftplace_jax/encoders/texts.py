"""A tokenizer and its frozen text encoder: what data carry of captions, and what networks see."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax.conditioning import Encoding
from liftplace_jax.data import Column
from liftplace_jax.encoders.clip import load_text_encoder
from liftplace_jax.encoders.tokenizer import Tokenizer, load_tokenizer

TOKENS, STATES, POOLED = "tokens", "text", "pooled"
"""Columns: ids; states and the pooled vector that the encoder makes of them, in float16."""
_AT_ONCE = 64  # captions, where states are made on the way


@dataclasses.dataclass(frozen=True)
class _Encode:
    """`Encoding.apply` of token ids; hashable, and the same for the same network."""

    graphdef: nnx.GraphDef
    pooled: bool

    def __call__(self, params: Any, columns: Mapping[str, jax.Array]) -> Any:
        encoded = nnx.merge(self.graphdef, params)(columns[TOKENS])
        if not self.pooled:
            return encoded.last
        return {"context": encoded.hidden[-2], "pooled": encoded.projected}


def _stored(params: Any, columns: Mapping[str, jax.Array]) -> Any:
    """`Encoding.apply` of states that are columns."""
    del params
    states = columns[STATES].astype(jnp.float32)
    if POOLED not in columns:
        return states
    return {"context": states, "pooled": columns[POOLED].astype(jnp.float32)}


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """See the module's text; made by `load_texts`.

    Attributes:
      tokenizer: of captions.
      encoder: of its ids, a `clip.TextEncoder`. Networks that take no pooled vector see its last
        state, the others its penultimate one and the projected pooled one.
    """

    tokenizer: Tokenizer
    encoder: Any

    @property
    def width(self) -> int:
        """Of states."""
        return self.encoder.config.hidden_size

    @property
    def pooled_width(self) -> int | None:
        """Of the projected pooled state; None: there is none."""
        return self.encoder.config.projection_dim

    @property
    def token_columns(self) -> tuple[str, ...]:
        """Names of the columns of token ids."""
        return (TOKENS,)

    def _encode(self, pooled: bool) -> Callable[[Any, Mapping[str, jax.Array]], Any]:
        """`Encoding.apply` of token ids."""
        return _Encode(self.encoder.graphdef, pooled)

    @property
    def identity(self) -> dict[str, Any]:
        """What states depend on, as JSON types."""
        return {"tokenizer": self.tokenizer.identity, "encoder": self.encoder.identity}

    def encoding(self, pooled: bool, cached: bool = False) -> Encoding:
        """How a network is told texts.

        Args:
          pooled: whether it takes a pooled vector.
          cached: whether data carry states, not token ids.

        Raises:
          ValueError: it takes one, and the encoder has no projection.
        """
        length, width = self.tokenizer.length, self.width
        if pooled and self.pooled_width is None:
            raise ValueError("has an encoder without a projection, config.model takes pooled texts")
        columns: dict[str, tuple[tuple[int, ...], str]] = {TOKENS: ((length,), "int32")}
        if cached:
            columns = {STATES: ((length, width), "float16")}
            columns |= {POOLED: ((self.pooled_width or 0,), "float16")} if pooled else {}
        origins = {name: self._origin(name, columns) for name in columns}
        return Encoding(
            tuple((name, shape, dtype) for name, (shape, dtype) in columns.items()),
            _stored if cached else self._encode(pooled),
            length,
            width,
            self.pooled_width if pooled else None,
            tuple((name, json.dumps(o, sort_keys=True)) for name, o in origins.items()),
        )

    def _origin(self, name: str, columns: Collection[str]) -> dict[str, Any]:
        """A column's `identity`: digests, so that a folder may be moved."""
        found = {"tokenizer": self.tokenizer.identity["sha256"]}
        if name != TOKENS:
            state = "penultimate" if POOLED in columns else "last"
            found |= {"encoder": self.encoder.sha256, "state": state}
        return found

    def values(self, captions: Sequence[str], columns: Collection[str]) -> dict[str, np.ndarray]:
        """Columns of captions, each (N, ...).

        Args:
          captions: N of them.
          columns: which.

        Raises:
          ValueError: a caption is no text, or its states are too large for float16.
        """
        found = {TOKENS: self.tokenizer.encode(captions)}
        if STATES in columns:
            found |= self._states(found[TOKENS], POOLED in columns)
        return {name: found[name] for name in columns}

    def _states(self, ids: np.ndarray, pooled: bool) -> dict[str, np.ndarray]:
        run, parts = self._run(pooled), []
        for first in range(0, len(ids), _AT_ONCE):
            part = ids[first : first + _AT_ONCE]
            # To a whole number of them, so that there is one program.
            padded = np.pad(part, ((0, _AT_ONCE - len(part)), (0, 0)), mode="edge")
            parts.append(jax.device_get(run(self.encoder.params, {TOKENS: padded})))
        whole = jax.tree.map(lambda *xs: np.concatenate(xs)[: len(ids)], *parts)
        for values in jax.tree.leaves(whole):
            finite = np.isfinite(values).reshape(len(ids), -1).all(axis=1)
            if not finite.all():
                raise ValueError(
                    f"caption {int(np.argmin(finite))}: its states are not finite in float16"
                )
        return {STATES: whole["context"], POOLED: whole["pooled"]} if pooled else {STATES: whole}

    @functools.cached_property
    def _run(self):
        @functools.cache
        def made(pooled: bool):
            encode = self._encode(pooled)

            @jax.default_matmul_precision("highest")  # they are data: the same on every machine
            def run(params, columns):
                return jax.tree.map(lambda x: x.astype(jnp.float16), encode(params, columns))

            return jax.jit(run)

        return made

    def frozen(self, null: str, columns: Collection[str]) -> dict[str, Any]:
        """The frozen arrays of `conditioning.Text` of such columns.

        Args:
          null: the text that says nothing.
          columns: of the data.
        """
        arrays = {name: value[0] for name, value in self.values([null], columns).items()}
        return {"null": arrays} | ({"params": self.encoder.params} if TOKENS in columns else {})

    def columns(self, captions: Sequence[str], names: Collection[str]) -> dict[str, Column]:
        """Columns of captions, made as they are read.

        Args:
          captions: of every example.
          names: which.
        """
        specs = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for cached in (False, True)
            for name, shape, dtype in self.encoding(POOLED in names, cached).columns
        }

        @functools.lru_cache(maxsize=2)  # the columns of a batch are read one after another
        def made(indices: tuple[int, ...]) -> dict[str, np.ndarray]:
            return self.values([captions[index] for index in indices], names)

        def read(indices: np.ndarray, name: str) -> np.ndarray:
            return made(tuple(map(int, indices)))[name]

        return {
            name: Column(specs[name], functools.partial(read, name=name), self._origin(name, names))
            for name in names
        }


def tokenizer_entry(entry: str | None) -> str | None:
    """Which tokenizer goes with an `entry` of `load_texts`; None: there is one."""
    part = (entry or "").partition(".")[0]
    return f"tokenizer{part.removeprefix('text_encoder')}" if "encoder_" in part else None


def load_texts(
    folder: str | os.PathLike, entry: str | None = None, dtype: str = "float32"
) -> Texts:
    """A tokenizer and its text encoder.

    Args:
      folder: of a pipeline, with "tokenizer" and "text_encoder"; or with the files of both.
      entry: which of the text encoders in it, which variant of its weights, or both, as of
        `load_text_encoder`. "text_encoder_2" has its own "tokenizer_2".
      dtype: of the encoder's computation.

    Raises:
      ValueError: one of them is missing or damaged, or they do not belong together; names it.
    """
    encoder = load_text_encoder(folder, entry, dtype)
    most = encoder.config.max_position_embeddings
    tokenizer = load_tokenizer(folder, tokenizer_entry(entry), most=most)
    check_vocabulary(folder, tokenizer, encoder)
    return Texts(tokenizer, encoder)


def check_vocabulary(place: str | os.PathLike, tokenizer: Tokenizer, encoder: Any) -> None:
    """Raises a ValueError that names the place if an encoder does not know all of the tokens."""
    if tokenizer.vocab_size > encoder.config.vocab_size:
        raise ValueError(
            f"{place}: the tokenizer has {tokenizer.vocab_size:,} tokens, its text encoder knows "
            f"{encoder.config.vocab_size:,}: they do not belong together"
        )
