"""Rectified flow as a process: what it draws, what losses see of it, and whole jobs with it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
import tiny_dit_config
import torch
from conftest import QUICK_XLA
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from liftplace_jax.data import load_source
from liftplace_jax.diffusion import Flow, make_process
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.losses import PUBLISHED, lift_loss, output_kd_loss, place_loss
from liftplace_jax.training.metrics_io import read_metrics
from liftplace_jax.training.objective import METHODS, Task, draw_inputs, make_objective
from liftplace_jax.training.state import random_key

ROOT = Path(__file__).parent.parent
X0, NOISE = np.random.default_rng(0).normal(size=(2, 8, 4, 4, 2)).astype(np.float32)
T = np.linspace(0, 1000, 8).astype(np.float32)
WAYS = [{}, {"timesteps": "mode"}, {"timesteps": "logit_normal", "logit_mean": 0.5}]


def test_the_path_is_straight():
    flow = Flow()
    s = T.astype(np.float64)[:, None, None, None] / 1000
    x_t = flow.add_noise(X0, T, NOISE)
    np.testing.assert_allclose(x_t, (1 - s) * X0 + s * NOISE, atol=1e-6)
    velocity = flow.target(X0, NOISE, T)
    np.testing.assert_array_equal(velocity, NOISE - X0)
    np.testing.assert_allclose(flow.to_x0(velocity, x_t, T), X0, atol=1e-5)
    mean, rest = flow.split(velocity)
    assert rest is None and mean is velocity and flow.outputs == 1
    assert flow.bound(velocity, X0, x_t, T) is flow.bound(velocity, X0, x_t, T, velocity) is None
    np.testing.assert_allclose(flow.at(jnp.array([0, 0.25])), [0, 250])
    np.testing.assert_array_equal(Flow(4).sweep(), [0.5, 1.5, 2.5, 3.5])
    assert hash(flow) == hash(Flow()) != hash(Flow(shift=3.0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("fields", WAYS)
def test_timesteps_are_drawn_as_by_diffusers(fields, shift):
    """Its u counts from the data's end: sigma = shift(1 - u), so its mean has the other sign."""
    flow = Flow(shift=shift, **fields)
    t = np.asarray(jax.jit(flow.draw_t, static_argnums=1)(jax.random.key(0), 40_000))
    assert t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1000
    u = compute_density_for_timestep_sampling(
        flow.timesteps,
        40_000,
        -flow.logit_mean,
        flow.logit_std,
        flow.mode_scale,
        generator=torch.Generator().manual_seed(0),
    ).numpy()
    sigma = shift * (1 - u) / (1 + (shift - 1) * (1 - u))
    shares = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(
        np.quantile(t, shares) / 1000, np.quantile(sigma, shares), atol=0.012
    )


def test_weights_are_those_of_diffusers():
    s = T / 1000
    for scheme in ("uniform", "logit_normal", "mode"):
        assert Flow(timesteps=scheme).weight(T) is None
        assert (compute_loss_weighting_for_sd3(scheme, torch.from_numpy(s)) == 1).all()
    expected = compute_loss_weighting_for_sd3("cosmap", torch.from_numpy(s)).numpy()
    np.testing.assert_allclose(Flow(timesteps="cosmap").weight(T), expected, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_antithetic_times_are_mirrored(batch):
    t = np.asarray(Flow(timesteps="antithetic").draw_t(jax.random.key(batch), batch))
    drawn = batch // 2 + 1
    assert t.shape == (batch,) and len(set(t)) == batch
    np.testing.assert_allclose(t[drawn:], 1000 - t[: batch - drawn], rtol=1e-5)


@pytest.mark.parametrize("fields, message", [
    ({"timesteps": "sigma_sqrt"}, "unknown timesteps 'sigma_sqrt'; known: .*'cosmap'"),
    ({"shift": 0.0}, "shift must be a number above 0, not 0.0"),
    ({"shift": math.nan}, "shift must be a number above 0, not nan"),
    ({"timesteps": "logit_normal", "logit_std": 0.0}, "logit_std one above 0, not 0.0, 0.0"),
    ({"timesteps": "mode", "mode_scale": 1.8}, r"mode_scale must be in \[-1, 2 / \(pi - 2\)\]"),
    ({"logit_mean": 1.0}, "logit_mean is for timesteps 'logit_normal', not 'uniform': leave it at"),
    ({"mode_scale": 1.0}, "mode_scale is for timesteps 'mode', not 'uniform'"),
    ({"num_timesteps": 0}, "num_timesteps must be at least 1, not 0"),
])  # fmt: skip
def test_bad_flows(fields, message):
    with pytest.raises(ValueError, match=message):
        Flow(**fields)


def test_bad_arguments_of_flows():
    with pytest.raises(ValueError, match="noise has shape .* x0"):
        Flow().add_noise(X0, T, NOISE[:1])
    with pytest.raises(ValueError, match=r"t must have shape \(8,\), one per sample"):
        Flow().add_noise(X0, T[:1], NOISE)
    with pytest.raises(ValueError, match="unknown skip_type 'quad'; known: "):
        Flow().levels(5, "quad")
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.4 \(num_timesteps\), not 5"):
        Flow(4).levels(5)


# Losses -----------------------------------------------------------------------------------------


def network(params, x, t, return_features, dropout_key, cond=None):
    hidden = jnp.tanh(params * x + jnp.sin(t / 300)[:, None, None, None])
    return hidden * (1 + params), {"hidden": hidden} if return_features else {}


@pytest.mark.parametrize("method", ["no_kd", "output_kd", "lift", "lift_place", "feature_kd"])
def test_losses_see_the_velocities(method):
    flow, task, options = Flow(timesteps="cosmap", shift=2.0), Task(), PUBLISHED["pixel"]
    if method == "lift_place":
        options = options | {"group_size": 4}
    objective = make_objective(
        METHODS[method],
        network,
        flow,
        3,
        task=task,
        teacher_apply=network,
        loss_options=options,
        layer_map={"hidden": "hidden"},
    )
    batch, params = {"image": X0}, {"student": 0.7}
    loss, metrics = objective(params, {"teacher": 0.2}, batch, 5)
    t, noise, _ = draw_inputs(flow, task, 3, batch, 5)
    np.testing.assert_array_equal(t, flow.draw_t(random_key(3, "timestep", 5), 8))
    x_t = flow.add_noise(X0, t, noise)
    student, teacher = (network(p, x_t, t, False, None)[0] for p in (0.7, 0.2))
    s = np.asarray(t) / 1000
    weight = 2 / (np.pi * (1 - 2 * s + 2 * s**2))
    errors = np.sum((np.asarray(student) - (noise - X0)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["diffusion"], np.mean(weight * errors), rtol=1e-5)
    expected = {
        "no_kd": lambda: 0.0,
        "output_kd": lambda: output_kd_loss(student, teacher),
        "lift": lambda: lift_loss(student, teacher, **options).loss,
        "lift_place": lambda: place_loss(student, teacher, **options).loss,
        "feature_kd": lambda: 1e-6 * metrics["feature_kd"],
    }[method]()
    np.testing.assert_allclose(loss, metrics["diffusion"] + expected, rtol=1e-5)
    assert "vb" not in metrics


# Configs ----------------------------------------------------------------------------------------


def flow_config(get=tiny_config.get_config, **changes):
    config = get()
    config.process.kind = "flow"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def test_the_usual_sampler_follows_the_process(tmp_path):
    config = tiny_config.get_config()
    assert config.evaluation.sampler == "ddim"
    config.process.kind = "flow"
    assert config.evaluation.sampler == "euler"
    assert config.copy_and_resolve_references().evaluation.sampler == "euler"
    context = open_experiment(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["evaluation"]["sampler"] == "euler"
    assert context.process == make_process(config.process) == Flow(20, "antithetic")
    config.evaluation.sampler = "heun"
    assert config.process.kind == "flow" and config.evaluation.sampler == "heun"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(process__variance="learned_range"),
            "config.process.variance must be 'fixed' with config.process.kind=flow, which has none",
        ),
        (
            dict(process__prediction="v"),
            "config.process.prediction must be 'epsilon' with config.proc",
        ),
        (
            dict(process__schedule="quad"),
            "config.process.schedule must be 'linear' with config.proc",
        ),
        (
            dict(process__beta_end=0.012),
            "config.process.beta_end must be 0.02 with config.process.ki",
        ),
        (
            dict(evaluation__eta=0.5),
            "config.evaluation.eta must be 0.0 with config.evaluation.sampler",
        ),
        (dict(evaluation__steps_offset=1), "config.evaluation.steps_offset must be 0 with"),
        (
            dict(evaluation__set_alpha_to_one=False),
            "config.evaluation.set_alpha_to_one must be True",
        ),
        (
            dict(evaluation__sampler="ddim"),
            "config.evaluation: unknown sampler 'ddim'; known: .*euler",
        ),
        (dict(evaluation__skip_type="leading"), "config.evaluation: unknown skip_type 'leading'"),
        (dict(evaluation__sample_steps=21), r"config.evaluation: steps must be in 1\.\.20"),
        (dict(process__timesteps="random"), "config.process: unknown timesteps 'random'; known"),
        (dict(process__logit_std=2.0), "config.process: logit_std is for timesteps 'logit_normal'"),
        (
            dict(process__shift=0.0),
            r"config.process.shift must be a number in \(0, 1000\], got 0.0",
        ),
        (dict(model__out_channels=2), "predicts 2 channels .* config.process.kind=flow with"),
        (
            dict(process__kind="gaussian", process__shift=3.0),
            "config.process.shift must be 1.0 with config.process.kind=gaussian",
        ),
        (
            dict(process__kind="gaussian", evaluation__sampler="pndm", evaluation__eta=0.5),
            "config.evaluation.eta must be 0.0 with config.evaluation.sampler=pndm",
        ),
        (
            dict(process__kind="gaussian", evaluation__sampler="ancestral", evaluation__eta=1.0),
            "config.evaluation.eta must be 0.0 with config.evaluation.sampler=ancestral",
        ),
        (
            dict(process__kind="gaussian", evaluation__steps_offset=1),
            "config.evaluation: steps_offset 1 is for skip_type 'leading', not uniform",
        ),
        (dict(process__kind="diffusion"), "config.process: unknown kind 'diffusion'; known"),
    ],
)
def test_fields_of_another_process_or_sampler_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        open_experiment(flow_config(**changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_transformer_whose_channels_do_not_fit_is_told_which_field(tmp_path):
    config = flow_config(tiny_dit_config.get_config, model__learn_sigma=True)
    with pytest.raises(ValueError, match="predicts 2 channels for an input of 1; .*needs 1"):
        open_experiment(config, tmp_path / "run")


# Jobs -------------------------------------------------------------------------------------------

COMMANDS = {
    "unet": [
        "--config=configs/digits.py:runlocal", "--config.process.kind=flow", "--config.model.ch=8",
        "--config.compress.importance=taylor", "--config.compress.taylor_batch_size=4",
        "--config.compress.ratio=0.5", "--config.process.timesteps=logit_normal",
        "--config.process.shift=2.0",
    ],
    "dit": [
        "--config=configs/digits_dit.py:runlocal,process=flow,layers=loss,method=output_feature_kd",
        "--config.model.hidden_size=16", "--config.model.num_heads=2",
        "--config.evaluation.sampler=heun", "--config.evaluation.skip_type=diffusers",
        "--config.compress.score_batches=1", "--config.compress.score_batch_size=8",
    ],
}  # fmt: skip
SMALL = [
    "--config.process.num_timesteps=6",
    "--config.evaluation.sample_steps=3", "--config.evaluation.num_samples=64",
    "--config.evaluation.batch_size=64", "--config.evaluation.allow_few=True",
    *(f"--config.{room}.{field}={value}" for room in ("teacher", "distill")
      for field, value in {"steps": 4, "batch_size": 8, "log_every": 1, "checkpoint_every": 2,
                           "optimizer.warmup_steps": 1}.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """(folder of work directories, function that runs commands)."""
    home = tmp_path_factory.mktemp("flow")
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICK_XLA,
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(home / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    load_source("digits", "train", data_dir=str(home / "data"))

    def run(*names):
        lists = [[*COMMANDS[name], *SMALL, f"--workdir={home / name}"] for name in names]
        done = subprocess.run(
            [
                sys.executable,
                "tests/forked_commands.py",
                "liftplace_jax.main",
                "liftplace_jax.experiment.stages",
            ],
            cwd=ROOT,
            env=environment,
            text=True,
            capture_output=True,
            timeout=900,
            input=json.dumps(lists),
        )
        assert done.returncode == 0, done.stderr
        for status, _, err in json.loads(done.stdout):
            assert status == 0, err

    run("unet", "dit")
    return home, run


def test_both_digits_go_from_teacher_to_report(jobs):
    home, _ = jobs
    said = {
        "unet": "Sampler: euler, 3 uniform steps, evaluations 3, shift 2.0, EMA weights",
        "dit": "Sampler: heun, 3 diffusers steps, evaluations 5, shift 1.0, EMA weights",
    }
    for name, sampler in said.items():
        report = json.loads((home / name / "report.json").read_text())
        _, student = report["rows"]
        assert sampler in (home / name / "report.md").read_text()
        protocol = student["protocol"]
        assert (protocol["sample_steps"], protocol["evaluations"]) == (3, 5 if name == "dit" else 3)
        assert {"sampler", "skip_type", "steps_offset", "shift"} <= set(protocol)
        assert np.isfinite(student["frechet"]) and student["output_error"] > 0
        for row in read_metrics(home / name / "teacher"):
            assert 0 < row["diffusion"] < 1e4 and "vb" not in row
    layers = json.loads((home / "dit" / "pruned" / "layers.json").read_text())
    assert len(layers["kept"]) == 2


def test_a_flow_goes_on_to_the_same_bits(jobs):
    home, run = jobs
    whole = home / "whole"
    shutil.move(home / "unet", whole)
    shutil.copytree(whole, home / "unet")
    student = Path("student/lift_place/seed0")
    for file in ("teacher/model.safetensors", student / "model.safetensors", "report.json"):
        (home / "unet" / file).unlink()
    for folder in ("teacher", student):
        shutil.rmtree(home / "unet" / folder / "checkpoints" / "4")
        assert (home / "unet" / folder / "checkpoints" / "2").is_dir()
        (home / "unet" / folder / "evaluation.json").unlink()
    run("unet")
    for file in ("teacher/model.safetensors", student / "model.safetensors"):
        assert (home / "unet" / file).read_bytes() == (whole / file).read_bytes()
    ours, theirs = (
        json.loads((folder / student / "evaluation.json").read_text())
        for folder in (home / "unet", whole)
    )
    assert ours["frechet"] == theirs["frechet"]
