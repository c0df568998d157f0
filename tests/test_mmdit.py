"""The MMDiT against diffusers' arrays and the library live; its sizes; students by depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import nhwc
from diffusers import SD3Transformer2DModel
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax.compress import DepthPruner, depth, learned_depth
from liftplace_jax.families.loading import load_checkpoint, read_diffusers, write_diffusers
from liftplace_jax.families.mmdit import PUBLISHED_MMDITS, MMDiTConfig, cost
from liftplace_jax.families.mmdit.diffusers import FORMAT, POSITIONS
from liftplace_jax.nn import building
from liftplace_jax.nn.network import from_tensors, make_apply
from liftplace_jax.weights import WeightMismatchError, to_torch
from liftplace_jax.weights.diffusers import DiffusersError

NAMES = ("peer_sd3", "peer_sd35_dual")
TINY = MMDiTConfig(
    4,
    5,
    2,
    head_size=8,
    in_channels=3,
    context_dim=12,
    pooled_dim=10,
    position_size=4,
    qk_norm="rms_norm",
    dual_attention_layers=(0, 1, 3),
    context_tokens=5,
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
T = np.array([3.0, 712.5], np.float32)
TEXT = {
    "context": RNG.normal(size=(2, 5, 12)).astype(np.float32),
    "pooled": RNG.normal(size=(2, 10)).astype(np.float32),
}


@functools.partial(jax.jit, static_argnums=0, static_argnames="return_features")
def apply(graphdef, params, x, t, cond, **options):
    return nnx.merge(graphdef, params)(x, t, cond, **options)


@functools.cache
def tiny(config=TINY, dtype="float32", remat=None):
    """A tiny model with random parameters: a new one predicts zero."""
    graphdef, params = building.create(config, dtype=jnp.dtype(dtype), remat=remat)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    drawn = [0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return graphdef, jax.tree.unflatten(treedef, drawn)


def tensors_of(arrays):
    return {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}


# diffusers' arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_blocks_of_an_oblong_input(golden, name):
    arrays, meta = golden(name)
    config = FORMAT.config_from(meta["config"])
    network = from_tensors(*FORMAT.tensors_from(config, tensors_of(arrays)))
    cond = {
        "context": arrays["in/encoder_hidden_states"],
        "pooled": arrays["in/pooled_projections"],
    }
    x, t = nhwc(arrays["in/hidden_states"]), arrays["in/timestep"]
    assert x.shape[1] != x.shape[2]
    y, features = apply(network.graphdef, network.params, x, t, cond, return_features=True)
    np.testing.assert_allclose(y, nhwc(arrays["out/sample"]), atol=5e-5)
    assert list(features) == [f"transformer_blocks.{i}" for i in range(config.depth)]
    for feature, found in features.items():
        np.testing.assert_allclose(found, arrays[f"out/block/{feature}/hidden"], atol=5e-5)
    embedded = nnx.merge(network.graphdef, network.params).embed(x)
    np.testing.assert_allclose(embedded, arrays["out/block/pos_embed"], atol=5e-5)
    assert cost.parameters(config) == building.count_parameters(network.params)
    table = arrays["param/pos_embed.pos_embed"].size
    assert cost.parameters(config) - table == meta["num_params"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd3-medium", (2_028_328_000, 56_623_104, (918, 136), (3_006, 1_446))),
        ("sd3.5-medium", (2_243_171_520, 226_492_416, (1_044, 178), (3_509, 2_116))),
        ("sd3.5-large", (8_056_627_520, 89_653_248, (3_649, 340), (11_935, 3_626))),
    ],
)
def test_published_sizes(name, expected):
    config = PUBLISHED_MMDITS[name]
    table = config.position_size**2 * config.hidden_size
    found = [cost.parameters(config) - table, table]
    for size in (64, 128):
        at_size = config.replace(image_size=size)
        products = cost.attention_macs(at_size)
        found.append(tuple(round(n / 1e9) for n in (cost.macs(at_size) - products, products)))
    assert tuple(found) == expected
    if name == "sd3-medium":  # from the shapes of the network itself, too
        _, params = building.abstract(config)
        assert building.count_parameters(params) == sum(expected[:2])


@pytest.mark.parametrize(
    ("name", "kept", "parameters"),
    [
        ("sd3-medium", 18, 1_518.4),
        ("sd3-medium", 12, 1_008.6),
        ("sd3-medium", 8, 668.6),
        ("sd3-medium", 6, 498.7),
        ("sd3.5-medium", 18, 1_683.7),
        ("sd3.5-medium", 12, 1_124.2),
        ("sd3.5-medium", 8, 751.3),
        ("sd3.5-medium", 6, 564.8),
    ],
)
def test_sizes_of_students(name, kept, parameters):
    teacher = PUBLISHED_MMDITS[name]
    duals = {18: 10, 12: 7, 8: 5, 6: 4}[kept] if teacher.dual_attention_layers else 0
    student = depth.pruned_depth_config(teacher, depth.uniform_layers(kept, teacher.depth))
    student = student.replace(dual_attention_layers=tuple(range(duals)))
    table = teacher.position_size**2 * teacher.hidden_size
    assert round((cost.parameters(student) - table) / 1e6, 1) == parameters


# diffusers live -----------------------------------------------------------------------------------


FIELDS = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    "pooled_projection_dim": 10, "out_channels": 4, "pos_embed_max_size": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**FIELDS, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def theirs(model, x):
    with torch.no_grad():
        out = model(
            torch.from_numpy(np.moveaxis(x, -1, 1)),
            torch.from_numpy(TEXT["context"]),
            torch.from_numpy(TEXT["pooled"]),
            torch.from_numpy(T),
        )
    return np.moveaxis(out.sample.numpy(), 1, -1)


def test_a_folder_of_diffusers_there_and_back(peer, tmp_path):
    peer.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs" / "transformer").glob("*.safetensors"))) > 1
    network = load_checkpoint(tmp_path / "theirs")
    x = RNG.normal(size=(2, 8, 12, 4)).astype(np.float32)
    found = make_apply(network.graphdef)(network.params, x, T, False, None, TEXT)[0]
    np.testing.assert_allclose(found, theirs(peer, x), atol=5e-5)
    write_diffusers(tmp_path / "ours", network.config, network.params)
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    assert again.config.dual_attention_layers in ([0, 1], (0, 1))
    np.testing.assert_allclose(theirs(again, x), theirs(peer, x), atol=1e-6)


def test_positions_that_are_not_stored_are_those_of_diffusers(peer):
    tensors = {name: value.numpy() for name, value in peer.state_dict().items()}
    table = tensors.pop(POSITIONS)
    _, ours = FORMAT.tensors_from(FORMAT.config_from(dict(peer.config)), tensors)
    np.testing.assert_allclose(ours[POSITIONS], table, atol=1e-6)


def test_a_student_is_a_network_of_diffusers(peer, tmp_path):
    peer.save_pretrained(tmp_path / "theirs")
    config, tensors = read_diffusers(tmp_path / "theirs")
    student = from_tensors(*depth.prune_depth(config, tensors, (1, 2)))
    assert student.config.dual_attention_layers == (0,)
    write_diffusers(tmp_path / "student", student.config, student.params)
    x = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
    found = make_apply(student.graphdef)(student.params, x, T, False, None, TEXT)[0]
    expected = theirs(SD3Transformer2DModel.from_pretrained(tmp_path / "student"), x)
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_projection_dim": 20}, "caption_projection_dim 20: must be num_attention_heads"),
        ({"out_channels": 8}, "out_channels 8: must be in_channels, 4"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm': must be"),
        ({"num_layers": 0}, "num_layers 0: must be a number above 0"),
        ({"dual_attention_layers": [3]}, "dual_attention_layers must be different block numbers"),
        ({"dual_attention_layers": "all"}, "dual_attention_layers 'all': must be a list"),
        ({"pos_embed_max_size": 2}, "sample_size|position_size"),
        ({"new": 1}, "new 1: not a field known here"),
    ],
)
def test_fields_that_ours_cannot_be_are_named(changes, message):
    with pytest.raises(DiffusersError, match=message):
        FORMAT.config_from(FIELDS | changes)


def test_tensors_that_do_not_fit_are_named(peer):
    tensors = {name: value.numpy() for name, value in peer.state_dict().items()}
    del tensors["context_embedder.bias"]
    with pytest.raises(WeightMismatchError, match="context_embedder.bias: missing"):
        FORMAT.tensors_from(FORMAT.config_from(dict(peer.config)), tensors)


# As it is used ------------------------------------------------------------------------------------


def test_a_new_model_predicts_zero():
    graphdef, params = building.create(TINY)
    assert not np.any(apply(graphdef, params, X, T, TEXT))
    assert np.abs(nnx.merge(graphdef, params).embed(X)).max() > 0.1


def test_remat_and_bfloat16():
    config = TINY.replace(depth=2, dual_attention_layers=(0,))
    graphdef, params = tiny(config)
    expected = jax.grad(lambda p: jnp.sum(apply(graphdef, p, X, T, TEXT) ** 2))(params)
    other = tiny(config, remat="nothing_saveable")[0]
    found = jax.grad(lambda p: jnp.sum(apply(other, p, X, T, TEXT) ** 2))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not np.any(found["pos_embed"]["pos_embed"])
    y = apply(graphdef, params, X, T, TEXT)
    low, features = apply(tiny(config, "bfloat16")[0], params, X, T, TEXT, return_features=True)
    assert low.dtype == jnp.float32 and features["transformer_blocks.0"].dtype == jnp.bfloat16
    assert 0 < np.abs(low - y).max() < 0.05 * np.abs(y).max()


@pytest.mark.parametrize("remat", [None, "nothing_saveable"])
def test_blocks_as_loops_are_the_same_function(remat):
    """Two with a second attention, two without, and the last one."""
    config = TINY.replace(dual_attention_layers=(0, 1))
    graphdef, params = tiny(config, remat=remat)
    loops, _ = building.create(config, remat=remat, scan_blocks=True)
    assert [len(part) for part in nnx.merge(loops, params)._alike()] == [2, 2, 1]
    gates = jnp.array([1.0, 0.5, 0, 1, 1])

    def run(graphdef, gates):
        options = {"return_features": True, "gates": gates}

        def loss(params):
            y, features = apply(graphdef, params, X, T, TEXT, **options)
            return jnp.sum(y**2), (y, features)

        return jax.grad(loss, has_aux=True)(params)

    for gate in (None, gates):
        (found, (y, features)), (expected, (z, others)) = run(loops, gate), run(graphdef, gate)
        np.testing.assert_allclose(y, z, atol=1e-5)
        assert list(features) == list(others)
        for a, b in zip(features.values(), others.values(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_gate_of_zero_leaves_a_block_out():
    graphdef, params = tiny()
    network = from_tensors(*depth.prune_depth(TINY, to_torch(params), (0, 2, 4)))
    assert network.config.dual_attention_layers == (0,)
    expected = apply(network.graphdef, network.params, X, T, TEXT)
    gates = jnp.array([1.0, 0, 1, 0, 1])
    found = apply(graphdef, params, X, T, TEXT, gates=gates)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = apply(graphdef, params, X, T, TEXT, gates=jnp.ones(5))
    np.testing.assert_allclose(found, apply(graphdef, params, X, T, TEXT), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[:, :3]}, r"x must have shape \(B, H, W, 3\), H and W multiples of 2 up to 8"),
        ({"x": np.zeros((2, 4, 10, 3), np.float32)}, "up to 8"),
        ({"t": T[:1]}, "one per sample"),
        ({"cond": None}, "text-conditional"),
        ({"cond": {"context": TEXT["context"]}}, "text-conditional"),
        ({"cond": TEXT | {"context": TEXT["context"][:, :, :3]}}, "context.* must have shape"),
        ({"cond": TEXT | {"pooled": TEXT["pooled"][:1]}}, "pooled.* must have shape"),
        ({"gates": jnp.ones(2)}, "gates must have shape"),
    ],
)
def test_bad_inputs(changes, message):
    arguments = {"x": X, "t": T, "cond": TEXT} | changes
    with pytest.raises(ValueError, match=message):
        nnx.merge(*tiny())(**arguments)


# Students by depth --------------------------------------------------------------------------------


def test_the_last_block_stays():
    with pytest.raises(ValueError, match="layers must keep block 4"):
        depth.pruned_depth_config(TINY, (0, 1))
    assert depth.most_important(np.array([3.0, 1, 2, 5, 0]), 2, TINY.always_kept) == (3, 4)
    groups = learned_depth.smallest_groups(2, 4, (3,))
    gates = np.array([[0.0, 1.0], [9.0, -9.0]])
    assert learned_depth.most_probable(gates, groups) == (1, 3)
    draws = jax.vmap(
        lambda key: learned_depth.sample_gates(key, groups.logits(gates, 1.0), groups, 1.0)
    )(jax.random.split(jax.random.key(0), 64))
    assert np.all(draws[:, 3] == 1) and np.all(draws[:, 2] == 0) and 0 < np.mean(draws[:, 0]) < 1


@pytest.mark.parametrize("layers", ["uniform", "similarity", "loss", "0,4"])
def test_the_pruner_serves_it(layers):
    graphdef, params = tiny()
    fields = DepthPruner().defaults(lambda **fields: ConfigDict({"optimizer": {}, **fields}))
    fields.update(depth=2, layers=layers)

    class Tools:
        def tensors(self, params):
            return to_torch(params)

        def noised(self, count, batch_size):
            yield jnp.asarray(X), jnp.asarray(T), TEXT, jnp.asarray(X)

    class Teacher:
        config = TINY

    Teacher.graphdef, Teacher.params = graphdef, params
    predicted = DepthPruner().predict(fields, TINY)
    student = DepthPruner().prune(fields, Teacher, Tools())
    assert student.config.kept_layers[-1] == 4 and predicted.depth == student.config.depth == 2
    assert np.all(np.isfinite(apply(*_network(student), X, T, TEXT)))


def _network(student):
    network = from_tensors(student.config, student.tensors)
    return network.graphdef, network.params


def test_features_are_compared_with_the_end_of_each_interval():
    teacher = TINY.replace(depth=6, dual_attention_layers=())
    numbers = lambda kept: [  # noqa: E731
        int(name.split(".")[1]) for name in teacher.keep(kept).layer_map(teacher).values()
    ]
    assert numbers((1, 3, 5)) == numbers((0, 2, 5)) == [1, 3, 5]  # one in each share
    assert numbers((0, 1, 5)) == [0, 4, 5]
    assert list(teacher.keep((0, 5)).layer_map(teacher)) == [
        "transformer_blocks.0",
        "transformer_blocks.1",
    ]
