"""CLIP's towers with their weights: folders of transformers, which ours are too."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.encoders.clip.config import CLIPTextConfig, CLIPVisionConfig
from liftplace_jax.encoders.clip.model import Encoded
from liftplace_jax.encoders.shipped import find_shipped
from liftplace_jax.host.buckets import as_path, make_folder
from liftplace_jax.host.files import write_json
from liftplace_jax.host.outside import shown
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network, from_tensors
from liftplace_jax.weights.diffusers_files import TRANSFORMERS, choose_folder, read_weights

_PAIR = "CLIPModel"
_DEFAULT_PROJECTION = 512  # transformers' "projection_dim" where a config has none


@dataclasses.dataclass(frozen=True)
class _Tower(Network):
    """A tower with its arrays; attributes as of `Network`.

    Attributes:
      name: of the folder it comes from.
    """

    name: str = "clip"

    @property
    def identity(self) -> dict[str, Any]:
        """What its states depend on, as JSON types."""
        return {"name": self.name, "sha256": self.sha256}

    def encode(self, params: building.Params, inputs: jax.Array) -> Encoded:
        """States of token ids (B, T), or of images (B, H, W, C), as of the tower's module.

        Args:
          params: the parameters, such as `self.params`.
          inputs: what the module takes.
        """
        return nnx.merge(self.graphdef, params)(inputs)


class TextEncoder(_Tower):
    """A `CLIPText` with its arrays."""


class ImageEncoder(_Tower):
    """A `CLIPVision` with its arrays."""


def load_text_encoder(
    path: str | os.PathLike, entry: str | None = None, dtype: str = "float32"
) -> TextEncoder:
    """A text encoder from its folder.

    Args:
      path: a folder of transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` or `CLIPModel`,
        or of a pipeline with one of them in it; its weights are model.safetensors,
        pytorch_model.bin or the shards that an index of these names. Or a name of SHIPPED.
      entry: which of the folders in it ("text_encoder_2"), which variant of the weights ("fp16"),
        or both.
      dtype: of the computation.

    Raises:
      ValueError: no such folder, it holds another network, or files that do not fit; names the
        path and every misfit.
    """
    return TextEncoder(*_load(path, entry, dtype, CLIPTextConfig, "text"))


def load_image_encoder(
    path: str | os.PathLike, entry: str | None = None, dtype: str = "float32"
) -> ImageEncoder:
    """An image encoder from its folder.

    Args:
      path: as of `load_text_encoder`, of `CLIPVisionModel`, `CLIPVisionModelWithProjection` or
        `CLIPModel`.
      entry, dtype: as of `load_text_encoder`.

    Raises:
      ValueError: as of `load_text_encoder`.
    """
    return ImageEncoder(*_load(path, entry, dtype, CLIPVisionConfig, "vision"))


def _load(path, entry, dtype, config_class, tower: str):
    folder = find_shipped(path)
    allowed = {*config_class.architectures, _PAIR}
    found = choose_folder(folder, entry, (), lambda fields: _is_one(fields, config_class))
    if found is None:
        raise ValueError(
            f"{path}: no config.json of a CLIP {tower} model there, or in a folder in it"
        )
    place, variant, fields = found
    if not _is_one(fields, config_class):
        said = fields.get("architectures", fields.get("model_type", fields.get("_class_name")))
        raise ValueError(
            f"{place / 'config.json'}: is of {shown(said)}, must be one of {sorted(allowed)}"
        )
    tensors = _own_tensors(read_weights(place, variant, TRANSFORMERS), fields, tower)
    try:
        config = _config(fields, tensors, config_class, tower)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place / 'config.json'}: {error}") from error
    network = from_tensors(config, tensors, place, dtype)
    return network.config, network.graphdef, network.params, folder.resolve().name


def _is_one(fields: Mapping[str, Any], config_class: type) -> bool:
    """Whether a config is of such a tower, or of both; architectures tell more than model_type.

    The safety checker of a pipeline has the model_type of both, and is neither.
    """
    names = fields.get("architectures")
    if isinstance(names, list) and names:
        return not {*map(str, names)}.isdisjoint({*config_class.architectures, _PAIR})
    return fields.get("model_type") in (config_class.model_type, "clip")


def _own_tensors(
    tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any], tower: str
) -> dict[str, np.ndarray]:
    """Those of one tower by their published names."""
    model, projection = f"{tower}_model.", {"text": "text", "vision": "visual"}[tower]
    # Buffers, which files of earlier versions hold: 0, 1, 2, ...
    found = {k: v for k, v in tensors.items() if not k.endswith(".embeddings.position_ids")}
    found.pop("embeddings.position_ids", None)
    if _is_pair(fields):
        starts = (model, f"{projection}_projection.")
        return {name: value for name, value in found.items() if name.startswith(starts)}
    if not any(name.startswith(model) for name in found):  # transformers 5 may leave it out
        whole = f"{projection}_projection."
        return {k if k.startswith(whole) else model + k: v for k, v in found.items()}
    return found


def _is_pair(fields: Mapping[str, Any]) -> bool:
    return "text_config" in fields or "vision_config" in fields


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], config_class: type, tower: str):
    width = fields.get("projection_dim", _DEFAULT_PROJECTION)
    if _is_pair(fields):
        own = dict(fields.get(f"{tower}_config") or {})
        # Of earlier versions; where there is one, it is what transformers goes by.
        old = fields.get(f"{tower}_config_dict")
        if old is not None:
            defaults = dataclasses.asdict(config_class())
            own |= defaults | dict(old)
        return config_class.from_transformers(own, width)
    names = fields.get("architectures") or ()
    projects = config_class.architectures[1] in names or any("_projection." in k for k in tensors)
    return config_class.from_transformers(fields, width if projects else None)


def save_clip(
    folder: str | os.PathLike, text: Network, vision: Network, logit_scale: float
) -> None:
    """Writes a pair of towers as transformers' `CLIPModel`.

    Args:
      folder: gets model.safetensors and config.json; made if missing.
      text: of a `CLIPTextConfig` with a projection.
      vision: of a `CLIPVisionConfig` with one of the same width.
      logit_scale: logarithm of the factor of cosines, as it was trained.

    Raises:
      ValueError: the projections have different widths, or there are none.
    """
    widths = text.config.projection_dim, vision.config.projection_dim
    if widths[0] is None or widths[0] != widths[1]:
        raise ValueError(f"projection_dim must be one of both towers, got {widths}")
    tensors = weights.to_torch(text.params) | weights.to_torch(vision.params)
    tensors["logit_scale"] = np.asarray(logit_scale, np.float32)
    fields = {
        "architectures": [_PAIR],
        "model_type": "clip",
        "projection_dim": widths[0],
        "text_config": text.config.described(),
        "vision_config": vision.config.described(),
    }
    folder = as_path(folder)
    make_folder(folder)
    weights.write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", fields)


def save_text_encoder(folder: str | os.PathLike, encoder: Network) -> None:
    """Writes a text encoder as transformers' `CLIPTextModel`: without its projection.

    Args:
      folder: gets model.safetensors and config.json; made if missing.
      encoder: of a `CLIPTextConfig`.
    """
    fields = encoder.config.replace(projection_dim=None).described()
    params = {name: part for name, part in encoder.params.items() if name != "text_projection"}
    folder = as_path(folder)
    make_folder(folder)
    tensors = weights.to_torch(params)
    weights.write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", fields)


def write_random_text_encoder(
    folder: str | os.PathLike,
    *,
    vocab_size: int,
    width: int = 16,
    length: int = 16,
    projection_dim: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny text encoder of random weights, for runs in miniature (`runlocal`) and tests.

    Args:
      folder: where `load_text_encoder` will find it.
      vocab_size: number of tokens; the last of them is the end token.
      width: of its states.
      length: tokens of the longest text.
      projection_dim: of the pooled state; None: there is no projection.
      seed: of the weights.

    Returns:
      The folder.
    """
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        eos_token_id=vocab_size - 1,
        projection_dim=projection_dim,
    )
    weights.save_model(folder, config.described(), building.create(config, seed)[1])
    return as_path(folder)
