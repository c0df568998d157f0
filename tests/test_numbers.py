"""Every number of every config is of its kind and in its range, or is refused by name."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_config
import tiny_dit_config
from conftest import config_module
from ml_collections import ConfigDict

from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule, ddim_sample
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.experiment.checks import check_batches, check_config
from liftplace_jax.experiment.configuration import default_config, optimizer_config
from liftplace_jax.experiment.fields import check_fields, kind_of, leaves, ranges
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.families import registry
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.host.ranges import positive, whole
from liftplace_jax.training.optimizer import make_optimizer

CONFIGS = {path.stem: None for path in (Path(__file__).parent.parent / "configs").glob("*.py")}
NAMES = pytest.mark.parametrize("name", ["default", *sorted(CONFIGS)])
NO_NUMBERS = (math.nan, math.inf, -math.inf, 1e30, 10**400, True, "1", {"a": 1})
OPTIONAL = {
    "data.image_size", "data.crop", "compress.depth", "compress.learned.keep",
    "compress.learned.group", "distill.feature.mask_sigma", "distill.loss.eps", "evaluation.clip",
    "evaluation.guidance_channels", "evaluation.resize", "teacher.optimizer.grad_clip",
    "distill.optimizer.grad_clip", "compress.learned.optimizer.grad_clip",
}  # fmt: skip
SIGNED = {"process.logit_mean"}  # which may be below 0, in [-10, 10]


def get_config(name):
    config = default_config() if name == "default" else config_module(name).get_config()
    if config.data.name == "folder":
        # What these experiments leave to their users.
        config.data.path = "pictures"
        config.latents.update(autoencoder="vae", path="latents")
    return config


def number_fields(config):
    """The dotted fields whose type, or whose items', is a number."""
    for field, value in leaves(config, model=True):
        items = value if isinstance(value, list | tuple) else [value]
        numeric = any(isinstance(v, int | float) and not isinstance(v, bool) for v in items)
        if numeric or kind_of(config, field) in (int, float) or field == "data.crop":
            yield field


def changed(config, field, value):
    """A config with a field that ConfigDict itself would not take."""
    fields = config.to_dict()
    *rooms, name = field.split(".")
    node = fields
    for room in rooms:
        node = node[room]
    node[name] = value
    return ConfigDict(fields)


def check(config):
    """As `open_experiment` does, without the rest of it."""
    check_config(config)
    registry.config_from_dict(config.model.to_dict(), partial=True)


def refusals(config, field, values):
    """What is said of each value of a field, None if nothing."""
    config = config.copy_and_resolve_references()
    *rooms, name = field.split(".")
    node = functools.reduce(ConfigDict.__getitem__, rooms, config)
    for value in values:
        del node[name]  # or its type would stay
        node[name] = value
        try:
            if rooms[:1] == ["model"]:
                registry.config_from_dict(config.model.to_dict(), partial=True)
            else:
                check_fields(config)
            yield value, None
        except ValueError as error:
            yield value, str(error)


@NAMES
def test_no_field_takes_what_is_no_number(name):
    config = get_config(name)
    fields = list(number_fields(config))
    assert len(fields) >= 70
    for field in fields:
        negative = -11 if field in SIGNED else -2
        values = [*NO_NUMBERS, negative, *([1.5] if kind_of(config, field) is int else [])]
        wanted = f"config.{field}" if not field.startswith("model.") else field[len("model.") :]
        for value, said in refusals(config, field, values):
            assert said and said.startswith(wanted) and "\n" not in said, (field, value, said)
        if not field.startswith("model."):
            ((_, said),) = refusals(config, field, [None])
            assert (said is None) == (field in OPTIONAL), (field, said)
    check(config)


def test_a_number_without_a_range_is_found():
    for name in registry.FAMILIES:
        config = default_config(name)
        numbers = {field for field in number_fields(config) if not field.startswith("model.")}
        assert numbers == set(ranges(config))
    for family in (UNetConfig, DiTConfig, AutoencoderConfig):
        annotated = {
            field.name
            for field in dataclasses.fields(family)
            if {"int", "float"} & set(re.findall(r"\w+", str(field.type))) - {"widths"}
        }
        assert annotated - {"widths"} == set(family.RANGES), family


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(8, 1, 1, 8, (1, 2), 1, (4,), num_groups=4),
        DiTConfig(8, 16, 2, 2, kept_layers=(0, 1)),
        AutoencoderConfig((32, 64)),
    ],
)
def test_no_model_takes_what_is_no_number(config):
    for field, limits in config.RANGES.items():
        one = limits._replace(many=False)
        outside = [one.low - 1, one.high + 1, *NO_NUMBERS]
        if one.above:
            outside.append(one.low)
        if one.below:
            outside.append(one.high)
        if limits.kind is int:
            outside.append(2.0)
        for value in outside:
            value = (value,) if limits.many else value
            with pytest.raises(ValueError, match=field):
                config.replace(**{field: value})


@pytest.mark.parametrize("field, value", [
    ("teacher.optimizer.learning_rate", 1e-50),  # 0 in float32
    ("teacher.optimizer.b1", 2),
    ("distill.optimizer.b2", 1 - 1e-9),  # 1 in float32
    ("distill.ema_decay", 1 - 1e-12),
    ("distill.optimizer.eps", 0),
    ("distill.optimizer.grad_clip", -1),
    ("teacher.optimizer.final_scale", 1.5),
    ("compress.learned.optimizer.learning_rate", 0),
    ("distill.task_scale", -1),
    ("distill.weight.value", 1.5),
    ("evaluation.num_samples", 10**12),
    ("distill.batch_size", 10**12),
    ("evaluation.guidance", 1e30),
    ("input_threads", 10**6),
    ("process.num_timesteps", 10**12),
    ("seeds", (0, 2**31)),
    ("seeds", (0, True)),
    ("seed", 1.0),
    ("mesh.data", -2),
])  # fmt: skip
def test_numbers_that_are_no_settings(tmp_path, field, value):
    gets = [tiny_config.get_config, tiny_dit_config.get_config]
    for get in gets[1:] if "learned" in field else gets:
        with pytest.raises(ValueError, match=f"config.{field}.* must be .*got") as error:
            open_experiment(changed(get(), field, value), tmp_path / "run")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_settings():
    config = tiny_config.get_config()
    for field, value in {
        "distill.scale": 0,
        "distill.optimizer.grad_clip": 0,
        "teacher.optimizer.b1": 0,
        "distill.optimizer.learning_rate": 1,
        "seed": np.int64(3),
        "evaluation.eta": np.float32(1),
        "mesh.data": -1,
        "distill.feature_scale": 0,
        "distill.weight.value": 1,
    }.items():
        check(changed(config, field, value))


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="no_kd", task_scale=0.0),
        dict(method="all", task_scale=0.0),  # no_kd is one of them
        dict(method="lift_place", task_scale=0.0, scale=0.0),
        dict(method="feature_kd", task_scale=0.0, feature_scale=0.0),
    ],
)
def test_a_loss_that_is_0_is_refused(changes):
    config = tiny_config.get_config()
    config.method = changes.pop("method")
    config.distill.update(changes)
    with pytest.raises(ValueError, match="all that method .* minimises is multiplied by 0"):
        check_config(config)
    config.method = "output_feature_kd"
    config.distill.update(scale=1.0)
    check_config(config)


def test_batches_that_fit_in_no_memory_are_named():
    channels, depth = tiny_config.get_config(), tiny_dit_config.get_config()
    check_batches(channels, (8, 8, 1))
    for config, field in (
        (channels, "teacher.batch_size"),
        (channels, "compress.taylor_batch_size"),
        (channels, "evaluation.batch_size"),
        (depth, "compress.learned.batch_size"),
        (depth, "compress.score_batch_size"),
    ):
        with pytest.raises(ValueError, match=f"config.{field} 2147483647: .* GiB, there are"):
            check_batches(changed(config, field, 2**31 - 1), (256, 256, 3))


def test_fields_that_nobody_reads_or_that_lack_are_named():
    config = default_config()
    config.teacher.stepz = 3
    with pytest.raises(ValueError, match=r"teacher.stepz is no field.*mean config.teacher.steps\?"):
        check_fields(config)
    with pytest.raises(ValueError, match="config.distill.optimizer.b1 is missing"):
        check_fields(changed(default_config(), "distill.optimizer", {"name": "adam"}))
    for field, value, kind in (
        ("data.flip", 1, "true or false"),
        ("name", 5, "text"),
        ("sharding_rules", "x", "a tuple"),
        ("method", None, "set"),
        ("model", 3, "the fields of a network"),
    ):
        with pytest.raises(ValueError, match=f"config.{field}:? must be {kind}, got {value!r}"):
            check_fields(changed(default_config(), field, value))


@pytest.mark.parametrize("rules, message", [
    ((("kernel", ("fdsp",)),), r"sharding_rules\[0\]: .* one of \['data', 'fsdp'\]"),
    ((("kernel", ("fsdp", None)), ("bias", ("fsdp", "fsdp"))), r"sharding_rules\[1\]: .* once"),
    ((("kernel", "fsdp"),), r"sharding_rules\[0\] must be \(regular expression, partition\)"),
    (("kernel", ("fsdp",)), r"sharding_rules\[0\] must be \(regular expression, partition\)"),
    (((3, ("fsdp",)),), r"sharding_rules\[0\] must be \(regular expression, partition\)"),
    ((("(", ("fsdp",)),), r"sharding_rules\[0\]: '\(' is no regular expression"),
])  # fmt: skip
def test_sharding_rules_that_cannot_be(rules, message):
    with pytest.raises(ValueError, match=message):
        check_config(changed(tiny_config.get_config(), "sharding_rules", rules))


def test_attention_is_where_it_was_asked_for():
    with pytest.raises(ValueError, match=r"attn_resolutions \[5\]: .* only \[16, 8\]"):
        UNetConfig(16, ch=32, ch_mult=(1, 2), attn_resolutions=(8, 5))
    published = UNetConfig(32, ch=32, ch_mult=(1, 2))
    assert published.attn_resolutions == (16,)
    assert UNetConfig(8, ch=32, ch_mult=(1, 2)).attn_resolutions == ()
    names = [node.name for node in published.block_plan() if node.kind == "attention"]
    assert "down.1.attn.0" in names and "down.0.attn.0" not in names


def test_the_library_refuses_them_too():
    for changes in (
        dict(learning_rate=math.nan),
        dict(b1=2),
        dict(grad_clip=-1.0),
        dict(final_scale=math.nan),
    ):
        with pytest.raises(ValueError, match=f"optimizer.{next(iter(changes))} must be"):
            make_optimizer(optimizer_config(**changes), 10)
    process = GaussianDiffusion(beta_schedule("linear", 10))
    with pytest.raises(ValueError, match="eta nan is out of range"):
        ddim_sample(lambda x, t: x, np.zeros((1, 2, 2, 1)), process, steps=5, eta=math.nan)


def test_ranges_say_what_they_take():
    assert str(whole()) == "a whole number in 1..2^31 - 1"
    assert str(positive(optional=True)) == "a number in (0, 1e+06] or None"
    assert str(whole(0, 9, many=True)) == "a sequence, each a whole number in 0..9"
    with pytest.raises(ValueError, match=r"x must be .*, got 11$"):
        whole(1, 10).check("x", 11)
    with pytest.raises(ValueError, match=r"x must be .*\(a reason\), got 11"):
        whole(1, 10, why="a reason").check("x", 11)
    with pytest.raises(ValueError, match=r"x must be .*1..10, got 0"):
        whole(1, 10, why="a reason").check("x", 0)
