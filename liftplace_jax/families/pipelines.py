"""Pipelines of diffusers with a network of ours: among the parts of another one, or of parts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from liftplace_jax.families import registry
from liftplace_jax.families.loading import write_network
from liftplace_jax.host.buckets import as_path, listed, on_this_machine
from liftplace_jax.host.files import replacing_folder, write_json
from liftplace_jax.host.outside import lies, read_json, shown
from liftplace_jax.weights.diffusers import DiffusersError
from liftplace_jax.weights.diffusers_files import DIFFUSERS, TRANSFORMERS, weight_files

INDEX = "model_index.json"
SCHEDULER, SCHEDULER_FILE = "scheduler", "scheduler_config.json"
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".onnx", ".onnx_data", ".h5", ".ckpt", ".xml")


class Written(NamedTuple):
    """What `write_pipeline` did.

    Attributes:
      parts: names of the folders that were copied.
      left_out: files of these that diffusers' `from_pretrained` would not read without a variant.
    """

    parts: tuple[str, ...]
    left_out: tuple[str, ...]


Parts = Mapping[str, Callable[[Path], None]]
"""Name of a part of a pipeline -> what writes its files into the folder that it is given."""


def write_pipeline(
    out: str | os.PathLike,
    config: Any,
    params: Any,
    source: str | os.PathLike,
    others: Parts | None = None,
) -> Written:
    """Writes a pipeline that diffusers' `from_pretrained` loads: another one, with our network.

    Args:
      out: a new or an empty folder; made whole or not at all.
      config: the network's config.
      params: its parameters.
      source: folder of a pipeline of the network's kind, such as its teacher's; the parts that its
        model_index.json names are copied, but for the network.
      others: parts that are written in place of the source's.

    Raises:
      DiffusersError: source is no such pipeline, a part is missing in it, or diffusers has no such
        network; says why.
      FileExistsError: there is something at `out`.
    """
    parts, form = read_index(source, config), registry.family_of(config).format
    source, others, copied, left_out = as_path(source), others or {}, [], []
    with replacing_folder(out) as temporary:
        for name in parts:
            if name == form.part or not isinstance(parts[name], list) or None in parts[name]:
                continue  # the network, a setting, or a part that this pipeline goes without
            if name in others:
                (temporary / name).mkdir()
                others[name](temporary / name)
                continue
            left_out += _copy_part(source / name, temporary / name)
            copied.append(name)
        _write_own(temporary, config, params, parts)
    return Written(tuple(copied), tuple(left_out))


def _write_own(folder: Path, config: Any, params: Any, index: Mapping[str, Any]) -> None:
    form = registry.family_of(config).format
    (folder / form.part).mkdir()
    write_network(folder / form.part, config, params)
    write_json(folder / INDEX, {**index, form.part: ["diffusers", form.classes[0]]})


def parts_of(config: Any) -> list[str]:
    """The parts that `join_pipeline` needs for a network, beside the network and its scheduler.

    Args:
      config: the network's config.

    Raises:
      DiffusersError: no pipelines of such networks are put together here.
    """
    family = registry.family_of(config)
    if family.format.pipeline is None:
        raise DiffusersError(
            f"pipelines of a {family.name!r} are not put together here, only written with the "
            "parts of another one"
        )
    values = family.format.pipeline.items()
    return [name for name, value in values if isinstance(value, list) and None not in value]


def join_pipeline(
    out: str | os.PathLike, config: Any, params: Any, parts: Parts, scheduler: Mapping[str, Any]
) -> None:
    """Writes a pipeline that diffusers' `from_pretrained` loads, out of its parts.

    Args:
      out: a new or an empty folder; made whole or not at all.
      config: the network's config.
      params: its parameters.
      parts: all of `parts_of`.
      scheduler: the content of scheduler_config.json, as of `Process.scheduler`.

    Raises:
      DiffusersError: as of `parts_of`, or diffusers has no such network; says why.
      KeyError: a part is missing.
      FileExistsError: there is something at `out`.
    """
    names, form = parts_of(config), registry.family_of(config).format
    with replacing_folder(out) as temporary:
        for name in names:
            (temporary / name).mkdir()
            parts[name](temporary / name)
        write_json(temporary / SCHEDULER / SCHEDULER_FILE, dict(scheduler))
        own = {SCHEDULER: ["diffusers", scheduler["_class_name"]]}
        _write_own(temporary, config, params, {**(form.pipeline or {}), **own})


def find_pipeline(folder: str | os.PathLike) -> Path | None:
    """The pipeline that a folder is, or is a part of; None if there is none."""
    folder = as_path(folder)
    places = [folder, folder.parent] if folder.is_dir() else []
    return next((place for place in places if lies(place / INDEX)), None)


def read_scheduler(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The content of a pipeline's scheduler_config.json; None if it has none.

    Raises:
      ValueError: it is damaged; names it.
    """
    path = as_path(folder) / SCHEDULER / SCHEDULER_FILE
    return read_json(path) if lies(path) else None


def read_index(source: str | os.PathLike, config: Any) -> dict[str, Any]:
    """The content of a pipeline's model_index.json, which `write_pipeline` can copy parts of.

    Args:
      source: the pipeline's folder.
      config: the config of the network that is to be in it.

    Raises:
      DiffusersError: as of `write_pipeline`.
      ValueError: it is in a bucket.
    """
    source = on_this_machine(source, "the pipeline whose parts are copied")
    form, path = registry.family_of(config).format, source / INDEX
    if not lies(path):
        raise DiffusersError(f"{source}: no {INDEX} there: it is no pipeline of diffusers")
    parts = read_json(path)
    given = parts.get(form.part)
    named = given[1] if isinstance(given, list) and len(given) == 2 else given
    if named not in form.classes:
        raise DiffusersError(
            f"{path}: {form.part} is {shown(named)}, must be {' or '.join(form.classes)}: choose "
            "a pipeline of the network's kind"
        )
    odd = [name for name in parts if not re.fullmatch(r"\w+", name)]
    if odd:
        raise DiffusersError(f"{path}: {shown(odd)} are no names of parts")
    missing = [
        name
        for name, value in parts.items()
        if isinstance(value, list)
        and None not in value
        and name != form.part
        and not (source / name).is_dir()
    ]
    if missing:
        raise DiffusersError(f"{source}: {INDEX} names {missing}, which are no folders there")
    return parts


def _copy_part(source: Path, target: Path) -> list[str]:
    """Copies a folder without the weights that nobody reads; returns the names of those."""
    read = next(
        (found for stems in (DIFFUSERS, TRANSFORMERS) if (found := weight_files(source, stems))),
        None,
    )
    left_out = []
    target.mkdir()
    for file in sorted(listed(source), key=lambda file: file.name):
        is_weight = file.name.endswith(_WEIGHTS) or ".index." in file.name
        if read is not None and is_weight and file.name not in read:
            left_out.append(f"{source.name}/{file.name}")
        elif file.is_dir():
            shutil.copytree(file, target / file.name)
        else:
            shutil.copyfile(file, target / file.name)
    return left_out
