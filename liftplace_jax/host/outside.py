"""Files that others made: what they are is judged before they are read, and said in few lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from liftplace_jax.host.buckets import as_path, is_in_bucket, reaching

MAX_JSON_BYTES = 16 * 2**20
"""Of a JSON file: the longest known, an index of shards, has less than a twentieth of that."""
MAX_JSON_DEPTH = 32
EMPTY = "it is empty (0 bytes): copy or download it again"
MOST_LINES = 16
"""Of a list in a message."""


def lies(path: Path) -> bool:
    """Whether there is something of this name, be it a link to nothing."""
    return path.exists() or (not is_in_bucket(path) and path.is_symlink())


def find_fault(path: Path) -> str | None:
    """What keeps a path from being a file with something in it; None: nothing does.

    Raises:
      OSError: it may not be looked at, or its bucket cannot be reached.
    """
    with reaching(path):
        if path.is_file():
            # A bucket's file is judged as its copy.
            empty = not is_in_bucket(path) and path.stat().st_size == 0
            return EMPTY if empty else None
        if path.is_dir():
            return "it is a folder, not a file"
        if path.exists():  # to open a pipe would wait for ever
            return "it is a pipe, a socket or a device, not a file"
    link = not is_in_bucket(path) and path.is_symlink()
    return "it is a link that leads to no file" if link else "no such file"


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds an object, in UTF-8, UTF-16 or UTF-32, with or without a mark.

    Args:
      path: a file of this machine or a bucket.

    Raises:
      ValueError: it is no such file, too long, too deeply nested, or not JSON of finite numbers
        whose keys are all different; names the file and the reason.
      OSError: its bucket cannot be reached.
    """
    path = as_path(path)
    try:
        return _read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except OSError as error:
        if is_in_bucket(path):
            raise
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    fault = find_fault(path)
    if fault:
        raise ValueError(fault)
    with reaching(path), path.open("rb") as file:
        content = b""
        while len(content) <= MAX_JSON_BYTES and (part := file.read(2**16)):
            content += part
    if not content:
        raise ValueError(EMPTY)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {MAX_JSON_BYTES:,} bytes, so it is something else")
    found = parse_object(content)
    level = [found]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for part in level for item in _items(part)]
    if level:
        raise ValueError(f"its brackets are nested more than {MAX_JSON_DEPTH} deep")
    return found


def parse_object(content: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
      ValueError: it is none, or not JSON of finite numbers whose keys are all different.
    """
    try:
        found = json.loads(
            content,
            object_pairs_hook=_object,
            parse_constant=_refuse_number,
            parse_float=_number,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is no JSON object but a {type(found).__name__}")
    return found


def _items(part: Any) -> Iterable[Any]:
    if isinstance(part, dict):
        return part.values()
    return part if isinstance(part, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is there more than once: keep one")
    return found


def _number(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _whole(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"it has a whole number of {len(text):,} digits")
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"it has the number {text}, which is not finite")


def shown(value: Any, most: int = 160) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def cut(lines: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """Lines for a message; those above `most` are counted."""
    more = len(lines) - most
    return [*lines] if more <= 0 else [*lines[:most], f"and {more:,} more"]
