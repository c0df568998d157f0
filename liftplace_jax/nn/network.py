"""A model together with its arrays: on disk, as a pure function, and beside another one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.families import registry
from liftplace_jax.nn import building
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import as_path
from liftplace_jax.experiment.configuration import differences
from liftplace_jax.families.loading import OF_DIFFUSERS, find_folder, read_diffusers
from liftplace_jax.losses import init_adapters
from liftplace_jax.host.outside import lies
from liftplace_jax.host import sharding

Shardings = Callable[[Any], Any]
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
    """(params, x, t, return_features, dropout key or None, cond) -> (prediction, features)."""

    def apply(params, x, t, return_features, dropout_key, cond=None):
        model = nnx.merge(graphdef, params)
        result = model(
            x, t, cond, train=dropout_key is not None, rngs=dropout_key,
            return_features=return_features,
        )  # fmt: skip
        return result if return_features else (result, {})

    return apply


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether a finished model lies in a folder (config.json is written last)."""
    folder = as_path(folder)
    return (folder / "model.safetensors").exists() and (folder / "config.json").exists()


def is_finished(folder: str | os.PathLike) -> bool:
    """`is_saved` as process 0 sees it; for decisions that all processes must make alike."""
    return processes.told_by_first(lambda: is_saved(folder))


def load_network(
    folder: str | os.PathLike, dtype: str = "float32", hint: str = "check the path",
    params: str = "ema", remat: str | None = None, shardings: Shardings | None = None,
) -> Network:  # fmt: skip
    """A model from its folder.

    Args:
      folder: of `weights.save_model`.
      dtype: of the computation.
      hint: what to do if there is none, for the error message.
      params: "ema", the averaged ones, or "raw", those that training ended with.
      remat: as of `building.create`.
      shardings: as of `from_tensors`: this process then never holds more than a few arrays.

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
            config = registry.config_from_dict(fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        return from_tensors(config, tensors, folder, dtype, remat, shardings)


def load_checkpoint(
    path: str | os.PathLike,
    config: Any | None = None,
    entry: str | int | None = None,
    dtype: str = "float32",
    said_by: str = "config.model",
) -> Network:
    """A model from wherever it was trained.

    Args:
      path: a folder of ours (model.safetensors and config.json); a folder of diffusers'
        `UNet2DModel` or `DiTTransformer2DModel`, or of a pipeline with one; or a file of
        published weights, as of `weights.read_tensors`. Of this machine or a bucket.
      config: what the model must be. A folder's own config must agree with it, but for what is no
        property of weights, such as dropout: that of `config` counts. Needed for a file, which
        does not say what it is; without it a folder's own config counts.
      entry: where in a file the weights are, as of `weights.read_tensors`; or in a folder of
        diffusers, as of `read_diffusers`.
      dtype: of the computation.
      said_by: where `config` comes from, for the error message.

    Raises:
      ValueError: the path cannot be read, or does not fit; names the path and every misfit.
    """
    path = as_path(path)
    if path.is_dir():
        if find_folder(path, entry):
            network = from_tensors(*read_diffusers(path, entry), path, dtype)
        elif entry is not None:
            raise ValueError(
                f"{path} is a folder, only a file has an entry {entry!r}, or a folder of diffusers"
            )
        else:
            network = load_network(path, dtype)
        return network if config is None else _as_config(network, config, path, dtype, said_by)
    if not lies(path):
        raise ValueError(f"{path}: no such file or folder")
    if config is None:
        raise ValueError(f"{path}: a file of weights does not say its model, so give its config")
    tensors = weights.read_tensors(path, entry)
    if any(name.endswith(theirs) for theirs in OF_DIFFUSERS for name in tensors):
        raise ValueError(f"{path} is the weights of diffusers alone: give its folder")
    seen = config.visible_in(tensors)  # a wrong depth is one line, not a hundred tensors
    wanted = [{name: getattr(config, name) for name in seen}]
    _check_agreement(path, [seen], wanted, said_by)
    return from_tensors(config, tensors, path, dtype)


def _as_config(network: Network, config: Any, path: Path, dtype: str, said_by: str) -> Network:
    """The network as `config`, from which it may differ only in what no weights tell."""
    _check_agreement(path, _architecture(network.config), _architecture(config), said_by)
    return Network(config, building.abstract(config, jnp.dtype(dtype))[0], network.params)


def _architecture(config: Any) -> list[dict[str, Any]]:
    return [{"model": registry.config_to_dict(config)["model"]}, *config.architecture()]


def _check_agreement(path: Path, found: list[dict], wanted: list[dict], said_by: str) -> None:
    # A later dictionary says something only where those before it agree.
    pairs = zip(found, wanted, strict=False)
    lines = next((lines for pair in pairs if (lines := differences(*pair))), None)
    if lines:
        raise ValueError(
            f"{path} is not what {said_by} says (checkpoint -> {said_by}):\n  "
            + "\n  ".join(lines)
            + f"\nSet {said_by} to what the checkpoint is, or choose another checkpoint."
        )


def from_tensors(
    config: Any, tensors: Mapping[str, np.ndarray], origin: Any = "tensors", dtype: str = "float32",
    remat: str | None = None, shardings: Shardings | None = None,
) -> Network:  # fmt: skip
    """A model of a config from arrays by published name, in PyTorch's layouts.

    Args:
      config: the model's config.
      tensors: as of `weights.read_tensors` or a `Pruned` student.
      origin: where they come from, for the error message.
      dtype: of the computation.
      remat: as of `building.create`.
      shardings: abstract parameters -> their shardings; None: the default device.

    Raises:
      ValueError: tensors do not fit; names the origin and every misfit.
    """
    try:
        config.check_blocks(len(tensors))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    graphdef, abstract = building.abstract(config, jnp.dtype(dtype), remat)
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


def match_features(
    student: Network, teacher: Network, layer_map: Mapping[str, str] | None, adapters: bool
) -> dict[str, tuple[str, int, int]]:
    """Checks a layer map on shapes, before any training.

    Args:
      student: the student.
      teacher: its teacher.
      layer_map: student feature -> teacher feature; None: the published one of their depths, or
        all features by name.
      adapters: whether widths may differ.

    Returns:
      Student feature -> (teacher feature, the student's width, the teacher's width).

    Raises:
      ValueError: a layer of the map does not exist, or shapes do not fit.
    """
    features = [_feature_shapes(network) for network in (student, teacher)]
    if layer_map is None:
        layer_map = student.config.layer_map(teacher.config) or {name: name for name in features[0]}
    for s, t in layer_map.items():
        for side, name, known in (("student", s, features[0]), ("teacher", t, features[1])):
            if name not in known:
                raise ValueError(
                    f"config.distill.layer_map: the {side} has no feature {name!r}; "
                    f"it has {sorted(known)}"
                )
        last = -1 if adapters else None
        if features[0][s][1:last] != features[1][t][1:last]:
            raise ValueError(
                f"config.distill.layer_map: {s!r} is {features[0][s][1:]}, the teacher's {t!r} "
                f"{features[1][t][1:]}; "
                + ("only widths may differ" if adapters else
                   "without config.distill.feature.adapters they must be equal")
            )  # fmt: skip
    return {s: (t, features[0][s][-1], features[1][t][-1]) for s, t in layer_map.items()}


def _feature_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    config, apply = network.config, make_apply(network.graphdef)
    x = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.in_channels),
                             jnp.float32)  # fmt: skip
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(
        lambda params, x, t, cond: apply(params, x, t, True, None, cond)[1],
        network.params, x, t, t if config.num_classes else None,
    )  # fmt: skip
    return {name: feature.shape for name, feature in shapes.items()}


def make_adapters(
    student: Network, teacher: Network, layer_map: Mapping[str, str] | None, seed: int
) -> dict[str, jax.Array]:
    """Adapters between features, student layer -> matrix; see `match_features`."""
    matched = match_features(student, teacher, layer_map, adapters=True)
    return init_adapters(
        jax.random.key(seed),
        {s: width for s, (_, width, _) in matched.items()},
        {t: width for t, _, width in matched.values()},
        layer_map={s: t for s, (t, _, _) in matched.items()},
    )
