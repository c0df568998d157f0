"""A model together with its arrays: on disk, as a pure function, and beside another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax import models, weights
from liftplace_jax.configuration import differences
from liftplace_jax.diffusers_folder import find_folder, read_diffusers
from liftplace_jax.losses import init_adapters

PARAMS = {"ema": "model.safetensors", "raw": "raw.safetensors"}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with its arrays.

    Attributes:
      config: the model's config.
      graphdef: its NNX definition.
      params: its parameters.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: nnx.State


def make_apply(graphdef: nnx.GraphDef) -> Callable[..., tuple[jax.Array, dict]]:
    """(params, x, t, return_features, dropout key or None) -> (prediction, features)."""

    def apply(params, x, t, return_features, dropout_key):
        model = nnx.merge(graphdef, params)
        result = model(
            x, t, train=dropout_key is not None, rngs=dropout_key, return_features=return_features
        )
        return result if return_features else (result, {})

    return apply


def is_saved(folder: Path) -> bool:
    """Whether a finished model lies in a folder (config.json is written last)."""
    return (folder / "model.safetensors").exists() and (folder / "config.json").exists()


def load_network(
    folder: Path, dtype: str = "float32", hint: str = "check the path", params: str = "ema"
) -> Network:
    """A model from its folder.

    Args:
      folder: of `weights.save_model`.
      dtype: of the computation.
      hint: what to do if there is none, for the error message.
      params: "ema", the averaged ones, or "raw", those that training ended with.

    Raises:
      ValueError: nothing there, or files that do not fit; names the path.
    """
    if not is_saved(folder):
        raise ValueError(f"no model.safetensors and config.json in {folder}: {hint}")
    if not (folder / PARAMS[params]).exists():
        raise ValueError(
            f"{folder} has no {PARAMS[params]}: its model was not trained there (or by a version "
            "that did not write it); take its EMA weights"
        )
    fields, tensors = weights.load_model_tensors(folder, PARAMS[params])
    try:
        config = models.config_from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return from_tensors(config, tensors, folder, dtype)


def load_checkpoint(
    path: Path,
    config: Any | None = None,
    entry: str | int | None = None,
    dtype: str = "float32",
) -> Network:
    """A model from wherever it was trained.

    Args:
      path: a folder of ours (model.safetensors and config.json); a folder of diffusers'
        `UNet2DModel`, or of a pipeline with one; or a file of published weights, as of
        `weights.read_tensors`.
      config: what the model must be. A folder's own config must agree with it, but for dropout,
        which is no property of weights: that of `config` counts. Needed for a file, which does
        not say what it is; without it a folder's own config counts.
      entry: where in a file the weights are, as of `weights.read_tensors`.
      dtype: of the computation.

    Raises:
      ValueError: the path cannot be read, or does not fit; names the path and every misfit.
    """
    if path.is_dir():
        if entry is not None:
            raise ValueError(f"{path} is a folder, only a file has an entry {entry!r}")
        if find_folder(path):
            network = from_tensors(*read_diffusers(path), path, dtype)
        else:
            network = load_network(path, dtype)
        return network if config is None else _as_config(network, config, path, dtype)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if config is None:
        raise ValueError(f"{path}: a file of weights does not say its model, so give its config")
    tensors = weights.read_tensors(path, entry)
    if "conv_norm_out.weight" in tensors:
        raise ValueError(f"{path} is the weights of diffusers alone: give its folder")
    return from_tensors(config, tensors, path, dtype)


def _as_config(network: Network, config: Any, path: Path, dtype: str) -> Network:
    """The network with the dropout of `config`, from which it must not differ otherwise."""
    found, wanted = _architecture(network.config), _architecture(config)
    widths = found.pop("widths"), wanted.pop("widths")
    # Widths follow from the other fields: they tell something only where those agree.
    lines = differences(found, wanted) or differences(*({"widths": w} for w in widths))
    if lines:
        raise ValueError(
            f"{path} is not what config.model says (checkpoint -> config.model):\n  "
            + "\n  ".join(lines)
            + "\nSet config.model to what the checkpoint is (also widths, in a config file, where "
            "they are not those of ch and ch_mult), or choose another checkpoint."
        )
    return Network(config, models.abstract(config, jnp.dtype(dtype))[0], network.params)


def _architecture(config: Any) -> dict[str, Any]:
    fields = models.config_to_dict(config)
    del fields["dropout"]
    sizes = {fields["image_size"] >> level for level in range(len(fields["ch_mult"]))}
    return fields | {"attn_resolutions": sorted(sizes.intersection(fields["attn_resolutions"]))}


def from_tensors(
    config: Any, tensors: Mapping[str, np.ndarray], origin: Any = "tensors", dtype: str = "float32"
) -> Network:
    """A model of a config from arrays by published name, in PyTorch's layouts.

    Args:
      config: the model's config.
      tensors: as of `weights.read_tensors` or a `Pruned` student.
      origin: where they come from, for the error message.
      dtype: of the computation.

    Raises:
      ValueError: tensors do not fit; names the origin and every misfit.
    """
    graphdef, abstract = models.abstract(config, jnp.dtype(dtype))
    try:
        params = weights.from_torch(abstract, tensors)
    except weights.WeightMismatchError as error:
        raise weights.WeightMismatchError(error.misfits, origin) from error
    return Network(config, graphdef, jax.tree.map(jnp.asarray, params))


def make_adapters(
    student: Network, teacher: Network, layer_map: Mapping[str, str] | None, seed: int
) -> dict[str, jax.Array]:
    """Adapters between features; checks the layer map on shapes, before any training.

    Raises:
      ValueError: a layer of the map does not exist, or the two have different resolutions.
    """
    features = []
    for network in (student, teacher):
        size, channels = network.config.image_size, network.config.in_channels
        x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        apply = make_apply(network.graphdef)
        shapes = jax.eval_shape(lambda p, x, t, f=apply: f(p, x, t, True, None)[1],
                                network.params, x, t)  # fmt: skip
        features.append({name: feature.shape for name, feature in shapes.items()})
    layer_map = {name: name for name in features[0]} if layer_map is None else layer_map
    for s, t in layer_map.items():
        for side, name, known in (("student", s, features[0]), ("teacher", t, features[1])):
            if name not in known:
                raise ValueError(
                    f"config.distill.layer_map: the {side} has no feature {name!r}; "
                    f"it has {sorted(known)}"
                )
        if features[0][s][1:-1] != features[1][t][1:-1]:
            raise ValueError(
                f"config.distill.layer_map: {s!r} is {features[0][s][1:]}, the teacher's {t!r} "
                f"{features[1][t][1:]}; only widths may differ"
            )
    channels = [{name: shape[-1] for name, shape in f.items()} for f in features]
    return init_adapters(jax.random.key(seed), *channels, layer_map=layer_map)
