"""Reading and writing published weight files as dictionaries of NumPy arrays.

Files are data: nothing in a file is run, whatever it asks for.
"""

import json
import math
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name "bfloat16", which safetensors looks up
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from liftplace_jax.host.buckets import as_path, local_copy
from liftplace_jax.host.files import replacing
from liftplace_jax.host.outside import cut, find_fault, shown
from liftplace_jax.weights.entries import WeightFileError, find_state_dict, plain_names
from liftplace_jax.weights.pickled import (
    check_growth,
    first_line,
    read_torch,
    reason_of,
    to_numpy,
)


def read_tensors(path: str | os.PathLike, entry: str | int | None = None) -> dict[str, np.ndarray]:
    """Reads a state dict.

    A state dict in a dictionary (such as under "state_dict" or "ema"), in one within it
    ("ema.shadow") or in a list (the DDPM checkpoints: model, optimizer, epoch, step, EMA) is
    unwrapped; numbers and texts beside its tensors are left out. Any chain of prefixes "module."
    and "_orig_mod." of every name is dropped, with the `n_averaged` of PyTorch's AveragedModel.

    Args:
      path: a .safetensors, .pt, .pth, .ckpt, .bin (PyTorch, weights only) or .npz file, of this
        machine or a bucket. In an .npz with keys "param/<name>" only those count, without the
        prefix.
      entry: which entry of a dictionary, or item of a list, to take ("ema", "-1" or -1), or of one
        within it ("ema.shadow"), if there are several state dicts; or how the names of the wanted
        tensors begin ("ema_model"), without which they are returned.

    Returns:
      Arrays by name, bfloat16 as float32, everything else as stored.

    Raises:
      WeightFileError: the file is missing, empty, no file, damaged, of an unknown kind, would run
        code or fill the memory, or has a tensor that is no plain array.
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
    tensors = plain_names(path, find_state_dict(path, content, entry))
    return {name: _to_numpy(path, name, value) for name, value in tensors.items()}


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
        return _to_numpy(self._path, name, value)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


_CHECKSUMS = "crc32"  # in a file's header, of each tensor; files of others have none


def _checksum(value: np.ndarray) -> str:
    """Of the values, and of what the header says they are."""
    start = zlib.crc32(f"{value.dtype.name} {list(value.shape)}".encode())
    content: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return f"{zlib.crc32(content, start):08x}"


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
    fault = find_fault(path)
    if fault:
        raise WeightFileError(f"{path}: {_said(fault)}")
    with local_copy(path) as file:
        fault = find_fault(file)
        if fault:
            raise WeightFileError(f"{path}: {_said(fault)}")
        yield file


def _said(fault: str) -> str:
    return f"cannot be read: {fault}" if fault.startswith("it ") else fault


def _read(path: Path, reader: Callable[[Path], Any], file: Path) -> Any:
    """The content of `file`, a copy of path or path itself."""
    try:
        return reader(file)
    except WeightFileError as error:
        raise WeightFileError(str(error).replace(str(file), str(path), 1)) from error
    except Exception as error:  # a damaged file can fail anywhere inside a reader
        said = reason_of if reader is read_torch else _reason_of
        reason = _other_kind(file) or said(error)
        raise WeightFileError(f"{path}: cannot be read as weights only: {reason}") from error


def _reason_of(error: Exception) -> str:
    kind = re.search(r"module 'numpy' has no attribute '(float\w+)'", str(error))
    if kind:
        return f"it has numbers of the kind {kind[1]}, of a quantised model: save it as float32"
    said = first_line(error)
    if isinstance(error, OSError | MemoryError):
        return said
    return f"it is damaged, or no file of this kind: copy or download it again ({said})"


def _other_kind(file: Path) -> str | None:
    """What a file is that is not what its name says, as far as its beginning tells."""
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch what it stands for, git lfs pull"
    if not start.strip(b"\0"):
        return "it begins with zeros, as a file that was never written: copy or download it again"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, not what was meant to be downloaded: download it again"
    if start.startswith(b"\x1f\x8b"):
        return "it is compressed: unpack it with gunzip"
    if start.startswith(b"PK") and file.suffix == ".safetensors":
        return "it is an archive, of torch.save (name it .pt) or of NumPy (name it .npz)"
    if start[8:9] == b"{" and file.suffix != ".safetensors":
        return "it is a .safetensors file: name it so"
    return None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    check_growth(path)
    with zipfile.ZipFile(path) as archive:
        names = Counter(archive.namelist())
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise WeightFileError(f"{path}: has {', '.join(cut(twice, 4))} more than once")
        for member in archive.infolist():
            with archive.open(member) as file:
                _check_header(path, member, file)
    with np.load(path, allow_pickle=False) as file:
        parameters = [name for name in file.files if name.startswith("param/")]
        return {name.removeprefix("param/"): file[name] for name in parameters or file.files}


def _check_header(path: Path, member: zipfile.ZipInfo, file: Any) -> None:
    """Refuses an array before memory is taken for it."""
    read = _HEADERS.get(np.lib.format.read_magic(file))
    shape, _, dtype = read(file) if read else ((), False, np.dtype("u1"))
    name = member.filename.removesuffix(".npy")
    if dtype.hasobject:
        raise WeightFileError(
            f"{path}: cannot be read as weights only: {name} holds Python objects, and reading "
            "them would run code: save it as an array of numbers"
        )
    size, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if read and size != held:
        raise WeightFileError(
            f"{path}: cannot be read as weights only: {name} has shape {shown(shape)} of {dtype}, "
            f"{size:,} bytes, and the file holds {held:,}"
        )


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_torch,
    ".bin": read_torch,
}


def _to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    try:
        return to_numpy(value)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise WeightFileError(f"{path}: {name} {reason}") from error


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
