"""A model out of its config: the NNX definition and its parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.nn.model_config import ModelConfig

Params = dict[Any, Any]  # nested, numbers are the keys of lists; leaves are arrays


def create(
    config: ModelConfig,
    seed: int | jax.Array = 0,
    dtype: Dtype = jnp.float32,
    remat: str | None = None,
    shardings: Callable[[Params], Any] | None = None,
    scan_blocks: bool = False,
) -> tuple[nnx.GraphDef, Params]:
    """Initialises a model.

    Args:
      config: the model's config, which builds it (`ModelConfig.build`).
      seed: an integer or a random key (works under jit and vmap).
      dtype: dtype of the computation; parameters are float32.
      remat: None or one of `layers.REMAT_POLICIES`: what the gradient keeps of each block.
      shardings: abstract parameters -> their shardings. Where they split a parameter, all are made
        in parts (by one program: rounding may differ); otherwise all are on the default device.
      scan_blocks: whether equal blocks are a loop in the program, which compiles in less time: the
        numbers are the same but for rounding, the parameters have the same names. The program
        copies the blocks' parameters together first.

    Returns:
      (graphdef, params), params as plain nested dicts: jitted functions take these apart much
      faster than an `nnx.State`. `nnx.merge(graphdef, params)(x, t)` is a pure function of them.

    Raises:
      ValueError: there is no such policy, or the model is no stack of equal blocks.
    """

    def build():
        return split(_build(config, nnx.Rngs(seed), dtype, remat, scan_blocks))

    if shardings is not None:
        graphdef, shapes = abstract(config, dtype, remat, scan_blocks)
        places = shardings(shapes)
        if not all(place.is_fully_replicated for place in jax.tree.leaves(places)):
            return graphdef, jax.jit(lambda: build()[1], out_shardings=places)()
    return build()


def abstract(
    config: ModelConfig,
    dtype: Dtype = jnp.float32,
    remat: str | None = None,
    scan_blocks: bool = False,
) -> tuple[nnx.GraphDef, Params]:
    """As `create`, with shapes and dtypes (`jax.ShapeDtypeStruct`) in place of arrays."""
    graphdef, params = _abstract(config, dtype, remat, scan_blocks)
    return graphdef, jax.tree.map(lambda leaf: leaf, params)  # a tree of the caller's own


@functools.lru_cache(maxsize=32)  # a second or more for each
def _abstract(config, dtype, remat, scan_blocks):
    return split(nnx.eval_shape(lambda: _build(config, nnx.Rngs(0), dtype, remat, scan_blocks)))


def _build(config, rngs, dtype, remat, scan_blocks):
    options = {} if remat is None else {"remat": remat}  # an autoencoder has none
    if scan_blocks:
        if not config.equal_blocks:
            raise ValueError(f"scan_blocks: a {config.model!r} is no stack of equal blocks")
        options["scan_blocks"] = True
    return config.build(rngs=rngs, dtype=dtype, **options)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model's definition and its parameters, as plain nested dicts."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def count_parameters(params: Any) -> int:
    """Number of elements in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
