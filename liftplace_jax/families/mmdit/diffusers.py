"""diffusers' `SD3Transformer2DModel` as our MMDiT and back: its fields; the tensors are the same.

Fields and defaults: diffusers 0.42 "models/transformers/transformer_sd3.py".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from liftplace_jax import weights
from liftplace_jax.families.mmdit.config import QK_NORMS, MMDiTConfig
from liftplace_jax.host.outside import cut, shown
from liftplace_jax.nn import building
from liftplace_jax.nn.layers import position_embedding
from liftplace_jax.weights.diffusers import (
    MOST_PROBLEMS,
    DiffusersError,
    Format,
    find_problems,
    in_their_words,
    is_count,
)

# Ours -> theirs, and its default.
_COUNTS = {
    "image_size": ("sample_size", 128),
    "depth": ("num_layers", 18),
    "num_heads": ("num_attention_heads", 18),
    "head_size": ("attention_head_dim", 64),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 16),
    "context_dim": ("joint_attention_dim", 4096),
    "pooled_dim": ("pooled_projection_dim", 2048),
    "position_size": ("pos_embed_max_size", 96),
}
_OTHERS = ("caption_projection_dim", "out_channels", "dual_attention_layers")
_NAMES = {ours: theirs for ours, (theirs, _) in _COUNTS.items()}
POSITIONS = "pos_embed.pos_embed"


def config_from_diffusers(fields: Mapping[str, Any]) -> MMDiTConfig:
    """Our config of a `SD3Transformer2DModel`'s; absent fields have diffusers' defaults.

    Args:
      fields: the content of its config.json.

    Raises:
      DiffusersError: fields that our MMDiT cannot be; lists all of them.
    """
    fixed = {"qk_norm": (None, QK_NORMS)}
    problems = find_problems(fields, fixed, {*_NAMES.values(), *_OTHERS})
    values = {}
    for ours, (theirs, default) in _COUNTS.items():
        values[ours] = fields.get(theirs, default)
        if not is_count(values[ours]):
            problems.append(f"{theirs} {shown(values[ours])}: must be a number above 0")
    dual = fields.get("dual_attention_layers", ()) or ()
    if not isinstance(dual, list | tuple) or not all(type(layer) is int for layer in dual):
        problems.append(f"dual_attention_layers {shown(dual)}: must be a list of block numbers")
    if not problems:
        problems += _width_problems(fields, values)
    if not problems:
        try:
            return MMDiTConfig(
                **values, qk_norm=fields.get("qk_norm"), dual_attention_layers=tuple(dual)
            )
        except ValueError as error:
            problems.append(in_their_words(str(error), _NAMES))
    raise DiffusersError(
        f"not an MMDiT, {len(problems)} fields cannot be represented:\n"
        + "\n".join(f"  {problem}" for problem in cut(problems, MOST_PROBLEMS))
    )


def _width_problems(fields: Mapping[str, Any], values: Mapping[str, int]) -> list[str]:
    width, channels = values["num_heads"] * values["head_size"], values["in_channels"]
    found = []
    for name, default, wanted, why in (
        ("caption_projection_dim", 1152, width, "num_attention_heads * attention_head_dim"),
        ("out_channels", 16, channels, "in_channels"),
    ):
        value = fields.get(name, default)
        if value != wanted and not (value is None and name == "out_channels"):
            absent = "" if name in fields else " (the default, as the field is absent)"
            found.append(f"{name} {shown(value)}{absent}: must be {why}, {wanted}")
    return found


def tensors_from_diffusers(
    config: MMDiTConfig, stored: Mapping[str, np.ndarray]
) -> tuple[MMDiTConfig, dict[str, np.ndarray]]:
    """Our tensors of theirs; a table of positions that is not stored is computed, as theirs is.

    Raises:
      weights.WeightMismatchError: tensors do not fit; lists all.
    """
    tensors = dict(stored)
    if POSITIONS not in tensors:
        tensors[POSITIONS] = position_embedding(
            config.hidden_size, config.position_size, config.side / config.position_size
        )
    expected = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in weights.published_shapes(building.abstract(config)[1]).items()
    }
    misfits = weights.find_misfits(expected, tensors)
    if misfits:
        raise weights.WeightMismatchError(misfits)
    return config, {name: tensors[name] for name in expected}


def config_to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json of the `SD3Transformer2DModel` that an MMDiT of this config is."""
    counts = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    return counts | {
        "_class_name": "SD3Transformer2DModel",
        "caption_projection_dim": config.hidden_size,
        "out_channels": config.out_channels,
        "qk_norm": config.qk_norm,
        "dual_attention_layers": list(config.dual_attention_layers),
    }


def tensors_to_diffusers(
    config: MMDiTConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Their tensors of ours."""
    del config
    return dict(tensors)


FORMAT = Format(
    ("SD3Transformer2DModel",),
    "transformer",
    None,
    config_from_diffusers,
    tensors_from_diffusers,
    config_to_diffusers,
    tensors_to_diffusers,
)
