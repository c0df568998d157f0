"""Text to token ids, by the `tokenizers` library alone: CLIP's folders, and any tokenizer.json.

What ids come out is that of transformers for the same folder; see `load_tokenizer`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from liftplace_jax.encoders.shipped import find_shipped
from liftplace_jax.host.buckets import as_path, local_copy, make_folder
from liftplace_jax.host.files import replacing, write_json
from liftplace_jax.host.outside import find_fault, lies, read_json, shown

LENGTH = 77
"""Tokens of a text, where nobody says: CLIP's."""
_MOST_LENGTH = 2**16  # a length above it is transformers' way to say that there is none
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
_CLIP = {"unk_token": _END, "bos_token": _START, "eos_token": _END, "pad_token": _END}
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_SIDES = ("right", "left")
_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
# What a fingerprint tries, beside the vocabulary: case, accents, digits, spaces, special tokens.
_PROBES = (
    "", "A photo of  a cat!", "cafe\u0301 na\u00efve \u00dcber", "it's 1,234\n<|endoftext|> x",
    "\u732b\u3068\u72ac", "</s> <pad> ! # \U0001f600", "\u2014 don't I'LL \ufb01",
)  # fmt: skip


class Tokenizer:
    """Texts to ids of a fixed number of tokens; made by `load_tokenizer`.

    Args:
      backend: of the `tokenizers` library; its truncation and padding are set here.
      length: ids of every text.
      pad: the token that fills up; in a text it is that token too.
      name: of the folder it comes from.
      sides: of truncation and of padding, "right" or "left".

    Attributes:
      length: ids of every text.
      pad_id: of the token that fills up.
      vocab_size: ids are below it.
    """

    def __init__(
        self,
        backend: Any,
        length: int,
        pad: str,
        name: str = "tokenizer",
        sides: tuple[str, str] = ("right", "right"),
    ):
        self._backend, self.length, self.name = backend, length, name
        self.pad_id = backend.token_to_id(pad)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        backend.enable_truncation(length, direction=sides[0])
        backend.enable_padding(direction=sides[1], pad_id=self.pad_id, pad_token=pad, length=length)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of texts; what is longer is cut, with its end token kept.

        Args:
          texts: N of them, of any length.

        Returns:
          (N, length) int32.

        Raises:
          ValueError: one is no text; names it.
        """
        texts = list(texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"caption {index} is no text but {shown(text)}")
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"caption {index}, {shown(text)}, has what is no character: {error.reason}"
                    ) from error
        ids = [encoding.ids for encoding in self._backend.encode_batch(texts)]
        return np.asarray(ids, np.int32).reshape(len(texts), self.length)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What its ids depend on, as JSON types; the same in all versions of the library."""
        model = json.loads(self._backend.to_str())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
        vocab = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        scores = model["vocab"] if isinstance(model["vocab"], list) else None
        tried = self.encode(_PROBES).tolist()
        content = json.dumps([vocab, merges, scores, self.length, self.pad_id, tried])
        return {
            "name": self.name,
            "length": self.length,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        }


def load_tokenizer(
    folder: str | os.PathLike,
    entry: str | None = None,
    *,
    length: int | None = None,
    most: int | None = None,
) -> Tokenizer:
    """A tokenizer from its folder, as transformers would have it.

    tokenizer.json is read where there is one, otherwise vocab.json and merges.txt, as CLIP's.
    Special tokens are those of special_tokens_map.json, then those of tokenizer_config.json: Stable
    Diffusion 2 pads with "!" by the first, and so "!" in a text is that token.

    Args:
      folder: of a tokenizer, or of a pipeline with one in "tokenizer"; or a name of SHIPPED.
      entry: which of the folders in it, such as "tokenizer_2".
      length: ids of every text; None: model_max_length of tokenizer_config.json or, where it is
        missing or has no meaning (transformers writes 1e30), `most`.
      most: tokens that the text encoder takes; a longer length is cut to it. None: 77 where the
        folder says nothing.

    Raises:
      ValueError: no such folder, a file is missing or damaged, or of another tokenizer; names it.
        Or the `tokenizers` library is missing; says what to install.
    """
    _library()  # missing, it is not the folder's fault
    place = _place(find_shipped(folder), entry)
    config, roles = _read_roles(place)
    if lies(place / "tokenizer.json"):
        backend = _read_whole(place / "tokenizer.json")
        padding = backend.padding or {}
        roles.setdefault("pad_token", padding.get("pad_token", "<pad>"))
    else:
        roles = _CLIP | roles
        backend = _read_clip(place, config, roles)
    _add_special(backend, roles, place)
    if length is None:
        said = config.get("model_max_length")
        whole = isinstance(said, int | float) and 1 <= said <= _MOST_LENGTH
        length = int(cast(float, said)) if whole else most or LENGTH
        length = min(length, most or length)
    sides = _side(config, "truncation_side", place), _side(config, "padding_side", place)
    least = backend.num_special_tokens_to_add(False)
    if length <= least:
        raise ValueError(f"{place}: {length} tokens are too few, {least} of them are special")
    return Tokenizer(backend, length, _content(roles["pad_token"]), place.name, sides)


def copy_tokenizer(
    folder: str | os.PathLike, target: str | os.PathLike, entry: str | None = None
) -> None:
    """Copies the files that a tokenizer is read from.

    Args:
      folder: as of `load_tokenizer`.
      target: a folder; made if missing.
      entry: as of `load_tokenizer`.

    Raises:
      ValueError: as of `load_tokenizer`.
    """
    place, target = _place(find_shipped(folder), entry), as_path(target)
    make_folder(target)
    for name in _FILES:
        if lies(place / name):
            with local_copy(place / name) as file, replacing(target / name) as temporary:
                shutil.copyfile(file, temporary)


def _library() -> Any:
    try:
        import tokenizers  # late: only texts need it
    except ImportError as error:
        raise ValueError(
            "texts need the tokenizers library: pip install 'liftplace_jax[text]'"
        ) from error
    return tokenizers


def _place(folder: Path, entry: str | None) -> Path:
    """The folder that has the files."""
    places = [folder / entry] if entry else [folder, folder / "tokenizer"]
    for place in places:
        if lies(place / "tokenizer.json") or lies(place / "vocab.json"):
            return place
    for place in places:
        if lies(place / "spiece.model"):
            raise ValueError(
                f"{place}: has spiece.model alone, which is not read: write its tokenizer.json, by "
                "save_pretrained of transformers' fast tokenizer"
            )
    raise ValueError(
        f"{places[0]}: no tokenizer.json, nor vocab.json and merges.txt, there"
        + ("" if entry else ' or in "tokenizer"')
    )


def _read_roles(place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json, and the special tokens by what they are for."""
    found = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        found.append(read_json(place / name) if lies(place / name) else {})
    config = found[0]
    details = config.get("added_tokens_decoder")
    tokens = details.values() if isinstance(details, dict) else ()
    attributes = {token["content"]: token for token in tokens if _is_token(token)}
    roles = {}
    for fields in found:  # the later one wins
        for role in _ROLES:
            if fields.get(role) is not None:
                if not _is_token(fields[role]):
                    raise ValueError(f"{place}: {role} {shown(fields[role])} is no token")
                roles[role] = attributes.get(_content(fields[role]), fields[role])
    return config, roles


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("content"), str)
    )


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _side(config: Mapping[str, Any], field: str, place: Path) -> str:
    side = config.get(field, "right")
    if side not in _SIDES:
        raise ValueError(f"{place / 'tokenizer_config.json'}: {field} {shown(side)}: must be right")
    return side


def _read_whole(path: Path) -> Any:
    """Of tokenizer.json."""
    library = _library()
    if fault := find_fault(path):
        raise ValueError(f"{path}: {fault}")
    with local_copy(path) as local:
        try:
            return library.Tokenizer.from_file(os.fspath(local))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{path}: is no tokenizer: {error}") from error


def _read_clip(place: Path, config: Mapping[str, Any], roles: Mapping[str, Any]) -> Any:
    """Of vocab.json and merges.txt."""
    kind = config.get("tokenizer_class", "CLIPTokenizer")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise ValueError(
            f"{place}: vocab.json and merges.txt are of a {shown(kind)}, and read as CLIP's alone: "
            "write its tokenizer.json, by save_pretrained of transformers' fast tokenizer"
        )
    vocab, merges = read_json(place / "vocab.json"), _read_merges(place / "merges.txt")
    wrong = [k for k, v in vocab.items() if not isinstance(v, int) or isinstance(v, bool) or v < 0]
    if wrong:
        raise ValueError(f"{place / 'vocab.json'}: {shown(wrong[0])} has no whole number as its id")
    names = {role: _content(roles[role]) for role in ("bos_token", "eos_token", "unk_token")}
    for role, name in names.items():
        if name not in vocab:
            raise ValueError(f"{place / 'vocab.json'}: has no {shown(name)}, the {role}")
    try:
        return _clip(vocab, merges, *names.values())
    except Exception as error:  # the library raises no narrower one
        raise ValueError(
            f"{place}: merges.txt does not fit vocab.json: {error}. Take both from one folder"
        ) from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    if fault := find_fault(path):
        raise ValueError(f"{path}: {fault}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8: {error.reason}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"{path}, line {number}: {shown(line)} are not two tokens")
        merges.append((parts[0], parts[1]))
    return merges


def _clip(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], start: str, end: str, unknown: str
) -> Any:
    """CLIP's pipeline: NFC, single spaces, lower case; words; bytes; pairs of them; both ends."""
    library = _library()
    model = library.models.BPE(
        vocab=dict(vocab),
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix=_WORD_END,
        fuse_unk=False,
        unk_token=unknown,
    )
    backend = library.Tokenizer(model)
    normalizers, before = library.normalizers, library.pre_tokenizers
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(library.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = before.Sequence(
        [
            before.Split(library.Regex(_WORDS), behavior="removed", invert=True),
            before.ByteLevel(add_prefix_space=False),
        ]
    )
    ends = [(token, vocab[token]) for token in (start, end)]
    backend.post_processor = library.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ends
    )
    return backend


def _add_special(backend: Any, roles: Mapping[str, Any], place: Path) -> None:
    """Tokens that are found in a text before it is taken apart; a tokenizer.json has its own."""
    added = _library().AddedToken
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for role, token in roles.items():
        if backend.token_to_id(_content(token)) is None:
            raise ValueError(
                f"{place}: the {role} {shown(_content(token))} is not in the vocabulary; name one "
                "that is in special_tokens_map.json"
            )
        if _content(token) in there:
            continue
        names = ("lstrip", "rstrip", "normalized", "single_word")
        given = {n: bool(token[n]) for n in names if n in token} if isinstance(token, dict) else {}
        backend.add_special_tokens([added(_content(token), special=True, **given)])


def train_tokenizer(
    folder: str | os.PathLike, texts: Iterable[str], vocab_size: int, length: int = LENGTH
) -> Tokenizer:
    """Makes a vocabulary of texts in CLIP's layout, and writes its folder.

    The layout is 256 bytes, 256 bytes that end a word, pairs, the start and the end token; any text
    has ids. The files are those that transformers' `CLIPTokenizer` reads.

    Args:
      folder: gets vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json; made
        if missing.
      texts: what pairs are counted in.
      vocab_size: greatest number of tokens, 514 or more; few texts make fewer.
      length: ids of every text.

    Returns:
      The tokenizer that is read from there.

    Raises:
      ValueError: vocab_size is too small.
    """
    library = _library()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    first = [*alphabet, *(symbol + _WORD_END for symbol in alphabet)]
    if vocab_size < len(first) + 2:
        raise ValueError(f"vocab_size must be at least {len(first) + 2}, got {vocab_size}")
    ends = {_START: 0, _END: 1}
    counted = _clip(ends, [], _START, _END, _END)
    counted.post_processor = None
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        show_progress=False,
        # Numbered beforehand: or pairs that are equally frequent come in another order each time.
        end_of_word_suffix=_WORD_END,
        special_tokens=first[len(alphabet) :],
    )
    counted.train_from_iterator(texts, trainer)
    merges = json.loads(counted.to_str())["model"]["merges"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    pairs = pairs[: vocab_size - len(first) - 2]
    tokens = dict.fromkeys([*first, *(one + other for one, other in pairs), _START, _END])
    folder = as_path(folder)
    make_folder(folder)
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    with replacing(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
        temporary.write_text("\n".join(lines), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **_CLIP},
    )
    write_json(folder / "special_tokens_map.json", _CLIP)
    return load_tokenizer(folder)
