"""Text to image on the embedded emoji, from captions to the report, in miniature."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK_XLA
from PIL import Image

from liftplace_jax.data import load_source

ROOT = Path(__file__).parent.parent
CONFIGS = ("emoji_sd", "emoji_mmdit")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{name: (folder, its process)}; the encoded data are shared."""
    home = tmp_path_factory.mktemp("emoji")
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICK_XLA,
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(home / "data"),
    }

    def run(module, name, *arguments):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                f"liftplace_jax.{module}",
                f"--config={ROOT / 'configs' / name}.py:runlocal",
                *arguments,
            ],
            cwd=home,
            env=environment,
            text=True,
            capture_output=True,
            timeout=900,
        )

    encoded = run("encode", CONFIGS[0])
    assert encoded.returncode == 0, encoded.stderr
    assert "1,928 images of 'train' and 337 images of 'test'" in encoded.stdout
    load_source("emoji/people-32", "train", data_dir=str(home / "data"))  # not by two at once
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: run("main", name, f"--workdir={name}"), CONFIGS)
        return {name: (home / name, process) for name, process in zip(CONFIGS, done, strict=True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_from_captions_to_the_report(name, finished):
    workdir, process = finished[name]
    assert process.returncode == 0, process.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place_feature_kd"]
    student = report["rows"][1]
    assert student["compression"] > 1.5 and np.isfinite(student["frechet"])
    assert -1 <= student["clip_score"] <= 1
    with Image.open(workdir / "samples.png") as grid:
        assert min(grid.size) > 300
    (path,) = workdir.glob("student/*/seed0/samples.npz")
    with np.load(path, allow_pickle=False) as samples:
        held_out = set(
            load_source("emoji/people-32", "test", data_dir=str(workdir.parent / "data")).captions
        )
        assert set(samples["prompts"].tolist()) <= held_out
        assert samples["images_by_prompt"].shape[1:] == (32, 32, 3)
