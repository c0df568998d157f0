"""One step, one loop, one state: against NumPy, optax and themselves on other devices."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.experiment.configuration import optimizer_config, training_config
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.host import sharding
from liftplace_jax.losses import (
    cosine_weight,
    feature_kd_loss,
    init_adapters,
    lift_loss,
    linear_weight,
    output_kd_loss,
    place_loss,
)
from liftplace_jax.nn import building
from liftplace_jax.nn.network import make_apply
from liftplace_jax.training.checkpoints import Checkpoints
from liftplace_jax.training.loop import Interrupted, NonFiniteLossError, train
from liftplace_jax.training.metrics_io import MetricsLog, read_metrics
from liftplace_jax.training.objective import METHODS, WEIGHTS, Weighting, make_objective
from liftplace_jax.training.optimizer import make_optimizer, make_schedule
from liftplace_jax.training.prepare import prepare
from liftplace_jax.training.state import STREAMS, create_state, random_key
from liftplace_jax.training.step import make_train_step

PROCESS = GaussianDiffusion(beta_schedule("linear", 20))
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 2)).astype(np.float32)


def small_net(seed, width):
    """Parameters of `small_apply`: two 1x1 layers."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "inner": jax.random.normal(keys[0], (2, width)),
        "outer": jax.random.normal(keys[1], (width, 2)),
    }


def small_apply(params, x, t, return_features, dropout_key, cond=None):
    hidden = jnp.tanh(x @ params["inner"] + jnp.sin(t * 1.0)[:, None, None, None])
    features = {"hidden": hidden} if return_features else {}
    if dropout_key is not None:
        hidden = hidden * jax.random.bernoulli(dropout_key, 0.9, hidden.shape)
    return hidden @ params["outer"], features


STUDENT, TEACHER = small_net(1, 3), small_net(2, 5)
FROZEN = {"teacher": TEACHER}
ADAPTERS = init_adapters(jax.random.key(3), {"hidden": 3}, {"hidden": 5})


@pytest.fixture
def cheap_random():
    """Random bits that compile in half the time, where it does not matter which they are."""
    with jax.default_prng_impl("unsafe_rbg"):
        yield


def small_objective(name, **options):
    return make_objective(
        METHODS[name], small_apply, PROCESS, 7, teacher_apply=small_apply, **options
    )


def trained(method):
    """What a method trains."""
    extra = {"adapters": ADAPTERS} if METHODS[method].feature else {}
    return {"student": STUDENT} | extra


def squares(params, frozen, batch, step):
    """Loss without randomness: mean squared distance of the batch to one vector."""
    del frozen, step
    loss = jnp.mean(jnp.square(batch["image"] - params["student"]["w"]))
    return loss, {"square": loss}


def vector_state(optimizer):
    return create_state({"student": {"w": jnp.array([1.0, -2.0, 3.0])}}, optimizer)


def vector_batch(step):
    return {"image": np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)}


def vector_batches(first):
    while True:
        yield vector_batch(first)
        first += 1


def close(a, b, tolerance=1e-5):
    """Whether two trees agree, on whatever devices they live."""
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        jax.device_get(a),
        jax.device_get(b),
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# Randomness, schedules, optimizers ----------------------------------------------------------------


def test_random_key_depends_on_seed_stream_and_step_alone():
    keys = {
        (seed, stream, step): jax.random.key_data(random_key(seed, stream, step)).tobytes()
        for seed in (0, 1)
        for stream in STREAMS
        for step in (0, 1, 2)
    }
    assert len(set(keys.values())) == len(keys)
    jitted = jax.jit(lambda step: jax.random.key_data(random_key(1, "noise", step)))
    assert jitted(2).tobytes() == keys[1, "noise", 2]
    with pytest.raises(ValueError, match="x not in tuple"):
        random_key(0, "unheard", 0)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_have_their_closed_form(name, warmup):
    config = optimizer_config(
        learning_rate=0.5, schedule=name, warmup_steps=warmup, final_scale=0.1
    )
    schedule = make_schedule(config, 24)
    steps = np.arange(30)
    progress = np.clip((steps - warmup) / (24 - warmup), 0, 1)
    decay = {
        "constant": np.ones(30),
        "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2,
        "linear": 1 - 0.9 * progress,
    }[name]
    expected = 0.5 * np.where(steps < warmup, steps / max(warmup, 1), decay)
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, rtol=1e-5)


def test_adam_clips_by_the_global_norm_and_adamw_decays():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    grads = [
        {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])},
        {"a": jnp.array([0.1, 0.2]), "b": jnp.array([0.0])},
    ]

    def run(**changes):
        optimizer, _ = make_optimizer(optimizer_config(learning_rate=0.1, **changes), 10)
        state, values = optimizer.init(params), params
        for grad in grads:
            updates, state = optimizer.update(grad, state, values)
            values = optax.apply_updates(values, updates)
        return np.r_[values["a"], values["b"]]

    def by_hand(clip, decay):
        x, m, v = np.array([1.0, 2.0, 3.0]), np.zeros(3), np.zeros(3)
        for n, grad in enumerate(grads, start=1):
            g = np.r_[grad["a"], grad["b"]]
            norm = np.linalg.norm(g)
            g = g * min(1, clip / norm) if clip else g
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            x = x - 0.1 * (m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + decay * x)
        return x

    np.testing.assert_allclose(run(), by_hand(1.0, 0), rtol=1e-5)
    np.testing.assert_allclose(run(grad_clip=0.0), by_hand(None, 0), rtol=1e-5)
    np.testing.assert_allclose(run(name="adamw", weight_decay=0.2), by_hand(1.0, 0.2), rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="sgd"), "optimizer.name must be one of .*'adam', 'adamw'.*'sgd'"),
        (dict(weight_decay=0.1), "weight_decay needs optimizer.name='adamw'"),
        (dict(schedule="step"), "optimizer.schedule must be one of .*'step'"),
        (dict(warmup_steps=11), "warmup_steps must be in 0..10, got 11"),
    ],
)
def test_bad_optimizer_configs_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(optimizer_config(**changes), 10)


# The step --------------------------------------------------------------------------------------


def test_ema_warms_up_as_in_numpy():
    optimizer = optax.sgd(0.3)
    step = make_train_step(squares, optimizer, ema_decay=0.3)
    state = vector_state(optimizer)
    ema = np.asarray(state.ema["w"], np.float64)
    for n in range(6):
        state, _ = step(state, None, vector_batch(n))
        decay = min(0.3, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * np.asarray(state.params["student"]["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5)
    assert int(state.step) == 6


def test_state_is_donated_and_nothing_else():
    optimizer = optax.adam(0.1)
    params, teacher = {"student": {"w": jnp.ones(3)}}, {"w": jnp.ones(5)}
    state = create_state(params, optimizer)
    step = make_train_step(squares, optimizer, ema_decay=0.9)
    after, _ = step(state, teacher, vector_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, teacher, after)))


def test_a_run_keeps_no_second_copy_of_what_it_trains():
    objective = make_objective(METHODS["no_kd"], small_apply, PROCESS, 7)
    fields = training_config(steps=2)
    rules = ((r"outer", ("fsdp",)),)
    for mesh in ({"data": 1}, {"data": 4, "fsdp": 2}):
        mesh = sharding.make_mesh(mesh, jax.devices()[: 8 if "fsdp" in mesh else 1])
        params = {"student": jax.tree.map(jnp.copy, STUDENT)}
        leaves = jax.tree.leaves(params)
        before = {id(x) for x in jax.live_arrays()}
        run = prepare(fields, objective, params, {}, mesh, rules)
        assert all(leaf.is_deleted() for leaf in leaves)
        new = [x for x in jax.live_arrays() if id(x) not in before]
        assert sum(x.size for x in new) <= sum(x.size for x in jax.tree.leaves(run.state)) + 8
        np.testing.assert_array_equal(run.state.params["student"]["inner"], STUDENT["inner"])


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_products_of_a_step_have_the_precision_of_the_config(precision):
    """Forward and backward, of student and teacher; the process's own setting does not matter."""
    objective = make_objective(
        METHODS["output_kd"], small_apply, PROCESS, 7, teacher_apply=small_apply
    )
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    params = {"student": jax.tree.map(jnp.copy, STUDENT)}
    fields = training_config(steps=2, precision=precision)
    run = prepare(fields, objective, params, FROZEN, mesh, ())
    traced = run.step.trace(run.state, run.frozen, {"image": IMAGES})
    lines = traced.lower(lowering_platforms=("tpu",)).as_text().splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert len(products) >= 7
    said = f"precision = [{precision.upper()}, {precision.upper()}]"
    assert all(said in line for line in products)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_flag_is_that_of_every_metric(bad):
    def loss_fn(params, frozen, batch, step):
        loss = jnp.sum(params["student"]["w"] ** 2)
        return loss, {"odd": jnp.where(step == 1, bad, 1.0), "number": step}

    step = make_train_step(loss_fn, SGD, ema_decay=0.9)
    state, first = step(vector_state(SGD), None, vector_batch(0))
    _, second = step(state, None, vector_batch(1))
    assert bool(first["finite"]) and not bool(second["finite"])


def test_plain_dicts_and_nnx_states_give_the_same_bits():
    config = UNetConfig(
        image_size=4,
        in_channels=1,
        out_channels=1,
        ch=8,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=(),
        num_groups=4,
    )
    graphdef, params = building.create(config, 0)
    objective = make_objective(METHODS["no_kd"], make_apply(graphdef), PROCESS, 7)
    results = []
    for tree in (params, nnx.state(nnx.merge(graphdef, params))):
        compute = jax.jit(jax.value_and_grad(objective, has_aux=True))
        batch = {"image": np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype("f4")}
        results.append(jax.tree.leaves(compute({"student": tree}, None, batch, 0)))
    assert type(params) is dict and len(results[0]) == len(results[1]) > 20
    equal(*results)


def test_accumulation_equals_the_whole_batch():
    optimizer = optax.adam(0.1)
    results = []
    for parts in (1, 2, 4):
        step = make_train_step(squares, optimizer, ema_decay=0.9, accumulation=parts)
        state = vector_state(optimizer)
        for n in range(3):
            state, metrics = step(state, None, vector_batch(n))
        results.append((state, metrics))
    close(results[0], results[1])
    close(results[0], results[2])
    assert set(metrics) == {"loss", "square", "grad_norm", "finite"}
    step = make_train_step(squares, optimizer, ema_decay=0.9, accumulation=3)
    with pytest.raises(ValueError, match="accumulation 3 does not divide the batch of 4"):
        step(vector_state(optimizer), None, vector_batch(0))


def test_parts_are_a_loop_on_accelerators_and_copies_on_cpus(monkeypatch):
    def loss_fn(params, teacher_params, batch, step):
        kernel = params["student"]["w"].reshape(1, 1, 1, -1)
        images = jax.lax.conv(batch["image"] + jnp.cos(step), kernel, (1, 1), "SAME")
        loss = jnp.mean(jnp.square(images) + jnp.tanh(images))
        return loss, {"number": step, "minus": -jnp.abs(loss)}

    batch = {"image": np.random.default_rng(0).normal(size=(8, 1, 4, 3)).astype(np.float32)}

    def stepped():
        step = make_train_step(loss_fn, SGD, ema_decay=0.9, accumulation=4)
        state = vector_state(SGD)
        for _ in range(3):
            state, metrics = step(state, None, batch)
        return step, (state, metrics)

    step, copies = stepped()
    traced = step.trace(vector_state(SGD), None, batch)
    for platform, loops in {"cpu": 0, "tpu": 1, "cuda": 1}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.while") == loops
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    step, looped = stepped()
    assert "stablehlo.while" in step.trace(vector_state(SGD), None, batch).lower().as_text()
    close(looped, copies, 1e-6)


def test_each_part_has_its_own_randomness():
    def loss_fn(params, frozen, batch, step):
        return jnp.sum(params["student"]["w"] ** 2), {"index": step, "index2": step**2}

    step = make_train_step(loss_fn, optax.sgd(0.1), ema_decay=0.9, accumulation=2)
    state, first = step(vector_state(optax.sgd(0.1)), None, vector_batch(0))
    _, second = step(state, None, vector_batch(1))
    assert [float(first["index"]), float(first["index2"])] == [0.5, 0.5]  # parts 0 and 1
    assert [float(second["index"]), float(second["index2"])] == [2.5, 6.5]  # parts 2 and 3


# Objectives ------------------------------------------------------------------------------------


@jax.jit
def outputs_at(step):
    """Prediction, features and target of student and teacher, written out once more."""
    t = PROCESS.antithetic_timesteps(random_key(7, "timestep", step), len(IMAGES))
    noise = jax.random.normal(random_key(7, "noise", step), IMAGES.shape)
    x_t = PROCESS.add_noise(IMAGES, t, noise)
    student = small_apply(STUDENT, x_t, t, True, random_key(7, "dropout", step))
    return student, small_apply(TEACHER, x_t, t, True, None), noise


@pytest.mark.parametrize("name", METHODS)
def test_every_method_returns_its_terms_and_trains(name, cheap_random):
    method = METHODS[name]
    objective = small_objective(name, scale=0.5, feature_scale=0.25)
    params = trained(name)
    value_and_grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (loss, metrics), (grads, teacher_grads) = value_and_grad(params, FROZEN, {"image": IMAGES}, 3)
    (student, s_features), (teacher, t_features), noise = outputs_at(3)
    expected = {"diffusion": output_kd_loss(student, noise)}
    total = expected["diffusion"]
    if method.needs_teacher:
        expected["output_kd"] = output_kd_loss(student, teacher)
    if method.output == "output_kd":
        total += 0.5 * expected["output_kd"]
    if method.output in ("lift", "place"):
        terms = (lift_loss if method.output == "lift" else place_loss)(student, teacher)
        total += 0.5 * terms.loss
        expected |= {
            "lift": terms.loss,
            "coarse": terms.coarse,
            "fine": terms.fine,
            "weight": terms.weight,
            "slope": terms.slope.mean(),
            "intercept": terms.intercept.mean(),
            "slope_error": abs(terms.slope - 1).mean(),
            "intercept_error": abs(terms.intercept).mean(),
        }
    if method.feature:
        expected["feature_kd"] = feature_kd_loss(s_features, t_features, adapters=ADAPTERS)
        total += 0.25 * expected["feature_kd"]
    assert set(metrics) == set(expected)
    close(metrics, expected, 1e-4)
    close(loss, total, 1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(teacher_grads))


def test_methods_without_a_teacher_never_call_one(cheap_random):
    objective = make_objective(METHODS["no_kd"], small_apply, PROCESS, 7)
    loss, metrics = objective({"student": STUDENT}, None, {"image": IMAGES}, 0)
    assert set(metrics) == {"diffusion"} and np.isfinite(loss)


def test_a_step_sees_new_noise_and_the_same_again_when_repeated():
    objective = jax.jit(small_objective("no_kd"))
    losses = [
        float(objective({"student": STUDENT}, None, {"image": IMAGES}, step)[0])
        for step in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_weighting_reaches_the_loss(cheap_random):
    step, params = 25, trained("lift") | {"weight_logit": jnp.float32(0.4)}
    (student, _), (teacher, _), _ = outputs_at(step)
    expected = {
        "adaptive": lift_loss(student, teacher).weight,
        "constant": 0.3,
        "cosine": cosine_weight(step, 100, "decrease"),
        "linear": linear_weight(step, 100, "decrease"),
        "learnable": 1 / (1 + math.exp(-0.4)),
    }
    assert set(expected) == set(WEIGHTS)
    assert float(expected["linear"]) == 0.75
    for name, weight in expected.items():
        weighting = Weighting(name, 0.3, "decrease", 100)
        loss, metrics = jax.jit(small_objective("lift", weighting=weighting))(
            params, FROZEN, {"image": IMAGES}, step
        )
        np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-4)
        total = metrics["diffusion"] + metrics["coarse"] + metrics["weight"] * metrics["fine"]
        np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_loss_options_and_layer_map_reach_the_loss(cheap_random):
    (student, s), (teacher, t), _ = outputs_at(0)
    options = dict(group_size=(2, 2), grouping="space", norm="l2", eps=1e-3)
    objective = small_objective("lift_place", loss_options=options)
    _, metrics = jax.jit(objective)(trained("lift_place"), FROZEN, {"image": IMAGES}, 0)
    close(metrics["lift"], place_loss(student, teacher, **options).loss, 1e-4)
    objective = small_objective("feature_kd", layer_map={"hidden": "unheard"})
    with pytest.raises(ValueError, match="teacher has no feature 'unheard'"):
        objective(trained("feature_kd"), FROZEN, {"image": IMAGES}, 0)


def test_student_adapters_and_learnable_weight_are_trained(cheap_random):
    optimizer = optax.adam(0.01)
    objective = small_objective(
        "lift_place_feature_kd", weighting=Weighting("learnable"), feature_scale=1.0
    )
    params = trained("lift_place_feature_kd") | {"weight_logit": jnp.float32(0.0)}
    step = make_train_step(objective, optimizer, ema_decay=0.99)
    state, first, metrics = create_state(params, optimizer), None, None
    for _ in range(30):
        state, metrics = step(state, FROZEN, {"image": IMAGES})
        first = first or metrics
    assert all(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)
    )
    assert metrics["loss"] < first["loss"] and metrics["feature_kd"] < first["feature_kd"]
    # A weight that may choose leaves the term it weighs.
    assert metrics["weight"] < first["weight"] == 0.5
    assert jax.tree.structure(state.ema) == jax.tree.structure(params["student"])


# Devices ---------------------------------------------------------------------------------------

UNET = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    ch=8,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
)
RULES = ((r"conv\d\.kernel", ("fsdp",)), (r"dense.*\.kernel", ("fsdp",)))
# Plain steps show the gradients themselves; Adam makes the small ones as large as the others.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def step_on(shape, student, teacher, images, rules):
    """One PLACE step on a mesh of that shape; networks are (apply, params)."""
    mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    objective = make_objective(
        METHODS["lift_place"], student[0], PROCESS, 0, teacher_apply=teacher[0]
    )
    state = create_state({"student": student[1]}, OPTIMIZER)
    shardings = sharding.tree_shardings(state, rules, mesh)
    state = jax.device_put(state, shardings)
    teacher = jax.device_put(teacher[1], sharding.tree_shardings(teacher[1], rules, mesh))
    frozen = {"teacher": teacher}
    step = make_train_step(objective, OPTIMIZER, ema_decay=0.99, shardings=shardings)
    batch = next(sharding.global_batches([{"image": images}], mesh))
    new, metrics = step(state, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), new, shardings)
    assert all(jax.tree.leaves(placed))
    return new, metrics


def unet(seed):
    graphdef, params = building.create(UNET, seed)
    return make_apply(graphdef), params


DIGITS = np.random.default_rng(5).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)


def test_a_step_split_over_data_and_parameters_equals_one_device():
    one, eight = (
        step_on(shape, unet(0), unet(1), DIGITS, RULES)
        for shape in ({"data": 1}, {"data": 2, "fsdp": 4})
    )
    close(eight, one)
    split = [leaf for leaf in jax.tree.leaves(eight[0]) if not leaf.sharding.is_fully_replicated]
    # Kernels, their moving averages and their momenta; a device holds a quarter of each.
    assert len(split) >= 3 * 8
    assert all(s.data.size * 4 == leaf.size for leaf in split for s in leaf.addressable_shards)


def test_a_step_split_over_data_equals_one_device():
    networks = (small_apply, STUDENT), (small_apply, TEACHER)
    one, eight = (step_on({"data": n}, *networks, IMAGES, ()) for n in (1, 8))
    close(eight, one)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight[0]))


def test_mesh_sizes():
    assert dict(sharding.make_mesh({"data": -1, "fsdp": 2}).shape) == {"data": 4, "fsdp": 2}
    assert dict(sharding.make_mesh({"data": 2}, jax.devices()[:2]).shape) == {"data": 2, "fsdp": 1}
    with pytest.raises(ValueError, match=r"data=3 x fsdp=1 does not fit 8 devices"):
        sharding.make_mesh({"data": 3})
    with pytest.raises(ValueError, match="data=-1 x fsdp=3 does not fit 8"):
        sharding.make_mesh({"data": -1, "fsdp": 3})
    with pytest.raises(ValueError, match=r"data=-1 x fsdp=-1 does not fit"):
        sharding.make_mesh({"data": -1, "fsdp": -1})
    with pytest.raises(ValueError, match=r"unknown axes \['model'\]; the axes are \['data'"):
        sharding.make_mesh({"model": 2})


def test_sharding_rules_match_names_and_leave_what_does_not_divide():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    tree = {
        "a": {"kernel": np.zeros((3, 8)), "bias": np.zeros(8)},
        "b": {"kernel": np.zeros((4, 6))},
    }
    rules = (
        (r"^a\.kernel", ("fsdp",)), (r"kernel", ("fsdp", None)), (r"bias", (None, None, "data")),
    )  # fmt: skip
    specs = jax.tree.map(lambda s: s.spec, sharding.tree_shardings(tree, rules, mesh))
    assert specs["a"]["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["b"]["kernel"] == PartitionSpec("fsdp", None)
    assert specs["a"]["bias"] == PartitionSpec("data")
    # 3 rows and 6 columns are not four equal parts.
    tree = {"kernel": np.zeros((3, 6))}
    odd = sharding.tree_shardings(tree, [("kernel", ("fsdp", "fsdp"))], mesh)
    assert odd["kernel"].spec == PartitionSpec(None, None)


@pytest.mark.parametrize("rules, said", [
    ([("kernal", ("fsdp",))], "0] ('kernal', ('fsdp',)) splits nothing: it is found in no name"),
    ([("kernel", ("fsdp",)), ("in.kernel", ("fsdp",))], "1] .* rules before it decide all"),
    ([("kernel", ("data",))], "0] .* the mesh has one device along ['data']"),
    ([("scale", ("fsdp",)), ("out.kernel", ("fsdp",))], "0] .* {'fsdp': 4}, divide no .* 1 arrays"),
    ([("kernel", ("fsdp",)), ("scale", ())], None),
    ([], None),
])  # fmt: skip
def test_sharding_rules_that_split_nothing_are_said(rules, said):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4}, jax.devices()[:4])
    shapes = {"in": {"kernel": (8, 3)}, "out": {"kernel": (3, 8), "scale": (3,)}}
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    lines = list(sharding.idle_rules(tree, rules, mesh))
    assert len(lines) == (said is not None)
    for line in lines:
        pattern = re.escape(f"config.sharding_rules[{said}").replace(re.escape(".*"), ".*")
        assert re.match(pattern, line), line


# Checkpoints -----------------------------------------------------------------------------------


def wide_state():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "inner": jax.random.normal(keys[0], (2, 16)) / 4,
        "outer": jax.random.normal(keys[1], (16, 2)) / 4,
    }
    return create_state({"student": params}, OPTIMIZER)


def continued(state, mesh, shardings, steps):
    """`steps` more steps on a mesh."""

    def loss_fn(params, frozen, batch, step):
        images = batch["image"]
        noise = jnp.sin(step + jnp.arange(images.shape[0]))[:, None, None, None]
        outputs, _ = small_apply(params["student"], images + noise, images[:, 0, 0, 0], False, None)
        return jnp.mean(jnp.square(outputs - images)), {}

    step = make_train_step(loss_fn, OPTIMIZER, ema_decay=0.9, shardings=shardings)
    for batch in sharding.global_batches([{"image": IMAGES}] * steps, mesh):
        state, metrics = step(state, None, batch)
    return state, metrics


def test_a_checkpoint_of_eight_devices_goes_on_on_two_and_on_one(tmp_path):
    rules = (("inner", ("fsdp",)), ("outer", ("fsdp", None)))

    def placed(shape, devices):
        mesh = sharding.make_mesh(shape, jax.devices()[:devices])
        return mesh, sharding.tree_shardings(wide_state(), rules, mesh)

    mesh, shardings = placed({"data": 2, "fsdp": 4}, 8)
    state, _ = continued(jax.device_put(wide_state(), shardings), mesh, shardings, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state)
    saved = jax.device_get(state)
    expected = jax.device_get(continued(state, mesh, shardings, 3))

    abstract = jax.eval_shape(wide_state)
    for shape, devices in (({"fsdp": 2}, 2), ({"data": 2}, 2), ({}, 1)):
        mesh, shardings = placed(shape, devices)
        restored = checkpoints.restore(abstract, shardings)
        equal(restored, saved)
        kernel = restored.params["student"]["inner"]
        assert kernel.sharding == shardings.params["student"]["inner"]
        assert len(kernel.sharding.device_set) == devices
        close(continued(restored, mesh, shardings, 3), expected)
    restored = checkpoints.restore(abstract)
    equal(restored, saved)
    assert restored.step.devices() == {jax.devices()[0]}
    checkpoints.close()


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = create_state({"student": {"w": jnp.ones(3)}}, optax.sgd(0.1))
    Checkpoints("run/checkpoints").save(3, state)
    restored = Checkpoints("run/checkpoints").restore(state)
    np.testing.assert_array_equal(restored.ema["w"], np.ones(3))
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("has_sums", [True, False])
def test_checkpoints_of_versions_whose_parameters_were_an_nnx_state_go_on(tmp_path, has_sums):
    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(n)) for n in range(11)])

    graphdef, params = building.split(Model())
    older = create_state({"student": nnx.state(nnx.merge(graphdef, params))}, OPTIMIZER)
    state = create_state({"student": params}, OPTIMIZER)
    assert "value" in jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(older)[1][0])
    Checkpoints(tmp_path).save(4, older)
    path = tmp_path / "4" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    assert "params.student.blocks.10.kernel.value" in content["custom_metadata"]["position_sums"]
    if not has_sums:
        path.write_text(json.dumps(content | {"custom_metadata": {}}))
    for shardings in (None, sharding.tree_shardings(state, (), sharding.make_mesh({"data": -1}))):
        restored = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state), shardings)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        equal(restored, state)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(ValueError, match=re.escape(f"no checkpoint in {tmp_path}")):
        checkpoints.restore(wide_state())
    for step in (3, 5, 5, 9):
        checkpoints.save(step, wide_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
    assert checkpoints.latest_step() == 9
    checkpoints.close()
    assert Checkpoints(tmp_path).latest_step() == 9


def damage_truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            os.truncate(path, path.stat().st_size // 2)


def damage_remove(folder):
    for path in (folder / "default").iterdir():
        if path.is_dir():
            for inner in path.rglob("*"):
                if inner.is_file():
                    inner.unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, wide_state())
    damage(tmp_path / "4")
    with pytest.raises(ValueError, match=f"step 4 in {tmp_path} cannot be restored") as error:
        checkpoints.restore(jax.eval_shape(wide_state))
    assert "Delete that checkpoint" in str(error.value)


def test_checkpoints_of_another_network_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, wide_state())
    other = jax.eval_shape(lambda: create_state({"student": STUDENT}, OPTIMIZER))
    with pytest.raises(ValueError, match=f"step 4 in {tmp_path} cannot be restored"):
        checkpoints.restore(other)


def test_a_checkpoint_without_its_checksums_is_refused_or_that_is_said(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, wide_state())
    path, abstract = tmp_path / "4" / "_CHECKPOINT_METADATA", jax.eval_shape(wide_state)
    content = json.loads(path.read_text())
    equal(checkpoints.restore(abstract), wide_state())
    assert capsys.readouterr().err == ""
    # A version that wrote none.
    path.write_text(json.dumps(content | {"custom_metadata": {}}))
    equal(Checkpoints(tmp_path).restore(abstract), wide_state())
    assert f"{tmp_path}/4: a checkpoint without checksums" in capsys.readouterr().err
    sums = content["custom_metadata"]["position_sums"]
    fewer = {"position_sums": dict(list(sums.items())[1:])}
    for damaged, said in {
        "": "",
        "[]": "",
        json.dumps(content)[:-9]: "",
        json.dumps(content | {"custom_metadata": fewer}): f"not what was saved: {next(iter(sums))}",
        None: "its _CHECKPOINT_METADATA, with the checksums, is missing",
    }.items():
        path.unlink() if damaged is None else path.write_text(damaged)
        message = f"(step 4|a checkpoint) in {tmp_path} cannot be .*: {said}"
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path).restore(abstract)


def unfinished(folder, step):
    """As orbax leaves it, or as another process has it right now."""
    made = folder / f"{step}.orbax-checkpoint-tmp"
    (made / "default").mkdir(parents=True)
    return made


def test_a_checkpoint_that_another_process_is_writing_is_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, wide_state())
    others = [unfinished(tmp_path, step) for step in (6, 9)]
    Checkpoints(tmp_path).restore(jax.eval_shape(wide_state))  # someone looks
    with pytest.raises(OSError, match="step 6 in .* is being written by another process"):
        checkpoints.save(6, wide_state())
    assert all((path / "default").is_dir() for path in others)


def test_what_a_killed_process_left_is_named_and_goes_with_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, wide_state())
    unfinished(tmp_path, 6)
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.unfinished == ["6.orbax-checkpoint-tmp"] and checkpoints.latest_step() == 4
    checkpoints.save(6, wide_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6", "notes.txt"]


# The loop --------------------------------------------------------------------------------------

SGD = optax.adam(0.1)


def looped(folder, total_steps=9, batches=vector_batches, **options):
    """A run of the loop over `squares`."""
    step = make_train_step(squares, SGD, ema_decay=0.9)
    options = dict(log_every=2, checkpoint_every=3) | options
    return train(
        step,
        vector_state(SGD),
        None,
        batches,
        total_steps=total_steps,
        folder=folder,
        title="test",
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def at_step_four(step, state):
        if step == 4:
            os.kill(os.getpid(), number)
        return {"extra": step / 2}

    with pytest.raises(Interrupted, match=f"test: {number.name} at step 4"):
        looped(tmp_path / "a", on_log=at_step_four)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert Checkpoints(tmp_path / "a" / "checkpoints").latest_step() == 4
    resumed = looped(tmp_path / "a", on_log=lambda step, state: {"extra": step / 2})
    whole = looped(tmp_path / "b", on_log=lambda step, state: {"extra": step / 2})
    equal(resumed, whole)
    rows = [read_metrics(tmp_path / name) for name in "ab"]
    assert [row["step"] for row in rows[0]] == [1, 2, 4, 6, 8, 9]
    for a, b in zip(*rows, strict=True):
        for name in ("step", "loss", "square", "grad_norm", "extra"):
            assert a[name] == b[name]
        assert a["seconds"] > 0 and a["steps_per_second"] > 0
    # Done already: nothing is trained.
    equal(looped(tmp_path / "a", batches=lambda first: (_ for _ in ())), whole)


def test_a_signal_at_the_last_step_still_stops_the_job(tmp_path):
    def at_the_end(step, state):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted, match="SIGTERM at step 9"):
        looped(tmp_path / "a", on_log=at_the_end)
    equal(looped(tmp_path / "a"), looped(tmp_path / "b"))


@pytest.mark.parametrize("log_every", [1, 100])
def test_non_finite_losses_are_named_and_never_saved(tmp_path, log_every):
    def batches(first):
        for batch in vector_batches(first):
            yield {"image": np.full_like(batch["image"], np.nan) if first == 5 else batch["image"]}
            first += 1

    with pytest.raises(NonFiniteLossError, match="step 6: .*loss=nan.*square=nan") as error:
        looped(tmp_path, batches=batches, log_every=log_every)
    assert "last checkpoint is from before" in str(error.value)
    assert Checkpoints(tmp_path / "checkpoints").latest_step() == 3
    assert max(row["step"] for row in read_metrics(tmp_path)) <= 5
    # Better data, same command: it goes on.
    assert int(looped(tmp_path).step) == 9


def test_one_flag_is_fetched_each_step_and_all_metrics_where_they_are_logged(tmp_path, monkeypatch):
    fetched = []
    real = jax.device_get

    def device_get(tree):
        if isinstance(tree, dict):
            fetched.append(sorted(tree))
        elif isinstance(tree, jax.Array) and tree.dtype == bool and tree.ndim == 0:
            fetched.append("flag")
        return real(tree)

    monkeypatch.setattr("liftplace_jax.training.loop.jax.device_get", device_get)
    looped(tmp_path, log_every=4, checkpoint_every=100)
    terms = ["grad_norm", "loss", "square"]
    assert fetched == [terms, "flag", "flag", terms, "flag", "flag", "flag", terms, terms]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4, 8, 9]


def test_a_step_that_is_not_finite_is_named_though_what_follows_fails_too(tmp_path):
    def nan_then_damaged(first):
        yield vector_batch(first)
        yield {"image": np.full((4, 3), np.nan, np.float32)}
        raise ValueError("example 3")

    with pytest.raises(NonFiniteLossError, match="step 2: .*loss=nan"):
        looped(tmp_path / "a", batches=nan_then_damaged)

    def on_log(step, state):
        if step == 2:
            raise ValueError("features are not finite")
        return {}

    with pytest.raises(NonFiniteLossError, match="step 2: .*loss=nan"):
        looped(tmp_path / "b", batches=nan_then_damaged, on_log=on_log)


def test_a_failing_batch_ends_the_loop_with_its_error(tmp_path):
    def batches(first):
        yield vector_batch(first)
        raise ValueError("data set x, example 3: image has non-finite values")

    with pytest.raises(ValueError, match="example 3"):
        looped(tmp_path, batches=batches)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_the_teacher_is_not_in_the_checkpoint(tmp_path):
    teacher = {"inner": jnp.ones((2, 37)), "outer": jnp.ones((37, 2))}
    train(
        make_train_step(small_objective("output_kd"), SGD, ema_decay=0.9),
        create_state({"student": STUDENT}, SGD),
        {"teacher": teacher},
        lambda first: ({"image": IMAGES} for _ in range(9)),
        total_steps=1,
        folder=tmp_path,
        title="test",
    )
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(tmp_path / "checkpoints" / "1" / "default")
    assert set(saved) == {"step", "params", "ema", "opt_state"}
    assert set(saved["params"]) == {"student"}
    assert not any(37 in leaf.shape for leaf in jax.tree.leaves(saved))


# Metrics ---------------------------------------------------------------------------------------


def test_lines_after_the_checkpoint_and_cut_off_lines_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, {"loss": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    before = read_metrics(tmp_path)[1]["seconds"]
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    log.write(3, {"loss": 30.0})
    log.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 30)]
    assert rows[2]["seconds"] > before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "nothing") == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    looped(tmp_path, total_steps=4, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    rows = read_metrics(tmp_path)
    losses = events.Tensors("loss")
    values = [np.frombuffer(e.tensor_proto.tensor_content, np.float32) for e in losses]
    assert [event.step for event in losses] == [row["step"] for row in rows] == [1, 2, 4]
    np.testing.assert_allclose(np.ravel(values), [row["loss"] for row in rows], rtol=1e-6)


def steps_in_tensorboard(folder, plugin=False):
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    module = plugin_event_accumulator if plugin else event_accumulator
    events = module.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    values = [np.frombuffer(e.tensor_proto.tensor_content, np.float32) for e in events.Tensors("a")]
    return [(e.step, v.item()) for e, v in zip(events.Tensors("a"), values, strict=True)]


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    def session(start, last, value):
        log = MetricsLog(tmp_path, start, tensorboard=True)
        for step in range(start + 1, last + 1):
            log.write(step, {"a": value})
        log.flush()  # and then nothing more, as after SIGKILL

    session(0, 5, 1.0)
    session(3, 7, 2.0)
    session(3, 4, 3.0)  # at once, within the same second
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 3
    assert steps_in_tensorboard(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0)]
    session(0, 1, 4.0)  # its checkpoints were deleted
    assert steps_in_tensorboard(tmp_path) == [(1, 4.0)]
    assert not list(tmp_path.glob(".events*"))


def test_a_tensorboard_that_is_running_forgets_later_steps_too(tmp_path, monkeypatch):
    monkeypatch.setattr("liftplace_jax.training.event_files.forget_later", lambda *_: None)
    for start, value in ((0, 1.0), (2, 2.0)):
        log = MetricsLog(tmp_path, start, tensorboard=True)
        log.write(start + 1, {"a": value}), log.write(start + 2, {"a": value}), log.flush()
    log.write(7, {"a": 3.0}), log.flush()
    MetricsLog(tmp_path, 3, tensorboard=True).flush()
    expected = [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert steps_in_tensorboard(tmp_path, plugin=True) == expected


def test_event_files_of_others_stay_and_cut_off_ones_are_read(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2):
        log.write(step, {"a": float(step)})
    log.close()
    path = next(tmp_path.glob("events*"))
    path.write_bytes(path.read_bytes()[:-3])
    others = {
        "events.out.tfevents.1.x": b"",
        "events.out.tfevents.2.x": b"\xff" * 3000,
        "events.out.tfevents.3.x": (8).to_bytes(8, "little") + b"\xff" * 100,
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "events.out.tfevents.4.x").mkdir()
    MetricsLog(tmp_path, 1, tensorboard=True).close()
    for name, content in others.items():
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()
    (tmp_path / "events.out.tfevents.4.x").rmdir()
    assert steps_in_tensorboard(tmp_path) == [(1, 1.0)]


def test_a_full_disk_under_tensorboards_file_is_named(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log._board._file.close()
    log._board._file = log._board._records._writer = open("/dev/full", "wb")  # noqa: SIM115
    log.write(1, {"a": 1.0})
    with pytest.raises(OSError, match=r"No space left.*events\.out\.tfevents"):
        log.flush()
    log.close()
    assert "No space left" in capsys.readouterr().err


def test_metrics_are_written_without_tensorflow(tmp_path):
    code = (
        "import sys; from liftplace_jax.training.metrics_io import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], 0, tensorboard=True)\n"
        "log.write(1, {'a': 0.5}); log.flush(); log.close()\n"
        "heavy = {'tensorflow', 'torch', 'grpc', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert steps_in_tensorboard(tmp_path) == [(1, 0.5)]
