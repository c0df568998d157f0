"""The networks, by name: a model is its config (JSON friendly) and its arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.encoders.autoencoder import Autoencoder
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.families.cost import config_parameters, count_macs
from liftplace_jax.families.dit.model import DiT
from liftplace_jax.families.dit.config import DiTConfig, published_layer_map
from liftplace_jax.families.published import PUBLISHED_DITS, PUBLISHED_UNETS
from liftplace_jax.families.unet.model import UNet
from liftplace_jax.families.unet.config import UNetConfig

__all__ = [
    "MODELS",
    "PUBLISHED_DITS",
    "PUBLISHED_UNETS",
    "Autoencoder",
    "AutoencoderConfig",
    "DiT",
    "DiTConfig",
    "UNet",
    "UNetConfig",
    "abstract",
    "config_from_dict",
    "config_parameters",
    "config_to_dict",
    "count_macs",
    "count_parameters",
    "create",
    "published_layer_map",
]

MODELS = {
    "unet": (UNetConfig, UNet),
    "dit": (DiTConfig, DiT),
    "autoencoder": (AutoencoderConfig, Autoencoder),
}


def create(
    config: Any,
    seed: int | jax.Array = 0,
    dtype: Dtype = jnp.float32,
    remat: str | None = None,
    shardings: Callable[[nnx.State], Any] | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Initialises a model.

    Args:
      config: a config of one of MODELS.
      seed: an integer or a random key (works under jit and vmap).
      dtype: dtype of the computation; parameters are float32.
      remat: None or one of `layers.REMAT_POLICIES`: what the gradient keeps of each block.
      shardings: abstract parameters -> their shardings. Where they split a parameter, all are made
        in parts (by one program: rounding may differ); otherwise all are on the default device.

    Returns:
      (graphdef, params); `nnx.merge(graphdef, params)(x, t)` is a pure function of params.

    Raises:
      ValueError: the config belongs to no known model, or there is no such policy.
    """

    def build():
        return nnx.split(_build(config, nnx.Rngs(seed), dtype, remat))

    if shardings is not None:
        graphdef, shapes = abstract(config, dtype, remat)
        places = shardings(shapes)
        if not all(place.is_fully_replicated for place in jax.tree.leaves(places)):
            return graphdef, jax.jit(lambda: build()[1], out_shardings=places)()
    return build()


def abstract(
    config: Any, dtype: Dtype = jnp.float32, remat: str | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """As `create`, with shapes and dtypes (`jax.ShapeDtypeStruct`) in place of arrays."""
    graphdef, params = _abstract(config, dtype, remat)
    return graphdef, jax.tree.map(lambda leaf: leaf, params)  # a tree of the caller's own


@functools.lru_cache(maxsize=32)  # a second or more for each
def _abstract(config, dtype, remat):
    return nnx.split(nnx.eval_shape(lambda: _build(config, nnx.Rngs(0), dtype, remat)))


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON types, with its model's name under "model"."""
    return {"model": _name(config)} | config.to_dict()


def config_from_dict(fields: Mapping[str, Any], partial: bool = False) -> Any:
    """The inverse of `config_to_dict`.

    Args:
      fields: the model's name under "model", and its config's fields.
      partial: whether missing fields get their defaults.

    Raises:
      ValueError: unknown model name, or unknown, missing or bad fields.
    """
    name = fields.get("model")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {sorted(MODELS)}")
    config_class, given = MODELS[name][0], {k: v for k, v in fields.items() if k != "model"}
    if partial:
        defaults = {
            field.name: field.default for field in dataclasses.fields(config_class)
            if field.default is not dataclasses.MISSING
        }  # fmt: skip
        given = defaults | given
    return config_class.from_dict(given)


def count_parameters(params: Any) -> int:
    """Number of elements in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _name(config: Any) -> str:
    for name, (config_class, _) in MODELS.items():
        if isinstance(config, config_class):
            return name
    known = [config_class.__name__ for config_class, _ in MODELS.values()]
    raise ValueError(f"no model has a config of type {type(config).__name__}; known: {known}")


def _build(config: Any, rngs: nnx.Rngs, dtype: Dtype, remat: str | None) -> nnx.Module:
    options = {} if remat is None else {"remat": remat}  # an autoencoder has none
    return MODELS[_name(config)][1](config, rngs=rngs, dtype=dtype, **options)
