"""The published experiments: their numbers, and each one in miniature from teacher to report."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import GOLDEN, QUICK_XLA
from conftest import config_module as module
from PIL import Image

from liftplace_jax.experiment.checks import check_config
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.families import registry
from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.families.unet.channels import pruned_config

ROOT = Path(__file__).parent.parent
FACTS = json.loads((GOLDEN / "ddpm_facts.json").read_text())["models"]
# name: entry of the facts, and steps of the students by ratio.
CONFIGS = {
    "celeba64_unet": (
        "celeba", {0.1: 100_000, 0.3: 100_000, 0.4: 200_000, 0.5: 200_000, 0.7: 240_000,
                   0.9: 500_000, 0.95: 500_000}),
    "lsun_bedroom256_unet": (
        "bedroom", {0.3: 200_000, 0.5: 500_000, 0.6: 700_000, 0.7: 700_000, 0.9: 700_000}),
    "lsun_church256_unet": ("church", {0.3: 200_000, 0.5: 500_000, 0.7: 500_000, 0.9: 500_000}),
    "cifar10_unet": ("cifar10", {0.3: 100_000, 0.5: 100_000, 0.9: 100_000}),
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", CONFIGS)


def get_config(name, arg=None):
    return module(name).get_config(arg)


def unet(config):
    return registry.config_from_dict(config.model.to_dict(), partial=True)


# The published numbers ------------------------------------------------------------------------


@NAMES
def test_models_and_processes_are_the_published_ones(name):
    config, facts = get_config(name), FACTS[CONFIGS[name][0]]["config"]
    renamed = {"out_ch": "out_channels", "image_size": "image_size"}
    fields = {renamed.get(k, k): v for k, v in facts["model"].items()}
    for key in (
        "in_channels",
        "out_channels",
        "ch",
        "num_res_blocks",
        "dropout",
        "resamp_with_conv",
    ):
        assert config.model[key] == fields[key], key
    for key in ("ch_mult", "attn_resolutions"):
        assert list(config.model[key]) == fields[key]
    assert config.model.image_size == config.data.image_size == facts["data"]["image_size"]
    assert config.data.flip is facts["data"]["random_flip"] is True
    assert config.teacher.ema_decay == config.distill.ema_decay == fields["ema_rate"]
    diffusion = facts["diffusion"]
    assert config.process.to_dict() == dict(
        kind="gaussian",
        schedule=diffusion["beta_schedule"],
        beta_start=diffusion["beta_start"],
        beta_end=diffusion["beta_end"],
        num_timesteps=diffusion["num_diffusion_timesteps"],
        prediction="epsilon",
        variance="fixed",
        timesteps="antithetic",
        reduction="sum",
        shift=1.0,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
    )


@NAMES
def test_teachers_and_students_have_the_published_sizes(name):
    fact = FACTS[CONFIGS[name][0]]
    teacher = unet(get_config(name))
    # Church shares Bedroom's students.
    pruned = fact["pruned"] or FACTS["bedroom"]["pruned"]
    assert set(pruned) == {"0.3", "0.5", "0.7", "0.9"}
    students = {
        ratio: pruned_config(teacher, get_config(name, f"ratio={ratio}").compress.ratio)
        for ratio in pruned
    }
    sizes = [(teacher, fact)] + [(students[ratio], pruned[ratio]) for ratio in pruned]
    for config, expected in sizes:
        assert config_parameters(config) == expected["total_params"]
        assert count_macs(config) == expected["macs"]
    # Whatever the docstring says of millions is one of these.
    said = set(re.findall(r"\d{1,3},\d{3},\d{3}", module(name).__doc__))
    assert len(said) >= 4 and said <= {f"{expected['total_params']:,}" for _, expected in sizes}


@pytest.mark.parametrize("name, teacher, batch, rate, clip, data, test", [
    ("celeba64_unet", 500_000, 96, 2e-4, 1.0, "celeb_a", "test"),
    ("lsun_bedroom256_unet", 2_400_000, 8, 2e-5, 0.0, "lsun/bedroom", "validation"),
    ("lsun_church256_unet", 4_400_000, 8, 2e-5, 0.0, "lsun/church_outdoor", "validation"),
    ("cifar10_unet", 800_000, 128, 2e-4, 1.0, "cifar10", "test"),
])  # fmt: skip
def test_training_is_as_published(name, teacher, batch, rate, clip, data, test):
    config = get_config(name)
    assert config.teacher.steps == teacher
    for run in (config.teacher, config.distill):
        assert (run.batch_size, run.accumulation, run.dtype) == (batch, 1, "float32")
        assert run.optimizer.to_dict() == dict(
            name="adam",
            learning_rate=rate,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            grad_clip=clip,
            schedule="constant",
            warmup_steps=0,
            final_scale=0.0,
        )
    for ratio, steps in CONFIGS[name][1].items():
        assert get_config(name, f"ratio={ratio}").distill.steps == steps, ratio
    assert (config.data.name, config.data.train_split, config.data.test_split) == (
        data,
        "train",
        test,
    )
    assert config.method == "lift_place_feature_kd"
    loss, evaluation = config.distill.loss, config.evaluation
    assert (config.distill.scale, config.distill.feature_scale) == (1.0, 1e-6)
    assert (loss.variant, loss.group_size, loss.grouping) == ("pixel", 16, "error")
    assert config.distill.weight.name == "adaptive" and config.compress.importance == "taylor"
    assert (evaluation.num_samples, evaluation.sampler, evaluation.sample_steps) == (
        50_000,
        "ddim",
        100,
    )
    assert (evaluation.eta, evaluation.clip, evaluation.neighbours) == (0.0, None, 5)
    assert evaluation.skip_type == ("quad" if name == "cifar10_unet" else "uniform")


@NAMES
def test_full_size_experiments_fit_their_tfds_data(name, tmp_path, monkeypatch):
    monkeypatch.setattr("liftplace_jax.data.named._need_tensorflow_io", lambda: None)
    config = get_config(name)
    config.data.data_dir = str(tmp_path / "data")
    # Every check of shapes, and no array; the tests have eight devices.
    experiment = open_experiment(config, tmp_path / "run")
    with tfds.testing.mock_data(num_examples=2):
        size = config.model.image_size
        for source in experiment.sources.values():
            assert source.get([0, 1])["image"].shape == (2, size, size, 3)
    assert experiment.config.name == name.removesuffix("_unet")
    assert [(run.method, run.seed) for run in experiment.runs] == [("lift_place_feature_kd", 0)]


@NAMES
def test_arguments_reach_the_config(name):
    methods = "no_kd+output_kd+feature_kd+output_feature_kd+lift_place_feature_kd"
    config = get_config(name, f"ratio=0.5,method={methods},seeds=0+1,normalisation=adapted")
    assert (config.compress.ratio, config.method, config.seeds) == (0.5, methods, (0, 1))
    assert config.compress.normalisation == "adapted"
    assert get_config(name, "seed=3").seeds == (3,) and get_config(name, "seed=3").seed == 3
    small = get_config(name, "runlocal,ratio=0.7")
    assert small.compress.ratio == 0.7 and small.model.image_size == 16
    check_config(small)
    with pytest.raises(ValueError, match="unknown config argument 'rato'; known:"):
        get_config(name, "rato=0.5")


@NAMES
def test_docstrings_name_commands_that_exist(name):
    text = module(name).__doc__
    assert f"--config=configs/{name}.py" in text and "runlocal" in text and "Hardware" in text
    config = get_config(name)
    for field in set(re.findall(r"--config\.([\w.]+)=", text)):
        node = config
        for part in field.split("."):
            assert part in node, field
            node = node[part]


# In miniature, teacher to report --------------------------------------------------------------


def images(folder, count, size=(24, 20)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{('png', 'jpg', 'webp', 'bmp')[i % 4]}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{name: (folder, finished process)} of the main command, in each folder to runs/one.

    Two at a time; what the first two compiled, the others need not compile again.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICK_XLA,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        flags = ["--config.data.name=folder", "--config.data.path=pictures", "--workdir=runs/one"]
        if name == "celeba64_unet":  # one folder for both splits, and a crop
            images(folder / "pictures", 20)
            flags.append("--config.data.crop=(1, 2, 19, 20)")
        else:
            images(folder / "pictures" / "train" / "a", 20)
            images(folder / "pictures" / get_config(name).data.test_split, 3)
        config = f"--config={ROOT / 'configs' / name}.py:runlocal"
        return folder, subprocess.run(
            [sys.executable, "-m", "liftplace_jax.main", config, *flags],
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
            timeout=600,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CONFIGS, pool.map(run, CONFIGS), strict=True))


@NAMES
def test_runlocal_goes_from_teacher_to_report(name, finished):
    folder, done = finished[name]
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\nReport: runs/one/report.md\n")
    workdir = folder / "runs" / "one"
    report = json.loads((workdir / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place_feature_kd"]
    assert report["rows"][1]["compression"] > 1.5 and report["rows"][1]["output_error"] > 0
    assert all(row["images_per_second"] > 0 for row in report["rows"])
    text = (workdir / "report.md").read_text()
    assert "No feature extractor was named (config.evaluation.features)" in text
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert "Frechet" not in header and "precision" not in header
    assert "output error" in header and "images/s" in header
    for picture in ("samples.png", "groups.png", "curves.png"):
        with Image.open(workdir / picture) as image:
            assert min(image.size) > 300
    (path,) = workdir.glob("student/*/seed*/samples.npz")
    with np.load(path, allow_pickle=False) as samples:
        assert samples["images"].shape == (64, 16, 16, 3)
    terms = report["rows"][1]["final_loss_terms"]
    assert {"coarse", "fine", "weight", "feature_kd"} <= set(terms)
