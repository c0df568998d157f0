"""diffusers' `DiTTransformer2DModel` as our DiT and back: its fields and its tensors.

Theirs has a timestep and a label embedder in every block (equal ones where the model was not
trained there), other frequencies and another epsilon before the MLP; `DiTConfig` says all three.
Fields and defaults: diffusers 0.42 "models/transformers/dit_transformer_2d.py".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from liftplace_jax import weights
from liftplace_jax.families.dit.config import DiTConfig
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

# Field -> the value under which it is our DiT. The later ones are those of the class before.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
}
_DEFAULTS = {
    "attention_head_dim": 72, "in_channels": 4, "norm_eps": 1e-5, "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000, "num_layers": 28, "out_channels": None, "patch_size": 2,
    "sample_size": 32,
}  # fmt: skip
# `Transformer2DModel`, as the published DiT pipelines name it, has other defaults.
_OLD = "Transformer2DModel"
_OLD_DEFAULTS = {
    "activation_fn": "geglu", "attention_bias": False, "norm_elementwise_affine": True,
    "norm_type": "layer_norm",
    "attention_head_dim": 88, "in_channels": None, "num_embeds_ada_norm": None, "num_layers": 1,
    "patch_size": None, "sample_size": None,
}  # fmt: skip
_IGNORED = (
    "norm_num_groups",
    "upcast_attention",
    "use_additional_conditions",
    "use_linear_projection",
)

_NAMES = {
    "depth": "num_layers", "hidden_size": "num_attention_heads * attention_head_dim",
    "image_size": "sample_size", "norm_epsilon": "norm_eps", "num_classes": "num_embeds_ada_norm",
    "num_heads": "num_attention_heads",
}  # fmt: skip
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = _EMBEDDERS | {
    "adaLN_modulation.1": "norm1.linear",
    "attn.qkv": "attn1.to_{}",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_OTHERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_POSITIONS = "pos_embed.pos_embed"
_CLASS_DROPOUT = 0.1


def config_from_diffusers(fields: Mapping[str, Any]) -> DiTConfig:
    """Our config of a `DiTTransformer2DModel`'s; absent fields have diffusers' defaults.

    Args:
      fields: the content of its config.json.

    Returns:
      The config with embedders="per_block"; only the tensors tell whether they are equal.

    Raises:
      DiffusersError: fields that our DiT cannot be; lists all of them.
    """
    old = _OLD_DEFAULTS if fields.get("_class_name") == _OLD else {}
    fixed = {name: (old.get(name, value), (value,)) for name, value in _FIXED.items()}
    problems = find_problems(fields, fixed, {*_DEFAULTS, *_IGNORED})
    values = {**_DEFAULTS, **old, **fields}
    for name in sorted(_DEFAULTS.keys() - {"norm_eps", "out_channels"}):
        if not is_count(values[name]):
            problems.append(f"{name} {shown(values[name])}: must be a number above 0")
    channels, out = values["in_channels"], values["out_channels"]
    learn_sigma = is_count(channels) and out == 2 * channels
    if is_count(channels) and out not in (None, channels, 2 * channels):
        problems.append(
            f"out_channels {shown(out)}: must be in_channels {channels}, or twice as many"
        )
    if not problems:
        try:
            return DiTConfig(
                image_size=values["sample_size"],
                hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
                depth=values["num_layers"],
                num_heads=values["num_attention_heads"],
                patch_size=values["patch_size"],
                in_channels=channels,
                num_classes=values["num_embeds_ada_norm"],
                class_dropout=_CLASS_DROPOUT,
                learn_sigma=learn_sigma,
                frequency_shift=1,
                norm_epsilon=values["norm_eps"],
                embedders="per_block",
            )
        except ValueError as error:
            problems.append(in_their_words(str(error), _NAMES))
    raise DiffusersError(
        f"not a DiT, {len(problems)} fields cannot be represented:\n"
        + "\n".join(f"  {problem}" for problem in cut(problems, MOST_PROBLEMS))
    )


def tensors_from_diffusers(
    config: DiTConfig, stored: Mapping[str, np.ndarray]
) -> tuple[DiTConfig, dict[str, np.ndarray]]:
    """Our tensors of theirs.

    Args:
      config: of `config_from_diffusers`.
      stored: their arrays by their names.

    Returns:
      (config with embedders="shared" if all blocks have equal ones, tensors by published name).

    Raises:
      weights.WeightMismatchError: tensors do not fit; lists all, by their own names.
    """
    shapes = weights.published_shapes(building.abstract(config)[1])
    expected = {}
    for ours, shape in shapes.items():
        theirs = _their_names(ours)
        leaf = jax.ShapeDtypeStruct((shape[0] // len(theirs), *shape[1:]), np.float32)
        expected |= dict.fromkeys(theirs, leaf)
    # Newer versions compute the positions and do not store them.
    if _POSITIONS not in stored:
        del expected[_POSITIONS]
    misfits = weights.find_misfits(expected, stored)
    if misfits:
        raise weights.WeightMismatchError(misfits)
    side = config.image_size // config.patch_size
    stored = {_POSITIONS: position_embedding(config.hidden_size, side)} | dict(stored)
    tensors = {name: np.concatenate([stored[t] for t in _their_names(name)]) for name in shapes}
    first = {name: name.removeprefix("blocks.0.") for name in shapes if _is_embedder(name, "0")}
    equal = all(
        np.array_equal(tensors[name], tensors[f"blocks.{index}.{shared}"])
        for name, shared in first.items()
        for index in range(1, config.depth)
    )
    if not equal:
        return config, tensors
    tensors |= {shared: tensors[name] for name, shared in first.items()}
    tensors = {name: value for name, value in tensors.items() if not _is_embedder(name)}
    return config.replace(embedders="shared"), tensors


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """The config.json of a `DiTTransformer2DModel` that computes what a DiT of this config does.

    Raises:
      DiffusersError: there is none; says why.
    """
    problems = []
    if config.frequency_shift != 1:
        problems.append(
            "frequency_shift 0: must be 1, the frequencies of diffusers' timestep embedding (the "
            "published ones are others, so its weights mean something else there)"
        )
    if config.mlp_width != 4 * config.hidden_size:
        problems.append(f"mlp_ratio {config.mlp_ratio}: must be 4")
    if config.null_label is None:
        problems.append("class_dropout 0: must be above 0, theirs has a null label")
    if problems:
        raise DiffusersError(
            "no DiTTransformer2DModel is equal to this DiT:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    own = {name: _FIXED[name] for name in list(_FIXED)[:5]}
    return own | {
        "_class_name": "DiTTransformer2DModel",
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "norm_eps": config.norm_epsilon,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.image_size,
    }


def tensors_to_diffusers(
    config: DiTConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Their tensors of ours; the inverse of `tensors_from_diffusers`.

    Raises:
      DiffusersError: the positions are not those that diffusers computes.
    """
    side = config.image_size // config.patch_size
    if not np.allclose(
        tensors["pos_embed"], position_embedding(config.hidden_size, side), atol=1e-6
    ):
        raise DiffusersError("pos_embed is not the sines and cosines that diffusers computes")
    result = {}
    for name, value in tensors.items():
        module = name.rpartition(".")[0]
        prefixes = [f"blocks.{i}." for i in range(config.depth)] if module in _EMBEDDERS else [""]
        for prefix in prefixes:
            theirs = _their_names(prefix + name)
            result |= dict(zip(theirs, np.split(value, len(theirs)), strict=True))
    return {name: value for name, value in result.items() if name != _POSITIONS}


def _their_names(name: str) -> list[str]:
    """The tensors of diffusers that, one after another, are the one of a published name."""
    if name == "pos_embed":
        return [_POSITIONS]
    module, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block is None:
        return [f"{_OTHERS[module]}.{leaf}"]
    theirs = f"transformer_blocks.{block[1]}.{_BLOCK[block[2]]}.{leaf}"
    return [theirs.format(part) for part in "qkv"] if "{}" in theirs else [theirs]


def _is_embedder(name: str, block: str = r"\d+") -> bool:
    return re.match(rf"blocks\.{block}\.[ty]_embedder\.", name) is not None


FORMAT = Format(
    ("DiTTransformer2DModel", _OLD),
    "transformer",
    "proj_out_2.weight",
    config_from_diffusers,
    tensors_from_diffusers,
    config_to_diffusers,
    tensors_to_diffusers,
)
