"""Frozen networks: in the dtype that they compute in, with the numbers of a cast at each step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from liftplace_jax import weights
from liftplace_jax.diffusion import make_process
from liftplace_jax.experiment import training
from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.loading import load_network
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.nn import building, frozen
from liftplace_jax.nn.network import make_apply
from liftplace_jax.training.objective import METHODS, Task, make_objective

UNET = UNetConfig(
    image_size=8,
    in_channels=2,
    out_channels=2,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    num_groups=4,
)
DIT = DiTConfig(
    image_size=8,
    in_channels=2,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    learn_sigma=False,
    class_dropout=0.0,
)


def random_params(config):
    _, params = building.abstract(config)
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype("f4"), params)


def nbytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_a_teacher_in_bfloat16_takes_half_the_bytes_and_gives_the_same_loss(config, tmp_path):
    weights.save_model(tmp_path, config.described(), random_params(config))
    whole, half = (
        load_network(tmp_path, "bfloat16", is_frozen=is_frozen) for is_frozen in (False, True)
    )
    assert nbytes(half.params) * 2 == nbytes(whole.params)
    assert half.graphdef == whole.graphdef
    student = building.create(config, 1, jnp.bfloat16)
    objective = make_objective(
        METHODS["lift_place_feature_kd"],
        make_apply(student[0]),
        make_process(default_config().process),
        0,
        teacher_apply=make_apply(half.graphdef),
        task=Task(conditioning=config.conditioning),
    )
    batch = {"image": np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("f4")}
    batch["label"] = np.array([0, 1, 2, 0])
    loss = jax.jit(objective)
    first, second = (
        loss({"student": student[1]}, {"teacher": x.params}, batch, 0) for x in (whole, half)
    )
    assert first[1]["output_kd"] > 0.1 and first[1]["feature_kd"] > 0.1
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_in_float32_nothing_changes(config, tmp_path):
    params = random_params(config)
    weights.save_model(tmp_path, config.described(), params)
    found = load_network(tmp_path, is_frozen=True).params
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_only_what_is_cast_wherever_it_is_used_is_kept_in_that_dtype():
    half = jnp.bfloat16

    @jax.jit
    def inside(x, y):
        return x.astype(half) * 2, y * 2

    def program(params, x):
        first = params["cast"].astype(half) * x + jnp.exp(params["twice"].astype(half))
        second = inside(params["inside"], params["used"])
        returned = params["returned"].astype(half)
        looped = jax.lax.map(lambda row: row.astype(half), params["looped"])
        return first, jnp.sum(params["twice"]), second, returned, params["returned"], looped

    names = ("cast", "twice", "inside", "used", "returned", "looped", "unused")
    params = {name: jnp.ones((2, 3)) for name in names}
    kept = frozen.kept(program, params, jnp.ones((2, 3), half))
    assert {name for name in names if kept[name].dtype == half} == {"cast", "inside"}
    assert all(leaf.shape == (2, 3) for leaf in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distillation_has_its_teacher_in_the_dtype_of_the_config(dtype, tmp_path, monkeypatch):
    config = tiny_config.get_config()
    config.distill.dtype = dtype
    context = open_experiment(config, tmp_path)
    for folder in (context.teacher_folder, context.pruned_folder):
        weights.save_model(folder, context.model.described(), random_params(context.model))
    seen = []

    def run_training(context, fields, objective, params, frozen, *_):
        seen.append((params["student"], frozen["teacher"]))

    monkeypatch.setattr(training, "run_training", run_training)
    monkeypatch.setattr(training, "save_trained", lambda *_: None)
    training.distill(context)
    ((student, teacher),) = seen
    assert {leaf.dtype.name for leaf in jax.tree.leaves(student)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher)} == {dtype}
