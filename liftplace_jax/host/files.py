"""Files that are written whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from liftplace_jax.host.buckets import as_path, is_in_bucket, make_folder, on_this_machine, upload


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path to write; it takes path's place only if the block succeeds.

    Args:
      path: a file, also of a bucket; the temporary one is always of this machine.

    Raises:
      OSError: it cannot be written, or the disk is full; names the path.
    """
    path = as_path(path)
    if is_in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="liftplace-") as folder:
            temporary = Path(folder) / path.name
            try:
                yield temporary
            except OSError as error:
                raise unwritable(temporary, error) from error
            upload(temporary, path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder to fill; it takes path's place only if the block succeeds.

    Raises:
      FileExistsError: there is something at path, other than an empty folder.
      ValueError: it is of a bucket.
    """
    path = on_this_machine(path, "a folder that is written")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: name a new folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | os.PathLike) -> None:
    """Sees that a file can be written, before the work whose result it will hold.

    Folders that are missing are as good as there. A bucket is not asked.

    Raises:
      ValueError: there is a folder at path, or a file where a folder has to be.
      OSError: the folder cannot be written to.
    """
    path = as_path(path)
    if is_in_bucket(path):
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


# Of what `replacing` is given, so that no file of somebody else's is taken for a temporary one.
_TEMPORARY = re.compile(r"\..+\.(json|jsonl|md|npz|png|safetensors)\.\d+|\.pipeline\.\d+")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that `replacing` was filling when its process died.

    Or a folder, of `replacing_folder`.
    """
    return bool(_TEMPORARY.fullmatch(name))


def unwritable(path: str | os.PathLike, error: OSError) -> OSError:
    """The error, with the name of the file: that of a full disk has none."""
    if error.errno is None:
        return OSError(f"{path} cannot be written: {error}")
    return OSError(error.errno, f"cannot be written ({error.strerror})", os.fspath(path))


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes a compressed .npz file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_json(path: str | os.PathLike, advice: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: the file.
      advice: what to do if it is none, for the error message.

    Raises:
      ValueError: it is cut off, or holds something else; names it.
      OSError: there is none, or it cannot be read.
    """
    path = as_path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file. {advice}")
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. {advice}") from error
    return found


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON; its folder is made if missing, once the content has proved to be JSON."""
    path, text = as_path(path), json.dumps(content, indent=2) + "\n"
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_text(text)
