"""Folders of diffusers' `UNet2DModel`: config.json and weights, as our U-Net and back."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from liftplace_jax import models, weights
from liftplace_jax.diffusers_config import (
    DiffusersError,
    config_from_diffusers,
    config_to_diffusers,
)
from liftplace_jax.files import replacing_folder, write_json
from liftplace_jax.models import UNetConfig
from liftplace_jax.models.unet_config import Node

WEIGHTS_NAME = "diffusion_pytorch_model"

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


def find_folder(folder: Path) -> Path | None:
    """The folder itself if it is one of diffusers, or "unet" in it if it is a pipeline's.

    Returns:
      The folder with config.json; None if there is none, or it is not of diffusers.
    """
    if not (folder / "config.json").exists():
        folder = folder / "unet"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return folder if isinstance(config, dict) and "_class_name" in config else None


def read_diffusers(folder: str | os.PathLike) -> tuple[UNetConfig, dict[str, np.ndarray]]:
    """Reads the folder of a `UNet2DModel`.

    Args:
      folder: as `find_folder` takes it, with diffusion_pytorch_model.safetensors or .bin (which
        needs PyTorch), or their index.json and the files that it names. Attention may have the
        names before diffusers 0.12 (query, key, value, proj_attn).

    Returns:
      (config, tensors by published DDPM name in PyTorch's layouts).

    Raises:
      DiffusersError: no such folder, or fields of its config that our U-Net cannot be; lists all.
      weights.WeightFileError: a file is missing or damaged.
      weights.WeightMismatchError: tensors do not fit the config; lists all, by their own names.
    """
    found = find_folder(Path(folder))
    if found is None:
        raise DiffusersError(f"{folder}: no config.json of a UNet2DModel there, or in unet/")
    path = found / "config.json"
    try:
        config = config_from_diffusers(json.loads(path.read_text()))
    except ValueError as error:
        raise DiffusersError(f"{path}: {error}") from error
    names = {theirs: ours for ours, theirs in _tensor_names(config).items()}
    own_names, tensors = {}, {}
    for name, value in _read_weights(found).items():
        current = re.sub(
            rf"\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)$",
            lambda match: f".{_OLD_ATTENTION[match[1]]}.{match[2]}",
            name,
        )
        published = names.get(current, name)
        if _LINEAR.search(published) and value.ndim == 2:
            value = value[:, :, None, None]
        tensors[published] = value
        own_names[published] = name
    misfits = weights.find_misfits(models.abstract(config)[1], tensors)
    if misfits:
        theirs = _tensor_names(config) | own_names
        renamed = sorted((theirs.get(name, name), problem) for name, problem in misfits)
        raise weights.WeightMismatchError(renamed, found)
    return config, tensors


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    for suffix in (".safetensors", ".bin"):
        path = folder / f"{WEIGHTS_NAME}{suffix}"
        index = folder / f"{path.name}.index.json"
        if path.exists():
            return weights.read_tensors(path)
        if index.exists():
            tensors = {}
            for name in _shards(index):
                tensors |= weights.read_tensors(folder / name)
            return tensors
    raise weights.WeightFileError(
        f"{folder}: no {WEIGHTS_NAME}.safetensors or .bin there, nor an index.json of one"
    )


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise weights.WeightFileError(f"{index}: no index of weight files: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise weights.WeightFileError(f"{index}: names files outside its folder: {outside}")
    return names


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


def write_diffusers(folder: str | os.PathLike, config: UNetConfig, params: Any) -> None:
    """Writes a folder that `UNet2DModel.from_pretrained` loads, with equal outputs.

    Args:
      folder: a new or an empty one; made whole or not at all.
      config: the network's config, of regular widths (see `config_to_diffusers`).
      params: its parameters.

    Raises:
      DiffusersError: the widths are not regular; names the first layers.
      FileExistsError: there is something in the folder.
    """
    fields, names = config_to_diffusers(config), _tensor_names(config)
    tensors = {}
    for name, value in weights.to_torch(params).items():
        tensors[names[name]] = value[:, :, 0, 0] if _LINEAR.search(name) else value
    with replacing_folder(folder) as temporary:
        path = temporary / f"{WEIGHTS_NAME}.safetensors"
        weights.write_safetensors(path, tensors, {"format": "pt"})
        write_json(temporary / "config.json", fields)
