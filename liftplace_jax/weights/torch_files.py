"""Reading and writing published weight files as dictionaries of NumPy arrays.

Files are data: nothing in a file is run, whatever it asks for.
"""

import argparse
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name "bfloat16", which safetensors looks up
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from liftplace_jax.host.buckets import as_path, local_copy, reaching
from liftplace_jax.host.files import replacing


class WeightFileError(ValueError):
    """A weight file cannot be used; the message names the file and the reason."""


class EntryError(WeightFileError):
    """A file holds no state dict, or several and the chosen entry is none; names the entries."""


def read_tensors(path: str | os.PathLike, entry: str | int | None = None) -> dict[str, np.ndarray]:
    """Reads a state dict.

    A state dict in a dictionary (such as under "state_dict" or "ema") or in a list (the DDPM
    checkpoints: model, optimizer, epoch, step, EMA) is unwrapped; a prefix "module." of every
    name is dropped.

    Args:
      path: a .safetensors, .pt, .pth, .ckpt, .bin (PyTorch, weights only) or .npz file, of this
        machine or a bucket. In an .npz with keys "param/<name>" only those count, without the
        prefix.
      entry: which entry of a dictionary, or item of a list, to take ("ema", "-1" or -1), if
        there are several state dicts.

    Returns:
      Arrays by name, bfloat16 as float32, everything else as stored.

    Raises:
      WeightFileError: the file is missing, damaged, of an unknown kind, or would run code.
      EntryError: it holds no state dict, none at `entry`, or several and entry is None.
      OSError: a bucket cannot be reached.
    """
    path = as_path(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise WeightFileError(
            f"{path}: unknown kind {path.suffix!r} of weight file; known: {sorted(_READERS)}"
        )
    with _existing(path) as file:
        content = _read(path, reader, file)
    tensors = {name: _to_numpy(value) for name, value in _unwrap(path, content, entry).items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


@contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[Mapping[str, np.ndarray]]:
    """Opens a .safetensors file, each of whose tensors is read when it is asked for.

    Yields:
      Arrays by name, as of `read_tensors`.

    Raises:
      WeightFileError: the file is missing or damaged.
      OSError: a bucket cannot be reached.
    """
    path = as_path(path)
    with _existing(path) as file, _read(path, lambda file: safe_open(file, "numpy"), file) as found:
        yield _OnDisk(path, found)


class _OnDisk(Mapping):
    def __init__(self, path: Path, file: Any):
        self._path, self._file, self._names = path, file, frozenset(file.keys())
        self._checksums = _stored_checksums(path, file)

    def __getitem__(self, name):
        if name not in self._names:
            raise KeyError(name)
        value = _read(self._path, lambda _: self._file.get_tensor(name), self._path)
        if self._checksums is not None and self._checksums.get(name) != _checksum(value):
            raise WeightFileError(
                f"{self._path} is damaged: {name} is not what was saved. Take it from a backup, or "
                "delete the file and run the command that made it again"
            )
        return _to_numpy(value)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


_CHECKSUMS = "crc32"  # in a file's header, of each tensor; files of others have none


def _checksum(value: np.ndarray) -> str:
    """Of the values, and of what the header says they are."""
    start = zlib.crc32(f"{value.dtype.name} {list(value.shape)}".encode())
    return f"{zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8), start):08x}"


def _stored_checksums(path: Path, file: Any) -> dict[str, str] | None:
    stored = (file.metadata() or {}).get(_CHECKSUMS)
    if stored is None:
        return None
    try:
        found = dict(json.loads(stored))
    except (ValueError, TypeError) as error:
        raise WeightFileError(f"{path} is damaged: its checksums cannot be read") from error
    lost = sorted(found.keys() - set(file.keys()))
    if lost:
        raise WeightFileError(f"{path} is damaged: it has no {lost[0]} any more")
    return found


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, "numpy") as file:
        return dict(_OnDisk(path, file))


@contextmanager
def _existing(path: Path) -> Iterator[Path]:
    """The file on this machine."""
    with reaching(path):
        found = path.is_file()
    if not found:
        raise WeightFileError(f"{path}: no such file")
    with local_copy(path) as file:
        yield file


def _read(path: Path, reader: Callable[[Path], Any], file: Path) -> Any:
    """The content of `file`, a copy of path or path itself."""
    try:
        return reader(file)
    except WeightFileError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside a reader
        found = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if found:
            raise WeightFileError(
                f"{path}: cannot be read as weights only: it holds a Python object, {found[1]}, "
                "and reading it would run code. If this is a whole pickled model, save its tensors "
                "where it was made, torch.save(model.state_dict(), file), and name that file"
            ) from error
        reason = (str(error).splitlines() or [""])[0]
        raise WeightFileError(
            f"{path}: cannot be read as weights only: {type(error).__name__}: {reason}"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightFileError(
            f"{path}: PyTorch reads {path.suffix} files and is not installed: pip install torch, "
            "or convert the file to .safetensors"
        ) from error
    # Training scripts store their parsed flags beside the weights: plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True, map_location="cpu")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        parameters = [name for name in file.files if name.startswith("param/")]
        return {name.removeprefix("param/"): file[name] for name in parameters or file.files}


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".ckpt": _read_torch,
    ".bin": _read_torch,
}


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(
            isinstance(name, str) and hasattr(value, "shape") and hasattr(value, "dtype")
            for name, value in content.items()
        )
    )


def _unwrap(path: Path, content: Any, entry: str | int | None) -> Mapping[str, Any]:
    if _is_state_dict(content):
        if entry is None:
            return content
        raise EntryError(f"{path}: is itself a state dict, it has no entry {entry!r}")
    hint, nested = "", dict(content) if isinstance(content, Mapping) else {}
    if isinstance(content, list | tuple):
        hint = " (in the published DDPM checkpoints, 0 is the model and -1 its EMA)"
        nested = dict(enumerate(content))
        if re.fullmatch(r"-?\d+", str(entry)):
            entry = int(entry) + (len(content) if int(entry) < 0 else 0)
    found = [name for name, value in nested.items() if _is_state_dict(value)]
    if entry is None and len(found) == 1:
        return nested[found[0]]
    if entry in found:
        return nested[entry]
    if entry is None and found:
        raise EntryError(f"{path}: holds several state dicts, {found}; choose one as entry{hint}")
    where = "" if entry is None else f" at entry {entry!r}"
    held = f"there are some at {found}{hint}" if found else f"it holds {_summary(content)}"
    raise EntryError(f"{path}: no state dict (named tensors){where}; {held}")


def _summary(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary of {sorted(map(str, content))}"[:500]
    if isinstance(content, list | tuple):
        return f"a list of {[type(item).__name__ for item in content]}"[:500]
    return f"a {type(content).__name__}"


def _to_numpy(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):  # a torch.Tensor; NumPy knows no bfloat16 from torch
        value = value.detach()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a .safetensors file, whole or not at all.

    Its header has a checksum of each tensor, which is compared when the tensor is read here; other
    programs pass over it.

    Args:
      path: the file; its folder exists.
      tensors: arrays by name.
      metadata: text kept in the file's header.

    Raises:
      OSError: it cannot be written, or the disk is full; names the path.
    """
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    checksums = {name: _checksum(value) for name, value in contiguous.items()}
    metadata = dict(metadata or {}) | {_CHECKSUMS: json.dumps(checksums, sort_keys=True)}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
