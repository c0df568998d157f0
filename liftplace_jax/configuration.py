"""Configs: every field with its default, arguments after the colon, comparison and checks.

A config file is `get_config(arg)` over `default_config`; `main.py --config=FILE:method=lift,seed=1`
hands over the arg, and `--config.field=value` changes single fields.
"""

from __future__ import annotations

import dataclasses
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
    # A name of training.objective.METHODS, several of them joined by "+", or "all".
    config.method = "lift_place"
    config.seeds = (0,)  # one student for each method and seed

    config.data = ConfigDict(
        dict(name="digits", train_split="train", test_split="test", image_size=None, flip=False)
    )
    config.data.data_dir = config_dict.placeholder(str)  # default: TFDS's own
    config.data.path = config_dict.placeholder(str)  # of the images, with data.name=folder
    config.data.image_size = config_dict.placeholder(int)
    # (left, upper, right, lower) in pixels, cut out first; default: the data set's published crop.
    config.data.crop = config_dict.placeholder(tuple)

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
    # Instead of training one: a folder of ours (model.safetensors and config.json) or of diffusers'
    # UNet2DModel, or a file of published weights (.safetensors, .pt, .pth, .ckpt, .bin, .npz).
    # Whichever it is, it must be what config.model says; only dropout is always config.model's.
    config.teacher.checkpoint = config_dict.placeholder(str)
    # Where in a file of several state dicts: a key ("ema") or the number of an item ("-1").
    config.teacher.entry = config_dict.placeholder(str)

    config.compress = ConfigDict(
        dict(
            ratio=0.9,  # share of channels removed
            importance="magnitude",  # magnitude, random or taylor
            normalisation="published",  # the teacher's groups stay; "adapted": >= 2 channels each
            taylor_threshold=0.05,
            taylor_batch_size=64,
        )
    )
    # Instead of the pruned teacher: a folder with model.safetensors and config.json.
    config.compress.checkpoint = config_dict.placeholder(str)

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

    # features: a name of evaluation.FEATURES, or None: samples are drawn, not scored.
    # curve_every: steps of training between Frechet distances of curve_samples samples, for a curve
    # (a multiple of log_every); 0: none.
    config.evaluation = ConfigDict(
        dict(features="digits", num_samples=1024, batch_size=256, sampler="ddim", sample_steps=50,
             skip_type="uniform", eta=0.0, seed=12345, neighbours=5, clip=None, curve_every=0,
             curve_samples=256)
    )  # fmt: skip
    # File of the extractor's weights, where it does not ship with them (the Inception ones).
    config.evaluation.weights = config_dict.placeholder(str)
    # Reference statistics, of liftplace_jax.evaluate ref, pytorch-fid or ADM; default: the training
    # data are read.
    config.evaluation.reference = config_dict.placeholder(str)
    # Score a second time with predicted data limited to +-clip at each step; default: do not.
    config.evaluation.clip = config_dict.placeholder(float)
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))
    config.sharding_rules = ()  # (regular expression, partition) pairs; default: replicated
    config.tensorboard = True
    return config


def experiment_config(
    arg: str | None, name: str, *, method: str, ratio: float
) -> tuple[ConfigDict, ConfigDict]:
    """The default config with the arguments of every experiment.

    Args:
      arg: what follows the colon: method, ratio, seed, seeds, normalisation, runlocal.
      name: of the experiment.
      method: the default one.
      ratio: the default share of channels removed.

    Returns:
      (config, the arguments as read).

    Raises:
      ValueError: a bad argument; see `parse_arg`.
    """
    args = parse_arg(
        arg, method=method, ratio=ratio, seed=0, seeds=(-1,), normalisation="published",
        runlocal=False,
    )  # fmt: skip
    config = default_config()
    config.name = name
    config.method = args.method
    config.seed = args.seed
    config.seeds = args.seeds if args.seeds != (-1,) else (args.seed,)
    config.compress.ratio = args.ratio
    config.compress.normalisation = args.normalisation
    return config, args


def pixel_unet_config(
    arg: str | None, name: str, unet: str, *, ratio: float, steps: Mapping[float, int]
) -> tuple[ConfigDict, ConfigDict]:
    """What the published pixel-space experiments share.

    Args:
      arg: as of `experiment_config`.
      name: of the experiment.
      unet: of `PUBLISHED_UNETS`.
      ratio: the default share of channels removed.
      steps: student's training steps by ratio; a ratio between two takes those of the larger, one
        beyond the last those of the last.

    Returns:
      (config, the arguments as read).
    """
    # Late, so that a misspelt flag of other configs need not wait for the models.
    from liftplace_jax.models.published import PUBLISHED_UNETS

    config, args = experiment_config(arg, name, method="lift_place_feature_kd", ratio=ratio)
    model = PUBLISHED_UNETS[unet]
    for field in dataclasses.fields(model):
        if field.name != "widths":
            config.model[field.name] = getattr(model, field.name)
    config.data.image_size = model.image_size
    config.data.flip = True
    config.compress.importance = "taylor"
    config.distill.steps = steps[min((r for r in steps if r >= args.ratio), default=max(steps))]
    for run in (config.teacher, config.distill):
        run.log_every = 100
        run.checkpoint_every = 5000
    config.evaluation.features = config_dict.placeholder(str)
    config.evaluation.num_samples = 50_000
    config.evaluation.sample_steps = 100
    return config, args


def runlocal(config: ConfigDict) -> ConfigDict:
    """The same experiment on 16x16 images, with a small network and few steps: under a minute."""
    config.model.update(
        image_size=16, ch=16, ch_mult=config.model.ch_mult[:2], num_res_blocks=1,
        attn_resolutions=(8,), num_groups=4,
    )  # fmt: skip
    config.data.image_size = 16
    config.process.num_timesteps = 20
    config.compress.taylor_batch_size = 8
    for run in (config.teacher, config.distill):
        run.steps = 30
        run.batch_size = 16
        run.ema_decay = 0.9
        run.optimizer.learning_rate = 2e-3
        run.log_every = 10
        run.checkpoint_every = 20
    config.evaluation.update(num_samples=64, batch_size=32, sample_steps=10)
    config.tensorboard = False
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


def filled(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict `old` with what only `new` has: fields that did not exist yet."""
    return {
        key: filled(old[key], new[key])
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping)
        else old.get(key, new.get(key))
        for key in old.keys() | new.keys()
    }


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


