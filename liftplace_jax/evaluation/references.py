"""Reference statistics: made once from real images, kept in an .npz, read from published ones too.

Keys are those that published tools share: `mu`, `sigma` (pytorch-fid and the ADM evaluator),
`mu_s`, `sigma_s` (ADM's spatial features), `arr_0` (ADM: uint8 images). Ours adds `features` (rows
for precision, recall and KID) and `meta` (JSON: what made it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from liftplace_jax.evaluation.frechet import check_statistics
from liftplace_jax.host.buckets import as_path, local_copy, reaching
from liftplace_jax.host.files import write_npz

# Kind of features -> the names of its mean and covariance.
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
KNOWN = ("meta", "features", *sum(KEYS.values(), ()))  # what a reference is made of
SHOWN = 8  # arrays of a file, in messages


class ReferenceFileError(ValueError):
    """A file cannot serve as a reference; the message names it and the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What generated samples are compared with.

    Attributes:
      statistics: "features" and, if known, "spatial" -> (mean (D,), covariance (D, D)), float64.
      features: (M, D) float32 rows, or None: then neither precision and recall nor KID.
      info: what made it; "extractor" and "count" if known.
      digest: SHA-256 of its file, to name it in results.
      logits: (M, classes) of its images, or None: then no Inception Score where it is compared.
      cosines: (M,) of its images and their prompts, or None: then no CLIP score.
    """

    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    info: Mapping[str, Any]
    digest: str
    logits: np.ndarray | None = None
    cosines: np.ndarray | None = None


def save_reference(
    path: str | os.PathLike,
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    features: np.ndarray | None,
    info: Mapping[str, Any],
) -> None:
    """Writes a reference file, whole or not at all.

    Args:
      path: an .npz file; its folder exists.
      statistics: as in `Reference`.
      features: rows to keep, or None.
      info: what made it, as JSON types.
    """
    arrays = {"meta": np.array(json.dumps(dict(info)))}
    for kind, (mean, covariance) in statistics.items():
        arrays |= dict(zip(KEYS[kind], (mean, covariance), strict=True))
    if features is not None:
        arrays["features"] = features
    write_npz(path, arrays)


def load_reference(path: str | os.PathLike) -> Reference:
    """Reads a reference file: ours, pytorch-fid's or the ADM evaluator's.

    Raises:
      ReferenceFileError: it is missing, damaged, holds objects (which would have to be
        unpickled), or
        lacks statistics that fit each other and can be those of any features.
    """
    path = as_path(path)
    with reaching(path):
        found = path.is_file()
    if not found:
        raise ReferenceFileError(
            f"{path}: no such file; make one with python -m liftplace_jax.evaluate ref"
        )
    with local_copy(path) as file:
        arrays = read_npz(file, KNOWN)
        if not set(KEYS["features"]) & arrays.keys():
            raise ReferenceFileError(
                f"{path}: has no mu and sigma; images (an .npz with arr_0) can be compared by "
                "python -m liftplace_jax.evaluate calc, and made a reference by evaluate ref "
                f"--data; it has {contents(file)}"
            )
        sha256 = digest(file)
    try:
        return Reference(*_checked(arrays), sha256)
    except (ValueError, TypeError) as error:
        raise ReferenceFileError(f"{path}: {error}") from error


def _checked(arrays):
    """(statistics, features, info) of a file's arrays."""
    statistics = {}
    for kind, keys in KEYS.items():
        missing = [key for key in keys if key not in arrays]
        if len(missing) == 1:
            raise ValueError(f"has no {missing[0]}, though the other of {' and '.join(keys)}")
        if not missing:
            mean, covariance = (arrays[key] for key in keys)
            suffix = keys[0].removeprefix("mu")
            statistics[kind] = check_statistics(mean, covariance, suffix, thorough=True)
    info = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    if not isinstance(info, dict):
        raise ValueError(f"meta is {info!r}, want a JSON object")
    if type(info.get("count", 2)) is not int or info.get("count", 2) < 2:
        raise ValueError(f"meta has count {info['count']!r}, want a number of images")
    features = arrays.get("features")
    if features is not None:
        if np.iscomplexobj(features):
            raise ValueError("features has complex numbers, want real ones")
        features = np.asarray(features, np.float32)
        if features.shape[1:] != statistics["features"][0].shape:
            raise ValueError(f"features {features.shape} do not fit mu")
        if not np.isfinite(features).all():
            raise ValueError("features has non-finite values")
    return statistics, features, info


def read_npz(path: str | os.PathLike, keys: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, never unpickled.

    Args:
      path: the file, on this machine.
      keys: read no others.

    Raises:
      ReferenceFileError: it cannot be read so.
    """
    with _npz(path) as file:
        return {key: file[key] for key in file.files if keys is None or key in keys}


def shapes(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, type) of the arrays of an .npz file, whose numbers are not read.

    Raises:
      ReferenceFileError: it cannot be read.
    """
    found = {}
    with _npz(path) as file:
        assert file.zip is not None
        for member in file.zip.namelist():
            with file.zip.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, _, dtype = read(stream)
            found[member.removesuffix(".npy")] = shape, dtype
    return found


def contents(path: str | os.PathLike) -> str:
    """The arrays of an .npz file in words: "mu (3,) float64, sigma (3, 3) float64"."""
    listed = [f"{name} {shape} {dtype}" for name, (shape, dtype) in shapes(path).items()]
    more = f" and {len(listed) - SHOWN} others" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "no arrays") + more


@contextmanager
def _npz(path):
    """An open .npz file; whatever goes wrong in the block becomes a ReferenceFileError."""
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError(f"it is a single array {file.shape} {file.dtype} (.npy)")
            yield file
    except Exception as error:  # a damaged archive can fail anywhere inside
        reason = (str(error).splitlines() or [""])[0]
        kind = type(error).__name__
        raise ReferenceFileError(f"{path}: no readable .npz: {kind}: {reason}") from error


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
