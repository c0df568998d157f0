"""Reading and writing published weight files as dictionaries of NumPy arrays.

Files are data: nothing in a file is run, whatever it asks for.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name "bfloat16", which safetensors looks up
import numpy as np
from safetensors.numpy import load_file, save_file

from liftplace_jax.files import replacing

# Entries under which training scripts keep a state dict beside other things.
_ENTRIES = ("state_dict", "model", "ema")


class WeightFileError(ValueError):
    """A weight file cannot be used; the message names the file and the reason."""


def read_tensors(path: str | os.PathLike, entry: str | int | None = None) -> dict[str, np.ndarray]:
    """Reads a state dict.

    A dictionary with a state dict under "state_dict", "model" or "ema" is unwrapped, as is a list
    that starts with one (the DDPM checkpoints); a prefix "module." of every name is dropped.

    Args:
      path: a .safetensors, .pt, .pth, .ckpt, .bin (PyTorch, weights only) or .npz file. In an
        .npz with keys "param/<name>" only those count, without the prefix.
      entry: which entry of a dictionary, or item of a list, to take (for example "ema" or -1).

    Returns:
      Arrays by name, bfloat16 as float32, everything else as stored.

    Raises:
      WeightFileError: the file is missing, damaged, of an unknown kind, would run code, or holds
        no state dict, or several and entry is None.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise WeightFileError(
            f"{path}: unknown kind {path.suffix!r} of weight file; known: {sorted(_READERS)}"
        )
    if not path.is_file():
        raise WeightFileError(f"{path}: no such file")
    try:
        content = reader(path)
    except WeightFileError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside a reader
        reason = (str(error).splitlines() or [""])[0]
        raise WeightFileError(
            f"{path}: cannot be read as weights only: {type(error).__name__}: {reason}"
        ) from error
    tensors = {name: _to_numpy(value) for name, value in _unwrap(path, content, entry).items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


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
    ".safetensors": load_file,
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
    if isinstance(content, list | tuple):
        nested = dict(enumerate(content)) | {i - len(content): v for i, v in enumerate(content)}
        default = [0]
    elif isinstance(content, Mapping) and not _is_state_dict(content):
        nested = content
        default = [name for name in _ENTRIES if _is_state_dict(content.get(name))]
    else:
        nested, default = {None: content}, [None]
    if entry is None and len(default) > 1:
        raise WeightFileError(f"{path}: holds several state dicts, {default}; choose one as entry")
    chosen = entry if entry is not None else default[0] if default else None
    if chosen not in nested or not _is_state_dict(nested[chosen]):
        where = "" if entry is None else f" at entry {entry!r}"
        held = f", its entries are {list(nested)}" if isinstance(content, Mapping | list) else ""
        raise WeightFileError(f"{path}: no state dict (named tensors){where}{held[:500]}")
    return nested[chosen]


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

    Args:
      path: the file; its folder exists.
      tensors: arrays by name.
      metadata: text kept in the file's header.
    """
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}) or None)
