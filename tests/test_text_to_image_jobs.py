"""docs/text-to-image.md and the configs of Stable Diffusion, in miniature: every command, tried."""

import filecmp
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import QUICK_XLA
from conftest import config_module as module
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from liftplace_jax import weights
from liftplace_jax.experiment.context import make_context
from liftplace_jax.experiment.pipelines import write_student
from liftplace_jax.experiment.presets import write_random_pipeline
from liftplace_jax.experiment.training import distill
from liftplace_jax.experiment.workdir import remove_leftovers
from liftplace_jax.families.loading import load_network
from liftplace_jax.host.buckets import as_path, upload

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "text-to-image.md").read_text()
SD21, SD14 = "stable-diffusion-2-1-base", "stable-diffusion-v1-4"
STUDENT = "runs/small/student/lift_place_feature_kd/seed0"
PARAMS = "model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
PIPELINE_PARTS = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def tried(language):
    """Blocks of the page that stand below the mark."""
    return re.findall(rf"<!-- tried -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands():
    """{part of the job: arguments of python}: of the page, and of SD 1.4 with its own teacher."""
    page = [shlex.split(block.replace("\\\n", " ")) for block in tried("bash")]
    config = re.compile(r"--config=(configs/\w+\.py):?(.*)")
    for command in page:
        assert command[:2] == ["python", "-m"]
        for number, part in enumerate(command):
            if match := config.fullmatch(part):
                command[number] = f"--config={ROOT / match[1]}:runlocal,{match[2]}"
    options = [
        f"--config={ROOT / 'configs' / 'sd14_bksdm.py'}:runlocal,student=extreme,method=output_kd",
        f"--config.latents.autoencoder={SD14}",
        f"--config.text.folder={SD14}/",
        "--config.data.path=laion",
        "--config.latents.path=latents",
        "--config.text.cached=True",
    ]
    own = [
        ["liftplace_jax.encode", *options],
        [
            "liftplace_jax.main",
            *options,
            "--config.evaluation.prompts=prompts.txt",
            "--config.evaluation.sampler=ddim",
            "--workdir=runs/own",
        ],
    ]
    return {"page": [command[2:] for command in page], "own": own}


def write_data(home):
    rng, rows = np.random.default_rng(0), ["file_name,text"]
    (home / "laion").mkdir(parents=True)
    (home / "laion-tars").mkdir()
    with tarfile.open(home / "laion-tars" / "00000.tar", "w") as tar:
        for i in range(20):
            image = Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8))
            image.save(home / "laion" / f"{i}.jpg")
            rows.append(f'{i}.jpg,"a photo, number {i}"')
            text = f"a photo, number {i}".encode()
            image.save(packed := io.BytesIO(), "png")
            for name, content in ((f"{i:04}.png", packed.getvalue()), (f"{i:04}.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (home / "laion" / "metadata.csv").write_text("\n".join(rows) + "\n")
    (home / "prompts.txt").write_text("a photo of a cat\nthe digit\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{part: (folder, finished processes)} of `commands`, both parts at once."""
    environment = {**os.environ, "XLA_FLAGS": QUICK_XLA, "PYTHONPATH": str(ROOT)}

    def run(part):
        home, done = tmp_path_factory.mktemp(part), []
        write_data(home)
        name, folder = {"page": ("sd21_bksdm", SD21), "own": ("sd14_bksdm", SD14)}[part]
        write_random_pipeline(home / folder, module(name).get_config("runlocal"))
        for arguments in commands()[part]:
            done.append(
                subprocess.run(
                    [sys.executable, "-m", *arguments],
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

    parts = commands()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(parts, pool.map(run, parts), strict=True))


def config_of(home, name):
    config = module(name).get_config("runlocal")
    saved = json.loads((home / "config.json").read_text())
    for room in ("pipeline", "teacher", "data", "latents", "text", "evaluation", "compress"):
        if isinstance(saved[room], dict):
            config[room].update({k: v for k, v in saved[room].items() if not isinstance(v, list)})
        else:
            config[room] = saved[room]
    config.method = saved["method"]
    return config


@pytest.mark.parametrize("part", ["page", "own"])
def test_every_command_ends_well(part, finished):
    _, done = finished[part]
    assert [process.returncode for process in done] == len(commands()[part]) * [0], done[-1].stderr


def test_the_page_ends_in_a_pipeline(finished):
    home, done = finished["page"]
    assert "20 images of 'train', both flips" in done[0].stdout
    report = json.loads((home / "runs" / "small" / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place_feature_kd"]
    assert {"coarse", "fine", "weight", "feature_kd"} <= set(report["rows"][1]["final_loss_terms"])
    assert "Prompts: 2 of prompts.txt" in (home / "runs" / "small" / "report.md").read_text()
    # What the run wrote is what `convert` writes.
    run, converted = home / STUDENT / "pipeline", home / "small-sd"
    files = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    assert {file.parts[0] for file in files} == PIPELINE_PARTS
    texts = [file for file in files if file.suffix != ".safetensors"]
    assert filecmp.cmpfiles(run, converted, texts, shallow=False) == (texts, [], [])
    index = json.loads((run / "model_index.json").read_text())
    assert index == json.loads((home / SD21 / "model_index.json").read_text())
    # The network is the averaged one, the rest the teacher's.
    averaged = weights.read_tensors(home / STUDENT / "model.safetensors")
    for folder in (run, converted):
        assert_same(weights.read_tensors(folder / UNET), averaged)
    for part in PIPELINE_PARTS - {"unet", "model_index.json"}:
        same = filecmp.dircmp(run / part, home / SD21 / part)
        assert not (same.left_only or same.right_only or same.diff_files)


def test_the_pages_python_draws_the_image(finished, monkeypatch):
    home, _ = finished["page"]
    monkeypatch.chdir(home)
    (block,) = tried("python")
    exec(block, {})
    with Image.open("cat.png") as image:
        assert image.size == (32, 32)


def test_tars_are_encoded_as_the_folder_is(finished):
    home, _ = finished["page"]
    tars = json.loads((home / "laion-tars-latents" / "latents.json").read_text())
    folder = json.loads((home / "laion-latents" / "latents.json").read_text())
    assert tars["splits"] == folder["splits"] == {"train": 20}
    assert tars["columns"] == folder["columns"] and "tokens" in str(tars["columns"])


@pytest.mark.parametrize("part, name, workdir", [
    ("page", "sd21_bksdm", "runs/small"), ("own", "sd14_bksdm", "runs/own"),
])  # fmt: skip
def test_students_are_sampled_by_diffusers_as_here(part, name, workdir, finished, monkeypatch):
    home, _ = finished[part]
    monkeypatch.chdir(home)
    config = config_of(home / workdir, name)
    config.evaluation.sample_steps = 10
    context = make_context(config, workdir, writes=False)
    (folder,) = Path(workdir).glob("student/*/seed0")
    network, keys = load_network(folder), jax.random.split(jax.random.key(5), 2)
    sample = jax.jit(context.judge.sampler(network))
    params = network.params, context.judge.decoder.params, context.judge.prompts.frozen
    images = np.clip(sample(params, keys, context.judge.condition(2)) / 2 + 0.5, 0, 1)
    noise = [jax.random.normal(jax.random.fold_in(key, 0), network.config.shape) for key in keys]

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    if part == "own":  # put together with the scheduler that the config samples with
        assert isinstance(pipeline.scheduler, DDIMScheduler)
    expected = pipeline(
        Path("prompts.txt").read_text().splitlines(),
        num_inference_steps=10,
        guidance_scale=7.5,
        latents=torch.from_numpy(np.moveaxis(np.stack(noise), -1, 1).copy()),
        output_type="np",
    ).images
    assert images.std() > 0.02
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


def test_a_teacher_of_its_own_has_no_pipeline_to_copy(finished):
    home, _ = finished["own"]
    (folder,) = (home / "runs" / "own").glob("student/output_kd/seed0/pipeline")
    assert {path.name for path in folder.iterdir()} == PIPELINE_PARTS
    assert json.loads((folder / "model_index.json").read_text()) == {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
    }
    fields = json.loads((home / "latents" / "latents.json").read_text())["columns"]
    assert "text" in str(fields)


def test_a_pipeline_that_is_missing_is_written_later(finished, tmp_path, monkeypatch, bucket):
    home, _ = finished["page"]
    monkeypatch.chdir(home)
    config = config_of(Path("runs/small"), "sd21_bksdm")
    # Of a run that was cut off while it wrote, into a folder and into a bucket.
    for name in (PARAMS, "config.json"):
        upload(Path(STUDENT) / name, as_path(f"{bucket}/student") / name)
    left = tmp_path / "run" / "student" / "lift_place_feature_kd" / "seed0"
    left.mkdir(parents=True)
    for name in (PARAMS, "config.json"):
        (left / name).write_bytes((Path(STUDENT) / name).read_bytes())
    (left / ".pipeline.123" / "unet").mkdir(parents=True)
    remove_leftovers(tmp_path / "run")
    distill(make_context(config, tmp_path / "run"))
    assert {path.name for path in left.iterdir()} == {PARAMS, "config.json", "pipeline"}
    write_student(make_context(config, tmp_path / "run"), as_path(f"{bucket}/student"))
    for folder in (left / "pipeline", as_path(f"{bucket}/student/pipeline")):
        index = (home / "small-sd" / "model_index.json").read_bytes()
        assert (folder / "model_index.json").read_bytes() == index
        assert_same(weights.read_tensors(folder / UNET), weights.read_tensors(left / PARAMS))
    config.distill.write_pipeline = False
    (left / "pipeline" / "model_index.json").unlink()
    distill(make_context(config, tmp_path / "run"))
    assert not (left / "pipeline" / "model_index.json").exists()
