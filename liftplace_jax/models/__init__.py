"""The networks, by name: a model is its config (JSON friendly) and its arrays."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.models.unet import UNet
from liftplace_jax.models.unet_config import UNetConfig

MODELS = {"unet": (UNetConfig, UNet)}


def create(
    config: Any, seed: int | jax.Array = 0, dtype: Dtype = jnp.float32
) -> tuple[nnx.GraphDef, nnx.State]:
    """Initialises a model.

    Args:
      config: a config of one of MODELS.
      seed: an integer or a random key (works under jit and vmap).
      dtype: dtype of the computation; parameters are float32.

    Returns:
      (graphdef, params); `nnx.merge(graphdef, params)(x, t)` is a pure function of params.

    Raises:
      ValueError: the config belongs to no known model.
    """
    return nnx.split(_model_class(config)(config, rngs=nnx.Rngs(seed), dtype=dtype))


def abstract(config: Any, dtype: Dtype = jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """As `create`, with shapes and dtypes (`jax.ShapeDtypeStruct`) in place of arrays."""
    model = _model_class(config)
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0), dtype=dtype)))


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON types, with its model's name under "model"."""
    return {"model": _name(config)} | config.to_dict()


def config_from_dict(fields: Mapping[str, Any]) -> Any:
    """The inverse of `config_to_dict`.

    Raises:
      ValueError: unknown model name, or unknown, missing or bad fields.
    """
    name = fields.get("model")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {sorted(MODELS)}")
    return MODELS[name][0].from_dict({k: v for k, v in fields.items() if k != "model"})


def count_parameters(params: Any) -> int:
    """Number of elements in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _name(config: Any) -> str:
    for name, (config_class, _) in MODELS.items():
        if isinstance(config, config_class):
            return name
    known = [config_class.__name__ for config_class, _ in MODELS.values()]
    raise ValueError(f"no model has a config of type {type(config).__name__}; known: {known}")


def _model_class(config: Any) -> type[nnx.Module]:
    return MODELS[_name(config)][1]
