"""Captions of pictures: of a folder (metadata.csv, metadata.jsonl, name.txt), of tars, of TFDS.

A caption is one line: its white space is single spaces. An empty one is allowed; it is what a
network is told where it is told nothing. What is empty or very long is counted and said; what
cannot be right is refused: a picture without a caption, a caption without its picture, a picture
named twice or outside the folder, bytes that are no UTF-8.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from liftplace_jax.data.pictures import Member
from liftplace_jax.host import processes
from liftplace_jax.host.outside import parse_object, shown

METADATA = ("metadata.csv", "metadata.jsonl")
FILE, TEXT = "file_name", "text"  # columns of metadata, as Hugging Face's folders have them
NONE = f"neither {METADATA[0]}, {METADATA[1]} (columns {FILE}, {TEXT}) nor name.txt beside name.jpg"
MOST_CHARACTERS = 131_072  # of a caption; what is longer is something else
JSON, JSON_TEXTS = ".json", ("caption", "text")  # of tar files
_LONG = 1_000  # characters, that no known tokenizer keeps all of
_THREADS = 16  # for disks that answer late
_FEATURES = ("text", "caption", "captions")  # of TFDS data sets


def digest(captions: Iterable[str]) -> str:
    """What tells captions from others, as 16 hexadecimal digits."""
    found = hashlib.sha256()
    for text in captions:
        found.update(text.encode() + b"\n")
    return found.hexdigest()[:16]


def find_metadata(folder: Path, root: Path) -> list[Path]:
    """The files of captions of a split's folder: in it, or in the folder of all splits.

    There should be one at most; `read_captions` refuses two.
    """
    for place in (folder, root):
        found = [place / name for name in METADATA if (place / name).exists()]
        if found:
            return found
    return []


def read_captions(
    folder: Path, root: Path, files: Sequence[str], table: Path | None = None
) -> list[str]:
    """The captions of a folder's pictures; counts on stderr what is empty or very long.

    Args:
      folder: where the pictures are; its metadata.csv or metadata.jsonl names them relative to it.
      root: of all splits, whose metadata names the pictures of each relative to it; or `folder`.
      files: the pictures, relative to `folder`, sorted.
      table: instead, a metadata file that lies elsewhere and names pictures relative to `folder`.

    Returns:
      A caption of each of `files`.

    Raises:
      ValueError: captions that are missing, broken or doubtful; names the file and its line.
    """
    metadata = [table] if table else find_metadata(folder, root)
    if len(metadata) > 1:
        raise ValueError(f"{metadata[0].parent} has both {' and '.join(METADATA)}: keep one")
    if metadata:
        found, remarks = _of_metadata(metadata[0], folder, "." if table else None)
        captions, where = _matched(metadata[0], folder, found, files), metadata[0].name
    else:
        captions, where, remarks = _beside(folder, files), "the .txt files beside them", []
    remarks += _remarks(files, captions)
    if remarks:
        processes.say_once(f"{folder}: captions of {where}: {'; '.join(remarks)}")
    return captions


def _remarks(files: Sequence[str], captions: Sequence[str]) -> list[str]:
    remarks = []
    for what, chosen in (
        ("empty", lambda text: not text),
        (
            f"longer than {_LONG:,} characters, of which a tokenizer keeps the beginning",
            lambda text: len(text) > _LONG,
        ),
    ):
        named = [file for file, text in zip(files, captions, strict=True) if chosen(text)]
        if named:
            remarks.append(f"{len(named):,} {what} ({_first(named)})")
    return remarks


def member_captions(folder: Path, files: Sequence[str], members: Sequence[Member]) -> list[str]:
    """The captions of pictures in tar files; counts on stderr what is empty or very long.

    Args:
      folder: of the tar files.
      files: names of the pictures.
      members: of each, its text (name.txt), or a JSON object with "caption" or "text" (name.json).

    Raises:
      ValueError: a caption that is broken; names it.
    """
    captions = []
    for member in members:
        try:
            if member.size > 16 * MOST_CHARACTERS:
                raise ValueError(f"it has {member.size:,} bytes, so it is no caption")
            text = _decoded(member.read())
            captions.append(_clean(_json_caption(text) if member.name.endswith(JSON) else text))
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read caption {member}: {_reason(error)}") from error
    remarks = _remarks(files, captions)
    if remarks:
        processes.say_once(f"{folder}: captions of the tar files: {'; '.join(remarks)}")
    return captions


def _json_caption(text: str) -> str:
    fields = parse_object(text)
    names = [name for name in JSON_TEXTS if name in fields]
    if len(names) != 1 or not isinstance(fields[names[0]], str):
        raise ValueError(f"it must have one of {list(JSON_TEXTS)}, a text")
    return fields[names[0]]


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"the first is {names[0]}"


def _clean(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"the caption has {len(text):,} characters, so it is something else (at most "
            f"{MOST_CHARACTERS:,})"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a character, which JSON can spell
        raise ValueError(f"the caption {shown(text)} has what is no character") from error
    return " ".join(text.replace("\0", " ").split())


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}: byte {content[error.start]:#04x} is no UTF-8: save it as UTF-8"
        ) from error


def _beside(folder: Path, files: Sequence[str]) -> list[str]:
    """Of name.jpg what is in name.txt."""
    stems = [os.path.splitext(file)[0] for file in files]
    order = sorted(range(len(files)), key=lambda place: stems[place])
    for one, other in pairwise(order):
        if stems[one] == stems[other]:
            raise ValueError(
                f"{folder / stems[one]}.txt may be the caption of {files[one]} or of "
                f"{files[other]}: rename one"
            )
    lacking = [
        file
        for file, stem in zip(files, stems, strict=True)
        if not (folder / f"{stem}.txt").exists()
    ]
    if len(lacking) == len(files):
        raise ValueError(f"{folder} has no captions: {NONE}")
    if lacking:
        raise ValueError(_without(lacking, folder, f"no {Path(lacking[0]).stem}.txt beside it"))

    def read(stem: str) -> str:
        path = folder / f"{stem}.txt"
        try:
            if not path.is_file():
                raise ValueError("it is no regular file")  # reading a pipe would wait for ever
            if path.stat().st_size > 4 * MOST_CHARACTERS:
                raise ValueError(f"it has {path.stat().st_size:,} bytes, so it is no caption")
            return _clean(_decoded(path.read_bytes()))
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read caption {path}: {_reason(error)}") from error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, stems))


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _without(lacking: Sequence[str], folder: Path, why: str) -> str:
    others = f" (and {len(lacking) - 1:,} others have none)" if len(lacking) > 1 else ""
    return f"{folder / lacking[0]} has no caption: {why}{others}: add it, or take the picture away"


def _matched(
    metadata: Path, folder: Path, found: Mapping[str, tuple[int, str]], files: Sequence[str]
) -> list[str]:
    """Captions in the order of the pictures; every one has its picture, and the other way round."""
    known = {file.replace(os.sep, "/") for file in files}
    strange = [name for name in found if name not in known]
    if strange:
        line, _ = found[strange[0]]
        others = f" (nor of {len(strange) - 1:,} others that it names)" * (len(strange) > 1)
        raise ValueError(
            f"{metadata}: line {line}: there is no picture {shown(strange[0])} in {folder}{others}"
        )
    lacking = [file for file in files if file.replace(os.sep, "/") not in found]
    if lacking:
        raise ValueError(_without(lacking, folder, f"{metadata.name} does not name it"))
    return [found[file.replace(os.sep, "/")][1] for file in files]


def _of_metadata(
    metadata: Path, folder: Path, place: str | None = None
) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """({name relative to `folder`: (line, caption)}, remarks) of a metadata file.

    Those of other folders, which the metadata of all splits names too, are not in it. `place` is
    how it names the folder, where that is not the way from the one to the other.
    """
    place = place or folder.relative_to(metadata.parent).as_posix()
    found: dict[str, tuple[int, str]] = {}
    ignored: set[str] = set()
    try:
        if not metadata.is_file():
            raise ValueError("it is no regular file")
        text = _decoded(metadata.read_bytes())
        rows = _csv_rows(text) if metadata.suffix == ".csv" else _json_rows(text)
        for line, name, caption, others in rows:
            ignored.update(others)
            try:
                name, caption = _inside(name), _clean(caption)
            except ValueError as error:
                raise ValueError(f"line {line}: {error}") from error
            if place != ".":
                if not name.startswith(f"{place}/"):
                    continue
                name = name.removeprefix(f"{place}/")
            if name in found:
                raise ValueError(
                    f"lines {found[name][0]} and {line} both are of {shown(name)}: keep one"
                )
            found[name] = line, caption
    except (ValueError, OSError) as error:
        raise ValueError(f"{metadata}: {_reason(error)}") from error
    return found, [f"columns not read: {', '.join(sorted(ignored))}"] if ignored else []


def _inside(name: str) -> str:
    """A picture's path in its one form."""
    if not name:
        raise ValueError(f"{FILE} is empty")
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain in (".", "..") or "\0" in name:
        raise ValueError(f"{FILE} {shown(name)} is outside the folder")
    return plain


Row = tuple[int, str, str, Iterable[str]]  # line, picture, caption, names of what is not read


def _csv_rows(text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if header.count(FILE) != 1 or header.count(TEXT) != 1:
            raise ValueError(
                f"line 1: the header is {shown(','.join(header))}; it must have {FILE} and {TEXT}, "
                "once each, separated by commas"
            )
        file, caption = header.index(FILE), header.index(TEXT)
        others = [name for name in header if name not in (FILE, TEXT)]
        line = reader.line_num + 1
        for row in reader:
            if len(row) not in (0, len(header)):
                raise ValueError(
                    f"line {line}: has {len(row)} fields, the header has {len(header)}: put a "
                    "caption with commas into double quotes"
                )
            if row:
                yield line, row[file], row[caption], others
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error


def _json_rows(text: str) -> Iterator[Row]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            fields = parse_object(content)
            for name in (FILE, TEXT):
                if not isinstance(fields.get(name), str):
                    fault = f"is {shown(fields[name])}, no text" if name in fields else "is missing"
                    raise ValueError(f"{name} {fault}")
        except json.JSONDecodeError as error:
            raise ValueError(f"line {line}, column {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        yield line, fields[FILE], fields[TEXT], fields.keys() - {FILE, TEXT}


class RecordCaptions(Sequence[str]):
    """Captions of a TFDS split, read as they are asked for."""

    def __init__(self, name: str, feature: str, records: Sequence[Mapping]):
        """Takes the records of a split and the name of their feature; `name` is for errors."""
        self._name, self._feature, self._records = name, feature, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # raises an IndexError beyond the end, as iteration needs
        value = self._records[index][self._feature]
        if isinstance(value, Mapping):
            value = value[TEXT]
        if not isinstance(value, bytes):  # several
            value = value[0] if len(value) else b""
        try:
            return _clean(_decoded(value))
        except ValueError as error:
            raise ValueError(f"data set {self._name}, example {index}: caption: {error}") from error


def record_captions(name: str, builder, split: str) -> RecordCaptions | None:
    """The captions of a split of a prepared TFDS builder; no image is decoded for them.

    They are the feature "text" or "caption", or the first of "captions", as coco_captions has them:
    a sequence of texts, or of dictionaries with a "text". None: it has none of these.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    for feature in _FEATURES:
        kind = features[feature] if feature in features else None
        kind = kind.feature if isinstance(kind, tfds.features.Sequence) else kind
        if isinstance(kind, tfds.features.FeaturesDict):
            kind = kind[TEXT] if TEXT in kind else None
        if isinstance(kind, tfds.features.Text):
            decoders = {"image": tfds.decode.SkipDecoding()}
            records = builder.as_data_source(split, decoders=decoders)
            return RecordCaptions(f"{name} ({split})", feature, records)
    return None
