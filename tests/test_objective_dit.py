"""The one objective on class-conditional networks with learned variance: the published DiT form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import nhwc
from golden_dit import golden_dit
from ml_collections import ConfigDict

from liftplace_jax.conditioning import UNCONDITIONAL, Classes
from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.experiment.configuration import default_config, optimizer_config
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.host import sharding
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network, make_apply
from liftplace_jax.training import objective as objective_lib
from liftplace_jax.training.distillation import make_task, student_objective
from liftplace_jax.training.objective import (
    METHODS,
    Inputs,
    Task,
    draw_inputs,
    make_objective,
)
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.state import random_key

PROCESS = GaussianDiffusion(
    beta_schedule("linear", 1000), variance="learned_range", timesteps="uniform"
)
TASK = Task("mean", 1.0, Classes(10, 10, 0.5))


@pytest.fixture(scope="module")
def networks(golden):
    return golden_dit(golden, "dit_diffusion_losses"), golden_dit(golden, "dit_d4")


@pytest.fixture(scope="module")
def config():
    """The published DiT settings, as far as the objective reads them."""
    config = default_config()
    config.process.update(variance="learned_range", timesteps="uniform", reduction="mean")
    config.distill.update(
        steps=100,
        task_scale=0.1,
        scale=0.9,
        feature_scale=0.01,
        layer_map='{"blocks.0": "blocks.0", "blocks.1": "blocks.1", "blocks.2": "blocks.3"}',
    )
    config.distill.feature.update(
        mask_sigma=2.0, reduction="mean", layers="mean", adapters=False, schedule="linear"
    )
    config.distill.loss.variant = "dit"
    return config


def golden_inputs(monkeypatch, arrays, labels=None):
    """Lets the objective draw the published timesteps, noise and labels; returns its batch."""
    labels = arrays["in/y"] if labels is None else labels
    inputs = Inputs(*(jnp.asarray(v) for v in (arrays["in/t"], nhwc(arrays["in/noise"]), labels)))
    monkeypatch.setattr(objective_lib, "draw_inputs", lambda *_: inputs)
    return {"image": jnp.asarray(nhwc(arrays["in/x_start"])), "label": jnp.asarray(arrays["in/y"])}


def check(metrics, loss, arrays, case, tolerance):
    """Against the published terms: means over the batch."""
    expected = {
        name.rsplit("/", 1)[1]: value.mean()
        for name, value in arrays.items()
        if name.startswith(f"out/{case}/") and value.ndim == 1
    }
    names = {"diffusion": "mse", "vb": "vb", "vb_kd": "vb_kd", "feature_kd": "feat_loss",
             "coarse": "LIFT_PLACE", "output_kd": "OutKD", "slope": "slope",
             "intercept": "intercept"}  # fmt: skip
    found = {published: metrics[name] for name, published in names.items() if name in metrics}
    found["loss"] = loss
    found["kd_loss"] = metrics["vb_kd"] + metrics.get("lift", metrics["output_kd"])
    if "lift" in metrics:
        found["recon"] = metrics["weight"] * metrics["fine"]
    for name in expected.keys() & found.keys():
        np.testing.assert_allclose(
            found[name], expected[name], rtol=tolerance, atol=tolerance * 1e-2, err_msg=name
        )
    assert {"mse", "vb", "vb_kd", "feat_loss", "kd_loss", "loss"} <= expected.keys() & found.keys()


@pytest.mark.parametrize(
    "case, method", [("LIFT_PLACE", "lift_place_feature_kd"), ("logit", "output_feature_kd")]
)
def test_published_total(golden, networks, config, monkeypatch, case, method):
    arrays, meta = golden("dit_diffusion_losses")
    batch = golden_inputs(monkeypatch, arrays)
    student, teacher = networks
    objective, params = student_objective(config, PROCESS, method, 0, student, teacher)
    assert set(params) == {"student"}
    loss_and_grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, metrics), grads = loss_and_grad(params, {"teacher": teacher.params}, batch, 0)
    check(metrics, loss, arrays, f"kd_rep/{case}", 1e-4)
    np.testing.assert_allclose(loss, meta["results"][case]["mean_loss"], rtol=1e-4)
    gradient = grads["student"]["final_layer"]["linear"]["kernel"][...].T
    expected = arrays[f"out/kd_rep/{case}/grad_final_linear_weight"]
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())
    found = jnp.linalg.norm(grads["student"]["blocks"][0]["attn"]["qkv"]["kernel"][...])
    expected = meta["results"][case]["grad_norms"]["blocks.0.attn.qkv.weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    if case == "LIFT_PLACE":
        np.testing.assert_allclose(metrics["weight"], meta["results"]["w"], atol=1e-5)
        # The features' share of the total falls to 0 until the end.
        for step, share in ((50, 0.5), (100, 0.0)):
            later = loss_and_grad(params, {"teacher": teacher.params}, batch, step)[0][0]
            expected = loss - 0.01 * (1 - share) * metrics["feature_kd"]
            np.testing.assert_allclose(later, expected, rtol=1e-6)


def test_published_total_with_unmasked_features(golden, networks, config, monkeypatch):
    arrays = golden("dit_diffusion_losses")[0]
    batch = golden_inputs(monkeypatch, arrays)
    config = config.copy_and_resolve_references()
    config.distill.feature.mask_sigma = None
    student, teacher = networks
    objective, params = student_objective(config, PROCESS, "output_feature_kd", 0, student, teacher)
    loss, metrics = jax.jit(objective)(params, {"teacher": teacher.params}, batch, 0)
    check(metrics, loss, arrays, "kd_rep/logit_no_mask", 1e-4)


def test_published_total_with_dropped_labels(golden, networks, config, monkeypatch):
    arrays = golden("dit_diffusion_losses")[0]
    labels = np.where(arrays["in/train_drop_ids"], 10, arrays["in/y"])
    batch = golden_inputs(monkeypatch, arrays, labels)
    student, teacher = networks
    objective, params = student_objective(
        config, PROCESS, "lift_place_feature_kd", 0, student, teacher
    )
    loss, metrics = jax.jit(objective)(params, {"teacher": teacher.params}, batch, 0)
    check(metrics, loss, arrays, "kd_rep_train", 1e-3)


def test_published_teacher_loss(golden, networks, config, monkeypatch):
    arrays = golden("dit_diffusion_losses")[0]
    batch, teacher = golden_inputs(monkeypatch, arrays), networks[1]
    task = make_task(config, teacher.config.conditioning)
    assert task == Task("mean", 1.0, Classes(10, 10, 0.1))
    apply = make_apply(teacher.graphdef)
    objective = make_objective(METHODS["no_kd"], apply, PROCESS, 0, task=task)
    loss, metrics = jax.jit(objective)({"student": teacher.params}, None, batch, 0)
    assert set(metrics) == {"diffusion", "vb"}
    for found, name in ((metrics["diffusion"], "mse"), (metrics["vb"], "vb"), (loss, "loss")):
        expected = arrays[f"out/training_losses/{name}"].mean()
        np.testing.assert_allclose(found, expected, rtol=1e-4)


# Inputs ----------------------------------------------------------------------------------------


def test_labels_are_dropped_by_their_own_stream():
    batch = {"image": jnp.ones((400, 1, 1, 1)), "label": jnp.arange(400) % 10}
    draw = jax.jit(draw_inputs, static_argnums=(0, 1, 2))
    inputs = draw(PROCESS, TASK, 7, batch, 3)
    dropped = np.asarray(inputs.cond == 10)
    assert 150 < dropped.sum() < 250
    np.testing.assert_array_equal(inputs.cond[~dropped], batch["label"][~dropped])
    expected = jax.random.bernoulli(random_key(7, "label", 3), 0.5, (400,))
    np.testing.assert_array_equal(dropped, expected)
    assert np.any(dropped != np.asarray(draw(PROCESS, TASK, 7, batch, 4).cond == 10))
    kept = draw(PROCESS, TASK._replace(conditioning=Classes(10, None, 0.0)), 7, batch, 3)
    np.testing.assert_array_equal(kept.cond, batch["label"])
    unconditional = draw(PROCESS, TASK._replace(conditioning=UNCONDITIONAL), 7, batch, 3)
    assert unconditional.cond is None
    # Timesteps and noise do not know of labels.
    for other in (kept, unconditional):
        np.testing.assert_array_equal(other.t, inputs.t)
        np.testing.assert_array_equal(other.noise, inputs.noise)


def test_timesteps_uniform_or_antithetic():
    batch = {"image": jnp.ones((1000, 1, 1, 1))}
    t = np.asarray(draw_inputs(PROCESS, Task(), 0, batch, 0).t)
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() < 1000 and t.std() > 250
    assert np.any(t[:499] + t[501:] != 999)
    antithetic = dataclasses.replace(PROCESS, timesteps="antithetic")
    mirrored = np.asarray(draw_inputs(antithetic, Task(), 0, batch, 0).t)
    np.testing.assert_array_equal(mirrored[501:], 999 - mirrored[:499])


# Small networks --------------------------------------------------------------------------------

BATCH = {
    "image": np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32),
    "label": np.arange(8) % 3,
}
SMALL_TASK = Task("mean", 1.0, Classes(3, 3, 0.5))


def small_net(seed):
    """Parameters of `small_apply`: a row for each label, the null label's last."""
    rng = np.random.default_rng(seed)
    return {
        "inner": rng.normal(size=(2, 6)).astype(np.float32),
        "labels": rng.normal(size=(4, 6)).astype(np.float32),
        "outer": 0.3 * rng.normal(size=(6, 4)).astype(np.float32),
    }


def small_apply(params, x, t, return_features, dropout_key, cond):
    label = params["labels"][cond] * jnp.cos(t * 1.0)[:, None]
    hidden = jnp.tanh(x @ params["inner"] + label[:, None, None])
    return hidden @ params["outer"], {"hidden": hidden} if return_features else {}


def small_objective(method, **options):
    return make_objective(
        METHODS[method], small_apply, PROCESS, 0, teacher_apply=small_apply, **options
    )


def test_sums_are_the_means_times_the_elements():
    found = {}
    for reduction in ("sum", "mean"):
        task = SMALL_TASK._replace(reduction=reduction)
        found[reduction] = jax.jit(small_objective("output_kd", task=task, scale=0.5))(
            {"student": small_net(0)}, {"teacher": small_net(1)}, BATCH, 0
        )
    (loss, total), (_, mean) = found["sum"], found["mean"]
    assert set(total) == {"diffusion", "vb", "vb_kd", "output_kd"}
    for name, value in total.items():
        np.testing.assert_allclose(value, 32 * mean[name], rtol=1e-5)
    weighted = total["diffusion"] + total["vb"] + 0.5 * (total["output_kd"] + total["vb_kd"])
    np.testing.assert_allclose(loss, weighted, rtol=1e-5)


def test_teacher_sees_the_labels_of_the_student_and_gets_no_gradient():
    params = small_net(0)
    objective = small_objective("output_feature_kd", task=SMALL_TASK)
    gradient = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, metrics), (of_student, of_teacher) = gradient(
        {"student": params}, {"teacher": params}, BATCH, 0
    )
    # The same network agrees with itself whatever is dropped, and learns from the data alone.
    assert metrics["output_kd"] == metrics["feature_kd"] == 0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_student))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    assert np.any(of_student["student"]["labels"][3])  # of the null label


def test_methods_without_an_output_loss_have_no_bound_of_the_teacher():
    _, metrics = jax.eval_shape(
        small_objective("feature_kd", task=SMALL_TASK),
        {"student": small_net(0)},
        {"teacher": small_net(1)},
        BATCH,
        0,
    )
    assert set(metrics) == {"diffusion", "vb", "output_kd", "feature_kd"}


def test_a_prediction_of_other_channels_is_refused():
    fixed = GaussianDiffusion(PROCESS.betas)
    objective = make_objective(METHODS["no_kd"], small_apply, fixed, 0, task=SMALL_TASK)
    with pytest.raises(ValueError, match=r"student has shape \(8, 4, 4, 4\) but teacher .* 4, 2\)"):
        jax.eval_shape(objective, {"student": small_net(0)}, None, BATCH, 0)


def test_a_sharded_batch_gives_the_same_numbers():
    objective = jax.jit(small_objective("lift", task=SMALL_TASK))
    arguments = {"student": small_net(0)}, {"teacher": small_net(1)}
    mesh = sharding.make_mesh(ConfigDict(dict(data=8, fsdp=1)))
    batch = jax.device_put(BATCH, sharding.batch_sharding(mesh))
    _, expected = objective(*arguments, BATCH, 5)
    _, found = objective(*arguments, batch, 5)
    assert {"vb", "vb_kd", "lift"} <= found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_weight_decay_spares_the_position_embedding():
    blocks = {"0": {"kernel": jnp.ones(3)}, "pos_embed": jnp.ones(3)}
    params = {"student": {"pos_embed": jnp.ones(3), "blocks": blocks}}
    optimizer, _ = make_optimizer(
        optimizer_config(name="adamw", weight_decay=0.5, learning_rate=0.1, grad_clip=0.0),
        10,
        frozen=("pos_embed",),
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)["student"]
    np.testing.assert_array_equal(after["pos_embed"], 1)
    np.testing.assert_allclose(after["blocks"]["0"]["kernel"], 0.95, rtol=1e-6)
    # Frozen is a full name, no part of one.
    np.testing.assert_allclose(after["blocks"]["pos_embed"], 0.95, rtol=1e-6)


def tiny_dit(depth, **changes):
    config = DiTConfig(
        image_size=4,
        in_channels=2,
        num_heads=2,
        num_classes=3,
        **{"depth": depth, "hidden_size": 8} | changes,
    )
    graphdef, abstract = building.abstract(config)
    rng = np.random.default_rng(depth)
    draw = lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return Network(config, graphdef, jax.tree.map(draw, abstract))


def test_features_that_do_not_fit_are_refused_before_training(config):
    refused = functools.partial(
        student_objective, process=PROCESS, name="feature_kd", seed=0, start=tiny_dit(1)
    )
    config = config.copy_and_resolve_references()
    config.distill.layer_map = None  # the published one: the last block of the teacher's share
    assert refused(config, teacher=tiny_dit(2))[1].keys() == {"student"}
    wide = tiny_dit(2, hidden_size=16)
    with pytest.raises(ValueError, match="layer_map: 'blocks.0' is .*8.*teacher's 'blocks.1'.*16"):
        refused(config, teacher=wide)
    config.distill.feature.adapters = True
    assert refused(config, teacher=wide)[1]["adapters"]["blocks.0"].shape == (8, 16)
