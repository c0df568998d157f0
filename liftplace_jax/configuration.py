"""Configs: every field with its default, arguments after the colon, comparison and checks.

A config file is `get_config(arg)` over `default_config`; `main.py --config=FILE:method=lift,seed=1`
hands over the arg, and `--config.field=value` changes single fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

SEPARATOR = ","


def optimizer_config(**changes: Any) -> ConfigDict:
    """Adam with the published clipping; see `liftplace_jax.training.optimizer`."""
    return ConfigDict(
        dict(name="adam", learning_rate=2e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
             grad_clip=1.0, schedule="constant", warmup_steps=0, final_scale=0.0) | changes
    )  # fmt: skip


def training_config(**changes: Any) -> ConfigDict:
    """One training run, teacher's or student's."""
    return ConfigDict(
        dict(
            steps=1000,  # optimizer updates
            batch_size=64,  # global
            accumulation=1,  # parts of a batch, one after another, each with its adaptive weight
            ema_decay=0.9999,
            dtype="float32",  # of the computation: float32 or bfloat16
            log_every=50,
            checkpoint_every=500,
        )
        | changes
    )


def default_config() -> ConfigDict:
    """All fields of an experiment, pixel space, with their published or neutral defaults."""
    config = ConfigDict()
    config.name = "experiment"
    config.seed = 0  # of the teacher, and of pruning by random importance
    config.method = "lift_place"  # a name of training.objective.METHODS, or "all"
    config.seeds = (0,)  # one student for each method and seed

    config.data = ConfigDict(
        dict(name="digits", train_split="train", test_split="test", image_size=None, flip=False)
    )
    config.data.data_dir = config_dict.placeholder(str)  # default: TFDS's own
    config.data.image_size = config_dict.placeholder(int)

    config.model = ConfigDict(
        dict(model="unet", image_size=8, in_channels=1, out_channels=1, ch=32, ch_mult=(1, 2),
             num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, resamp_with_conv=True,
             num_groups=8, min_channels_per_group=1)
    )  # fmt: skip
    config.process = ConfigDict(
        dict(schedule="linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02,
             prediction="epsilon")
    )  # fmt: skip

    config.teacher = training_config()
    config.teacher.optimizer = optimizer_config()
    # Instead of training one: a folder with model.safetensors and config.json, or a file of
    # weights (.safetensors, .pt, .pth, .ckpt, .bin, .npz) for config.model.
    config.teacher.checkpoint = config_dict.placeholder(str)

    config.compress = ConfigDict(
        dict(
            ratio=0.9,  # share of channels removed
            importance="magnitude",  # magnitude, random or taylor
            normalisation="published",  # the teacher's groups stay; "adapted": >= 2 channels each
            taylor_threshold=0.05,
            taylor_batch_size=64,
        )
    )

    config.distill = training_config()
    config.distill.optimizer = optimizer_config()
    config.distill.scale = 1.0  # lambda of the output loss
    config.distill.feature_scale = 1e-6  # of the feature loss, where the method has it
    # {student feature: teacher feature}; default: all, by name. JSON, for the command line's sake.
    config.distill.layer_map = config_dict.placeholder(str)
    config.distill.loss = ConfigDict(
        dict(variant="pixel", norm=None, eps=None, terms="both", per="channel", group_size=16,
             grouping="error")
    )  # fmt: skip
    config.distill.loss.norm = config_dict.placeholder(str)  # default: the variant's
    config.distill.loss.eps = config_dict.placeholder(float)
    config.distill.weight = ConfigDict(dict(name="adaptive", value=0.3, direction="increase"))

    config.evaluation = ConfigDict(
        dict(features="digits", num_samples=1024, batch_size=256, sampler="ddim", sample_steps=50,
             skip_type="uniform", eta=0.0, seed=12345, neighbours=5, clip=None)
    )  # fmt: skip
    # Score a second time with predicted data limited to +-clip at each step; default: do not.
    config.evaluation.clip = config_dict.placeholder(float)
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))
    config.sharding_rules = ()  # (regular expression, partition) pairs; default: replicated
    config.tensorboard = True
    return config


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Reads "key=value,flag" into the types of `defaults`.

    A boolean key may stand alone ("runlocal"). A tuple is written with "+": "seeds=0+1+2".

    Raises:
      ValueError: unknown key, or a value of another type; names it and lists the keys.
    """
    result = dict(defaults)
    for part in filter(None, (arg or "").split(SEPARATOR)):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown config argument {key!r}; known: {sorted(defaults)}")
        try:
            result[key] = _read(text, defaults[key]) if equals else _flag(defaults[key])
        except ValueError as error:
            kind = type(defaults[key]).__name__
            raise ValueError(f"config argument {part!r}: expected {key}=<{kind}>") from error
    return ConfigDict(result)


def _flag(default):
    if not isinstance(default, bool):
        raise ValueError
    return True


def _read(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if (
            text.lower() in ("true", "1", "false", "0")
        ) else _flag(None)
    if isinstance(default, tuple):
        return tuple(_read(item, default[0]) for item in text.split("+"))
    return type(default)(text)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types."""
    return json.loads(config.to_json_best_effort())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "field: old -> new" for all fields of two nested dicts that differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Raises a ValueError naming the config field if `value` is not among `choices`."""
    if value not in choices:
        raise ValueError(f"config.{field} must be one of {sorted(choices)}, got {value!r}")


def check_positive(config: ConfigDict, *fields: str) -> None:
    """Raises a ValueError naming the first of the (dotted) fields that is not above 0."""
    for field in fields:
        value = config
        for part in field.split("."):
            value = value[part]
        if not value > 0:
            raise ValueError(f"config.{field} must be > 0, got {value}")


