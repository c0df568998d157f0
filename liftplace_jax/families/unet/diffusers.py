"""The config of diffusers' `UNet2DModel` as ours and back.

Both compute the same function where its fields are those of the DDPM U-Net: one attention head,
sines before cosines, convolutions that pad right and below only, eps 1e-6. Fields and defaults:
diffusers 0.42 "models/unets/unet_2d.py".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from liftplace_jax import weights
from liftplace_jax.families.unet.config import Node, UNetConfig
from liftplace_jax.host.outside import cut, shown
from liftplace_jax.nn import building
from liftplace_jax.weights.diffusers import (
    MOST_PROBLEMS,
    DiffusersError,
    Format,
    current_name,
    find_problems,
    in_their_words,
    is_count,
)

# Field -> (diffusers' default, the values under which it is our U-Net). An absent field has its
# default, so that a folder that says nothing of norm_eps is refused, not misread.
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "act_fn": ("silu", ("silu", "swish")),
    "add_attention": (True, (True,)),
    "center_input_sample": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "flip_sin_to_cos": (True, (False,)),
    "freq_shift": (0, (1,)),
    "mid_block_scale_factor": (1, (1,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "norm_eps": (1e-5, (1e-6,)),
    "num_class_embeds": (None, (None,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "time_embedding_type": ("positional", ("positional",)),
    "upsample_type": ("conv", ("conv",)),
}
_READ = (
    "attention_head_dim", "attn_norm_num_groups", "block_out_channels", "down_block_types",
    "dropout", "in_channels", "layers_per_block", "norm_num_groups", "out_channels",
    "sample_size", "time_embedding_dim", "up_block_types",
)  # fmt: skip
# What does not change the network: diffusers' EMA keeps its own state among the fields, and the
# number of timesteps matters to learned embeddings alone.
_IGNORED = (
    "decay", "inv_gamma", "min_decay", "min_value", "num_train_timesteps", "optimization_step",
    "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip


_BLOCK = {
    "norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2",
    "conv2": "conv2", "nin_shortcut": "conv_shortcut",
}  # fmt: skip
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Dense there, 1x1 convolutions here; by our name.
_LINEAR = re.compile(r"\.(q|k|v|proj_out)\.weight$")
_NAMES = {
    "ch": "block_out_channels[0]", "ch_mult": "block_out_channels", "image_size": "sample_size",
    "num_groups": "norm_num_groups", "num_res_blocks": "layers_per_block",
    "widths['temb.dense.0']": "time_embedding_dim",
}  # fmt: skip


def config_from_diffusers(fields: Mapping[str, Any]) -> UNetConfig:
    """Our config of a `UNet2DModel`'s; absent fields have diffusers' defaults.

    Args:
      fields: the content of its config.json.

    Raises:
      DiffusersError: fields that our U-Net cannot be; lists all of them.
    """
    problems = find_problems(fields, _FIXED, {*_READ, *_IGNORED})
    sizes = _sizes(fields, problems)
    if problems:
        raise DiffusersError(
            f"not the DDPM U-Net, {len(problems)} fields cannot be represented:\n"
            + "\n".join(f"  {problem}" for problem in cut(problems, MOST_PROBLEMS))
        )
    try:
        return _unet_config(fields, *sizes)
    except ValueError as error:
        raise DiffusersError(in_their_words(str(error), _NAMES)) from error


def _sizes(
    fields: Mapping[str, Any], problems: list[str]
) -> tuple[int, tuple[int, ...], tuple[bool, ...]]:
    """(image size, width of each level, whether a level has attention); adds to `problems`."""
    size: Any = fields.get("sample_size")
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    layers = fields.get("layers_per_block", 2)
    if not is_count(layers):
        problems.append(f"layers_per_block {shown(layers)}: must be a number above 0")
    widths: Any = fields.get("block_out_channels", (224, 448, 672, 896))
    if not is_count(size):
        problems.append(f"sample_size {shown(size)}: must be the height and width of square images")
        size = 0
    if not isinstance(widths, list | tuple) or not widths or not all(map(is_count, widths)):
        problems.append(f"block_out_channels {shown(widths)}: must be widths")
        widths = ()
    attention: list[tuple[bool, ...]] = []
    for field, name, default in (
        ("down_block_types", "DownBlock2D", ("DownBlock2D", *3 * ("AttnDownBlock2D",))),
        ("up_block_types", "UpBlock2D", (*3 * ("AttnUpBlock2D",), "UpBlock2D")),
    ):
        types = fields.get(field, default)
        types = types if isinstance(types, list | tuple) else ()
        types = [str(t).removeprefix("UNetRes") for t in types]  # as they were called at first
        unknown = sorted(set(types) - {name, f"Attn{name}"})
        if unknown or len(types) != len(widths):
            problems.append(
                f"{field} {shown(unknown or types)}: must be one {name} or Attn{name} for each of "
                f"the {len(widths)} block_out_channels"
            )
            types = ()
        attention.append(tuple(t.startswith("Attn") for t in types))
    if all(attention) and attention[0] != attention[1][::-1]:
        problems.append("up_block_types: must have attention where down_block_types has it")
    _check_attention(fields, widths, attention[0], problems)
    return cast(int, size), tuple(widths), attention[0]


def _check_attention(fields, widths, attention, problems):
    groups = fields.get("norm_num_groups", 32)
    if not is_count(groups):
        problems.append(f"norm_num_groups {shown(groups)}: must be a number")
    if fields.get("attn_norm_num_groups") not in (None, groups):
        problems.append(
            f"attn_norm_num_groups {shown(fields['attn_norm_num_groups'])}: must be norm_num_groups"
        )
    # The middle always has attention.
    attended = {w for w, has in zip(widths, attention, strict=False) if has} | set(widths[-1:])
    head = fields.get("attention_head_dim", 8)
    if head is not None and any(width != head for width in attended):
        absent = "" if "attention_head_dim" in fields else " (the default)"
        problems.append(
            f"attention_head_dim {shown(head)}{absent}: must be null, for one head as wide as its "
            f"level ({sorted(attended)})"
        )


def _unet_config(
    fields: Mapping[str, Any], size: int, level_widths: tuple[int, ...], attention: tuple[bool, ...]
) -> UNetConfig:
    ch = level_widths[0]
    if all(width % ch == 0 for width in level_widths):
        mult = [width // ch for width in level_widths]
    else:
        # `widths` says what a level has; ch_mult only where widths change, hence a shortcut.
        others = sorted(set(level_widths) - {ch})
        mult = [1 if width == ch else others.index(width) + 2 for width in level_widths]
    config = UNetConfig(
        image_size=size,
        in_channels=fields.get("in_channels", 3),
        out_channels=fields.get("out_channels", 3),
        ch=ch,
        ch_mult=tuple(mult),
        num_res_blocks=fields.get("layers_per_block", 2),
        attn_resolutions=tuple(size >> level for level, has in enumerate(attention) if has),
        dropout=fields.get("dropout", 0.0),
        # Whether it fits is judged with the true widths, below.
        num_groups=1,
    )
    embedding = fields.get("time_embedding_dim")
    widths = _regular_widths(config, level_widths, 4 * ch if embedding is None else embedding)
    return config.replace(widths=widths, num_groups=fields.get("norm_num_groups", 32))


def _regular_widths(
    config: UNetConfig, level_widths: tuple[int, ...], embedding: int
) -> dict[str, int]:
    """The widths of a network whose layers all have the width of their level."""
    widths = {}
    for name, _ in config.widths:
        if name.startswith("temb."):
            widths[name] = embedding
        elif name == "conv_in":
            widths[name] = level_widths[0]
        else:
            level = re.match(r"(?:down|up)\.(\d+)\.", name)
            widths[name] = level_widths[int(level[1]) if level else -1]
    return widths


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` that computes what a U-Net of this config computes.

    Raises:
      DiffusersError: widths are not regular, so that no such model exists: every layer must have
        the width of its level, the time embedding's two layers the same, and conv_in that of the
        sinusoidal embedding, `ch` (pruning narrows conv_in alone). Names the first that differ.
    """
    nodes, widths = config.block_plan(), dict(config.widths)
    levels = range(len(config.ch_mult))
    level_widths = tuple(widths[f"down.{level}.block.0.conv2"] for level in levels)
    regular = _regular_widths(config, level_widths, widths["temb.dense.0"]) | {"conv_in": config.ch}
    problems = [
        f"{name}: {widths[name]} channels, must be {width}"
        for name, width in regular.items()
        if widths[name] != width
    ]
    # Theirs has a shortcut exactly where widths change.
    problems += [
        f"{node.name}: a nin_shortcut though its input is as wide as its output"
        for node in nodes
        if node.shortcut and node.in_width == node.out_width
    ]
    groups = _num_groups(config, nodes)
    if len(groups) > 1:
        problems.append(f"normalisation: {sorted(groups)} groups in different layers")
    if not config.resamp_with_conv and len(levels) > 1:
        problems.append("resamp_with_conv: False, must be True")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DiffusersError(
            "the network is not regular, so no UNet2DModel is equal to it:\n  "
            + "\n  ".join(problems[:8])
            + more
        )
    attention = [config.image_size >> level in config.attn_resolutions for level in levels]
    names = ["Attn" if has else "" for has in attention]
    fields = {name: allowed[0] for name, (_, allowed) in _FIXED.items()} | {
        "_class_name": "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(level_widths),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": [f"{name}DownBlock2D" for name in names],
        "up_block_types": [f"{name}UpBlock2D" for name in reversed(names)],
        "attention_head_dim": None,
        "norm_num_groups": groups.pop(),
        "dropout": config.dropout,
    }
    if widths["temb.dense.0"] != 4 * config.ch:
        fields["time_embedding_dim"] = widths["temb.dense.0"]
    return fields


def _num_groups(config: UNetConfig, nodes: tuple[Node, ...]) -> set[int]:
    normed = {nodes[-1].out_width}
    for node in nodes:
        normed |= {node.in_width} if node.kind in ("block", "attention") else set()
        normed |= {node.hidden_width} if node.kind == "block" else set()
    return {config.norm_groups(width, "normalisation") for width in normed}


def tensors_from_diffusers(
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


def tensors_to_diffusers(
    config: UNetConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    names = _tensor_names(config)
    return {
        names[name]: value[:, :, 0, 0] if _LINEAR.search(name) else value
        for name, value in tensors.items()
    }


def _tensor_names(config: UNetConfig) -> dict[str, str]:
    """Published DDPM name -> diffusers' name of every tensor of a network."""
    modules = {
        "temb.dense.0": "time_embedding.linear_1",
        "temb.dense.1": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
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
        "mid.block_1": "mid_block.resnets.0",
        "mid.attn_1": "mid_block.attentions.0",
        "mid.block_2": "mid_block.resnets.1",
        "conv_in": "conv_in",
    }
    if node.name in middle:
        return middle[node.name]
    way, level, kind, *rest = node.name.split(".")
    level = int(level) if way == "down" else num_levels - 1 - int(level)
    if kind.endswith("sample"):
        return f"{way}_blocks.{level}.{kind}rs.0.conv"
    return f"{way}_blocks.{level}.{'resnets' if kind == 'block' else 'attentions'}.{rest[0]}"


FORMAT = Format(
    ("UNet2DModel",),
    "unet",
    "conv_norm_out.weight",
    config_from_diffusers,
    tensors_from_diffusers,
    config_to_diffusers,
    tensors_to_diffusers,
)
