"""Parameters that devices share are gathered block by block, where networks are stacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from liftplace_jax.conditioning import Encoding
from liftplace_jax.diffusion import make_process
from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.families.registry import config_from_dict, family_named
from liftplace_jax.host import sharding
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network
from liftplace_jax.suites.communication import collectives, executed, total_bytes
from liftplace_jax.training.distillation import student_objective
from liftplace_jax.training.prepare import prepare

BATCH, SIDE, TOKENS = 40, 6, 7  # neither the batch nor a device's part is a parameter's size
MMDIT = dict(
    model="mmdit",
    image_size=SIDE,
    depth=6,
    num_heads=4,
    head_size=16,
    in_channels=3,
    context_dim=12,
    pooled_dim=14,
    position_size=3,
    context_tokens=TOKENS,
    qk_norm="rms_norm",
)
DIT = dict(model="dit", image_size=SIDE, hidden_size=64, depth=4, num_heads=4, num_classes=10)


def _as_they_are(params, columns):
    return columns


TEXTS = Encoding(
    (("context", (TOKENS, 12), "float32"), ("pooled", (14,), "float32")),
    _as_they_are,
    TOKENS,
    12,
    14,
)


def random_network(config, remat, scan_blocks):
    graphdef, params = building.create(config, 0, jnp.float32, remat, None, scan_blocks)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    return Network(config, graphdef, params)


class Step:
    """A compiled step of LIFT + PLACE with features, all kernels split among eight devices."""

    def __init__(self, family, by_block, scan_blocks, remat, fields):
        config = default_config(family)
        family_named(family).preset(config)
        config.distill.batch_size, config.distill.loss.group_size = BATCH, 4
        config.model = ConfigDict(fields)
        model = config_from_dict(fields, partial=True)
        small = model.replace(
            depth=model.depth // 2, **({"dual_attention_layers": ()} if family == "mmdit" else {})
        )
        teacher, student = (random_network(c, remat, scan_blocks) for c in (model, small))
        frozen, conditioning = {"teacher": teacher.params}, None
        rng = np.random.default_rng(1)
        batch = {"image": rng.normal(size=(BATCH, SIDE, SIDE, model.in_channels))}
        if family == "mmdit":
            conditioning = model.conditioning.bound(lambda pooled: TEXTS)
            batch |= {
                "context": rng.normal(size=(BATCH, TOKENS, 12)),
                "pooled": rng.normal(size=(BATCH, 14)),
            }
            null = {"context": np.zeros((TOKENS, 12), np.float32), "pooled": np.zeros(14)}
            frozen["text"] = {"null": null}
        batch = {name: value.astype(np.float32) for name, value in batch.items()}
        batch["label"] = np.zeros(BATCH, np.int32)
        objective, params = student_objective(
            config,
            make_process(config.process),
            "lift_place_feature_kd",
            0,
            student,
            teacher,
            conditioning or model.conditioning,
        )
        mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
        run = prepare(
            config.distill,
            objective,
            params,
            frozen,
            mesh,
            ((r"kernel", ("fsdp",)),),
            stack=model.STACK if by_block else None,
        )
        placed = next(iter(sharding.global_batches([batch], mesh)))
        self.compiled = run.step.lower(run.state, run.frozen, placed).compile()
        self.sent = collectives(self.compiled)
        self.sizes = {
            use: sum(x.nbytes for x in jax.tree.leaves(tree) if not x.is_fully_replicated)
            for use, tree in (("student", run.state.params), ("teacher", run.frozen["teacher"]))
        }
        self.state, self.metrics = jax.device_get(self.compiled(run.state, run.frozen, placed))


@pytest.fixture(scope="module")
def step():
    @functools.cache
    def made(family, by_block, scan_blocks=False, remat=None, **changes):
        fields = {"mmdit": MMDIT, "dit": DIT}[family] | changes
        return Step(family, by_block, scan_blocks, remat, fields)

    return made


CASES = pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mmdit", {"scan_blocks": True, "remat": "nothing_saveable"}),
        ("mmdit", {"depth": 3, "dual_attention_layers": (0, 1)}),
        # Each block with embedders of its own, which are used outside of what is computed again.
        ("dit", {"depth": 2, "embedders": "per_block"}),
        ("dit", {"scan_blocks": True, "remat": "nothing_saveable"}),
    ],
)


@CASES
def test_the_numbers_are_those_of_parameters_gathered_together(step, family, options):
    found, expected = (step(family, by_block, **options) for by_block in (True, False))
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(
        jax.tree.leaves(found.state.opt_state),
        jax.tree.leaves(expected.state.opt_state),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@CASES
def test_no_activation_crosses_devices(step, family, options):
    found = step(family, True, **options)
    assert {s.kind for s in found.sent} <= {"all-reduce", "all-gather", "reduce-scatter"}
    sizes = {size for s in found.sent for size in s.shape}
    assert not sizes & {BATCH, BATCH // 8}


@pytest.mark.parametrize("family", ["mmdit", "dit"])
def test_a_device_holds_one_block_whole(step, family):
    options = {"scan_blocks": True, "remat": "nothing_saveable"}
    found, whole = (step(family, by_block, **options) for by_block in (True, False))
    everything = sum(found.sizes.values())
    held, held_whole = (s.compiled.memory_analysis().temp_size_in_bytes for s in (found, whole))
    assert held_whole > everything and held < 0.7 * held_whole
    # Those of the student once more, for the gradient; of every pass through the loops.
    gathered = total_bytes(executed(found.compiled), lambda s: s.kind == "all-gather")
    expected = everything + found.sizes["student"]
    assert 0.9 * expected < gathered < 1.1 * expected
    assert gathered > 1.5 * total_bytes(found.sent, lambda s: s.kind == "all-gather")
    reduced = total_bytes(executed(found.compiled), lambda s: s.kind != "all-gather")
    assert 0.9 * found.sizes["student"] < reduced < 1.3 * found.sizes["student"]
