"""The DiT experiments: their published settings, and each in miniature from teacher to report."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, QUICK_XLA
from conftest import config_module as module
from PIL import Image

from liftplace_jax.conditioning import Classes
from liftplace_jax.data import Source, load_source
from liftplace_jax.encoders.autoencoder_folder import write_random_autoencoder
from liftplace_jax.experiment.checks import check_config
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.families import registry
from liftplace_jax.families.registry import config_parameters
from liftplace_jax.training.metrics_io import read_metrics

ROOT = Path(__file__).parent.parent
FACTS = json.loads((GOLDEN / "dit_facts.json").read_text())
STUDENTS = {"D19": 19, "D14": 14, "D7": 7, "D4": 4}


def imagenet(arg=None):
    return module("imagenet256_dit").get_config(arg)


# The published settings -----------------------------------------------------------------------


def test_imagenet_is_as_published():
    config = imagenet()
    model = registry.config_from_dict(config.model.to_dict(), partial=True)
    assert config_parameters(model) == FACTS["models"]["DiT-XL/2"]["total_params"]
    assert config.process.to_dict() == dict(
        kind="gaussian",
        schedule="linear",
        num_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction="epsilon",
        variance="learned_range",
        timesteps="uniform",
        reduction="mean",
        shift=1.0,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
    )
    distill = config.distill
    assert (distill.task_scale, distill.scale, distill.feature_scale) == (0.1, 0.9, 0.01)
    assert distill.feature.to_dict() == dict(
        reduction="mean", layers="mean", adapters=False, schedule="linear", mask_sigma=2.0
    )
    assert (distill.loss.variant, distill.loss.group_size) == ("dit", 16)
    assert (distill.batch_size, distill.steps, distill.ema_decay) == (256, 500_000, 0.9999)
    assert distill.optimizer.to_dict() == dict(
        name="adamw",
        learning_rate=2e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        grad_clip=0.0,
        schedule="cosine",
        warmup_steps=0,
        final_scale=0.5,
    )
    fields = config.evaluation
    assert (fields.sampler, fields.sample_steps, fields.skip_type) == ("ancestral", 250, "spaced")
    assert (fields.guidance, fields.guidance_channels, fields.num_samples) == (1.5, None, 50_000)
    assert model.class_dropout == 0.1 and config.data.flip and config.data.image_size == 256


@pytest.mark.parametrize("student", STUDENTS)
def test_imagenet_students_have_the_published_sizes(student):
    config = imagenet(f"student={student}")
    model = registry.config_from_dict(config.model.to_dict(), partial=True)
    expected = FACTS["models"][f"DiT-{student}/2"]["total_params"]
    assert config_parameters(model.replace(depth=config.compress.depth)) == expected
    assert f"{expected:,}" in module("imagenet256_dit").__doc__


def test_arguments_reach_the_config():
    config = imagenet("student=D4,layers=0+9+18+27,method=output_kd,seeds=0+1")
    assert (config.compress.depth, config.compress.layers) == (4, "0,9,18,27")
    assert (config.method, config.seeds) == ("output_kd", (0, 1))
    with pytest.raises(ValueError, match="student must be one of .*'D14'.*, got 'D15'"):
        imagenet("student=D15")
    for name in ("imagenet256_dit", "digits_dit"):
        check_config(module(name).get_config())
        check_config(module(name).get_config("runlocal"))
        text = module(name).__doc__
        for field in set(re.findall(r"--config\.([\w.]+)=", text)):
            node = module(name).get_config()
            for part in field.split("."):
                assert part in node, field
                node = node[part]


@pytest.mark.parametrize("changes, message", [
    ({"model.out_channels": 3}, "config.model: .*unknown fields .'out_channels'"),
    ({"model.num_heads": 3}, "config.model: hidden_size 64 must be a multiple of num_heads 3"),
    ({"model.learn_sigma": False}, "predicts 1 channels for .* of 1; .*learned_range needs 2"),
    ({"model.model": "autoencoder"}, "config.model: "),
    ({"evaluation.guidance": 2.0, "model.class_dropout": 0.0}, "config.evaluation: guidance 2.0"),
    ({"evaluation.guidance_channels": 2}, "config.evaluation: guidance_channels must be in 1..1"),
    ({"evaluation.guidance": float("nan")}, r"config.evaluation.guidance must be a number in \[0,"),
    ({"process.timesteps": "random"}, "config.process: unknown timesteps 'random'"),
    ({"process.variance": "learned"}, "config.process: .*variance 'learned'"),
    ({"distill.feature.schedule": "cosine"}, "config.distill.feature.schedule must be one of"),
    ({"teacher.remat": "everything"}, "config.teacher.remat must be one of"),
    ({"latents.path": "latents"}, "config.latents.autoencoder and config.latents.path belong"),
    ({"distill.layer_map": '{"blocks.1": "blocks.8"}'}, "the teacher has no feature 'blocks.8'"),
    ({"compress.layers": "0,8"}, "config.compress.*8"),
])  # fmt: skip
def test_a_bad_field_is_named_before_anything_is_written(tmp_path, changes, message):
    config = module("digits_dit").get_config()
    for field, value in changes.items():
        *path, name = field.split(".")
        node = functools.reduce(getattr, path, config)
        with node.ignore_type(), node.unlocked():
            node[name] = value
    with pytest.raises(ValueError, match=message):
        open_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_classes_of_data_and_model_must_agree(tmp_path):
    config = module("digits_dit").get_config()
    config.data.data_dir = str(tmp_path / "data")
    config.model.num_classes = 7
    with pytest.raises(ValueError, match="digits .train. has 10 classes, .*num_classes is 7"):
        open_experiment(config, tmp_path / "run").sources  # noqa: B018


# In miniature, teacher to report --------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{name: (folder, finished processes)}: digits' DiT; ImageNet's on digits' latents."""
    home = tmp_path_factory.mktemp("dit")
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICK_XLA,
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(home / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    write_random_autoencoder(home / "autoencoder", channels=1, image_size=8, levels=2)
    latent = [
        f"--config={ROOT / 'configs' / 'imagenet256_dit.py'}:runlocal,student=D14",
        "--config.data.name=digits",
        "--config.data.test_split=test",
        "--config.data.flip=False",
        "--config.data.image_size=8",
        "--config.model.num_classes=10",
        "--config.latents.autoencoder=autoencoder",
        "--config.latents.path=latents",
    ]
    commands = {
        "digits_dit": [
            [
                "main",
                f"--config={ROOT / 'configs' / 'digits_dit.py'}:runlocal",
                "--workdir=digits_dit",
            ],
        ],
        "imagenet256_dit": [
            ["encode", *latent],
            [
                "main",
                *latent,
                "--workdir=imagenet256_dit",
                "--config.evaluation.features=digits",
                "--config.evaluation.num_samples=80",
                "--config.evaluation.curve_every=30",
                "--config.distill.remat=nothing_saveable",
                "--config.distill.dtype=bfloat16",
                "--config.distill.scan_blocks",
                "--config.distill.accumulation=2",
                "--config.evaluation.dtype=bfloat16",
                "--config.latents.decode_dtype=bfloat16",
                "--config.latents.tile=4",
            ],
        ],
    }
    load_source("digits", "train", data_dir=str(home / "data"))  # not by two at once

    def run(name):
        done = []
        for module_name, *arguments in commands[name]:
            done.append(
                subprocess.run(
                    [sys.executable, "-m", f"liftplace_jax.{module_name}", *arguments],
                    cwd=home,
                    env=environment,
                    text=True,
                    capture_output=True,
                    timeout=900,
                )
            )
            if done[-1].returncode:
                break
        return home, done

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


@pytest.mark.parametrize("name", ["digits_dit", "imagenet256_dit"])
def test_runlocal_goes_from_teacher_to_report(name, finished):
    home, done = finished[name]
    assert [process.returncode for process in done] == [0] * len(done), done[-1].stderr
    assert done[-1].stdout.endswith(f"\n\nReport: {name}/report.md\n")
    workdir = home / name
    report = json.loads((workdir / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place_feature_kd"]
    student = report["rows"][1]
    assert student["parameters"] < report["rows"][0]["parameters"]
    assert student["output_error"] > 0 and student["frechet"] > 0
    assert student["protocol"]["guidance"] == 1.5
    terms = {"vb", "vb_kd", "coarse", "fine", "weight", "feature_kd", "output_kd", "diffusion"}
    assert terms <= set(student["final_loss_terms"])
    assert "guidance 1.5" in (workdir / "report.md").read_text()
    for picture in ("samples.png", "groups.png", "curves.png"):
        with Image.open(workdir / picture) as image:
            assert min(image.size) > 200
    config = json.loads(
        (workdir / "student" / "lift_place_feature_kd" / "seed0" / "config.json").read_text()
    )
    assert config["depth"] == len(config["kept_layers"]) == 2
    with np.load(
        workdir / "student" / "lift_place_feature_kd" / "seed0" / "samples.npz", allow_pickle=False
    ) as samples:
        # Every digit, from the same noise in each row.
        assert samples["classes"].tolist() == list(range(10))
        assert samples["images_by_class"].shape == (40, 8, 8, 1)


def test_latents_are_trained_on_and_decoded_in_graph(finished):
    home, (encoded, *_) = finished["imagenet256_dit"]
    assert "1,437" in encoded.stdout
    manifest = json.loads((home / "latents" / "latents.json").read_text())
    assert manifest["shape"] == [4, 4, 4]
    metrics = read_metrics(home / "imagenet256_dit" / "student" / "lift_place_feature_kd" / "seed0")
    assert [m["step"] for m in metrics if "frechet_float32" in m] == [30]
    evaluated = json.loads((home / "imagenet256_dit" / "teacher" / "evaluation.json").read_text())
    protocol = evaluated["protocol"]
    assert protocol["dtype"] == protocol["decode_dtype"] == "bfloat16" and protocol["tile"] == 4
    report = (home / "imagenet256_dit" / "report.md").read_text()
    assert "evaluation bfloat16, decoding bfloat16 in tiles of 4, precision" in report
    with np.load(home / "imagenet256_dit" / "teacher" / "samples.npz") as samples:
        assert samples["images"].shape == (64, 8, 8, 1)


def test_another_autoencoder_at_evaluation_is_refused(finished, tmp_path):
    home, _ = finished["imagenet256_dit"]
    write_random_autoencoder(tmp_path / "other", channels=1, image_size=8, levels=2, seed=1)
    config = imagenet("runlocal")
    config.data.update(name="digits", test_split="test", image_size=8)
    config.data.data_dir = str(home / "data")
    config.model.num_classes = 10
    config.latents.update(autoencoder=str(tmp_path / "other"), path=str(home / "latents"))
    with pytest.raises(ValueError, match="encoded by another autoencoder .*\n *sha256: "):
        open_experiment(config, tmp_path / "run")
    # The same weights with another scale are another autoencoder too.
    shutil.copytree(home / "autoencoder", tmp_path / "scaled")
    fields = json.loads((tmp_path / "scaled" / "config.json").read_text())
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(fields | {"scaling_factor": 0.5}))
    config.latents.autoencoder = str(tmp_path / "scaled")
    with pytest.raises(ValueError, match="scaling_factor: 0.18215 -> 0.5"):
        open_experiment(config, tmp_path / "run")
    # Latents are no network to begin with.
    config.latents.update(autoencoder=str(home / "autoencoder"))
    config.compress.checkpoint = str(home / "autoencoder")
    with pytest.raises(ValueError, match="unknown model 'autoencoder'"):
        open_experiment(config, tmp_path / "run")


def test_labels_must_be_classes_in_every_split(tmp_path):
    for name in ("train/a/1", "train/b/2", "train/c/3", "test/b/4", "test/c/5"):
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    config = module("digits_dit").get_config()
    config.data.update(name="folder", path=str(tmp_path / "pictures"))
    config.model.num_classes = 3
    config.evaluation.num_samples = 64
    with pytest.raises(ValueError, match="test. has 2 classes, config.model.num_classes is 3"):
        open_experiment(config, tmp_path / "run").sources  # noqa: B018
    (tmp_path / "pictures" / "test" / "d").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "test" / "d" / "6.png")
    with pytest.raises(ValueError, match="different classes: .'a', 'd'. are in one of them alone"):
        open_experiment(config, tmp_path / "run").sources  # noqa: B018
    records = [{"image": np.zeros((8, 8, 1), np.uint8), "label": -1}]
    unlabelled, used = (
        Source("x", records, image_shape=(8, 8, 1), num_classes=3) for _ in range(2)
    )
    assert unlabelled.get([0])["label"] == -1  # fine where labels are not used
    Classes(3, None, 0.0).check_data([used])
    with pytest.raises(ValueError, match="example 0: label -1 is no class, there are 3 from 0"):
        used.get([0])


def test_latent_models_on_images_are_refused(tmp_path):
    message = "config.data.image_size 256 do not fit: config.model takes 32x32; .*config.latents"
    with pytest.raises(ValueError, match=message):
        open_experiment(imagenet(), tmp_path / "run")
