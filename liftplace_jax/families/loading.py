"""Folders of diffusers' networks, config.json and weights, as ours and back.

`UNet2DModel` is our U-Net, `DiTTransformer2DModel` (once `Transformer2DModel`) our DiT.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liftplace_jax import weights
from liftplace_jax.families.dit import diffusers as diffusers_dit
from liftplace_jax.nn import building
from liftplace_jax.families.unet.diffusers import (
    DiffusersError,
    config_from_diffusers,
    config_to_diffusers,
)
from liftplace_jax.weights.diffusers_files import (
    WEIGHTS_NAME,
    choose_folder,
    is_of_diffusers,
    read_weights,
)
from liftplace_jax.host.files import replacing_folder, write_json
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.config import Node
from liftplace_jax.host.outside import shown

PARTS = ("unet", "transformer")
"""Folders of a pipeline in which its denoising network may be."""

_BLOCK = {
    "norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2",
    "conv2": "conv2", "nin_shortcut": "conv_shortcut",
}  # fmt: skip
_ATTENTION = {
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}  # fmt: skip
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Dense there, 1x1 convolutions here; by our name.
_LINEAR = re.compile(r"\.(q|k|v|proj_out)\.weight$")

OF_DIFFUSERS = frozenset({"conv_norm_out.weight", "proj_out_2.weight"})
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
    found = choose_folder(folder, entry, PARTS, lambda fields: _class_of(fields) in _FAMILIES)
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
    chosen = choose_folder(folder, entry, PARTS, lambda fields: _class_of(fields) in _FAMILIES)
    if chosen is None or not is_of_diffusers(chosen[0], chosen[2]):
        raise DiffusersError(
            f"{folder}: no config.json of {_KNOWN} there, or in {'/ or '.join(PARTS)}/"
        )
    found, variant, fields = chosen
    path = found / "config.json"
    family = _FAMILIES.get(_class_of(fields))
    if family is None:
        raise DiffusersError(
            f"{path}: _class_name {shown(fields['_class_name'])}: no network known here, it must "
            f"be {_KNOWN}"
        )
    try:
        config = family.config_from_diffusers(fields)
    except ValueError as error:
        raise DiffusersError(f"{path}: {error}") from error
    stored = read_weights(found, variant)
    try:
        config.check_blocks(len(stored))
    except ValueError as error:
        raise DiffusersError(f"{path}: {error}") from error
    try:
        return family.tensors_from_diffusers(config, stored)
    except weights.WeightMismatchError as error:
        raise weights.WeightMismatchError(error.misfits, found) from error


def _unet_from_diffusers(
    config: UNetConfig, stored: Mapping[str, np.ndarray]
) -> tuple[UNetConfig, dict[str, np.ndarray]]:
    names = {theirs: ours for ours, theirs in _tensor_names(config).items()}
    misfits = weights.find_prefix(names, [current_name(name) for name in stored])
    if misfits:
        raise weights.WeightMismatchError(misfits)
    own_names, tensors = {}, {}
    for name, value in stored.items():
        published = names.get(current_name(name), name)
        if _LINEAR.search(published) and value.ndim == 2:
            value = value[:, :, None, None]
        tensors[published] = value
        own_names[published] = name
    misfits = weights.find_misfits(building.abstract(config)[1], tensors)
    if misfits:
        theirs = _tensor_names(config) | own_names
        raise weights.WeightMismatchError(
            sorted((theirs.get(name, name), problem) for name, problem in misfits)
        )
    return config, tensors


def _unet_to_diffusers(
    config: UNetConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    names = _tensor_names(config)
    return {
        names[name]: value[:, :, 0, 0] if _LINEAR.search(name) else value
        for name, value in tensors.items()
    }


def current_name(name: str) -> str:
    """A tensor's name since diffusers 0.12, where those of attention changed."""
    return re.sub(
        rf"\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)$",
        lambda match: f".{_OLD_ATTENTION[match[1]]}.{match[2]}",
        name,
    )


def _tensor_names(config: UNetConfig) -> dict[str, str]:
    """Published DDPM name -> diffusers' name of every tensor of a network."""
    modules = {
        "temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2",
        "norm_out": "conv_norm_out", "conv_out": "conv_out",
    }  # fmt: skip
    for node in config.block_plan():
        theirs = _module_name(node, len(config.ch_mult))
        parts = {"block": _BLOCK, "attention": _ATTENTION}.get(node.kind)
        if parts is None:
            modules[node.name] = theirs
        else:
            modules |= {
                f"{node.name}.{ours}": f"{theirs}.{part}"
                for ours, part in parts.items()
                if ours != "nin_shortcut" or node.shortcut
            }
    pairs = itertools.product(modules.items(), ("weight", "bias"))
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for (ours, theirs), leaf in pairs}


def _module_name(node: Node, num_levels: int) -> str:
    """Theirs of a node; both sides number the ways down alike, the ways up in opposite order."""
    middle = {
        "mid.block_1": "mid_block.resnets.0", "mid.attn_1": "mid_block.attentions.0",
        "mid.block_2": "mid_block.resnets.1", "conv_in": "conv_in",
    }  # fmt: skip
    if node.name in middle:
        return middle[node.name]
    way, level, kind, *rest = node.name.split(".")
    level = int(level) if way == "down" else num_levels - 1 - int(level)
    if kind.endswith("sample"):
        return f"{way}_blocks.{level}.{kind}rs.0.conv"
    return f"{way}_blocks.{level}.{'resnets' if kind == 'block' else 'attentions'}.{rest[0]}"


@dataclasses.dataclass(frozen=True)
class _Family:
    """How a class of diffusers and one of our configs are carried into each other.

    Attributes:
      config_class: ours.
      config_from_diffusers: fields of config.json -> our config.
      tensors_from_diffusers: (that config, their tensors) -> (config, our tensors by published
        name); only the tensors may tell all of the config.
      config_to_diffusers: our config -> their fields.
      tensors_to_diffusers: (our config, our tensors) -> theirs.
    """

    config_class: type
    config_from_diffusers: Callable[[Mapping[str, Any]], Any]
    tensors_from_diffusers: Callable[[Any, Mapping], tuple[Any, dict[str, np.ndarray]]]
    config_to_diffusers: Callable[[Any], dict[str, Any]]
    tensors_to_diffusers: Callable[[Any, Mapping], dict[str, np.ndarray]]


_UNET = _Family(
    UNetConfig, config_from_diffusers, _unet_from_diffusers, config_to_diffusers, _unet_to_diffusers
)
_DIT = _Family(
    DiTConfig,
    diffusers_dit.config_from_diffusers,
    diffusers_dit.tensors_from_diffusers,
    diffusers_dit.config_to_diffusers,
    diffusers_dit.tensors_to_diffusers,
)
_FAMILIES = {"UNet2DModel": _UNET, "DiTTransformer2DModel": _DIT, "Transformer2DModel": _DIT}
_KNOWN = " or ".join(f"a {name}" for name in _FAMILIES)


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
    family = next((f for f in _FAMILIES.values() if isinstance(config, f.config_class)), None)
    if family is None:
        raise DiffusersError(f"no network of {type(config).__name__} can be written, only {_KNOWN}")
    fields = family.config_to_diffusers(config)
    tensors = family.tensors_to_diffusers(config, weights.to_torch(params))
    with replacing_folder(folder) as temporary:
        path = temporary / f"{WEIGHTS_NAME}.safetensors"
        weights.write_safetensors(path, tensors, {"format": "pt"})
        write_json(temporary / "config.json", fields)
