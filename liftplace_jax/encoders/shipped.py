"""Networks that ship with this package: small, trained on its own data by committed scripts.

Each is a folder as a published pipeline's, and `made.json` in it says of every file what made it,
how good it is, and its SHA-256.
"""

import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from liftplace_jax.host.buckets import as_path
from liftplace_jax.host.files import make_folder, replacing, write_json

SHIPPED = ("emoji",)
RECORD = "made.json"


def find_shipped(path: str | os.PathLike) -> Path:
    """The folder of a shipped name, and any other path as it is.

    Args:
      path: one of SHIPPED, or a path; a folder of yours by the same name is "./emoji".
    """
    if str(path) in SHIPPED:
        return Path(str(importlib.resources.files("liftplace_jax.encoders") / str(path)))
    return as_path(path)


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_part(
    folder: Path, part: str, files: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a network's files into a shipped folder, and into its record what made them.

    Args:
      folder: of the name.
      part: folder in it, such as "vae".
      files: name -> what goes into it: JSON types (.json), arrays by name (.safetensors), or text.
      made: what made it and how good it is, as JSON types.

    Returns:
      The entry in the record: `made`, and "files", name -> SHA-256.
    """
    make_folder(folder / part)
    for name, content in files.items():
        path = folder / part / name
        if name.endswith(".safetensors"):
            arrays = {key: np.ascontiguousarray(value) for key, value in content.items()}
            with replacing(path) as temporary:
                # One entry, since safetensors writes several in random order.
                Path(temporary).write_bytes(save(arrays, metadata={"format": "pt"}))
        elif isinstance(content, str):
            with replacing(path) as temporary:
                Path(temporary).write_text(content, encoding="utf-8")
        else:
            write_json(path, content)
    entry = {**made, "files": {name: sha256_of(folder / part / name) for name in sorted(files)}}
    record = read_record(folder) | {part: entry}
    write_json(folder / RECORD, record)
    return entry


def read_record(folder: Path) -> dict[str, Any]:
    """Part -> its entry, of a shipped folder; empty if there is none yet."""
    path = folder / RECORD
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
