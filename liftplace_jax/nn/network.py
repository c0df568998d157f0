"""A model together with its arrays: on disk, as a pure function, and beside another one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.host import processes, sharding
from liftplace_jax.host.buckets import as_path
from liftplace_jax.nn import building, frozen
from liftplace_jax.nn.model_config import DenoiserConfig

Shardings = Callable[[Any], Any]
PARAMS = {"ema": "model.safetensors", "raw": "raw.safetensors"}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with its arrays.

    Attributes:
      config: the model's config.
      graphdef: its NNX definition.
      params: its parameters, plain nested dicts.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: building.Params

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of names, shapes and values of all weights, whatever file they come from."""
        digest = hashlib.sha256()
        for name, value in sorted(weights.to_torch(self.params).items()):
            digest.update(f"{name} {value.shape}\n".encode())
            digest.update(value.astype("<f4").tobytes())
        return digest.hexdigest()


def make_apply(graphdef: nnx.GraphDef) -> Callable[..., tuple[jax.Array, dict]]:
    """(params, x, t, return_features, dropout key or None, cond) -> (prediction, features)."""

    def apply(params, x, t, return_features, dropout_key, cond=None):
        model = nnx.merge(graphdef, params)
        result = model(
            x,
            t,
            cond,
            train=dropout_key is not None,
            rngs=dropout_key,
            return_features=return_features,
        )
        return result if return_features else (result, {})

    return apply


def example_inputs(config: DenoiserConfig) -> tuple[Any, Any, Any]:
    """Shapes and dtypes of a denoising network's (x, t, cond), for one sample."""
    x = jax.ShapeDtypeStruct((1, *config.shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    return x, t, config.conditioning.inputs(1)


def kept_params(config: DenoiserConfig, dtype: str) -> building.Params:
    """Parameters of a frozen denoising network, as of `frozen.kept`, when it computes in dtype."""
    if dtype == "float32":
        return building.abstract(config)[1]
    return jax.tree.map(lambda leaf: leaf, _kept_params(config, dtype))  # the caller's own


@functools.lru_cache(maxsize=32)
def _kept_params(config, dtype):
    graphdef, params = building.abstract(config, jnp.dtype(dtype))

    def program(params, x, t, cond):
        return make_apply(graphdef)(params, x, t, True, None, cond)

    return frozen.kept(program, params, *example_inputs(config))


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether a finished model lies in a folder (config.json is written last)."""
    folder = as_path(folder)
    return (folder / "model.safetensors").exists() and (folder / "config.json").exists()


def is_finished(folder: str | os.PathLike) -> bool:
    """`is_saved` as process 0 sees it; for decisions that all processes must make alike."""
    return processes.told_by_first(lambda: is_saved(folder))


def read_network(
    folder: str | os.PathLike,
    config_of: Callable[[Mapping[str, Any]], Any],
    dtype: str = "float32",
    hint: str = "check the path",
    params: str = "ema",
    remat: str | None = None,
    shardings: Shardings | None = None,
    is_frozen: bool = False,
    scan_blocks: bool = False,
) -> Network:
    """A model from its folder.

    Args:
      folder: of `weights.save_model`.
      config_of: the content of config.json -> the model's config.
      dtype: of the computation.
      hint: what to do if there is none, for the error message.
      params: "ema", the averaged ones, or "raw", those that training ended with.
      remat: as of `building.create`.
      shardings: as of `from_tensors`: this process then never holds more than a few arrays.
      is_frozen: as of `from_tensors`.
      scan_blocks: as of `building.create`.

    Raises:
      ValueError: nothing there, or files that do not fit; names the path.
    """
    folder = as_path(folder)
    if params not in PARAMS:
        raise ValueError(f"params must be one of {sorted(PARAMS)}, got {params!r}")
    if not is_saved(folder):
        raise ValueError(f"no model.safetensors and config.json in {folder}: {hint}")
    if not (folder / PARAMS[params]).exists():
        raise ValueError(
            f"{folder} has no {PARAMS[params]}: its model was not trained there (or by a version "
            "that did not write it); take its EMA weights"
        )
    with weights.open_model(folder, PARAMS[params]) as (fields, tensors):
        try:
            config = config_of(fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        return from_tensors(
            config, tensors, folder, dtype, remat, shardings, is_frozen, scan_blocks
        )


def from_tensors(
    config: Any,
    tensors: Mapping[str, np.ndarray],
    origin: Any = "tensors",
    dtype: str = "float32",
    remat: str | None = None,
    shardings: Shardings | None = None,
    is_frozen: bool = False,
    scan_blocks: bool = False,
) -> Network:
    """A model of a config from arrays by published name, in PyTorch's layouts.

    Args:
      config: the model's config.
      tensors: as of `weights.read_tensors` or a `Pruned` student.
      origin: where they come from, for the error message.
      dtype: of the computation.
      remat: as of `building.create`.
      shardings: abstract parameters -> their shardings; None: the default device.
      is_frozen: a denoising network that is not trained: its parameters are as of `kept_params`,
        for the same numbers in less memory. Otherwise they are float32.
      scan_blocks: as of `building.create`.

    Raises:
      ValueError: tensors do not fit; names the origin and every misfit.
    """
    try:
        config.check_blocks(len(tensors))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    graphdef, abstract = building.abstract(config, jnp.dtype(dtype), remat, scan_blocks)
    if is_frozen:
        abstract = kept_params(config, dtype)
    places = shardings and jax.tree.leaves(shardings(abstract))

    def put(value, number):
        array = sharding.place(value, places[number]) if places else jnp.asarray(value)
        # Or the values on their way would pile up in this process.
        return array.block_until_ready()

    try:
        params = weights.from_torch(abstract, tensors, put=put)
    except weights.WeightMismatchError as error:
        raise weights.WeightMismatchError(error.misfits, origin) from error
    return Network(config, graphdef, params)
