"""PyTorch's files, of which nothing is run: tensors, and the plain data that lie beside them."""

from __future__ import annotations

import argparse
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from liftplace_jax.weights.entries import WeightFileError

MAX_GROWTH = 20
_SMALL = 2**30


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, with NumPy's arrays and scalars, paths and the like as plain data.

    Raises:
      WeightFileError: PyTorch is not installed, or the file would not fit into memory.
      Exception: of PyTorch; `reason_of` says why.
    """
    try:
        import torch
        from torch.torch_version import TorchVersion
    except ImportError as error:
        raise WeightFileError(
            f"{path}: PyTorch reads {path.suffix} files and is not installed: pip install torch, "
            "or convert the file to .safetensors"
        ) from error
    if zipfile.is_zipfile(path):
        check_growth(path)
    safe = [argparse.Namespace, types.SimpleNamespace, TorchVersion, *_SAFE]
    with torch.serialization.safe_globals(safe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pickle's version; what fails is said by its error
        return torch.load(path, weights_only=True, map_location="cpu")


def check_growth(path: Path) -> None:
    """Refuses an archive that would fill the memory.

    Raises:
      WeightFileError: unpacked it is above 1 GiB and MAX_GROWTH times its size.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > max(_SMALL, MAX_GROWTH * path.stat().st_size):
        raise WeightFileError(
            f"{path}: {path.stat().st_size:,} bytes that unpack to {size:,}: no file of weights "
            "shrinks so; if it is one, save it without compression"
        )


def reason_of(error: Exception) -> str:
    """Why PyTorch refused a file, in words that advise nothing unsafe."""
    text = str(error)
    found = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)", text)
    if found:
        return (
            f"it holds a Python object, {found[1]}, and reading it would run code. If this is a "
            "whole pickled model, save its tensors where it was made, "
            "torch.save(model.state_dict(), file), and name that file"
        )
    if "TorchScript" in text:
        return (
            "it is a TorchScript program: save its tensors where it was made, "
            "torch.save(model.state_dict(), file), and name that file"
        )
    if isinstance(error, _NoNumbersError):
        return text
    if isinstance(error, OSError | MemoryError):
        return f"{type(error).__name__}: {text}"
    # Their other messages begin with how to read it nevertheless.
    said = "" if "weights_only" in text else f" ({first_line(error)})"
    return (
        "it is damaged, or no file of torch.save but a pickle of another kind: copy or download it "
        f"again, or save its tensors with torch.save(model.state_dict(), file){said}"
    )


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


class _NoNumbersError(ValueError):
    """A NumPy array in a file is of texts, dates or objects."""


class _Dtype:
    """A NumPy dtype of a file: only that of plain numbers becomes one."""

    def __init__(self, name: str, align: bool = False, copy: bool = True):
        self._name, self._order = str(name), "="

    def __setstate__(self, state: tuple) -> None:
        self._order = str(state[1])

    @property
    def is_number(self) -> bool:
        return re.fullmatch(r"[biufc]\d{1,2}", self._name) is not None and self._order in "<>=|"

    def made(self) -> np.dtype:
        if not self.is_number:
            raise _NoNumbersError(
                f"it holds a NumPy array of {self._name!r}, no plain numbers: save it without"
            )
        return np.dtype(self._name).newbyteorder(cast(Any, self._order))


class _Array:
    """A NumPy array of a file, before its content comes."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _from_bytes(content, dtype).reshape(shape, order="F" if is_fortran else "C")

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)


def _from_bytes(content: bytes | str, dtype: _Dtype) -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content
    made = dtype.made()
    return np.frombuffer(content, made).astype(made.newbyteorder("="))


def _scalar(dtype: _Dtype, content: Any = None) -> Any:
    if not dtype.is_number:  # a text or a date; no weight in any case
        return None
    return _from_bytes(content, dtype).reshape(())[()]


def _text(*parts: Any) -> str:
    return "/".join(map(str, parts))


def _dictionary(*_: Any) -> dict:
    return {}


def _no_bytes() -> bytes:
    """How the content of an empty array is written; `bytes` itself would make any number."""
    return b""


class _Type:
    """Stands for a class of NumPy's that a file names."""


# What takes the place of what a file names: none of it runs what the file brings.
_SAFE = [
    (_Dtype, "numpy.dtype"),
    (_dictionary, "collections.defaultdict"),
    (_Type, "numpy.ndarray"),
    (_no_bytes, "builtins.bytes"),
    (list, "builtins.list"),
    (dict, "builtins.dict"),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(
        (_text, f"{module}.{pure}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    ),
]


def to_numpy(value: Any) -> np.ndarray:
    """A tensor as an array; bfloat16 becomes float32, which NumPy knows.

    Raises:
      ValueError: it is sparse, quantised, without content, of a kind NumPy does not know, or
        larger than what is stored of it.
    """
    if isinstance(value, _Array):
        return value.value
    if not isinstance(value, np.ndarray):
        value = _from_tensor(value.detach())
    if value.dtype.name == "bfloat16":
        return value.astype(np.float32)
    return value


def _from_tensor(tensor: Any) -> np.ndarray:
    kind = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized or tensor.is_nested:
        raise ValueError(f"is sparse, quantised or nested ({kind}): save it dense")
    if kind.startswith(("float8", "float4")):
        raise ValueError(f"is of {kind}, of a quantised model: save it as float32")
    if tensor.device.type != "cpu":
        raise ValueError(f"has no content, only a shape (device {tensor.device.type!r})")
    size = tensor.numel() * tensor.element_size()
    if size > max(_SMALL, tensor.untyped_storage().nbytes()):
        raise ValueError(f"has shape {tuple(tensor.shape)}, but the file holds fewer numbers")
    return (tensor.float() if kind == "bfloat16" else tensor).numpy()
