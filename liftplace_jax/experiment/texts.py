"""An experiment's texts: its encoder, the columns of captions, and the prompts of samples."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from liftplace_jax import data
from liftplace_jax.conditioning import Conditioning, Shown
from liftplace_jax.encoders.joint_texts import JointTexts, is_joint, load_joint_texts
from liftplace_jax.encoders.texts import Texts, load_texts
from liftplace_jax.experiment.configuration import T5_TOKENS, under
from liftplace_jax.host.buckets import as_path
from liftplace_jax.host.outside import find_fault, shown
from liftplace_jax.nn.model_config import DenoiserConfig

_CAPTIONS = ("text", "caption", "prompt")  # names of a table's column


AnyTexts = Texts | JointTexts


def open_texts(config: ConfigDict) -> AnyTexts | None:
    """The tokenizers and text encoders of config.text; None if it names none.

    Raises:
      ValueError: as of `load_texts` and `load_joint_texts`, or a field is for several encoders, and
        there is one.
    """
    fields = config.text
    several = bool(fields.folder) and is_joint(fields.folder, fields.entry)
    for field, usual in (("left_out", ()), ("t5_tokens", T5_TOKENS)):
        value = tuple(fields[field]) if usual == () else fields[field]
        if not several and value != usual:
            raise ValueError(
                f"config.text.{field} is for a pipeline of several text encoders, which "
                "config.text.folder is not: unset it"
            )
    if not fields.folder:
        return None
    with under("text.folder: "):
        if several:
            return load_joint_texts(
                fields.folder, fields.entry, fields.dtype, fields.left_out, fields.t5_tokens
            )
        return load_texts(fields.folder, fields.entry, fields.dtype)


def bind(config: ConfigDict, model: DenoiserConfig, texts: AnyTexts | None) -> Conditioning:
    """What a network is told, of an experiment's data.

    Raises:
      ValueError: it is told texts and there are none, or the other way round.
    """
    encoding = texts and functools.partial(texts.encoding, cached=config.text.cached)
    with under("text.folder "):
        return model.conditioning.bound(encoding, config.text.dropout)


def with_captions(
    source: data.Source, texts: AnyTexts | None, conditioning: Conditioning, tokens: bool = False
) -> data.Source:
    """A source with the columns of its captions; without texts as it is.

    Args:
      source: of images.
      texts: as of `open_texts`.
      conditioning: as of `bind`, which says the columns.
      tokens: whether it has the token ids in any case.

    Raises:
      ValueError: it has no captions.
    """
    if texts is None:
        return source
    captions = getattr(source, "captions", None)
    if captions is None:
        raise ValueError(
            f"{source.name} has no captions, and config.model is told texts: put a metadata.csv "
            "(file_name, text) beside the images, or take other data"
        )
    names = dict.fromkeys([*(texts.token_columns if tokens else ()), *conditioning.columns])
    for name, column in texts.columns(captions, [*names]).items():
        source = source.with_column(name, column)
    return source


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """What samples of a network that is told texts are drawn with: sample i has prompt i.

    Attributes:
      prompts: N texts.
      texts: their tokenizers and encoders.
      conditioning: of their token ids; data may have another one, of states.
      negative: what guidance leads away from.
      identity: of the file, and of all of these, as JSON types.
      repeats: whether sample i has prompt i mod N, so that there may be more samples than prompts.
    """

    prompts: tuple[str, ...]
    texts: AnyTexts
    conditioning: Conditioning
    negative: str
    identity: Mapping[str, Any]
    repeats: bool = False

    @functools.cached_property
    def frozen(self) -> dict[str, Any]:
        """As of `Conditioning.embed`."""
        return {"text": self.texts.frozen(self.negative, self.texts.token_columns)}

    def condition(self, count: int) -> Any:
        """Of samples 0..count - 1, with NumPy arrays.

        Raises:
          ValueError: there are fewer prompts, and they do not repeat.
        """
        self.check("count", count)
        places = np.arange(count) % len(self.prompts)
        return {name: value[places] for name, value in self._all.items()}

    @functools.cached_property
    def _all(self) -> dict[str, np.ndarray]:
        ids = self.texts.values(self.prompts, self.texts.token_columns)
        condition = self.conditioning.of(jax.tree.map(jnp.asarray, ids))
        return {name: np.asarray(v) for name, v in condition.items()}

    def check(self, name: str, count: int) -> None:
        """Raises a ValueError if there are not so many prompts, and they do not repeat."""
        if count > len(self.prompts) and not self.repeats:
            raise ValueError(
                f"{name} {count} is more than the {len(self.prompts)} prompts of "
                f"{self.identity.get('file')}: draw no more, or let prompts repeat "
                "(config.evaluation.repeat_prompts, --repeat_prompts)"
            )

    def shown(self, most: int) -> Shown:
        """Some of them, evenly spaced: neighbours of a sorted list are alike."""
        count = min(most, len(self.prompts))
        places = np.linspace(0, len(self.prompts), count, endpoint=False).astype(int)
        condition = {name: value[places] for name, value in self._all.items()}
        return Shown(np.asarray(self.prompts)[places], condition, by_row=True)


CAPTIONS = "captions"
"""config.evaluation.prompts that are the captions of config.data.test_split."""


def open_prompts(
    config: ConfigDict,
    model: DenoiserConfig,
    texts: AnyTexts | None,
    held_out: Callable[[], data.Source],
) -> Prompts | None:
    """The prompts of config.evaluation.prompts; None if the network is told no texts.

    Args:
      config: the experiment's.
      model: the network's config.
      texts: as of `open_texts`.
      held_out: opens the images of config.data.test_split.

    Raises:
      ValueError: there are none and it is, or the other way round; or the file is no such one.
    """
    fields = config.evaluation
    if texts is None:
        for field in ("prompts", "negative_prompt", "clip_model"):
            if fields[field]:
                raise ValueError(
                    f"config.evaluation.{field} is for networks that are told texts: unset it, or "
                    "set config.text.folder"
                )
        return None
    if not fields.prompts:
        raise ValueError(
            "config.evaluation.prompts must be set: a file of one prompt a line, a table (.csv) "
            f"with a column 'text', or {CAPTIONS!r}: those of config.data.test_split"
        )
    if fields.negative_prompt and fields.guidance == 1:
        raise ValueError(
            "config.evaluation.negative_prompt needs config.evaluation.guidance, which is 1: none"
        )
    with under("evaluation.prompts: "):
        if fields.prompts == CAPTIONS:
            file, prompts = config.data.test_split, _captions_of(held_out())
        else:
            file, prompts = as_path(fields.prompts).name, read_prompts(fields.prompts)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    identity = {"file": file, "count": len(prompts), "sha256": digest, "text": texts.identity}
    conditioning = model.conditioning.bound(texts.encoding)
    found = Prompts(
        tuple(prompts), texts, conditioning, fields.negative_prompt, identity, fields.repeat_prompts
    )
    for name in ("num_samples", *(["curve_samples"] if fields.curve_every else [])):
        found.check(f"config.evaluation.{name}", fields[name])
    return found


def _captions_of(source: data.Source) -> list[str]:
    """A source's captions that are not empty, each once."""
    found = dict.fromkeys(caption for caption in source.captions or () if caption)
    if not found:
        raise ValueError(f"{source.name} has no captions")
    return list(found)


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Prompts of a file: one a line, or the column "text", "caption" or "prompt" of a .csv.

    Raises:
      ValueError: it is no such file, not in UTF-8, or has an empty prompt; names the line.
    """
    path = as_path(path)
    if fault := find_fault(path):
        raise ValueError(f"{path}: {fault}")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: is no text in UTF-8: {error.reason}") from error
    if path.suffix.lower() == ".csv":
        found = _read_table(content, path)
    else:
        lines = content.replace("\r\n", "\n").rstrip("\n").split("\n")
        found = list(enumerate(lines, 1))
    for line, prompt in found:
        if not prompt.strip():
            raise ValueError(f"{path}, line {line}: an empty prompt: remove the line")
    if not found:
        raise ValueError(f"{path}: has no prompts")
    return [prompt.strip() for _, prompt in found]


def _read_table(content: str, path: Any) -> list[tuple[int, str]]:
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        names = [name for name in _CAPTIONS if name in (rows.fieldnames or ())]
        if not names:
            raise ValueError(
                f"{path}: has no column of {list(_CAPTIONS)}, only {shown(rows.fieldnames)}"
            )
        return [(rows.line_num, row[names[0]] or "") for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: is no table: {error}") from error
