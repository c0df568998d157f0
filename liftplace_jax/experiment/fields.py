"""The fields of a config: which there are, and the kind and range of each, in one table.

`RANGES` has an entry for each number of `configuration.default_config`, but for those of
`config.model`, which are in the RANGES of the model's own config class, and of `config.compress`,
which are its pruner's.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.evaluation.handling import RANGES as RANGES_OF_HANDLING
from liftplace_jax.experiment.configuration import default_config, under
from liftplace_jax.families.registry import family_named
from liftplace_jax.host.ranges import COUNT, SHARE, SIDE, Range, factor, positive, whole
from liftplace_jax.training.optimizer import RANGES as RANGES_OF_OPTIMIZER

SEED = whole(0)
_THREADS = whole(1, 1024, why="threads of one machine")
_TIMESTEPS = whole(1, 10**6, why="its tables are part of every program")
_PARTS = whole(1, 1024, why="each part is a copy of the step in the program")

TRAINING = {
    "steps": COUNT,
    "batch_size": COUNT,
    "accumulation": _PARTS,
    "ema_decay": SHARE,
    "log_every": COUNT,
    "checkpoint_every": COUNT,
} | {f"optimizer.{field}": limits for field, limits in RANGES_OF_OPTIMIZER.items()}
EVALUATION = {
    "num_samples": whole(2),
    "batch_size": COUNT,
    "sample_steps": whole(1, _TIMESTEPS.high),
    "eta": Range(float, 0.0, 10.0),
    "steps_offset": whole(0, _TIMESTEPS.high),
    "seed": SEED,
    "neighbours": whole(1, 9999, why="10,000 samples are looked at"),
    "clip": positive(optional=True),
    "curve_every": whole(0),
    "curve_samples": whole(2),
    "guidance": factor(1000.0, why="it multiplies what the network predicts"),
    "guidance_channels": whole(1, SIDE, optional=True),
} | RANGES_OF_HANDLING
RANGES: dict[str, Range] = {
    "seed": SEED,
    "seeds": whole(0, many=True),
    "data.image_size": whole(1, SIDE, optional=True),
    "data.crop": whole(0, SIDE, many=True, optional=True),
    "latents.tile": whole(0, SIDE),
    "process.num_timesteps": _TIMESTEPS,
    "process.beta_start": positive(1.0),
    "process.beta_end": positive(1.0),
    "process.shift": positive(1000.0, why="all that is left is noise"),
    "process.logit_mean": Range(float, -10.0, 10.0),
    "process.logit_std": positive(10.0),
    "process.mode_scale": Range(float, -1.0, 2 / (math.pi - 2)),
    "distill.task_scale": factor(),
    "distill.scale": factor(),
    "distill.feature_scale": factor(),
    "distill.feature.mask_sigma": positive(optional=True),
    "distill.loss.eps": positive(optional=True),
    "distill.loss.group_size": COUNT,
    "distill.weight.value": Range(float, 0.0, 1.0),
    "text.dropout": SHARE,
    "text.t5_tokens": whole(2, 512, why="diffusers takes no more"),
    "mesh.data": whole(-1, 2**20),  # -1: the rest of the devices
    "mesh.fsdp": whole(-1, 2**20),
    "input_threads": _THREADS,
    "memory_cache_mb": whole(0),
}
for _room in ("teacher", "distill"):
    RANGES |= {f"{_room}.{field}": limits for field, limits in TRAINING.items()}
RANGES |= {f"evaluation.{field}": limits for field, limits in EVALUATION.items()}

UNSET = ("evaluation.features",)
"""Fields that may be None although their default is something else; see also `Range.optional`."""


def ranges(config: ConfigDict) -> dict[str, Range]:
    """Dotted field -> range, of all numbers of a config but its model's.

    Raises:
      ValueError: config.model or config.compress name no family or pruner.
    """
    with under("model: "):
        family = family_named(_model(config).get("model"))
    with under("compress."):
        pruner = family.pruner(config.compress.get("pruner"))
    found = {f"compress.{field}": limits for field, limits in pruner.ranges.items()}
    for name, part in config.compress.items():
        if isinstance(part, ConfigDict):
            found |= {f"compress.{name}.{field}": limits for field, limits in TRAINING.items()}
    return RANGES | found


def check_fields(config: ConfigDict) -> None:
    """Every field is there, none that nobody reads, and each is of its kind and in its range.

    The fields of `config.model` are the model's: see `registry.config_from_dict`.

    Raises:
      ValueError: names the first field that is not.
    """
    limits = ranges(config)
    wanted, found = _defaults(config.model.model), dict(leaves(config))
    for field in found.keys() - wanted.keys():
        near = difflib.get_close_matches(field, wanted, 1)
        meant = f"; did you mean config.{near[0]}?" if near else ""
        if field.startswith("compress."):
            meant = f": pruner {config.compress.pruner!r} does not know it{meant}"
        raise ValueError(f"config.{field} is no field of a config{meant}")
    for field, (default, kind) in wanted.items():
        if field not in found:
            raise ValueError(f"config.{field} is missing")
        value = found[field]
        if field in limits:
            limits[field].check(f"config.{field}", value)
        elif kind in (int, float):
            raise KeyError(f"config.{field} is a number, and has no range")
        elif value is None:
            if default is not None and field not in UNSET:
                raise ValueError(f"config.{field} must be set, got None")
        elif not isinstance(value, (tuple, list) if kind is tuple else kind):
            name = {str: "text", bool: "true or false", tuple: "a tuple"}.get(kind, kind.__name__)
            raise ValueError(f"config.{field} must be {name}, got {value!r}")


def _model(config: ConfigDict) -> ConfigDict:
    if not isinstance(config.get("model"), ConfigDict):
        raise ValueError(f"must be the fields of a network, got {config.get('model')!r}")
    return config.model


def changed_from_default(config: ConfigDict, fields: Iterable[str]) -> dict[str, Any]:
    """Of dotted fields those that are not as `default_config` has them, with that value."""
    wanted, found = _defaults(config.model.model), dict(leaves(config))
    return {field: wanted[field][0] for field in fields if found[field] != wanted[field][0]}


@functools.cache
def _defaults(family: str) -> dict[str, tuple[Any, type]]:
    config = default_config(family)
    return {field: (value, kind_of(config, field)) for field, value in leaves(config)}


def leaves(
    config: Mapping[str, Any], prefix: str = "", model: bool = False
) -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of all fields, those of `model` only if asked for."""
    for key, value in config.items():
        if prefix + key == "model" and not model:
            continue
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def kind_of(config: ConfigDict, field: str) -> type:
    """The type of a dotted field, also of one that is not set."""
    *rooms, name = field.split(".")
    for room in rooms:
        config = config[room]
    return config.get_type(name)
