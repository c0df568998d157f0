"""T5's encoder with its weights: folders of transformers."""

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
from liftplace_jax.encoders.t5.config import T5Config
from liftplace_jax.host.buckets import as_path
from liftplace_jax.host.outside import shown
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network, from_tensors
from liftplace_jax.weights.diffusers_files import TRANSFORMERS, choose_folder, read_weights

_ARCHITECTURES = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
_TABLE, _TABLES = "shared.weight", ("encoder.embed_tokens.weight",)


@dataclasses.dataclass(frozen=True)
class T5Encoder(Network):
    """A `T5` with its arrays; attributes as of `Network`.

    Attributes:
      name: of the folder it comes from.
    """

    name: str = "t5"

    @property
    def identity(self) -> dict[str, Any]:
        """What its states depend on, as JSON types."""
        return {"name": self.name, "sha256": self.sha256}

    def encode(self, params: building.Params, ids: jax.Array) -> jax.Array:
        """States (B, T, D) of token ids (B, T).

        Args:
          params: the parameters, such as `self.params`.
          ids: int32.
        """
        return nnx.merge(self.graphdef, params)(ids)


def load_t5(path: str | os.PathLike, entry: str | None = None, dtype: str = "float32") -> T5Encoder:
    """T5's encoder from its folder.

    Args:
      path: a folder of transformers' `T5EncoderModel`, or of a whole T5, whose decoder is left
        out; or of a pipeline with one of them in it. Its weights are model.safetensors,
        pytorch_model.bin or the shards that an index of these names.
      entry: which of the folders in it ("text_encoder_3"), which variant of the weights ("fp16"),
        or both.
      dtype: of the computation.

    Raises:
      ValueError: no such folder, it holds another network, or files that do not fit; names the
        path and every misfit.
    """
    folder = as_path(path)
    found = choose_folder(folder, entry, (), _is_t5)
    if found is None:
        raise ValueError(f"{path}: no config.json of a T5 there, or in a folder in it")
    place, variant, fields = found
    if not _is_t5(fields):
        said = fields.get("architectures", fields.get("model_type", fields.get("_class_name")))
        raise ValueError(
            f"{place / 'config.json'}: is of {shown(said)}, must be one of {list(_ARCHITECTURES)}"
        )
    try:
        config = T5Config.from_transformers(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place / 'config.json'}: {error}") from error
    tensors = _encoders_own(read_weights(place, variant, TRANSFORMERS))
    network = from_tensors(config, tensors, place, dtype)
    return T5Encoder(network.config, network.graphdef, network.params, folder.resolve().name)


def _is_t5(fields: Mapping[str, Any]) -> bool:
    names = fields.get("architectures")
    if isinstance(names, list) and names:
        return not {*map(str, names)}.isdisjoint(_ARCHITECTURES)
    return fields.get("model_type") == "t5"


def _encoders_own(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the decoder; files may have the table of tokens under several names, or one."""
    own = {name: t for name, t in tensors.items() if name.startswith(("shared.", "encoder."))}
    for name in _TABLES:
        table = own.pop(name, None)
        if table is not None:
            own.setdefault(_TABLE, table)
    return own


def write_random_t5(
    folder: str | os.PathLike, *, vocab_size: int, width: int = 16, seed: int = 0
) -> Path:
    """Writes a tiny T5 encoder of random weights, for runs in miniature (`runlocal`) and tests.

    Args:
      folder: where `load_t5` will find it.
      vocab_size: number of tokens.
      width: of its states.
      seed: of the weights.

    Returns:
      The folder.
    """
    config = T5Config(
        vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2
    )
    weights.save_model(folder, config.described(), building.create(config, seed)[1])
    return as_path(folder)
