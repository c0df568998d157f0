"""Encoded data sets on disk: shards of moments, and the source that training reads them with.

    latents.json                            what was encoded, and by what
    <split>-00003-of-00157.array_record     of each image its columns and its latents' moments

An example's moments are those of the image and of its mirror image, mean and log variance, in
float16: the mean's rounding, 2e-4 RMS in units of a latent's standard deviation, is a fiftieth of
the noise of the first timestep (0.01), and the variance's is below 1 %. ImageNet at 256 pixels
takes 42 GB so, and twice as much in float32. Which columns there are, such as the label, and of
what shape and dtype, is in latents.json; one that says nothing is of a version that wrote labels
alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from liftplace_jax.data.columns import LABEL, RESERVED, Columned
from liftplace_jax.data.unpacking import UnpackLatents
from liftplace_jax.host.buckets import as_path, cached, fetched, is_in_bucket, listed
from liftplace_jax.host.differences import differences
from liftplace_jax.host.files import replacing, write_json

SHARD_SIZE = 8192
"""Examples in a shard: what is lost when encoding is cut off, 270 MB of latents of (32, 32, 4)."""
DTYPE = "float16"
Specs = Mapping[str, jax.ShapeDtypeStruct]
LABEL_ALONE: Specs = {LABEL: jax.ShapeDtypeStruct((), np.int32)}
_MANIFEST = "latents.json"
_COMMAND = "python -m liftplace_jax.encode --config=..."


@dataclasses.dataclass(frozen=True)
class Shard:
    """The file of the examples start..stop-1 of a split."""

    path: Path
    start: int
    stop: int

    def is_whole(self) -> bool:
        """Whether the file is there with all its records (their content has checksums)."""
        return self.path.is_file() and _open(self.path).num_records() == self.stop - self.start


def list_shards(folder: Path, split: str, count: int, shard_size: int) -> list[Shard]:
    """All shards of a split of `count` examples, whether they are there or not."""
    total = -(-count // shard_size)
    name = quote(split, safe="")  # of "train[:90%]"
    return [
        Shard(
            folder / f"{name}-{k:05d}-of-{total:05d}.array_record",
            k * shard_size,
            min(count, (k + 1) * shard_size),
        )
        for k in range(total)
    ]


def record_dtype(shape: Iterable[int], columns: Specs = LABEL_ALONE) -> np.dtype:
    """A record's layout.

    Args:
      shape: (h, w, C) of the latents. "moments" has the axes: as stored or mirrored; mean or log
        variance; h; w; C.
      columns: name -> shape and dtype of one example's value; they come first, by name.
    """
    fields = [
        (name, np.dtype(spec.dtype).newbyteorder("<"), spec.shape)
        for name, spec in sorted(columns.items())
    ]
    return np.dtype([*fields, ("moments", "<f2", (2, 2, *shape))])


def described_columns(
    columns: Specs, identities: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Columns as JSON types, as the manifest has them.

    Args:
      columns: of a source.
      identities: its `column_identities`.

    Raises:
      ValueError: values that are no numbers, or that NumPy has not, cannot be stored; names it.
    """
    for name, spec in columns.items():
        if np.dtype(spec.dtype).kind not in "biuf":
            raise ValueError(f"column {name!r} is of {spec.dtype}, which shards cannot hold")
    return {
        name: {"shape": list(spec.shape), "dtype": np.dtype(spec.dtype).name}
        | ({"identity": identities[name]} if identities and name in identities else {})
        for name, spec in sorted(columns.items())
    }


def _read_columns(described: Mapping[str, Any]) -> tuple[Specs, dict[str, Any]]:
    """The inverse of `described_columns`; what it gets is of a file."""
    columns = {
        name: jax.ShapeDtypeStruct(tuple(fields["shape"]), np.dtype(fields["dtype"]))
        for name, fields in described.items()
    }
    identities = {name: f["identity"] for name, f in described.items() if "identity" in f}
    if described_columns(columns, identities) != described or columns.keys() & set(RESERVED):
        raise ValueError(f"no columns: {described}")
    return columns, identities


def write_shard(shard: Shard, batches: Iterable[np.ndarray]) -> None:
    """Writes a shard, whole or not at all, from arrays of `record_dtype`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with replacing(shard.path) as temporary:
        # Each record by itself, for random access; floats hardly compress.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for records in batches:
            for record in records:
                writer.write(record.tobytes())
        writer.close()


def claim(folder: Path, manifest: Mapping[str, Any], process_index: int) -> None:
    """Makes a folder that of a manifest, or checks that it is.

    Args:
      folder: made if missing.
      manifest: what latents.json is to say, the same on all processes.
      process_index: this process; all may do this at once.

    Raises:
      ValueError: the folder belongs to another manifest, or to something else; says the
        difference. Versions, and the name of the autoencoder's folder, make none.
    """
    path = folder / _MANIFEST
    if path.exists():
        lines = differences(_identity(read_manifest(folder)), _identity(manifest))
        if lines:
            raise ValueError(
                f"{folder} was encoded with other settings (old -> new):\n  "
                + "\n  ".join(lines)
                + "\nChoose another config.latents.path, or go back to those settings."
            )
    elif folder.exists() and any(
        file.name[0] != "." and file.name != _MANIFEST for file in folder.iterdir()
    ):  # by now another process may have written it
        raise ValueError(
            f"{folder} is not empty and has no {_MANIFEST}: choose another config.latents.path"
        )
    else:
        own = folder / f".{_MANIFEST}-{process_index}"
        write_json(own, manifest)
        os.replace(own, path)


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    autoencoder = dict(manifest["autoencoder"]) | {"name": None}
    return dict(manifest) | {"autoencoder": autoencoder, "versions": None}


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """What latents.json says.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    folder = as_path(folder)
    path = folder / _MANIFEST
    if not path.exists():
        raise ValueError(
            f"no {_MANIFEST} in {folder} (config.latents.path): encode the data first, {_COMMAND}"
        )
    try:
        manifest = dict(json.loads(path.read_text()))
        manifest.setdefault("columns", described_columns(LABEL_ALONE))
        record_dtype(manifest["shape"], _read_columns(manifest["columns"])[0])
        counts = {"shard_size": manifest["shard_size"], **manifest["splits"]}
        numbers = [float(manifest["autoencoder"][f]) for f in ("shift_factor", "scaling_factor")]
        whole = manifest["dtype"] == DTYPE and all(c > 0 and c == int(c) for c in counts.values())
        text = isinstance(manifest["autoencoder"]["sha256"], str) and "num_classes" in manifest
        if not (whole and text and np.isfinite(numbers).all()):
            raise ValueError("fields out of their range")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return manifest


class LatentSource(Columned):
    """Random access to the latents of one split, with the interface of `Source`.

    Attributes:
      name: name used in error messages.
      image_shape: (h, w, C) of every latent.
      num_classes: number of classes, or None if there are no labels.
      classes: their names, if known; those of every split.
      check_labels: as of `Source`.
      columns: what `get` gives beside the latents: what is stored, and what `with_column` added.
      unpack: `UnpackLatents`, which draws latents with a key and takes the means without.
    """

    check_labels = False

    def __init__(self, name: str, shards: list[Shard], manifest: Mapping[str, Any]):
        """See `load_latents`."""
        self.name = name
        self.image_shape = tuple(manifest["shape"])
        self.num_classes = manifest["num_classes"]
        self.classes = tuple(manifest.get("classes", ()))
        autoencoder = manifest["autoencoder"]
        self.unpack = UnpackLatents(
            float(autoencoder["shift_factor"]), float(autoencoder["scaling_factor"])
        )
        names = ("data", "autoencoder", "shape", "dtype")
        self._identity = {name: _identity(manifest).get(name) for name in names}
        self._own_columns, self._own_identities = _read_columns(manifest["columns"])
        self._shards = shards
        self._shard_size = manifest["shard_size"]
        self._dtype = record_dtype(self.image_shape, self._own_columns)
        self._readers = [_open(shard.path) for shard in shards]

    def __len__(self):
        return self._shards[-1].stop

    def fingerprint(self):
        """What tells these latents from others, as JSON types: what latents.json says of them."""
        columns = self.column_identities
        return {"images": len(self)} | self._identity | ({"columns": columns} if columns else {})

    def get(self, indices, mirrored=None):
        """Reads the moments of latents.

        Args:
          indices: (B,) integers in [0, len).
          mirrored: optional (B,) bool, for which to take the latents of the mirror image.

        Returns:
          {"moments": (B, 2, h, w, C) float16, mean and log variance, not scaled}, and the columns,
          such as "label" (B,) int32.

        Raises:
          ValueError: a damaged shard; names it.
        """
        indices = np.asarray(indices)
        records = self._read(indices)
        if self.check_labels:
            self._check_labels(indices, records[LABEL])
        flips = np.zeros(len(indices), int) if mirrored is None else np.asarray(mirrored, int)
        columns = {
            name: np.ascontiguousarray(records[name], spec.dtype)
            for name, spec in self._own_columns.items()
        }
        moments = records["moments"][np.arange(len(indices)), flips].astype(DTYPE, copy=False)
        return {"moments": moments} | columns | self._read_given(indices)

    def _check_labels(self, indices, labels):
        outside = (labels < 0) | (labels >= (self.num_classes or 0))
        if outside.any():
            raise ValueError(
                f"{self.name}, example {indices[outside][0]}: label {labels[outside][0]} is no "
                f"class, there are {self.num_classes} from 0; this split may be unlabelled"
            )

    def _read(self, indices):
        records = np.empty(len(indices), self._dtype)
        numbers, offsets = np.divmod(indices, self._shard_size)
        for number in np.unique(numbers):
            here, path = numbers == number, self._shards[number].path
            try:
                found = self._readers[number].read(offsets[here].tolist())
                records[here] = np.frombuffer(b"".join(found), self._dtype)
            except (RuntimeError, ValueError, IndexError) as error:
                reason = (str(error).splitlines() or [""])[0]
                raise ValueError(f"{_damaged(path)} ({reason})") from error
        return records


def check_autoencoder(path: str | os.PathLike, autoencoder: Mapping[str, Any]) -> None:
    """Checks that a folder's latents, if there are any yet, are of an autoencoder.

    Args:
      path: the folder, config.latents.path.
      autoencoder: its identity, as latents.json has it: name, sha256, scaling_factor and
        shift_factor.

    Raises:
      ValueError: they are of another one; says the difference.
    """
    folder = as_path(path)
    if not (folder / _MANIFEST).exists():
        return
    old = read_manifest(folder)["autoencoder"]
    lines = differences(dict(old) | {"name": None}, dict(autoencoder) | {"name": None})
    if lines:
        raise ValueError(
            f"{folder} was encoded by another autoencoder ({old['name']}) than "
            f"config.latents.autoencoder ({autoencoder['name']}):\n  "
            + "\n  ".join(lines)
            + "\nSet it to that one, or encode the data anew into another config.latents.path."
        )


def load_latents(
    path: str | os.PathLike, split: str, cache_dir: str | os.PathLike | None = None
) -> LatentSource:
    """Opens a split of an encoded data set.

    Args:
      path: the folder, config.latents.path. That of a bucket is copied to this machine first,
        but for what is there already.
      split: a split that was encoded, as the config that did it calls it.
      cache_dir: where to, as of `buckets.fetched`.

    Returns:
      A `LatentSource`.

    Raises:
      ValueError: no such folder or split, or one that is not whole; says what to do.
    """
    folder = as_path(path)
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise ValueError(
            f"{folder} has no latents of the split {split!r}, only {sorted(manifest['splits'])}"
        )
    count, size = manifest["splits"][split], manifest["shard_size"]
    shards = list_shards(folder, split, count, size)
    found = {path.name for path in listed(folder)}
    missing = [shard for shard in shards if shard.path.name not in found]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shards)} shards of {split!r} are missing, the first "
            f"is {missing[0].path.name}: encoding is not finished; go on with {_COMMAND}"
        )
    if is_in_bucket(folder):
        fetched((shard.path for shard in shards), cache_dir)
        shards = list_shards(cached(folder, cache_dir), split, count, size)
    for shard in shards:
        if not shard.is_whole():
            raise ValueError(_damaged(shard.path))
    return LatentSource(f"latents {folder.name} ({split})", shards, manifest)


def _damaged(path: Path) -> str:
    return f"{path} is damaged: delete it and encode it anew, {_COMMAND}"


def _open(path: Path):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
