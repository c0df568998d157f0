"""Networks of all families from wherever they lie: our folders, diffusers', published files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from liftplace_jax import weights
from liftplace_jax.families import registry
from liftplace_jax.families.registry import FAMILIES
from liftplace_jax.host.buckets import as_path
from liftplace_jax.host.differences import differences
from liftplace_jax.host.files import replacing_folder, write_json
from liftplace_jax.host.outside import lies, shown
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network, from_tensors, read_network
from liftplace_jax.weights.diffusers import DiffusersError
from liftplace_jax.weights.diffusers_files import (
    WEIGHTS_NAME,
    choose_folder,
    is_of_diffusers,
    read_weights,
)

FORMATS = {name: family.format for family in FAMILIES.values() for name in family.format.classes}
"""diffusers' name of a network -> how it is read and written."""
PARTS = tuple(dict.fromkeys(format.part for format in FORMATS.values()))
"""Folders of a pipeline in which its denoising network may be."""
_KNOWN = " or ".join(f"a {name}" for name in FORMATS)


OF_DIFFUSERS = frozenset(form.telltale for form in FORMATS.values() if form.telltale)
"""Names by which weights of diffusers can be told from published ones."""


def find_folder(folder: str | os.PathLike, entry: str | None = None) -> Path | None:
    """The folder itself if it is one of diffusers, or the network's in it if it is a pipeline's.

    Args:
      folder: of this machine or a bucket.
      entry: as of `read_diffusers`.

    Returns:
      The folder with config.json; None if there is none, or it is not of diffusers.

    Raises:
      ValueError: a config.json cannot be read, or does not say its class; names it.
      weights.EntryError: there are several networks, or none at `entry`; names those there are.
    """
    found = choose_folder(folder, entry, PARTS, lambda fields: _class_of(fields) in FORMATS)
    return found[0] if found and is_of_diffusers(found[0], found[2]) else None


def _class_of(fields: Mapping[str, Any]) -> str:
    return str(fields.get("_class_name"))


def read_diffusers(
    folder: str | os.PathLike, entry: str | None = None
) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads the folder of a network of diffusers.

    Args:
      folder: with config.json and diffusion_pytorch_model.safetensors or .bin (which needs
        PyTorch), or their index.json and the files that it names; or with one such folder in it,
        as a pipeline. Attention may have the names before diffusers 0.12 (query, key, value,
        proj_attn).
      entry: which of the folders in it ("unet_ema"), which variant of the weights ("fp16",
        "non_ema"), or both ("unet.fp16").

    Returns:
      (config, tensors by published name in PyTorch's layouts).

    Raises:
      DiffusersError: no such folder, or a network that none of ours can be; lists all why.
      weights.EntryError: several networks or variants, and entry names none; lists them.
      weights.WeightFileError: a file is missing or damaged.
      weights.WeightMismatchError: tensors do not fit the config; lists all, by their own names.
    """
    chosen = choose_folder(folder, entry, PARTS, lambda fields: _class_of(fields) in FORMATS)
    if chosen is None or not is_of_diffusers(chosen[0], chosen[2]):
        raise DiffusersError(
            f"{folder}: no config.json of {_KNOWN} there, or in {'/ or '.join(PARTS)}/"
        )
    found, variant, fields = chosen
    path = found / "config.json"
    form = FORMATS.get(_class_of(fields))
    if form is None:
        raise DiffusersError(
            f"{path}: _class_name {shown(fields['_class_name'])}: no network known here, it must "
            f"be {_KNOWN}"
        )
    try:
        config = form.config_from(fields)
    except ValueError as error:
        raise DiffusersError(f"{path}: {error}") from error
    stored = read_weights(found, variant)
    try:
        config.check_blocks(len(stored))
    except ValueError as error:
        raise DiffusersError(f"{path}: {error}") from error
    try:
        return form.tensors_from(config, stored)
    except weights.WeightMismatchError as error:
        raise weights.WeightMismatchError(error.misfits, found) from error


def write_diffusers(folder: str | os.PathLike, config: Any, params: Any) -> None:
    """Writes a folder that diffusers' `from_pretrained` loads, with equal outputs.

    Args:
      folder: a new or an empty one; made whole or not at all.
      config: the network's config; a U-Net's has regular widths (see `config_to_diffusers`).
      params: its parameters.

    Raises:
      DiffusersError: diffusers has no such network; says why.
      FileExistsError: there is something in the folder.
    """
    with replacing_folder(folder) as temporary:
        write_network(temporary, config, params)


def write_network(folder: Path, config: Any, params: Any) -> None:
    """Writes the two files of a network of diffusers into a folder; see `write_diffusers`.

    Raises:
      DiffusersError: diffusers has no such network; nothing is written then.
    """
    try:
        form = registry.family_of(config).format
    except ValueError as error:
        raise DiffusersError(
            f"no network of {type(config).__name__} can be written, only {_KNOWN}"
        ) from error
    fields = form.config_to(config)
    tensors = form.tensors_to(config, weights.to_torch(params))
    weights.write_safetensors(folder / f"{WEIGHTS_NAME}.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", fields)


def load_network(folder: str | os.PathLike, *args: Any, **options: Any) -> Network:
    """A denoising network from its folder; arguments as of `network.read_network`."""
    return read_network(folder, registry.config_from_dict, *args, **options)


def load_checkpoint(
    path: str | os.PathLike,
    config: Any | None = None,
    entry: str | int | None = None,
    dtype: str = "float32",
    said_by: str = "config.model",
) -> Network:
    """A model from wherever it was trained.

    Args:
      path: a folder of ours (model.safetensors and config.json); a folder of diffusers'
        `UNet2DModel`, `DiTTransformer2DModel` or `UNet2DConditionModel`, or of a pipeline with
        one; or a file of published weights, as of `weights.read_tensors`. Of this machine or a
        bucket.
      config: what the model must be. A folder's own config must agree with it, but for what is no
        property of weights, such as dropout: that of `config` counts. Needed for a file, which
        does not say what it is; without it a folder's own config counts.
      entry: where in a file the weights are, as of `weights.read_tensors`; or in a folder of
        diffusers, as of `read_diffusers`.
      dtype: of the computation.
      said_by: where `config` comes from, for the error message.

    Raises:
      ValueError: the path cannot be read, or does not fit; names the path and every misfit.
    """
    path = as_path(path)
    if path.is_dir():
        name = None if entry is None else str(entry)
        if find_folder(path, name):
            network = from_tensors(*read_diffusers(path, name), path, dtype)
        elif entry is not None:
            raise ValueError(
                f"{path} is a folder, only a file has an entry {entry!r}, or a folder of diffusers"
            )
        else:
            network = load_network(path, dtype)
        return network if config is None else _as_config(network, config, path, dtype, said_by)
    if not lies(path):
        raise ValueError(f"{path}: no such file or folder")
    if config is None:
        raise ValueError(f"{path}: a file of weights does not say its model, so give its config")
    tensors = weights.read_tensors(path, entry)
    theirs = OF_DIFFUSERS if registry.family_of(config).format.telltale else ()
    if any(name.endswith(tail) for tail in theirs for name in tensors):
        raise ValueError(f"{path} is the weights of diffusers alone: give its folder")
    seen = config.visible_in(tensors)  # a wrong depth is one line, not a hundred tensors
    wanted = [{name: getattr(config, name) for name in seen}]
    _check_agreement(path, [seen], wanted, said_by)
    return from_tensors(config, tensors, path, dtype)


def _as_config(network: Network, config: Any, path: Path, dtype: str, said_by: str) -> Network:
    """The network as `config`, from which it may differ only in what no weights tell."""
    _check_agreement(path, _architecture(network.config), _architecture(config), said_by)
    return Network(config, building.abstract(config, jnp.dtype(dtype))[0], network.params)


def _architecture(config: Any) -> list[dict[str, Any]]:
    return [{"model": config.model}, *config.architecture()]


def _check_agreement(path: Path, found: list[dict], wanted: list[dict], said_by: str) -> None:
    # A later dictionary says something only where those before it agree.
    pairs = zip(found, wanted, strict=False)
    lines = next((lines for pair in pairs if (lines := differences(*pair))), None)
    if lines:
        raise ValueError(
            f"{path} is not what {said_by} says (checkpoint -> {said_by}):\n  "
            + "\n  ".join(lines)
            + f"\nSet {said_by} to what the checkpoint is, or choose another checkpoint."
        )
