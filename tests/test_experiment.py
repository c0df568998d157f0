"""Configs, what is refused before anything is computed, and the numbers of the report."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from liftplace_jax import data, weights
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.experiment import configuration, scoring
from liftplace_jax.experiment.config_flag import load_config
from liftplace_jax.experiment.configuration import parse_arg
from liftplace_jax.experiment.context import Run
from liftplace_jax.experiment.pictures import (
    CURVES,
    columns_for,
    curves_figure,
    grid,
    groups_figure,
    samples_figure,
)
from liftplace_jax.experiment.report import describe, markdown, summarise
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.experiment.unused import unused_fields
from liftplace_jax.families import registry
from liftplace_jax.host.differences import differences
from liftplace_jax.host.files import write_json
from liftplace_jax.losses import PUBLISHED
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network, make_apply
from liftplace_jax.training.features import make_adapters
from liftplace_jax.training.objective import BASIC_METHODS, METHODS

CONFIGS = Path(__file__).parent.parent / "configs"


def tiny(arg=None, **changes):
    """The tiny config with changes of dotted fields, written with "__"."""
    config = tiny_config.get_config(arg)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


# Configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("method, changes, said", [
    ("lift", {"distill.loss.group_size": 8}, "group_size=8 does nothing here: .* with PLACE"),
    ("lift+lift_place", {"distill.loss.group_size": 8}, None),
    ("lift_place", {"distill.loss.per": "sample"}, "loss.per=sample .* LIFT alone"),
    ("output_kd", {"distill.weight.name": "cosine"}, "weight.name=cosine .* LIFT or PLACE"),
    ("lift", {"distill.weight.value": 0.5}, "weight.value=0.5 .*name=constant and learnable"),
    ("lift", {"distill.weight.name": "learnable", "distill.weight.value": 0.5}, None),
    ("lift", {"distill.feature.mask_sigma": 3.0}, "mask_sigma=3.0 .* loss on features"),
    ("feature_kd", {"distill.feature.mask_sigma": 3.0}, None),
    ("no_kd", {"distill.scale": 0.5}, "distill.scale=0.5 .* loss on outputs"),
    ("lift", {"evaluation.sampler": "ancestral", "evaluation.eta": 0.5}, "eta=0.5 .*sampler=ddim"),
    ("lift", {"evaluation.eta": 0.5}, None),
    ("lift", {"evaluation.guidance_channels": 1}, "guidance_channels=1 .* other than 1"),
    ("lift", {"teacher.optimizer.schedule": "constant", "teacher.optimizer.final_scale": 0.1},
     "teacher.optimizer.final_scale=0.1 .*schedule=cosine and linear"),
])  # fmt: skip
def test_a_field_that_was_set_and_does_nothing_is_said(method, changes, said):
    config = tiny(f"method={method}")
    assert not list(unused_fields(config)), "what nobody set"
    config.update_from_flattened_dict(changes)
    lines = list(unused_fields(config))
    assert len(lines) == (said is not None)
    assert all(re.match(rf"config\..*{said}", line) for line in lines)


def test_what_does_nothing_is_said_before_the_first_step(tmp_path, capfd):
    config = tiny(distill__loss__per="sample", sharding_rules=(("kernal", ("fsdp",)),))
    open_experiment(config, tmp_path / "run")
    said = capfd.readouterr().err
    assert said.count("config.distill.loss.per=sample does nothing here") == 1
    assert said.count("config.sharding_rules[0] ('kernal', ('fsdp',)) splits nothing") == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_published_configs_are_not_complained_about(path):
    for method in (*METHODS, "all"):
        assert not list(unused_fields(load_config(f"{path}:method={method}")))


def test_arguments_take_the_types_of_their_defaults():
    read = functools.partial(
        parse_arg, method="lift", ratio=0.9, seed=0, seeds=(-1,), names=("a",), runlocal=False
    )
    assert (
        read(None).to_dict()
        == read("").to_dict()
        == dict(method="lift", ratio=0.9, seed=0, seeds=(-1,), names=("a",), runlocal=False)
    )
    args = read("method=no_kd,ratio=.5,seed=3,seeds=0+1+2,names=x+y,runlocal")
    assert args.to_dict() == dict(
        method="no_kd", ratio=0.5, seed=3, seeds=(0, 1, 2), names=("x", "y"), runlocal=True
    )
    assert read("runlocal=false").runlocal is False and read("runlocal=1").runlocal is True


@pytest.mark.parametrize("arg, message", [
    ("stepz=3", r"unknown config argument 'stepz'; known: \['flag', 'seeds', 'steps'\]"),
    ("steps=many", "'steps=many': expected steps=<int>"),
    ("steps=1.5", "'steps=1.5': expected steps=<int>"),
    ("steps", "'steps': expected steps=<int>"),
    ("seeds=1+x", "'seeds=1.x': expected seeds=<tuple>"),
    ("flag=maybe", "'flag=maybe': expected flag=<bool>"),
])  # fmt: skip
def test_bad_arguments_are_named(arg, message):
    with pytest.raises(ValueError, match=message):
        parse_arg(arg, steps=1, seeds=(0,), flag=False)


def test_configs_become_json_and_compare_by_field():
    config = tiny(seeds=(0, 1))
    old, new = configuration.to_json(config), configuration.to_json(tiny(seeds=(0, 1)))
    assert differences(old, new) == []
    assert old["seeds"] == [0, 1] and old["teacher"]["checkpoint"] is None
    new = configuration.to_json(
        tiny(seeds=(0, 2), teacher__optimizer__b1=0.5, teacher__checkpoint="x")
    )
    assert differences(old, new) == [
        "seeds: [0, 1] -> [0, 2]",
        "teacher.checkpoint: None -> 'x'",
        "teacher.optimizer.b1: 0.9 -> 0.5",
    ]
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> None", "b: None -> {'c': 2}"]


def test_checks_name_the_field():
    with pytest.raises(ValueError, match=r"config.x must be one of \['u', 'v'\], got 'w'"):
        configuration.check_choice("x", "w", ("v", "u"))


# Experiments ----------------------------------------------------------------------------------


def test_folders_of_one_and_of_many_students(tmp_path):
    one = open_experiment(tiny(), tmp_path / "one")
    assert one.runs == [Run("lift_place", 0, tmp_path / "one/student/lift_place/seed0")]
    # A single student of an earlier version lies one folder higher.
    (tmp_path / "one" / "student").mkdir()
    (tmp_path / "one" / "student" / "metrics.jsonl").touch()
    assert open_experiment(tiny(), tmp_path / "one").runs == [
        Run("lift_place", 0, tmp_path / "one" / "student")
    ]
    many = open_experiment(tiny("method=all,seeds=0+3"), tmp_path / "many")
    assert [(run.method, run.seed) for run in many.runs] == [
        (method, seed) for method in BASIC_METHODS for seed in (0, 3)
    ]
    folders = [run.folder.relative_to(tmp_path / "many") for run in many.runs]
    assert folders[1] == Path("student/no_kd/seed3") and len(set(folders)) == 12
    assert set(BASIC_METHODS) < set(METHODS)


@pytest.mark.parametrize("field, value, message", [
    ("method", "lfit", r"config.method must be one of \['all', .*'lfit'"),
    ("seed", -1, r"config.seed must be a whole number in 0\.\.2.31 - 1, got -1"),
    ("seeds", (), "config.seeds must be different numbers"),
    ("seeds", (1, 1), "config.seeds must be different numbers"),
    ("teacher.steps", 0, r"config.teacher.steps must be a whole number in 1\.\..*, got 0"),
    ("distill.steps", -5, r"config.distill.steps must be a whole number in 1\.\..*, got -5"),
    ("teacher.batch_size", 12, "config.teacher.batch_size 12 is not a multiple of the 8 devices"),
    ("distill.batch_size", 20, "config.distill.batch_size 20 is not a multiple of the 8 devices"),
    ("evaluation.batch_size", 9, "config.evaluation.batch_size 9 is not a multiple of the 8"),
    ("teacher.accumulation", 3, "teacher.accumulation 3 does not divide config.teacher.batch_size"),
    ("distill.accumulation", 5, "distill.accumulation 5 does not divide config.distill.batch_size"),
    ("teacher.dtype", "float16", "config.teacher.dtype must be one of"),
    ("distill.precision", "float32", "config.distill.precision must be one of"),
    ("evaluation.precision", "bfloat16", "config.evaluation.precision must be one of"),
    ("distill.scan_blocks", True, "config.distill.scan_blocks: a 'unet' is no stack of equal"),
    ("evaluation.dtype", "float16", "config.evaluation.dtype must be one of"),
    ("latents.decode_dtype", "half", "config.latents.decode_dtype must be one of"),
    ("latents.tile", 64, "config.latents.tile 64: without config.latents.autoencoder"),
    ("latents.decode_dtype", "bfloat16", "without config.latents.autoencoder nothing is decoded"),
    ("distill.ema_decay", 1.0, r"config.distill.ema_decay must be a number in \[0, 1\), got 1.0"),
    ("teacher.optimizer.name", "sgd", "config.teacher.optimizer.name must be one of"),
    ("distill.optimizer.warmup_steps", 99, r"distill.optimizer.warmup_steps must be in 0\.\.8"),
    ("distill.optimizer.schedule", "step", "config.distill.optimizer.schedule must be one of"),
    ("mesh.data", 3, "mesh data=3 x fsdp=1 does not fit 8 devices"),
    ("model.ch_mult", (), "config.model: .*ch_mult"),
    ("model.num_groups", 3, "config.model: "),
    ("data.image_size", 16, "images of config.data.image_size 16 do not fit: .* takes 8x8"),
    ("model.out_channels", 2, "config.model: .* 2 channels .* of 1; .*variance=fixed needs 1"),
    ("model.model", "dit2", "config.model: unknown model 'dit2'"),
    ("model.in_channels", 3, "config.model: the network predicts 1 channels .* of 3"),
    ("model.image_size", 16, r"images are \(16, 16, 1\), .* 'digits' takes \(8, 8, 1\)"),
    ("process.schedule", "line", "config.process: unknown beta schedule 'line'"),
    ("process.prediction", "eps", "config.process: unknown prediction 'eps'"),
    ("compress.ratio", 1.0, r"config.compress.ratio must be a number in \[0, 1\), got 1.0"),
    ("compress.ratio", -0.1, r"config.compress.ratio must be a number in \[0, 1\)"),
    ("compress.ratio", 0.95, "config.compress.ratio 0.95 leaves none of the"),
    ("compress.importance", "size", "config.compress.importance must be one of .*'magnitude'"),
    ("compress.normalisation", "none", "config.compress.normalisation must be one of"),
    ("compress.taylor_threshold", 1.0, r"config.compress.taylor_threshold must be .* \[0, 1\)"),
    ("distill.loss.variant", "pixels", "config.distill.loss.variant must be one of"),
    ("distill.loss.group_size", 0,
     r"config.distill.loss.group_size must be a whole number in 1\.\..*, got 0"),
    ("distill.loss.group_size", 65, r"config.distill.loss.group_size must be .* 1\.\.64 .*got 65"),
    ("distill.loss.grouping", "place", "config.distill.loss.grouping must be one of 'error', 's"),
    ("distill.loss.terms", "all", "config.distill.loss.terms must be one of 'both', 'coarse'"),
    ("distill.loss.norm", "l3", "config.distill.loss.norm must be one of 'l1', 'l2'"),
    ("distill.loss.eps", 0.0,
     r"config.distill.loss.eps must be a number in \(0, 1e.06\] or None, got 0.0"),
    ("distill.weight.name", "ramp", "config.distill.weight.name must be one of"),
    ("distill.weight.direction", "up", "config.distill.weight.direction must be one of"),
    ("distill.layer_map", "{a: b}", "config.distill.layer_map is no JSON: .*'{a: b}'"),
    ("distill.layer_map", '["a"]', "config.distill.layer_map must be like"),
    ("distill.layer_map", '{"a": 1}', "config.distill.layer_map must be like"),
    ("evaluation.features", "inception9", "config.evaluation.features must be one of"),
    ("data.name", "folder", "config.data.path must be the folder of images of config.data.name="),
    ("data.path", "pictures", "config.data.path is for config.data.name=folder only.* 'digits'"),
    ("evaluation.sampler", "euler", "config.evaluation: unknown sampler 'euler'; known: .*anc"),
    ("evaluation.sample_steps", 7, "config.evaluation: steps 7 must divide num_timesteps 20"),
    ("evaluation.sample_steps", 21, r"config.evaluation: steps must be in 1\.\.20"),
    ("evaluation.skip_type", "log", "config.evaluation: unknown skip_type 'log'"),
    ("evaluation.eta", -1.0, r"config.evaluation.eta must be a number in \[0, 10\], got -1.0"),
    ("evaluation.neighbours", 10_000, r"evaluation.neighbours must .* 1\.\.9999 .10,000 samples"),
    ("evaluation.allow_few", False, "config.evaluation: num_samples 24 is fewer than the 64"),
    ("evaluation.neighbours", 24, "evaluation.neighbours 24 must be below .*num_samples 24"),
])  # fmt: skip
def test_a_bad_field_is_named_before_anything_is_written(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        open_experiment(tiny(**{field.replace(".", "__"): value}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_batches_are_checked_by_the_stage_that_needs_them(tmp_path):
    config = tiny(teacher__batch_size=12, distill__batch_size=12)
    with pytest.raises(ValueError, match="config.teacher.batch_size 12 is not a multiple of the 8"):
        open_experiment(config, tmp_path / "run")
    # Who only judges trains nothing, on whatever devices.
    context = open_experiment(config, tmp_path / "run", claim=False)
    assert not context.workdir.exists()
    given = tiny(teacher__batch_size=12, teacher__checkpoint="elsewhere")
    assert open_experiment(given, tmp_path / "run").mesh.size == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(method="lift", distill__loss__per="pixel"), "config.distill.loss.per must be one of"),
        (
            dict(distill__loss__grouping="space", distill__loss__group_size=8),
            "config.distill.loss.group_size=8 is no cubic patch",
        ),
        (
            dict(distill__weight__name="learnable", distill__weight__value=1.0),
            r"config.distill.weight.value of a learnable weight must be in \(0, 1\)",
        ),
        (
            dict(method="feature_kd", distill__layer_map='{"mid.block_9": "mid.block_1"}'),
            r"layer_map: the student has no feature 'mid.block_9'; it has \['down.0.block.0'",
        ),
        (
            dict(method="all", distill__layer_map='{"mid.block_1": "up.9"}'),
            "layer_map: the teacher has no feature 'up.9'",
        ),
        (
            dict(
                method="feature_kd",
                model__ch_mult=(1, 2),
                distill__layer_map='{"mid.block_1": "down.0.block.0"}',
            ),
            r"layer_map: 'mid.block_1' is \(4, 4, "
            r".*'down.0.block.0' \(8, 8, .*only widths may differ",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_experiment(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(distill__loss__variant=variant, distill__loss__grouping=grouping)
        for variant in PUBLISHED
        for grouping in ("error", "space")
    ]
    + [
        dict(method="lift", distill__loss__per="sample", distill__loss__terms="coarse"),
        dict(distill__loss__norm="l2", distill__loss__eps=1e-3, distill__loss__group_size=7),
        dict(method="feature_kd", distill__layer_map='{"mid.block_1": "mid.block_2"}'),
        dict(
            evaluation__sampler="ancestral",
            evaluation__skip_type="quad",
            evaluation__sample_steps=7,
        ),
        dict(compress__normalisation="adapted", compress__ratio=0.6, mesh__fsdp=2),
        dict(
            evaluation__features=None,
            model__image_size=16,
            model__in_channels=3,
            model__out_channels=3,
        ),
        dict(data__name="folder", data__path="pictures", data__crop=(0, 0, 8, 8)),
    ],
)
def test_good_choices_are_taken(tmp_path, changes):
    open_experiment(tiny(**changes), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_refused_first_run_does_not_bind_the_work_directory(tmp_path):
    open_experiment(tiny(), tmp_path / "run")
    open_experiment(tiny(seed=3), tmp_path / "run")  # nothing was made yet
    (tmp_path / "run" / "teacher").mkdir()
    with pytest.raises(ValueError, match="seed: 3 -> 0"):
        open_experiment(tiny(), tmp_path / "run")
    open_experiment(tiny(seed=3, mesh__data=2, mesh__fsdp=4), tmp_path / "run")
    # What computes nothing may change.
    changes = {
        f"{room}__{field}": 2
        for room in ("teacher", "distill")
        for field in ("log_every", "checkpoint_every")
    }
    open_experiment(tiny(seed=3, tensorboard=True, **changes), tmp_path / "run")
    with pytest.raises(ValueError, match="teacher.steps: 8 -> 9\n") as error:
        open_experiment(tiny(seed=3, teacher__steps=9, teacher__log_every=3), tmp_path / "run")
    assert "log_every" not in str(error.value)


def test_a_run_killed_before_its_config_was_written_starts_again(tmp_path):
    (tmp_path / ".config.json.123").write_text('{"na')
    open_experiment(tiny(), tmp_path)
    assert (tmp_path / "config.json").exists()


def test_samplers_are_a_function_of_the_keys(tmp_path):
    keys = jax.random.split(jax.random.key(0), 3)

    def predict(params, x, t, *_):
        return params * x, {}

    for changes in (
        {},
        {"evaluation__eta": 0.5},
        {"evaluation__sampler": "ancestral"},
        {"evaluation__skip_type": "quad"},
    ):
        experiment = open_experiment(tiny(**changes), tmp_path / "run")
        fields = experiment.config.evaluation
        sample = jax.jit(make_sampler(fields, experiment.process, experiment.model, predict))
        images = sample(0.1, keys)
        assert images.shape == (3, 8, 8, 1) and np.isfinite(images).all()
        np.testing.assert_allclose(sample(0.1, keys[::-1])[::-1], images, atol=1e-6)
        assert np.abs(images[0] - images[1]).max() > 0.1


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_networks_are_judged_in_the_precision_of_the_config(tmp_path, precision):
    experiment = open_experiment(tiny(evaluation__precision=precision), tmp_path / "run")
    graphdef, params = building.abstract(experiment.model)
    judge, network = experiment.judge, Network(experiment.model, graphdef, params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    x = jax.ShapeDtypeStruct((2, *experiment.model.shape), np.float32)
    t = jax.ShapeDtypeStruct((2,), np.int32)
    for traced in (
        jax.jit(judge.sampler(network)).trace(params, keys),
        judge.predictor(experiment.model).trace(params, x, t, None),
    ):
        lines = traced.lower(lowering_platforms=("tpu",)).as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        assert products and all(f"[{precision.upper()}, " in line for line in products)
        text = "".join(lines)
        assert text.count("stablehlo.convolution") == text.count("#stablehlo<precision ") / 2 > 0
        assert text.count(f"#stablehlo<precision {precision.upper()}>") == text.count(
            "#stablehlo<precision "
        )
    assert scoring.protocol(experiment)["precision"] == precision


def test_networks_are_judged_in_the_dtype_of_the_config(tmp_path):
    keys = jax.random.split(jax.random.key(0), 4)
    samples, predictions = {}, {}
    trained = None
    for dtype in ("float32", "bfloat16"):
        experiment = open_experiment(
            tiny(evaluation__dtype=dtype, evaluation__sample_steps=5), tmp_path / dtype
        )
        judge, model = experiment.judge, experiment.model
        trained = trained or building.create(model, 3, jnp.bfloat16)  # whatever it was trained in
        network = Network(model, *trained)
        params = judge.placed_params(network)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        samples[dtype] = jax.jit(judge.sampler(network))(params, keys)
        x, t = jax.random.normal(keys[0], (4, *model.shape)), jnp.arange(4)
        predictions[dtype] = judge.predictor(model)(judge.placed(network), x, t, None)
        assert samples[dtype].dtype == predictions[dtype].dtype == jnp.float32
        assert scoring.protocol(experiment)["dtype"] == dtype
        if dtype == "float32":  # the network as it is, to the bit
            apply = make_apply(building.abstract(model)[0])
            sample = make_sampler(experiment.config.evaluation, experiment.process, model, apply)
            np.testing.assert_array_equal(jax.jit(sample)(trained[1], keys), samples[dtype])
    for found in (samples, predictions):
        error = np.abs(found["bfloat16"] - found["float32"]).max()
        assert 0 < error < 5e-2 * np.abs(found["float32"]).max()


def test_configs_of_before_precision_get_its_defaults():
    old = configuration.to_json(tiny())
    del old["evaluation"]["dtype"], old["latents"]["decode_dtype"], old["latents"]["tile"]
    for room in ("teacher", "distill", "evaluation"):
        del old[room]["precision"]
    found = configuration.completed(old)
    assert found == configuration.to_json(tiny())
    assert found["teacher"]["precision"] == found["distill"]["precision"] == "default"
    assert found["evaluation"]["precision"] == "highest"
    assert found["evaluation"]["dtype"] == found["latents"]["decode_dtype"] == "float32"


def test_adapters_fit_the_widths_of_both_networks():
    config = tiny().model.to_dict()
    teacher_config = registry.config_from_dict(config | {"widths": None})
    student_config = dataclasses.replace(teacher_config, ch=4, widths=None)
    student, teacher = (Network(c, *building.abstract(c)) for c in (student_config, teacher_config))
    adapters = make_adapters(student, teacher, {"mid.block_1": "up.0.block.1"}, 0)
    assert {name: value.shape for name, value in adapters.items()} == {"mid.block_1": (4, 8)}
    everything = make_adapters(student, teacher, None, 0)
    assert {"down.0.block.0", "mid.block_1", "mid.block_2"} <= set(everything)
    assert all(value.shape == (4, 8) for value in everything.values())
    assert all(jnp.abs(value).max() <= 0.005 for value in everything.values())


# Report ---------------------------------------------------------------------------------------


def rows():
    base = dict(parameters=100, macs=2_500_000, compression=1.0, steps=8)
    teacher = base | dict(
        method="teacher", seed=0, frechet=5.0, precision=0.5, recall=0.25, train_seconds=None
    )
    rng = np.random.default_rng(0)
    return [teacher] + [
        base
        | dict(
            method=method,
            seed=seed,
            **dict(
                zip(
                    ("frechet", "precision", "recall", "output_error", "train_seconds"),
                    rng.random(5),
                    strict=True,
                )
            ),
        )
        for method in ("no_kd", "lift")
        for seed in (0, 1, 2)
    ]


def test_summaries_are_means_and_spreads_over_seeds():
    summary = summarise(rows())
    assert [entry["method"] for entry in summary] == ["teacher", "no_kd", "lift"]
    for entry in summary[1:]:
        members = [row for row in rows() if row["method"] == entry["method"]]
        assert entry["seeds"] == [0, 1, 2]
        for key in ("frechet", "precision", "recall", "output_error", "train_seconds"):
            values = [row[key] for row in members]
            np.testing.assert_allclose(entry[key], np.mean(values), rtol=1e-12)
            np.testing.assert_allclose(entry[f"{key}_spread"], np.std(values, ddof=1), rtol=1e-12)
    assert summary[0]["frechet"] == 5.0 and summary[0]["frechet_spread"] is None
    assert summary[0]["output_error"] is summary[0]["train_seconds"] is None


def test_the_table_has_a_line_for_each_method(tmp_path):
    experiment = open_experiment(tiny("method=all,seeds=0+1+2"), tmp_path / "run")
    text = markdown(experiment, describe(experiment, rows()))
    table = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line[:2] == "| "]
    assert [line[0] for line in table] == ["method", "teacher", "no_kd (3 seeds)", "lift (3 seeds)"]
    # Nothing was sampled with clipping or timed: no columns for them.
    assert table[0] == [
        "method",
        "params",
        "MACs",
        "compression",
        "Frechet",
        "precision",
        "recall",
        "output error",
        "steps",
        "time",
    ]
    assert table[1] == ["teacher", "100", "2.50M", "1.0x", "5.0", "0.500", "0.250", "-", "8", "-"]
    values = [row["precision"] for row in rows() if row["method"] == "lift"]
    assert table[3][5] == f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"
    assert "digit-feature Frechet distance, 24 samples against all of digits train" in text
    assert "standard deviation over seeds" in text and "importances" not in text
    record = {"importances": {"dtype": "bfloat16", "precision": "high"}}
    write_json(experiment.pruned_folder / "layers.json", record)
    text = markdown(experiment, describe(experiment, rows()))
    assert "precision default; importances bfloat16, precision high (jax." in text


def test_a_report_without_features_says_so(tmp_path):
    config = tiny(evaluation__features=None, evaluation__clip=None)
    experiment = open_experiment(config, tmp_path / "run")
    measured = [
        {k: v for k, v in row.items() if k not in ("frechet", "precision", "recall")}
        | {"images_per_second": 20.0 + row["seed"]}
        for row in rows()
    ]
    text = markdown(experiment, describe(experiment, measured))
    header, teacher, *_ = (line for line in text.splitlines() if line.startswith("| "))
    columns = "method params MACs compression output_error images/s steps time".split()
    assert header.strip("| ").replace("output error", "output_error").split(" | ") == columns
    assert teacher == "| teacher | 100 | 2.50M | 1.0x | - | 20 | 8 | - |"
    assert "No feature extractor was named (config.evaluation.features): 24 samples" in text
    assert "recall: k" not in text and "Clipped" not in text


def test_grids_hold_every_image():
    images = np.arange(1, 11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    picture = grid(images, columns=4)
    assert picture.shape == (9, 12, 1) and picture.dtype == np.uint8
    assert [picture[3, 3 * i, 0] for i in range(4)] == [5, 6, 7, 8]
    assert picture[6, 6, 0] == 128  # empty


@pytest.mark.parametrize("count, columns", [
    (0, 1), (1, 1), (3, 3), (4, 4), (5, 3), (7, 4), (9, 3), (10, 4), (11, 4), (12, 4),
])  # fmt: skip
def test_figures_of_many_panels_wrap(count, columns):
    assert columns_for(count) == columns


def pixels(figure):
    """(width, height) as saved."""
    return tuple(figure.get_size_inches() * 120)


def test_curves_of_many_terms_and_samples_of_many_methods_fit_a_page(tmp_path):
    experiment = open_experiment(tiny("method=all,seeds=0+1"), tmp_path / "run")
    (axis,) = curves_figure(experiment).axes
    assert axis.get_title() == "no metrics were logged"
    for run in experiment.runs:
        run.folder.mkdir(parents=True)
        row = dict.fromkeys(CURVES, 0.5)
        lines = [json.dumps({"step": step} | row) for step in (1, 2)]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines))
    figure = curves_figure(experiment)
    assert [axis.get_title() for axis in figure.axes] == [*CURVES, ""]
    assert max(pixels(figure)) <= 1500
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(
        dict.fromkeys(run.method for run in experiment.runs)
    )
    names = ["teacher", *dict.fromkeys(run.method for run in experiment.runs)]
    images = np.zeros((64, 8, 8, 1), np.uint8)
    for name in names:
        (experiment.workdir / name).mkdir(parents=True, exist_ok=True)
        np.savez(experiment.workdir / name / "samples.npz", images=images, images_clipped=images)
    figure = samples_figure(experiment, [{"method": name, "folder": name} for name in names])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [*names, "", *(f"{name}, clipped" for name in names), ""]
    assert max(pixels(figure)) <= 1700


@pytest.mark.parametrize("size, channels", [(4, 1), (8, 1), (20, 1), (64, 3)])
def test_pictures_of_every_size_and_fewer_images_than_rows(tmp_path, size, channels):
    config = tiny(evaluation__features=None, evaluation__clip=None)
    config.model.update(image_size=size, in_channels=channels, out_channels=channels)
    experiment = open_experiment(config, tmp_path / "run")
    records = [{"image": np.full((size, size, channels), 40 * i, np.uint8)} for i in range(3)]
    source = data.Source("three", records, image_shape=(size, size, channels))
    experiment.__dict__["sources"] = {"train": source, "test": source}
    for folder in (experiment.teacher_folder, experiment.runs[0].folder):
        params = building.create(experiment.model, 0)[1]
        weights.save_model(folder, experiment.model.described(), params)
        np.savez(folder / "samples.npz", images=np.zeros((64, size, size, channels), np.uint8))
    figure = groups_figure(experiment)
    count = -(-size * size // 16)
    panels = 5 if count == 1 else 6
    assert len(figure.axes) == 3 * panels
    maps = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert all(picture.shape[:2] == (size, size) for picture in maps)
    titles = [axis.get_title() for axis in figure.axes[:panels]]
    if count == 1:  # a map of it would be one flat colour
        assert figure.get_suptitle() == "All 16 elements of a channel are one group."
    else:
        assert titles[5].startswith(f"{count} groups of 16")
        for axis in figure.axes[5::6]:
            picture = axis.images[0]
            colors = picture.to_rgba(np.unique(picture.get_array()))
            assert len(np.unique(colors, axis=0)) == count
    assert ("squared error (red)" in titles) == (channels == 3)
    folders = {"teacher": "teacher", "student": "student/lift_place/seed0"}
    rows = [{"method": name, "folder": folder} for name, folder in folders.items()]
    figure = samples_figure(experiment, rows)
    shown = np.asarray(figure.axes[0].images[0].get_array()).shape[0] // (size + 1)
    assert shown == (8 if size <= 32 else 4)
    assert [axis.get_title() for axis in figure.axes] == ["teacher", "student"]
