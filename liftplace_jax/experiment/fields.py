"""The fields of a config: which there are, and the kind and range of each, in one table.

`RANGES` has an entry for each number of `configuration.default_config`; the numbers of
`config.model` are in the RANGES of the model's own config class.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.host.ranges import COUNT, SHARE, SIDE, Range, factor, positive, whole

SEED = whole(0)
_THREADS = whole(1, 1024, why="threads of one machine")
_TIMESTEPS = whole(1, 10**6, why="its tables are part of every program")
_PARTS = whole(1, 1024, why="each part is a copy of the step in the program")

OPTIMIZER = {
    "learning_rate": positive(1.0, why="Adam moves every parameter by about as much"),
    "b1": SHARE,
    "b2": SHARE,
    "eps": positive(1.0),
    "weight_decay": factor(10.0),
    "grad_clip": factor(optional=True),  # 0 or None: none
    "warmup_steps": whole(0),
    "final_scale": Range(float, 0.0, 1.0),
}
TRAINING = {
    "steps": COUNT,
    "batch_size": COUNT,
    "accumulation": _PARTS,
    "ema_decay": SHARE,
    "log_every": COUNT,
    "checkpoint_every": COUNT,
} | {f"optimizer.{field}": limits for field, limits in OPTIMIZER.items()}
EVALUATION = {
    "num_samples": whole(2),
    "batch_size": COUNT,
    "sample_steps": whole(1, _TIMESTEPS.high),
    "eta": Range(float, 0.0, 10.0),
    "seed": SEED,
    "neighbours": whole(1, 9999, why="10,000 samples are looked at"),
    "clip": positive(optional=True),
    "curve_every": whole(0),
    "curve_samples": whole(2),
    "guidance": factor(1000.0, why="it multiplies what the network predicts"),
    "guidance_channels": whole(1, SIDE, optional=True),
}
RANGES: dict[str, Range] = {
    "seed": SEED,
    "seeds": whole(0, many=True),
    "data.image_size": whole(1, SIDE, optional=True),
    "data.crop": whole(0, SIDE, many=True, optional=True),
    "process.num_timesteps": _TIMESTEPS,
    "process.beta_start": positive(1.0),
    "process.beta_end": positive(1.0),
    "compress.ratio": SHARE,
    "compress.taylor_threshold": SHARE,
    "compress.taylor_batch_size": COUNT,
    "compress.depth": whole(1, SIDE, optional=True),
    "compress.score_batches": COUNT,
    "compress.score_batch_size": COUNT,
    "compress.learned.rank": whole(1, SIDE),
    "compress.learned.alpha": positive(),
    "compress.learned.gate_scale": positive(),
    "compress.learned.temperature_start": positive(),
    "compress.learned.temperature_end": positive(),
    "compress.learned.keep": whole(1, SIDE, optional=True),
    "compress.learned.group": whole(1, SIDE, optional=True),
    "distill.task_scale": factor(),
    "distill.scale": factor(),
    "distill.feature_scale": factor(),
    "distill.feature.mask_sigma": positive(optional=True),
    "distill.loss.eps": positive(optional=True),
    "distill.loss.group_size": COUNT,
    "distill.weight.value": Range(float, 0.0, 1.0),
    "mesh.data": whole(-1, 2**20),  # -1: the rest of the devices
    "mesh.fsdp": whole(-1, 2**20),
    "input_threads": _THREADS,
    "memory_cache_mb": whole(0),
}
for _room in ("teacher", "distill", "compress.learned"):
    RANGES |= {f"{_room}.{field}": limits for field, limits in TRAINING.items()}
RANGES |= {f"evaluation.{field}": limits for field, limits in EVALUATION.items()}

UNSET = ("evaluation.features",)
"""Fields that may be None although their default is something else; see also `Range.optional`."""


def check_fields(config: ConfigDict) -> None:
    """Every field is there, none that nobody reads, and each is of its kind and in its range.

    The fields of `config.model` are the model's: see `models.config_from_dict`.

    Raises:
      ValueError: names the first field that is not.
    """
    wanted, found = _defaults(), dict(leaves(config))
    for field in found.keys() - wanted.keys():
        near = difflib.get_close_matches(field, wanted, 1)
        meant = f"; did you mean config.{near[0]}?" if near else ""
        raise ValueError(f"config.{field} is no field of a config{meant}")
    for field, (default, kind) in wanted.items():
        if field not in found:
            raise ValueError(f"config.{field} is missing")
        value = found[field]
        if field in RANGES:
            RANGES[field].check(f"config.{field}", value)
        elif kind in (int, float):
            raise KeyError(f"config.{field} is a number, and has no range in RANGES")
        elif value is None:
            if default is not None and field not in UNSET:
                raise ValueError(f"config.{field} must be set, got None")
        elif not isinstance(value, (tuple, list) if kind is tuple else kind):
            name = {str: "text", bool: "true or false", tuple: "a tuple"}.get(kind, kind.__name__)
            raise ValueError(f"config.{field} must be {name}, got {value!r}")
    if not isinstance(config.get("model"), ConfigDict):
        raise ValueError(
            f"config.model must be the fields of a network, got {config.get('model')!r}"
        )


@functools.cache
def _defaults() -> dict[str, tuple[Any, type]]:
    config = default_config()
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
