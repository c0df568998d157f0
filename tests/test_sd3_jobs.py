"""The SD3 experiment: its settings, and in miniature from captioned pictures to the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK_XLA
from conftest import config_module as module
from PIL import Image

from liftplace_jax.compress import depth
from liftplace_jax.encoders.autoencoder_folder import write_random_autoencoder
from liftplace_jax.encoders.joint_texts import write_random_joint_texts
from liftplace_jax.experiment import encoding
from liftplace_jax.experiment.checks import check_config
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.families import registry
from liftplace_jax.families.mmdit import PUBLISHED_MMDITS
from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.host import sharding

ROOT = Path(__file__).parent.parent


def get_config(arg=None):
    return module("sd3_mmdit").get_config(arg)


def network(config):
    return registry.config_from_dict(config.model.to_dict(), partial=True)


# The settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["sd3-medium", "sd3.5-medium"])
def test_sizes_are_those_that_the_text_says(teacher):
    text = module("sd3_mmdit").__doc__
    assert "ours, not published" in text
    config = get_config(f"teacher={teacher}")
    model = network(config)
    assert model == PUBLISHED_MMDITS[teacher]
    table = model.position_size**2 * model.hidden_size
    assert f"{config_parameters(model) - table:,}" in text
    for blocks in (18, 12, 8, 6):
        kept = depth.uniform_layers(blocks, 24)
        student = depth.pruned_depth_config(model, kept)
        (line,) = re.findall(rf"^    {blocks} .*G$", text, re.M)
        assert f"{config_parameters(student) - table:,}" in line
        assert f"{count_macs(student) / 1e9:.0f}G" in line
        assert get_config(f"depth={blocks}").compress.depth == blocks


def test_settings():
    config = get_config()
    process, fields = config.process, config.evaluation
    assert (process.kind, process.timesteps, process.shift) == ("flow", "logit_normal", 3.0)
    assert (fields.sampler, fields.skip_type, fields.sample_steps) == ("euler", "diffusers", 28)
    assert (fields.guidance, fields.num_samples, fields.prompts) == (5.0, 30_000, None)
    distill = config.distill
    assert (distill.task_scale, distill.scale, distill.feature_scale) == (1.0, 1.0, 1.0)
    assert (distill.loss.variant, distill.loss.group_size) == ("sd", 16)
    assert (distill.batch_size, distill.steps, distill.ema_decay) == (128, 50_000, 0.9999)
    assert (distill.optimizer.name, distill.optimizer.learning_rate) == ("adamw", 5e-5)
    assert (config.text.dropout, config.text.cached, config.text.t5_tokens) == (0.1, True, 256)
    assert config.model.context_tokens == 77 + config.text.t5_tokens


def test_arguments_reach_the_config():
    config = get_config("teacher=sd3.5-medium,depth=3,layers=0+2+23,method=lift,seeds=0+1")
    assert (config.compress.depth, config.compress.layers) == (3, "0,2,23")
    assert (config.method, config.seeds) == ("lift", (0, 1))
    with pytest.raises(ValueError, match="teacher must be one of .*, got 'sd3.5-large'"):
        get_config("teacher=sd3.5-large")
    for arg in (None, "runlocal", "runlocal,teacher=sd3.5-medium"):
        config = get_config(arg)
        config.data.path = "pictures"
        config.latents.update(autoencoder="tiny", path="latents")
        check_config(config)
    for field in set(re.findall(r"--config\.([\w.]+)=", module("sd3_mmdit").__doc__)):
        node = get_config()
        for part in field.split("."):
            assert part in node, field
            node = node[part]


# In miniature -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Captioned pictures, prompts and a folder of random encoders."""
    home = tmp_path_factory.mktemp("sd3_jobs")
    write_random_autoencoder(home / "tiny" / "vae", latent_channels=16)
    write_random_joint_texts(home / "tiny", ["a cat", "a dog"])
    (home / "pictures").mkdir()
    rng, rows = np.random.default_rng(0), ["file_name,text"]
    for index in range(20):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "pictures" / f"{index}.png")
        rows.append(f"{index}.png,{'a cat' if index % 2 else 'a dog'} number {index}")
    (home / "pictures" / "metadata.csv").write_text("\n".join(rows) + "\n")
    (home / "prompts.txt").write_text("a cat\na dog and a cat\n")
    return home


FLAGS = (
    "--config.latents.autoencoder=tiny",
    "--config.text.folder=tiny",
    "--config.data.path=pictures",
    "--config.latents.path=latents",
)


def command(home, name, *arguments, arg="runlocal,teacher=sd3.5-medium"):
    environment = {**os.environ, "XLA_FLAGS": QUICK_XLA, "PYTHONPATH": str(ROOT)}
    config = f"--config={ROOT / 'configs' / 'sd3_mmdit.py'}:{arg}"
    return subprocess.run(
        [sys.executable, "-m", f"liftplace_jax.{name}", config, *FLAGS, *arguments],
        cwd=home,
        env=environment,
        text=True,
        capture_output=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def finished(home):
    """Finished processes of encode and main."""
    done = [command(home, "encode")]
    assert done[0].returncode == 0, done[0].stderr
    return [
        *done,
        command(home, "main", "--config.evaluation.prompts=prompts.txt", "--workdir=run"),
    ]


def test_runlocal_goes_from_captions_to_the_report(home, finished):
    encoded, done = finished
    # Latents of both flips, ids and states, in float16: all that there is of an image.
    latents, ids = 2 * 2 * 4 * 4 * 16 * 2, 4 * (16 + 16 + 8)
    states = 2 * (2 * 16 * 16 + 2 * 8 + 8 * 32)
    total = 20 * (latents + ids + states + 4)  # and the label
    assert (
        f"20 images take {total / 20e6:.2g} MB each, {total / 1e9:.2g} GB in all" in encoded.stderr
    )
    manifest = json.loads((home / "latents" / "latents.json").read_text())
    assert manifest["shape"] == [4, 4, 16]
    assert {*manifest["columns"]} >= {"text", "text_2", "text_3", "pooled", "pooled_2", "tokens_3"}
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\nReport: run/report.md\n")
    report = json.loads((home / "run" / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place_feature_kd"]
    student = report["rows"][1]
    assert student["output_error"] > 0 and student["compression"] > 1.5
    assert {"coarse", "fine", "weight", "feature_kd"} <= set(student["final_loss_terms"])
    assert student["protocol"]["prompts"]["text"].keys() == {
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    }
    text = (home / "run" / "report.md").read_text()
    assert re.search(r"Text encoders: text_encoder \(\w+\), text_encoder_2 \(\w+\), text_enc", text)
    fields = json.loads(
        (home / "run" / "student" / "lift_place_feature_kd" / "seed0" / "config.json").read_text()
    )
    assert fields["kept_layers"] == [1, 3] and fields["dual_attention_layers"] == [0]
    for picture in ("samples.png", "groups.png", "curves.png"):
        with Image.open(home / "run" / picture) as image:
            assert min(image.size) > 200


def experiment_config(home, monkeypatch, arg="runlocal"):
    monkeypatch.chdir(home)
    config = get_config(arg)
    config.latents.update(autoencoder="tiny", path="latents")
    config.text.folder = "tiny"
    config.data.path = "pictures"
    config.evaluation.prompts = "prompts.txt"
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t5_tokens": 6}, "column 'text_3' of .*8, 32.*, config.model is told .*6, 32"),
        (
            {"dtype": "float32", "left_out": ("text_encoder_4",)},
            "config.text.folder: left_out must be",
        ),
        (
            {"folder": "tiny/text_encoder", "t5_tokens": 256, "left_out": ("text_encoder_3",)},
            "config.text.left_out is for a pipeline of several text encoders",
        ),
    ],
)
def test_texts_that_data_have_not_are_refused(
    home, finished, monkeypatch, tmp_path, changes, message
):
    config = experiment_config(home, monkeypatch)
    config.text.update(changes)
    with pytest.raises(ValueError, match=message):
        _ = open_experiment(config, tmp_path / "run").sources


def test_much_is_written_when_it_is_wanted(home, monkeypatch):
    config = experiment_config(home, monkeypatch)
    config.latents.path = "others"
    monkeypatch.setattr(encoding, "LARGE", 1000)
    over = sharding.batch_sharding(sharding.make_mesh({"data": -1}))
    with pytest.raises(ValueError, match=r"columns .*'text_3'.* take .* MB for each of 20 .*--yes"):
        encoding.encode_data(config, over, batch_size=8)
    assert not (home / "others").exists()
    config.text.left_out = ("text_encoder_3",)
    encoding.encode_data(config, over, batch_size=8, agreed=True)
    manifest = json.loads((home / "others" / "latents.json").read_text())
    assert {"text", "text_2"} <= manifest["columns"].keys()
    assert not {"text_3", "tokens_3"} & manifest["columns"].keys()
    config.text.cached = False  # token ids are there too
    columns = open_experiment(config, home / "none").sources["train"].columns
    assert {"tokens", "tokens_2"} <= columns.keys()
