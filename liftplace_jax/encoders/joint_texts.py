"""Several text encoders as one: Stable Diffusion 3's two CLIPs with a projection, and T5.

A text's context is the penultimate states of the CLIPs beside each other, filled up with zeros to
the width of T5, then the states of T5; its pooled vector the projected ones beside each other.
Each encoder has columns of its own, so that nothing that is zero is stored: those of `Texts`, with
the end of the encoder's name, as "text_2".
Source: diffusers "pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py", encode_prompt.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax.conditioning import Encoding
from liftplace_jax.data import Column
from liftplace_jax.encoders.clip import load_text_encoder, write_random_text_encoder
from liftplace_jax.encoders.clip.config import CLIPTextConfig
from liftplace_jax.encoders.shipped import find_shipped
from liftplace_jax.encoders.t5 import T5Config, load_t5, write_random_t5
from liftplace_jax.encoders.texts import TOKENS, Texts, check_vocabulary
from liftplace_jax.encoders.tokenizer import load_tokenizer, train_tokenizer
from liftplace_jax.host.buckets import as_path
from liftplace_jax.host.outside import lies, read_json

_CLIPS, _T5, _NETWORK = ("text_encoder", "text_encoder_2"), "text_encoder_3", "transformer"
NAMES = (*_CLIPS, _T5)
"""Folders of the encoders in a pipeline; their tokenizers are "tokenizer", "tokenizer_2", ..."""


class Part(NamedTuple):
    """One of the encoders.

    Attributes:
      name: of NAMES.
      texts: the encoder and its tokenizer; None: zeros stand for it.
      length: tokens.
      width: of its states.
      pooled_width: of its pooled vector; None: it gives none.
    """

    name: str
    texts: Texts | None
    length: int
    width: int
    pooled_width: int | None

    @property
    def end(self) -> str:
        """What its columns end in."""
        return self.name.removeprefix("text_encoder")


@dataclasses.dataclass(frozen=True)
class _EncodeT5:
    """`Encoding.apply` of token ids; hashable, and the same for the same network."""

    graphdef: nnx.GraphDef

    def __call__(self, params: Any, columns: Mapping[str, jax.Array]) -> jax.Array:
        return nnx.merge(self.graphdef, params)(columns[TOKENS])


class T5Texts(Texts):
    """`Texts` of a `T5Encoder`, which has no pooled vector."""

    @property
    def width(self) -> int:
        return self.encoder.config.d_model

    @property
    def pooled_width(self) -> None:
        return None

    def _encode(self, pooled: bool) -> Callable[[Any, Mapping[str, jax.Array]], Any]:
        del pooled
        return _EncodeT5(self.encoder.graphdef)


class _Piece(NamedTuple):
    """What `_Join` knows of a part; attributes as of `Part`.

    Attributes:
      columns: (name, name with the part's end) of its columns.
      apply: as of `Encoding.apply`; None: zeros.
    """

    end: str
    columns: tuple[tuple[str, str], ...]
    apply: Callable[[Any, Mapping[str, jax.Array]], Any] | None
    length: int
    width: int
    pooled_width: int | None


@dataclasses.dataclass(frozen=True)
class _Join:
    """`Encoding.apply` of all parts' columns; hashable."""

    pieces: tuple[_Piece, ...]
    width: int

    def __call__(self, params: Any, columns: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        count = len(next(iter(columns.values())))
        clips, pooled, others = [], [], []
        for piece in self.pieces:
            states, vector = self._made(piece, params, columns, count)
            if piece.pooled_width is None:
                others.append(states)
            else:
                clips.append(states)
                pooled.append(vector)
        beside = jnp.concatenate(clips, axis=-1)
        beside = jnp.pad(beside, ((0, 0), (0, 0), (0, self.width - beside.shape[-1])))
        context = jnp.concatenate([beside, *others], axis=1)
        return {"context": context, "pooled": jnp.concatenate(pooled, axis=-1)}

    def _made(self, piece: _Piece, params, columns, count: int) -> tuple[jax.Array, Any]:
        if piece.apply is None:
            states = jnp.zeros((count, piece.length, piece.width))
            return states, jnp.zeros((count, piece.pooled_width or 0))
        own = (params or {}).get(piece.end)
        made = piece.apply(own, {name: columns[full] for name, full in piece.columns})
        return (made, None) if piece.pooled_width is None else (made["context"], made["pooled"])


@dataclasses.dataclass(frozen=True, eq=False)
class JointTexts:
    """See the module's text; made by `load_joint_texts`, used as `Texts`.

    Attributes:
      parts: as of NAMES; T5 is the last.
    """

    parts: tuple[Part, ...]

    @property
    def _there(self) -> list[tuple[Part, Texts]]:
        return [(part, part.texts) for part in self.parts if part.texts is not None]

    @property
    def token_columns(self) -> tuple[str, ...]:
        """As of `Texts`."""
        return tuple(TOKENS + part.end for part, _ in self._there)

    @property
    def identity(self) -> dict[str, Any]:
        """As of `Texts`, of each part; None: it is left out."""
        return {part.name: part.texts and part.texts.identity for part in self.parts}

    def encoding(self, pooled: bool, cached: bool = False) -> Encoding:
        """As of `Texts`.

        Raises:
          ValueError: the network takes no pooled vector.
        """
        if not pooled:
            raise ValueError(
                f"has several encoders, {[part.name for part in self.parts]}, config.model takes "
                "the states of one: name it by config.text.entry"
            )
        found = {
            part.name: texts.encoding(part.pooled_width is not None, cached)
            for part, texts in self._there
        }
        pieces, width = [], self.parts[-1].width
        for part in self.parts:
            own = found.get(part.name)
            names = tuple((name, name + part.end) for name, *_ in own.columns) if own else ()
            pieces.append(
                _Piece(
                    part.end, names, own and own.apply, part.length, part.width, part.pooled_width
                )
            )
        ends = [(part.end, found[part.name]) for part, _ in self._there]
        clips = [part for part in self.parts if part.pooled_width is not None]
        return Encoding(
            tuple((n + end, shape, dtype) for end, own in ends for n, shape, dtype in own.columns),
            _Join(tuple(pieces), width),
            clips[0].length + self.parts[-1].length,
            width,
            sum(part.pooled_width or 0 for part in clips),
            tuple((name + end, origin) for end, own in ends for name, origin in own.origin),
        )

    def _by_part(self, columns: Collection[str]) -> list[tuple[Part, Texts, list[str]]]:
        """The parts with those of the columns that are theirs, by their names in `Texts`."""
        ends = {part.end for part in self.parts}
        found = []
        for part, texts in self._there:
            others = tuple(end for end in ends if end != part.end and end.endswith(part.end))
            own = [
                name.removesuffix(part.end)
                for name in columns
                if name.endswith(part.end) and not name.endswith(others)
            ]
            found.append((part, texts, own))
        return [(part, texts, own) for part, texts, own in found if own]

    def values(self, captions: Sequence[str], columns: Collection[str]) -> dict[str, np.ndarray]:
        """As of `Texts`."""
        return {
            name + part.end: value
            for part, texts, own in self._by_part(columns)
            for name, value in texts.values(captions, own).items()
        }

    def frozen(self, null: str, columns: Collection[str]) -> dict[str, Any]:
        """As of `Texts`; "params" are by the ends of the parts' names."""
        found: dict[str, Any] = {"null": {}}
        for part, texts, own in self._by_part(columns):
            arrays = texts.frozen(null, own)
            found["null"] |= {name + part.end: value for name, value in arrays["null"].items()}
            if "params" in arrays:
                found.setdefault("params", {})[part.end] = arrays["params"]
        return found

    def columns(self, captions: Sequence[str], names: Collection[str]) -> dict[str, Column]:
        """As of `Texts`."""
        return {
            name + part.end: column
            for part, texts, own in self._by_part(names)
            for name, column in texts.columns(captions, own).items()
        }


def is_joint(folder: str | os.PathLike, entry: str | None = None) -> bool:
    """Whether a folder has several text encoders, and no one of them is meant.

    Args:
      folder: of a pipeline.
      entry: as of `load_texts`.
    """
    if (entry or "").partition(".")[0] in NAMES:
        return False
    place = find_shipped(folder)
    return any(lies(place / name / "config.json") for name in NAMES[1:])


def load_joint_texts(
    folder: str | os.PathLike,
    variant: str | None = None,
    dtype: str = "float32",
    left_out: Collection[str] = (),
    t5_tokens: int = 256,
) -> JointTexts:
    """The tokenizers and text encoders of a pipeline of Stable Diffusion 3.

    Args:
      folder: of the pipeline: text_encoder, text_encoder_2 and text_encoder_3, and a tokenizer for
        each. It may be without the third one: zeros stand for it then, as wide as transformer/
        (its config.json alone is read) takes texts.
      variant: of their weights, such as "fp16".
      dtype: of the encoders' computation.
      left_out: of NAMES, those that zeros stand for; their config.json must be there.
      t5_tokens: that T5 is given.

    Raises:
      ValueError: a part is missing or damaged, or they do not belong together; names it.
    """
    place = find_shipped(folder)
    unknown = sorted(set(left_out) - set(NAMES))
    if unknown or set(left_out) == set(NAMES):
        raise ValueError(f"left_out must be some of {list(NAMES)}, got {list(left_out)}")
    parts = [_clip(place, name, variant, dtype, name in left_out) for name in _CLIPS]
    parts.append(_t5(place, variant, dtype, _T5 in left_out, t5_tokens))
    lengths = {part.length for part in parts[:-1]}
    if len(lengths) > 1:
        raise ValueError(f"{folder}: its two CLIPs have texts of {sorted(lengths)} tokens")
    beside, width = sum(part.width for part in parts[:-1]), parts[-1].width
    if beside > width:
        raise ValueError(
            f"{folder}: the states of its two CLIPs are {beside} wide together, those of the third "
            f"encoder {width}: they do not fit"
        )
    return JointTexts(tuple(parts))


def _tokenizer_of(name: str) -> str:
    return f"tokenizer{name.removeprefix('text_encoder')}"


def _fields(place: Path, name: str) -> dict[str, Any]:
    path = place / name / "config.json"
    if not lies(path):
        raise ValueError(f"{path}: no such file, and a pipeline of two CLIPs and T5 has it")
    return read_json(path)


def _clip(place: Path, name: str, variant: str | None, dtype: str, is_out: bool) -> Part:
    fields = _fields(place, name)
    if not is_out:
        encoder = load_text_encoder(place / name, variant, dtype)
        config = encoder.config
    else:
        encoder = None
        try:
            config = CLIPTextConfig.from_transformers(fields, fields.get("projection_dim", 512))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place / name / 'config.json'}: {error}") from error
    if config.projection_dim is None:
        raise ValueError(f"{place / name}: is a CLIP without a projection, which must have one")
    most = config.max_position_embeddings
    widths = (config.hidden_size, config.projection_dim)
    if encoder is None:
        return Part(name, None, most, *widths)
    tokenizer = load_tokenizer(place, _tokenizer_of(name), most=most)
    check_vocabulary(place / name, tokenizer, encoder)
    return Part(name, Texts(tokenizer, encoder), tokenizer.length, *widths)


def _t5(place: Path, variant: str | None, dtype: str, is_out: bool, tokens: int) -> Part:
    if not lies(place / _T5 / "config.json"):
        if not lies(place / _NETWORK / "config.json"):
            raise ValueError(
                f"{place}: neither {_T5}/config.json nor {_NETWORK}/config.json is there, which "
                "say how wide texts are"
            )
        width = _fields(place, _NETWORK).get("joint_attention_dim", 4096)
        if type(width) is not int or width < 1:
            raise ValueError(
                f"{place / _NETWORK / 'config.json'}: joint_attention_dim must be a number above 0"
            )
        return Part(_T5, None, tokens, width, None)
    if is_out:
        try:
            config = T5Config.from_transformers(_fields(place, _T5))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place / _T5 / 'config.json'}: {error}") from error
        return Part(_T5, None, tokens, config.d_model, None)
    encoder = load_t5(place / _T5, variant, dtype)
    tokenizer = load_tokenizer(place, _tokenizer_of(_T5), length=tokens)
    check_vocabulary(place / _T5, tokenizer, encoder)
    return Part(_T5, T5Texts(tokenizer, encoder), tokens, encoder.config.d_model, None)


def write_random_joint_texts(
    folder: str | os.PathLike,
    texts: Iterable[str],
    *,
    width: int = 32,
    pooled_width: int = 16,
    length: int = 16,
    seed: int = 0,
) -> Path:
    """Writes tiny encoders of random weights and their tokenizers, for runs in miniature and tests.

    Args:
      folder: where `load_joint_texts` will find them.
      texts: what vocabularies are counted in.
      width: of T5's states; each CLIP's are half as wide.
      pooled_width: of both pooled vectors together.
      length: tokens of a text for each CLIP.
      seed: of the weights.

    Returns:
      The folder.
    """
    place, texts = as_path(folder), list(texts)
    for number, name in enumerate(NAMES):
        made = train_tokenizer(place / _tokenizer_of(name), texts, 600, length)
        options = {"vocab_size": made.vocab_size, "seed": seed + number}
        if name == _T5:
            write_random_t5(place / name, width=width, **options)
        else:
            write_random_text_encoder(
                place / name,
                width=width // 2,
                length=length,
                projection_dim=pooled_width // 2,
                **options,
            )
    return place
