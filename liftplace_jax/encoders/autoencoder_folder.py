"""Autoencoders with their weights: diffusers' `AutoencoderKL` folders, and our own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.diffusion.scaling import from_latents
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.encoders.shipped import find_shipped
from liftplace_jax.host.buckets import as_path, make_folder
from liftplace_jax.host.files import write_json
from liftplace_jax.host.outside import cut, shown
from liftplace_jax.nn import building, frozen
from liftplace_jax.nn.network import Network, from_tensors, read_network
from liftplace_jax.weights.diffusers import MOST_PROBLEMS, DiffusersError, current_name
from liftplace_jax.weights.diffusers_files import (
    WEIGHTS_NAME,
    choose_folder,
    is_of_diffusers,
    read_weights,
)

# diffusers' defaults of the fields that are ours too (0.42 "autoencoder_kl.py"); shift_factor is
# None there.
_DEFAULTS = {
    "block_out_channels": (64,), "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 32, "scaling_factor": 0.18215, "shift_factor": 0.0,
    "use_quant_conv": True, "use_post_quant_conv": True, "in_channels": 3, "out_channels": 3,
    "sample_size": 32,
}  # fmt: skip
# Field -> (diffusers' default, the values under which it is our autoencoder).
_FIXED = {
    "act_fn": ("silu", ("silu", "swish")),
    "latents_mean": (None, (None,)),
    "latents_std": (None, (None,)),
    "mid_block_add_attention": (True, (True,)),
}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_IGNORED = ("force_upcast",)  # about float16


_DECODING = ("decoder", "post_quant_conv")


class Decoder(NamedTuple):
    """The half of an autoencoder that makes images.

    Attributes:
      decode: (params, (B, h, w, C) latents as a network sees them) -> (B, H, W, C) images, not
        clipped; a pure function.
      params: the parameters, as of `frozen.kept`.
    """

    decode: Callable[[Any, jax.Array], jax.Array]
    params: Any


@dataclasses.dataclass(frozen=True)
class AutoencoderNetwork(Network):
    """An autoencoder with its arrays.

    Attributes:
      config: an `AutoencoderConfig`.
      graphdef: the NNX definition.
      params: the parameters, in memory: devices get what they use.
      name: of the folder it comes from.
    """

    name: str

    def decoder(self, dtype: str = "float32", tile: int = 0) -> Decoder:
        """What decodes latents.

        Args:
          dtype: of the computation.
          tile: as of `Autoencoder.decode`.
        """
        config = self.config
        graphdef, whole = building.abstract(config, jnp.dtype(dtype))
        params = {name: part for name, part in self.params.items() if name in _DECODING}

        def decode(params, latents):
            z = from_latents(latents, config.shift_factor, config.scaling_factor)
            # The encoder is there in name only: its parameters stay where they are.
            return nnx.merge(graphdef, whole | params).decode(z, tile)

        latents = jax.ShapeDtypeStruct((1, 2, 2, config.latent_channels), jnp.float32)
        return Decoder(decode, frozen.cast(params, frozen.kept(decode, params, latents)))

    @property
    def identity(self) -> dict[str, Any]:
        """What its latents depend on, as JSON types."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "scaling_factor": self.config.scaling_factor,
            "shift_factor": self.config.shift_factor,
        }


def load_autoencoder(path: str | os.PathLike, entry: str | None = None) -> AutoencoderNetwork:
    """An autoencoder from its folder.

    Args:
      path: a name of SHIPPED; a folder of diffusers' `AutoencoderKL`, or of a pipeline with one
        in "vae"; its weights as of `read_weights`, attention also under its names before
        diffusers 0.12. Or a folder of ours (model.safetensors and config.json).
      entry: which of the folders in it ("vae_ema"), which variant of the weights ("fp16"), or both.

    Raises:
      ValueError: no such folder, it holds another network, or files that do not fit; names the
        path and every misfit.
    """
    folder = find_shipped(path)
    found = choose_folder(folder, entry, ("vae",), _is_autoencoder)
    if found is None:
        raise ValueError(f"{path}: no config.json of an autoencoder there, or in vae/")
    place, variant, fields = found
    if is_of_diffusers(place, fields):
        network = _from_diffusers(fields, place, variant)
    else:
        if not _is_ours(fields):
            raise ValueError(f"{path} holds a {fields.get('model')!r}, not an autoencoder")
        network = read_network(place, _own_config)
    params = jax.device_get(network.params)
    return AutoencoderNetwork(network.config, network.graphdef, params, folder.resolve().name)


def _is_autoencoder(fields: Mapping[str, Any]) -> bool:
    return "AutoencoderKL" == fields.get("_class_name") or _is_ours(fields)


def _is_ours(fields: Mapping[str, Any]) -> bool:
    return fields.get("model") == AutoencoderConfig.model


def _own_config(fields: Mapping[str, Any]) -> AutoencoderConfig:
    return AutoencoderConfig.from_dict({k: v for k, v in fields.items() if k != "model"})


def _from_diffusers(fields: Mapping[str, Any], folder: Path, variant: str | None) -> Network:
    try:
        config = config_from_diffusers(fields)
    except ValueError as error:
        raise DiffusersError(f"{folder / 'config.json'}: {error}") from error
    tensors = {}
    for name, value in read_weights(folder, variant).items():
        # Once a 1x1 convolution.
        square = ".attentions." in name and value.ndim == 4 and value.shape[2:] == (1, 1)
        tensors[current_name(name)] = value[:, :, 0, 0] if square else value
    return from_tensors(config, tensors, folder)


def config_from_diffusers(fields: Mapping[str, Any]) -> AutoencoderConfig:
    """Our config of an `AutoencoderKL`'s; absent fields have diffusers' defaults.

    Args:
      fields: the content of its config.json.

    Raises:
      DiffusersError: fields that our autoencoder cannot be; lists all of them.
      ValueError: a field is out of its range; names it.
    """
    problems = []
    if fields.get("_class_name") != "AutoencoderKL":
        problems.append(f"_class_name {shown(fields.get('_class_name'))}: must be 'AutoencoderKL'")
    for name, (default, allowed) in _FIXED.items():
        if fields.get(name, default) not in allowed:
            problems.append(f"{name} {shown(fields[name])}: must be {allowed[0]!r}")
    values = {name: fields.get(name, default) for name, default in _DEFAULTS.items()}
    widths, size = values["block_out_channels"], values["sample_size"]
    for name, block in _BLOCKS.items():
        types = fields.get(name, (block,))
        given = list(types) if isinstance(types, list | tuple) else None
        if not isinstance(widths, list | tuple) or given != len(widths) * [block]:
            problems.append(
                f"{name} {shown(types)}: must be one {block} for each block_out_channels"
            )
    known = {*_FIXED, *_DEFAULTS, *_BLOCKS, *_IGNORED}
    for name in sorted(name for name in fields if name not in known and name[:1] != "_"):
        problems.append(f"{name} {shown(fields[name])}: not a field known here")
    if problems:
        raise DiffusersError(
            f"not Stable Diffusion's autoencoder, {len(problems)} fields cannot be represented:\n"
            + "\n".join(f"  {problem}" for problem in cut(problems, MOST_PROBLEMS))
        )
    values["shift_factor"] = values["shift_factor"] or 0.0
    values["sample_size"] = size[0] if isinstance(size, list | tuple) and size else size
    return AutoencoderConfig(**values)


def config_to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """The content of an `AutoencoderKL`'s config.json; the opposite of `config_from_diffusers`."""
    fields = {name: getattr(config, name) for name in _DEFAULTS}
    fields["block_out_channels"] = list(config.block_out_channels)
    levels = len(config.block_out_channels)
    blocks = {name: levels * [block] for name, block in _BLOCKS.items()}
    return {"_class_name": "AutoencoderKL", "act_fn": "silu", **fields, **blocks}


def save_as_diffusers(folder: str | os.PathLike, network: Network) -> None:
    """Writes an autoencoder as diffusers' `AutoencoderKL`.

    Args:
      folder: gets diffusion_pytorch_model.safetensors and config.json; made if missing.
      network: of an `AutoencoderConfig`.
    """
    folder = as_path(folder)
    make_folder(folder)
    tensors = weights.to_torch(network.params)
    weights.write_safetensors(folder / f"{WEIGHTS_NAME}.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", config_to_diffusers(network.config))


def write_random_autoencoder(
    folder: str | os.PathLike,
    *,
    channels: int = 3,
    image_size: int = 16,
    levels: int = 3,
    latent_channels: int = 4,
    seed: int = 0,
) -> None:
    """Writes a tiny autoencoder of random weights, for runs in miniature (`runlocal`) and tests.

    Args:
      folder: where `load_autoencoder` will find it.
      channels: of the images.
      image_size: of the images; latents have image_size / 2 ** (levels - 1).
      levels: resolutions.
      latent_channels: of the latents.
      seed: of the weights.
    """
    config = AutoencoderConfig(
        block_out_channels=levels * (8,),
        layers_per_block=1,
        norm_num_groups=4,
        in_channels=channels,
        out_channels=channels,
        sample_size=image_size,
        latent_channels=latent_channels,
    )
    weights.save_model(folder, config.described(), building.create(config, seed)[1])
