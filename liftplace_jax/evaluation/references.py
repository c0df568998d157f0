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
from typing import Any

import numpy as np

from liftplace_jax.evaluation.frechet import check_statistics
from liftplace_jax.host.buckets import as_path, local_copy, reaching
from liftplace_jax.host.files import write_npz

# Kind of features -> the names of its mean and covariance.
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


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
    """

    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    info: Mapping[str, Any]
    digest: str


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
      ReferenceFileError: it is missing, damaged, holds objects (which would have to be unpickled), or
        lacks statistics that fit each other.
    """
    path = as_path(path)
    with reaching(path):
        found = path.is_file()
    if not found:
        raise ReferenceFileError(
            f"{path}: no such file; make one with python -m liftplace_jax.evaluate ref"
        )
    with local_copy(path) as file:
        arrays = read_npz(file, ("meta", "features", *sum(KEYS.values(), ())))
        sha256 = digest(file)
    if not {"mu", "sigma"} <= arrays.keys():
        raise ReferenceFileError(
            f"{path}: has no mu and sigma; images (an .npz with arr_0) can be compared by "
            "python -m liftplace_jax.evaluate calc"
        )
    try:
        return Reference(*_contents(arrays), sha256)
    except (ValueError, TypeError) as error:
        raise ReferenceFileError(f"{path}: {error}") from error


def _contents(arrays):
    """Checked (statistics, features, info) of a file's arrays."""
    statistics = {
        kind: tuple(np.asarray(arrays[key], np.float64) for key in keys)
        for kind, keys in KEYS.items()
        if all(key in arrays for key in keys)
    }
    for mean, covariance in statistics.values():
        check_statistics(mean, covariance)
    info = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    if not isinstance(info, dict):
        raise ValueError(f"meta is {info!r}, want a JSON object")
    features = arrays.get("features")
    if features is not None:
        features = np.asarray(features, np.float32)
        if features.shape[1:] != statistics["features"][0].shape:
            raise ValueError(f"features {features.shape} do not fit mu")
    return statistics, features, info


def read_npz(path: str | os.PathLike, keys: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, never unpickled.

    Args:
      path: the file, on this machine.
      keys: read no others.

    Raises:
      ReferenceFileError: it cannot be read so.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if keys is None or key in keys}
    except Exception as error:  # a damaged archive can fail anywhere inside
        reason = (str(error).splitlines() or [""])[0]
        kind = type(error).__name__
        raise ReferenceFileError(f"{path}: no readable .npz: {kind}: {reason}") from error


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
