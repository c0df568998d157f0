"""diffusers' `UNet2DConditionModel` as our Stable Diffusion U-Net and back.

Modules have the same names, so that the tensors are the same. Fields and defaults: diffusers 0.42
"models/unets/unet_2d_condition.py".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from liftplace_jax import weights
from liftplace_jax.families.sd_unet.config import SDUNetConfig
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

# Field -> (diffusers' default, the values under which it is our U-Net).
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "act_fn": ("silu", ("silu", "swish")),
    "addition_embed_type": (None, (None,)),
    "attention_type": ("default", ("default",)),
    "center_input_sample": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "cross_attention_norm": (None, (None,)),
    "downsample_padding": (1, (1,)),
    "dropout": (0.0, (0.0,)),
    "dual_cross_attention": (False, (False,)),
    "encoder_hid_dim": (None, (None,)),
    "encoder_hid_dim_type": (None, (None,)),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "mid_block_only_cross_attention": (None, (None, False)),
    "mid_block_scale_factor": (1, (1,)),
    "num_attention_heads": (None, (None,)),
    "num_class_embeds": (None, (None,)),
    "only_cross_attention": (False, (False,)),
    "resnet_out_scale_factor": (1.0, (1.0,)),
    "resnet_skip_time_act": (False, (False,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "time_cond_proj_dim": (None, (None,)),
    "time_embedding_act_fn": (None, (None,)),
    "time_embedding_type": ("positional", ("positional",)),
    "timestep_post_act": (None, (None,)),
    "transformer_layers_per_block": (1, (1,)),
}
_DEFAULTS = {
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "down_block_types": (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"), "in_channels": 4,
    "layers_per_block": 2, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5,
    "norm_num_groups": 32, "out_channels": 4, "sample_size": None, "time_embedding_dim": None,
    "up_block_types": ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)), "upcast_attention": False,
    "use_linear_projection": False,
}  # fmt: skip
# What does not change the network: fields of embeddings that it has not, and what diffusers' EMA
# keeps of its own state.
_IGNORED = (
    "addition_embed_type_num_heads", "addition_time_embed_dim", "class_embeddings_concat",
    "projection_class_embeddings_input_dim", "reverse_transformer_layers_per_block",
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup",
)  # fmt: skip
_ALIKE = ("cross_attention_dim", "only_cross_attention", "transformer_layers_per_block")
"""Fields that may be one value for each level, which must then be equal."""
_NAMES = {
    "context_dim": "cross_attention_dim", "down_attention": "down_block_types",
    "heads": "attention_head_dim", "image_size": "sample_size", "layers": "layers_per_block",
    "linear_projection": "use_linear_projection", "mid_block": "mid_block_type",
    "norm_epsilon": "norm_eps", "num_groups": "norm_num_groups", "up_attention": "up_block_types",
    "widths": "block_out_channels",
}  # fmt: skip


def config_from_diffusers(fields: Mapping[str, Any]) -> SDUNetConfig:
    """Our config of a `UNet2DConditionModel`'s; absent fields have diffusers' defaults.

    Args:
      fields: the content of its config.json.

    Raises:
      DiffusersError: fields that our U-Net cannot be; lists all of them.
    """
    fields = dict(fields)
    for name in _ALIKE:
        value = fields.get(name)
        if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
            fields[name] = value[0]
    problems = find_problems(fields, _FIXED, {*_DEFAULTS, *_IGNORED})
    values = _DEFAULTS | fields
    ours = _read(values, problems)
    if not problems:
        try:
            return SDUNetConfig(**ours)
        except ValueError as error:
            problems.append(in_their_words(str(error), _NAMES))
    raise DiffusersError(
        f"not the U-Net of Stable Diffusion 1 or 2, {len(problems)} fields cannot be represented:\n"
        + "\n".join(f"  {problem}" for problem in cut(problems, MOST_PROBLEMS))
    )


def _read(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Fields of our config; adds to `problems`."""
    size = values["sample_size"]
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not is_count(size):
        problems.append(f"sample_size {shown(size)}: must be the height and width of square images")
    widths = values["block_out_channels"]
    if not isinstance(widths, list | tuple) or not widths or not all(map(is_count, widths)):
        problems.append(f"block_out_channels {shown(widths)}: must be widths")
        widths = ()
    for name in ("in_channels", "out_channels", "norm_num_groups", "cross_attention_dim"):
        if not is_count(values[name]):
            problems.append(f"{name} {shown(values[name])}: must be a number above 0")
    for name in ("upcast_attention", "use_linear_projection"):
        if not isinstance(values[name], bool):
            problems.append(f"{name} {shown(values[name])}: must be true or false")
    middle = values["mid_block_type"]
    if middle not in (None, "UNetMidBlock2DCrossAttn"):
        problems.append(f"mid_block_type {shown(middle)}: must be UNetMidBlock2DCrossAttn or null")
    embedding = values["time_embedding_dim"]
    if embedding is not None and widths and embedding != 4 * widths[0]:
        problems.append(f"time_embedding_dim {shown(embedding)}: must be {4 * widths[0]}, or null")
    return {
        "image_size": size,
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "widths": tuple(widths),
        "layers": _of_levels("layers_per_block", values, len(widths), problems),
        "heads": _of_levels("attention_head_dim", values, len(widths), problems),
        "down_attention": _attention("down", "DownBlock2D", values, len(widths), problems),
        "up_attention": _attention("up", "UpBlock2D", values, len(widths), problems),
        "mid_block": middle is not None,
        "context_dim": values["cross_attention_dim"],
        "linear_projection": values["use_linear_projection"],
        "upcast_attention": values["upcast_attention"],
        "num_groups": values["norm_num_groups"],
        "norm_epsilon": values["norm_eps"],
    }


def _of_levels(name: str, values: Mapping[str, Any], levels: int, problems: list[str]) -> tuple:
    value = values[name]
    found = tuple(value) if isinstance(value, list | tuple) else levels * (value,)
    if len(found) != levels or not all(map(is_count, found)):
        problems.append(
            f"{name} {shown(value)}: must be a number above 0, or one for each of the {levels} "
            "block_out_channels"
        )
    return found


def _attention(way: str, kind: str, values: Mapping[str, Any], levels: int, problems: list[str]):
    name = f"{way}_block_types"
    types = values[name] if isinstance(values[name], list | tuple) else ()
    unknown = sorted({str(t) for t in types} - {kind, f"CrossAttn{kind}"})
    if unknown or len(types) != levels:
        problems.append(
            f"{name} {shown(unknown or values[name])}: must be one {kind} or CrossAttn{kind} for "
            f"each of the {levels} block_out_channels"
        )
    return tuple(str(t).startswith("Cross") for t in types)


def config_to_diffusers(config: SDUNetConfig) -> dict[str, Any]:
    """The config.json of the `UNet2DConditionModel` that a U-Net of this config is."""

    def short(values):
        return values[0] if len(set(values)) == 1 else list(values)

    def types(kind, attention):
        return [f"CrossAttn{kind}" if has else kind for has in attention]

    return {name: allowed[0] for name, (_, allowed) in _FIXED.items()} | {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": short(config.heads),
        "block_out_channels": list(config.widths),
        "cross_attention_dim": config.context_dim,
        "down_block_types": types("DownBlock2D", config.down_attention),
        "in_channels": config.in_channels,
        "layers_per_block": short(config.layers),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.mid_block else None,
        "norm_eps": config.norm_epsilon,
        "norm_num_groups": config.num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.image_size,
        "up_block_types": types("UpBlock2D", config.up_attention),
        "upcast_attention": config.upcast_attention,
        "use_linear_projection": config.linear_projection,
    }


def tensors_from_diffusers(
    config: SDUNetConfig, stored: Mapping[str, np.ndarray]
) -> tuple[SDUNetConfig, dict[str, np.ndarray]]:
    """Our tensors of theirs, which may have the names of attention before diffusers 0.12.

    Raises:
      weights.WeightMismatchError: tensors do not fit; lists all, by their own names.
    """
    own_names = {current_name(name): name for name in stored}
    tensors = {name: stored[own] for name, own in own_names.items()}
    misfits = weights.find_misfits(building.abstract(config)[1], tensors)
    if misfits:
        raise weights.WeightMismatchError(
            sorted((own_names.get(name, name), problem) for name, problem in misfits)
        )
    return config, tensors


def tensors_to_diffusers(
    config: SDUNetConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    del config
    return dict(tensors)


_PIPELINE = {
    "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "feature_extractor": [None, None],
    "image_encoder": [None, None], "safety_checker": [None, None],
}  # fmt: skip
FORMAT = Format(
    ("UNet2DConditionModel",),
    "unet",
    None,
    config_from_diffusers,
    tensors_from_diffusers,
    config_to_diffusers,
    tensors_to_diffusers,
    _PIPELINE,
)
