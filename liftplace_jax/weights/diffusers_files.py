"""Which files of a folder of diffusers are meant, and their tensors, whatever network it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liftplace_jax import weights
from liftplace_jax.host.buckets import as_path, listed
from liftplace_jax.host.outside import cut, lies, read_json, shown
from liftplace_jax.weights.diffusers import DiffusersError

WEIGHTS_NAME = "diffusion_pytorch_model"
DIFFUSERS = {".safetensors": WEIGHTS_NAME, ".bin": WEIGHTS_NAME}
"""How weights of diffusers are called, by suffix."""
TRANSFORMERS = {".safetensors": "model", ".bin": "pytorch_model"}
"""And those of transformers."""
_SHARD = re.compile(r"[^/\\\0]{1,200}\.(?:safetensors|bin)")


def choose_folder(
    folder: str | os.PathLike,
    entry: str | None,
    parts: tuple[str, ...],
    wanted: Callable[[Mapping[str, Any]], bool],
) -> tuple[Path, str | None, dict[str, Any]] | None:
    """Which folder of a pipeline, or of a training state, is meant.

    Args:
      folder: with config.json, or with folders that have one.
      entry: name of one of those folders, a variant of its weights, or both ("unet_ema.fp16").
      parts: names of folders that are meant whatever they hold.
      wanted: whether a config's fields make another folder one that may be meant.

    Returns:
      (folder with config.json, variant of its weights or None, fields); None if there is none.

    Raises:
      ValueError, weights.EntryError: as of `find_folder`.
    """
    folder = as_path(folder)
    if lies(folder / "config.json"):
        return folder, entry, read_json(folder / "config.json")
    found = {}
    for part in listed(folder) if folder.is_dir() else ():
        if part.is_dir() and lies(part / "config.json"):
            fields = read_json(part / "config.json")
            if part.name in parts or wanted(fields):
                found[part.name] = fields
    name, _, variant = (entry or "").partition(".")
    if name not in found and len(found) == 1:
        name, variant = next(iter(found)), entry
    if name in found:
        return folder / name, variant or None, found[name]
    if found:
        missing = f"{entry!r} is none of its folders; " if entry else ""
        raise weights.EntryError(
            f"{folder}: {missing}holds several networks, {sorted(found)}; choose one as entry"
        )
    return None


def is_of_diffusers(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether a folder is diffusers' by its config, not one of this library.

    Raises:
      DiffusersError: its weights are, and its config does not say the class.
    """
    if "_class_name" in fields:
        return True
    if "model" not in fields and any(f.name.startswith(WEIGHTS_NAME) for f in listed(folder)):
        raise DiffusersError(
            f"{folder / 'config.json'}: has no _class_name: add the class that wrote it, such as "
            '"_class_name": "UNet2DModel"'
        )
    return False


def read_weights(
    folder: str | os.PathLike, variant: str | None = None, stems: Mapping[str, str] = DIFFUSERS
) -> dict[str, np.ndarray]:
    """The tensors of a diffusers folder by name, from its one file or its shards.

    Args:
      folder: with diffusion_pytorch_model.safetensors or .bin, or an index.json of its shards.
      variant: of diffusion_pytorch_model.<variant>.safetensors, such as "fp16".
      stems: what stands before a suffix, `DIFFUSERS` or `TRANSFORMERS`.

    Raises:
      weights.WeightFileError: a file is missing or damaged.
      weights.EntryError: there are variants alone, or none of this name; names them.
    """
    folder = as_path(folder)
    path = _find_weights(folder, variant, stems)
    if path is None:
        raise _no_weights(folder, variant, stems)
    return _read_shards(path) if path.suffix == ".json" else weights.read_tensors(path)


def weight_files(folder: str | os.PathLike, stems: Mapping[str, str] = DIFFUSERS) -> list[str]:
    """Names of the files that `read_weights` reads, their index among them; none: it would refuse.

    Raises:
      weights.WeightFileError: an index is damaged.
    """
    path = _find_weights(as_path(folder), None, stems)
    if path is None:
        return []
    return [path.name, *(_shards(path) if path.suffix == ".json" else ())]


def _find_weights(folder: Path, variant: str | None, stems: Mapping[str, str]) -> Path | None:
    """The file of all tensors, or the index of several."""
    middle = f".{variant}" if variant else ""
    for suffix, stem in stems.items():
        path = folder / f"{stem}{middle}{suffix}"
        # diffusers puts the variant here; others where it is in the name of one file.
        indices = (f"{stem}{suffix}.index{middle}.json", f"{path.name}.index.json")
        for found in (path, *(folder / name for name in indices)):
            if lies(found):
                return found
    return None


def _no_weights(
    folder: Path, variant: str | None, stems: Mapping[str, str]
) -> weights.WeightFileError:
    names = [file.name for file in listed(folder) if file.name.startswith(tuple(stems.values()))]
    pattern = re.compile(
        rf"(?:{'|'.join(map(re.escape, stems.values()))})\.([^.]+?)(?:-\d+-of-\d+)?"
        r"\.(?:safetensors|bin)"
    )
    variants = {match[1] for name in names if (match := pattern.fullmatch(name))}
    middle = f".{variant}" if variant else ""
    stem, *others = dict.fromkeys(stems.values())
    other = f"{others[0]}{middle}.bin" if others else ".bin"
    message = f"{folder}: no {stem}{middle}.safetensors or {other} there, nor an index.json of one"
    if variants:
        return weights.EntryError(
            f"{message}, only the variants {sorted(variants)}: choose one as entry, or rename it"
        )
    if names:
        message += f"; there is {shown(sorted(names))}"
    return (weights.EntryError if variant else weights.WeightFileError)(message)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    names = _shards(index)
    missing = [name for name in names if not lies(index.parent / name)]
    if missing:
        raise weights.WeightFileError(
            f"{index.parent}: {', '.join(cut(missing, 8))}: no such file, and {index.name} names it"
        )
    for name in names:
        found = weights.read_tensors(index.parent / name)
        twice = sorted(tensors.keys() & found)
        if twice:
            raise weights.WeightFileError(
                f"{index.parent / name}: has {', '.join(cut(twice, 4))}, as another shard has"
            )
        tensors |= found
    return tensors


def _shards(index: Path) -> list[str]:
    try:
        names = list(read_json(index)["weight_map"].values())
    except (LookupError, AttributeError) as error:
        raise weights.WeightFileError(
            f"{index}: no index of weight files: it needs weight_map, of tensors and their files"
        ) from error
    except ValueError as error:
        reason = str(error).removeprefix(f"{index}: ")
        raise weights.WeightFileError(f"{index}: no index of weight files: {reason}") from error
    others = [name for name in names if not isinstance(name, str) or not _SHARD.fullmatch(name)]
    if others:
        raise weights.WeightFileError(
            f"{index}: names files outside its folder, or none of weights: {shown(others)}"
        )
    return sorted(set(names))
