"""What crosses devices in a compiled train step: gradients, split parameters, and nothing else."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.families import registry
from liftplace_jax.families.unet.channels import pruned_config
from liftplace_jax.host import sharding
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network
from liftplace_jax.suites.communication import collectives, sorted_shapes, total_bytes
from liftplace_jax.training.distillation import student_objective
from liftplace_jax.training.prepare import prepare

BATCH, SIDE, DEVICES = 40, 6, 8  # neither the batch nor a device's part is a parameter's size
RULES = ((r"kernel", ("fsdp",)),)
UNET = dict(
    model="unet",
    image_size=SIDE,
    in_channels=3,
    out_channels=3,
    ch=16,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
    dropout=0.1,
)
DIT = dict(model="dit", image_size=SIDE, hidden_size=16, depth=2, num_heads=2, num_classes=10)


def zeros(config):
    graphdef, abstract = building.abstract(config)
    return Network(config, graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract))


class Step:
    """A compiled LIFT + PLACE step of a family on a mesh, and the shapes in it."""

    def __init__(self, fields, fsdp):
        config = default_config()
        config.model = ConfigDict(fields)
        config.distill.batch_size = BATCH
        model = registry.config_from_dict(fields, partial=True)
        if fields["model"] == "unet":
            small = pruned_config(model, 0.5)
        else:
            small = model.replace(depth=1)
            config.process.update(variance="learned_range", timesteps="uniform", reduction="mean")
            config.distill.loss.variant = "dit"
        teacher, student = map(zeros, (model, small))
        process = GaussianDiffusion(beta_schedule("linear", 20), "epsilon", config.process.variance)
        objective, params = student_objective(config, process, "lift_place", 0, student, teacher)
        mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp})
        rules = RULES if fsdp > 1 else ()
        run = prepare(config.distill, objective, params, {"teacher": teacher.params}, mesh, rules)
        self.trained, self.teacher = (
            [(leaf.shape, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)]
            for tree in (run.state.params, run.frozen)
        )
        images = np.zeros((BATCH, SIDE, SIDE, model.in_channels), np.float32)
        batch = next(
            iter(
                sharding.global_batches(
                    [{"image": images, "label": np.zeros(BATCH, np.int32)}], mesh
                )
            )
        )
        self.compiled = run.step.lower(run.state, run.frozen, batch).compile()
        self.sent = collectives(self.compiled)
        self.local_rows = (BATCH // DEVICES, model.in_channels, SIDE**2)


@pytest.fixture(scope="module")
def step():
    return functools.cache(lambda family, fsdp: Step({"unet": UNET, "dit": DIT}[family], fsdp))


def elements(shapes):
    return Counter(math.prod(shape) for shape in shapes)


FAMILIES = pytest.mark.parametrize("family", ["unet", "dit"])
# How the parameters are split: not at all, among 4 of the 8 devices, among all.
CASES = pytest.mark.parametrize("family, fsdp", [("unet", 1), ("dit", 1), ("unet", 4), ("dit", 8)])


@FAMILIES
def test_devices_that_split_the_batch_add_gradients_and_scalars(step, family):
    found = step(family, 1)
    assert {s.kind for s in found.sent} == {"all-reduce"}
    gradients = [s.shape for s in found.sent if math.prod(s.shape) > 1]
    parameters = [shape for shape, _ in found.trained]
    # Layers whose outputs are added have the same gradient of the bias: it is sent once. The
    # positions of tokens are not trained.
    assert elements(gradients) <= elements(parameters)
    nbytes = 4 * sum(map(math.prod, parameters))
    assert 0.95 * nbytes < total_bytes(found.sent) < nbytes + 200
    # In few messages, not one for each parameter: the program waits once, or twice.
    assert found.compiled.as_text().count(" all-reduce(") <= 3


@pytest.mark.parametrize("family, fsdp", [("unet", 4), ("dit", 8)])
def test_split_parameters_are_gathered_and_their_gradients_scattered(step, family, fsdp):
    """XLA writes a scattering sum as all-reduce and slice here, elsewhere as reduce-scatter."""
    found = step(family, fsdp)
    assert {s.kind for s in found.sent} <= {"all-reduce", "all-gather", "reduce-scatter"}
    split = [whole for whole, part in found.trained + found.teacher if whole != part]
    gathered = [s.shape for s in found.sent if s.kind == "all-gather"]
    assert len(split) > 10 and elements(gathered) == elements(split)
    # Two stages: sums of whole gradients among those that share them, then of parts.
    wholes = elements(whole for whole, _ in found.trained)
    parts = elements(part for whole, part in found.trained if whole != part)
    reduced = elements(s.shape for s in found.sent if s.kind != "all-gather")
    del reduced[1]  # scalars
    assert reduced <= wholes + parts


@CASES
def test_no_image_and_no_activation_crosses_devices(step, family, fsdp):
    sizes = {size for s in step(family, fsdp).sent for size in s.shape}
    assert not sizes & {BATCH, BATCH // DEVICES, BATCH // DEVICES * 4}


@CASES
def test_place_sorts_on_each_device(step, family, fsdp):
    """Every device sorts its own samples, channel by channel."""
    found = step(family, fsdp)
    assert found.local_rows in sorted_shapes(found.compiled)
    assert all(shape[0] <= found.local_rows[0] for shape in sorted_shapes(found.compiled))


def test_what_crosses_is_seen():
    mesh = sharding.make_mesh({"data": -1})
    x = jax.ShapeDtypeStruct((BATCH, 7), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    sent = collectives(jax.jit(lambda x: (jnp.sort(x, axis=0), x.sum())).lower(x).compile())
    assert any(BATCH in s.shape or BATCH // DEVICES in s.shape for s in sent)
    assert {s.kind for s in sent} > {"all-reduce"}
    assert total_bytes(sent) >= 2 * BATCH * 7 / DEVICES
