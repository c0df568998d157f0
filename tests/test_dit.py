"""The DiT against the published model's arrays, its config, sizes and published weight files."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import GOLDEN, nhwc
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from liftplace_jax import weights
from liftplace_jax.families import registry
from liftplace_jax.families.dit.config import DiTConfig, published_layer_map
from liftplace_jax.families.dit.published import PUBLISHED_DITS
from liftplace_jax.families.loading import load_checkpoint
from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.host.sharding import make_mesh
from liftplace_jax.nn import building
from liftplace_jax.nn.layers import REMAT_POLICIES, position_embedding, sinusoidal_embedding
from liftplace_jax.suites import sizes

NAMES = ("dit_d4", "dit_d2p4")
FACTS = json.loads((GOLDEN / "dit_facts.json").read_text())
TINY = DiTConfig(image_size=4, hidden_size=16, depth=2, num_heads=2, in_channels=1, num_classes=3)
UNET = UNetConfig(
    image_size=4,
    in_channels=1,
    ch=8,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
)
X = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
T = jnp.array([3, 700])
LABELS = jnp.array([0, 3])


def published_config(fields):
    renamed = {"input_size": "image_size", "class_dropout_prob": "class_dropout"}
    return DiTConfig(**{renamed.get(name, name): value for name, value in fields.items()})


@pytest.fixture(scope="module")
def published(golden):
    """name -> (config, graphdef, params, arrays, meta), each loaded once."""

    @functools.cache
    def load(name):
        arrays, meta = golden(name)
        config = published_config(meta["config"])
        graphdef, params = building.abstract(config)
        tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        return config, graphdef, weights.from_torch(params, tensors), arrays, meta

    return load


@functools.partial(jax.jit, static_argnums=0, static_argnames="return_features")
def apply(graphdef, params, x, t, cond, **options):
    return nnx.merge(graphdef, params)(x, t, cond, **options)


@functools.cache
def tiny(**changes):
    """A tiny model with random parameters: a new one predicts zero."""
    graphdef, params = building.create(TINY.replace(**changes))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    drawn = [0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return graphdef, jax.tree.unflatten(treedef, drawn)


# Published arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_output_features_and_input_gradient(published, name):
    config, graphdef, params, arrays, _ = published(name)
    t, labels = jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/y"])

    @jax.jit
    def run(params, x, labels):
        def scalar(x):
            y, features = nnx.merge(graphdef, params)(x, t, labels, return_features=True)
            return jnp.sum(y * nhwc(arrays["in/v"])), (y, features)

        return jax.grad(scalar, has_aux=True)(x)

    gradient, (y, features) = run(params, nhwc(arrays["in/x"]), labels)
    assert y.dtype == jnp.float32 and y.shape[-1] == config.out_channels
    np.testing.assert_allclose(y, nhwc(arrays["out/y"]), atol=5e-5)
    expected = nhwc(arrays["out/grad_x"])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
    assert list(features) == [f"blocks.{index}" for index in range(config.depth)]
    for index, feature in enumerate(features.values()):
        np.testing.assert_allclose(feature, arrays[f"out/block/{index:02d}"], atol=5e-5)
    if "in/cfg_drop_ids" in arrays:
        dropped = jnp.where(arrays["in/cfg_drop_ids"] == 1, config.null_label, labels)
        _, (y, _) = run(params, nhwc(arrays["in/x"]), dropped)
        np.testing.assert_allclose(y, nhwc(arrays["out/y_cfg_drop_ids"]), atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings(published, name):
    config, graphdef, params, arrays, _ = published(name)
    t = jnp.asarray(arrays["in/t"])
    waves = functools.partial(sinusoidal_embedding, frequency_shift=0, cosines_first=True)
    # At t = 999 the last bit of a float32 frequency is worth 6e-5.
    np.testing.assert_allclose(waves(t, 256), arrays["out/t_freq"], atol=1e-4)
    model = nnx.merge(graphdef, params)
    np.testing.assert_allclose(model.t_embedder(t), arrays["out/t_emb"], atol=5e-5)
    tokens = model.embed(nhwc(arrays["in/x"]))
    np.testing.assert_allclose(tokens - model.pos_embed[...], arrays["out/x_embed"], atol=5e-5)
    side = config.image_size // config.patch_size
    np.testing.assert_allclose(
        position_embedding(config.hidden_size, side), arrays["param/pos_embed"], atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
def test_published_names_and_parameter_count(published, name):
    config, _, params, arrays, meta = published(name)
    assert building.count_parameters(params) == config_parameters(config) == meta["num_params"]
    written = weights.to_torch(params)
    assert {f"param/{key}" for key in written} == {k for k in arrays if k.startswith("param/")}
    for key, value in written.items():
        np.testing.assert_array_equal(value, arrays[f"param/{key}"])


# The model ----------------------------------------------------------------------------------------


def test_initial_weights_are_the_published_ones_and_blocks_the_identity():
    config = TINY.replace(hidden_size=64, num_classes=50)
    graphdef, params = building.create(config, 1)
    tensors = weights.to_torch(params)
    for name, fans in {
        "x_embedder.proj": (4, 64),
        "blocks.1.attn.qkv": (64, 192),
        "blocks.0.attn.proj": (64, 64),
        "blocks.0.mlp.fc1": (64, 256),
        "blocks.1.mlp.fc2": (256, 64),
    }.items():
        weight, bound = tensors[f"{name}.weight"], (6 / sum(fans)) ** 0.5
        assert 0.95 * bound < np.abs(weight).max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert tensors[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1)
    zero = re.compile(r"(.*adaLN_modulation.*|final_layer.linear.*|.*bias)$")
    for name, value in tensors.items():
        assert np.any(value) != bool(zero.match(name)), name
    assert len(tensors) == len(jax.tree.leaves(building.abstract(config)[1]))
    y, features = apply(graphdef, params, X, T, LABELS, return_features=True)
    tokens = nnx.merge(graphdef, params).embed(X)
    np.testing.assert_array_equal(y, np.zeros((2, 4, 4, 2)))
    np.testing.assert_allclose(features["blocks.1"], tokens, atol=1e-6)


def test_gates_say_how_far_a_block_acts():
    graphdef, params = tiny()
    plain, features = apply(graphdef, params, X, T, LABELS, return_features=True)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(gates):
        model = nnx.merge(graphdef, params)
        y, features = model(X, T, jnp.asarray(LABELS), return_features=True, gates=gates)
        return y.sum(), (y, features)

    slopes, (y, _) = run(jnp.ones(2))
    np.testing.assert_allclose(y, plain, rtol=1e-4, atol=1e-5)
    assert np.abs(slopes).min() > 1e-3
    half = run(jnp.array([0.5, 0.0]))[1][1]
    tokens = nnx.merge(graphdef, params).embed(X)
    expected = (tokens + features["blocks.0"]) / 2
    np.testing.assert_allclose(half["blocks.0"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(half["blocks.1"], half["blocks.0"])


@pytest.mark.parametrize("config, labels", [(TINY, LABELS), (UNET, None)], ids=["dit", "unet"])
def test_remat_gives_the_same_gradients_and_positions_are_not_trained(config, labels):
    params = tiny()[1] if config is TINY else building.create(config)[1]

    def gradients(remat):
        graphdef = building.abstract(config, remat=remat)[0]

        def loss(params):
            return jnp.square(nnx.merge(graphdef, params)(X, T, labels)).mean()

        kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        gradient = jax.jit(jax.grad(loss))(params)
        return weights.to_torch(gradient), building.count_parameters(kept)

    expected, all_kept = gradients(None)
    found, kept = gradients("nothing_saveable")
    own = building.count_parameters(params)
    assert kept - own < 0.5 * (all_kept - own)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    untrained = {name for name, value in expected.items() if not np.any(value)}
    assert untrained == ({"pos_embed"} if config is TINY else set())


@pytest.mark.parametrize(
    "changes, remat", [({}, None), ({}, "nothing_saveable"), ({"embedders": "per_block"}, None)]
)
def test_scanned_blocks_give_the_same_numbers_by_the_same_names(changes, remat):
    config = TINY.replace(depth=3, **changes)
    params = tiny(depth=3, **changes)[1]
    gates = jnp.array([1.0, 0.3, 0.0])

    def run(scan_blocks):
        graphdef, abstract = building.abstract(config, remat=remat, scan_blocks=scan_blocks)
        assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, params)

        def loss(params, gates):
            model = nnx.merge(graphdef, params)
            y, features = model(X, T, LABELS, return_features=True, gates=gates)
            return jnp.square(y).mean(), (y, features, model(X, T, LABELS))

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return step(params, gates), step.trace(params, gates).lower().as_text()

    (expected, plain), (found, text) = run(False), run(True)
    assert "stablehlo.while" in text and "stablehlo.while" not in plain
    assert list(found[0][1][1]) == list(expected[0][1][1]) == [f"blocks.{n}" for n in range(3)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max())),
        found,
        expected,
    )


def test_scanning_changes_no_file_and_is_refused_without_equal_blocks(tmp_path):
    for scan_blocks in (False, True):
        _, params = building.create(TINY, 3, scan_blocks=scan_blocks)
        weights.save_model(tmp_path / str(scan_blocks), TINY.described(), params)
    for name in ("model.safetensors", "config.json"):
        first, second = (tmp_path / str(scanned) / name for scanned in (False, True))
        assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ValueError, match="scan_blocks: a 'unet' is no stack of equal blocks"):
        building.create(UNET, scan_blocks=True)


@pytest.mark.parametrize("config", [TINY, UNET], ids=["dit", "unet"])
def test_an_unknown_policy_is_named(config):
    for policy in REMAT_POLICIES:
        assert building.abstract(config, remat=policy)[0] != building.abstract(config)[0]
    with pytest.raises(ValueError, match="remat must be None or one of .*'nothing_sav.*'all'"):
        building.create(config, remat="all")


def test_bfloat16_stays_close_with_float32_parameters_and_output():
    graphdef, abstract = building.abstract(TINY, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {np.dtype(np.float32)}
    expected = apply(*tiny(), X, T, LABELS)
    found, features = apply(graphdef, tiny()[1], X, T, LABELS, return_features=True)
    assert found.dtype == jnp.float32 and features["blocks.1"].dtype == jnp.bfloat16
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_samples_are_independent_on_any_devices_and_seeds_can_be_mapped_over():
    graphdef, params = tiny()
    mesh = make_mesh({"data": 4, "fsdp": 2})
    sharded = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, t, labels = (np.concatenate(4 * [value]) for value in (X, T, LABELS))
    arrays = [jax.device_put(value, sharded) for value in (x, t, labels)]
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))  # also qkv, across its three parts
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda leaf: jax.device_put(leaf, split if leaf.ndim == 2 else whole), params
    )
    found = apply(graphdef, params, *arrays)
    assert found.sharding.is_equivalent_to(sharded, found.ndim)
    expected = apply(*tiny(), X, T, LABELS)
    np.testing.assert_allclose(found, np.tile(expected, (4, 1, 1, 1)), rtol=1e-4, atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 2)
    mapped = jax.jit(jax.vmap(lambda key: building.create(TINY, key)[1]))(keys)
    table = mapped["y_embedder"]["embedding_table"]["embedding"][...]
    assert table.shape == (2, 4, 16) and np.abs(table[0] - table[1]).max() > 0.01
    assert building.create(TINY, 0)[0] == building.abstract(TINY)[0]


def test_each_block_can_have_its_own_embedders():
    config = TINY.replace(embedders="per_block", depth=3)
    params = building.create(config)[1]
    tensors = weights.to_torch(params)
    assert building.count_parameters(params) == config_parameters(config)
    assert "blocks.2.t_embedder.mlp.0.weight" in tensors and not any(
        name.startswith(("t_embedder", "y_embedder")) for name in tensors
    )
    # Equal ones are shared ones.
    graphdef, shared = tiny()
    tensors = weights.to_torch(shared)
    for name in [n for n in tensors if n.startswith(("t_embedder", "y_embedder"))]:
        value = tensors.pop(name)
        tensors |= {f"blocks.{index}.{name}": value for index in range(2)}
    graphdef, params = building.abstract(TINY.replace(embedders="per_block"))
    found = apply(graphdef, weights.from_torch(params, tensors), X, T, LABELS)
    np.testing.assert_allclose(found, apply(*tiny(), X, T, LABELS), atol=1e-6)


def test_wrong_inputs_name_what_is_wrong():
    model = nnx.merge(*tiny())
    with pytest.raises(ValueError, match=r"x must have shape \(B, 4, 4, 1\), not \(2, 1, 4, 4\)"):
        model(np.moveaxis(X, -1, 1), T, LABELS)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\).*not \(1,\)"):
        model(X, T[:1], LABELS)
    with pytest.raises(ValueError, match=r"cond must be integer labels of shape \(2,\).*not None"):
        model(X, T)
    with pytest.raises(ValueError, match=r"not int32 of shape \(1,\)"):
        model(X, T, LABELS[:1])
    with pytest.raises(ValueError, match=r"not float32 of shape \(2,\)"):
        model(X, T, LABELS.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"labels must be in 0..2, or the null label 3, got 4"):
        model(X, T, LABELS + 1)
    with pytest.raises(ValueError, match="got -1"):
        model(X, T, LABELS - 1)
    no_null = nnx.merge(*building.create(TINY.replace(class_dropout=0.0)))
    with pytest.raises(ValueError, match=r"labels must be in 0..2, got 3"):
        no_null(X, T, LABELS)
    with pytest.raises(ValueError, match=r"gates must have shape \(2,\), one per block"):
        model(X, T, LABELS, gates=jnp.ones(3))
    assert np.isnan(apply(*tiny(), X, T, LABELS + 1)[1]).all()  # it cannot be refused there


# Config, sizes and maps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 5}, "image_size 5 must be a multiple of patch_size 2"),
        ({"hidden_size": 18}, "hidden_size 18 must be a multiple of 4"),
        ({"num_heads": 3}, "hidden_size 16 must be a multiple of num_heads 3"),
        ({"depth": 0}, r"depth must be a whole number in 1\.\..*, got 0"),
        ({"num_classes": 2.0}, "num_classes must be a whole number"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must be at least 1 / hidden_size, got 0.01"),
        ({"class_dropout": 1.0}, r"class_dropout must be a number in \[0, 1\), got 1.0"),
        ({"norm_epsilon": 0}, r"norm_epsilon must be a number in \(0, 1\], got 0"),
        ({"learn_sigma": 1}, r"learn_sigma must be one of \[False, True\], not 1"),
        ({"frequency_shift": 2}, r"frequency_shift must be a whole number in 0\.\.1, got 2"),
        ({"embedders": "none"}, r"embedders must be one of \['shared', 'per_block'\], not 'none'"),
        ({"kept_layers": 2}, "kept_layers must be a sequence, each a whole number in .*, got 2"),
        ({"kept_layers": (1, 0)}, r"kept_layers must be depth 2 different .* not \[1, 0\]"),
        ({"kept_layers": (0, 1, 2)}, "kept_layers must be depth 2 different"),
    ],
)
def test_bad_configs_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_json_round_trip_and_contract():
    for config in (TINY, TINY.replace(kept_layers=[0, 5], learn_sigma=False)):
        found = registry.config_from_dict(json.loads(json.dumps(config.described())))
        assert found == config and hash(found) == hash(config)
    assert registry.FAMILIES["dit"].config is DiTConfig
    assert (TINY.out_channels, TINY.null_label) == (2, 3)
    plain = TINY.replace(learn_sigma=False, class_dropout=0.0)
    assert (plain.out_channels, plain.null_label) == (1, None)
    with pytest.raises(ValueError, match=r"DiTConfig: unknown fields \['ch'\], missing .*'depth'"):
        DiTConfig.from_dict({"ch": 3})


def test_published_sizes_to_the_unit():
    for name, fact in FACTS["models"].items():
        config = PUBLISHED_DITS[name]
        assert config.depth == fact["depth"]
        assert config_parameters(config) == fact["total_params"]
        assert count_macs(config) == fact["macs_fvcore"]
        if fact["paper_params"]:
            assert sizes.PAPER_DITS[name][0] == fact["paper_params"]
            assert f"{count_macs(config) / 1e9:.1f}G" == sizes.PAPER_DITS[name][1]
    assert (
        building.count_parameters(building.abstract(PUBLISHED_DITS["DiT-XL/2"])[1]) == 675_129_632
    )
    # Peebles & Xie 2023, table 4: parameters in millions, and Gflops, which leave out the norms.
    table = {"S/2": (33, 6.06), "S/4": (33, 1.41), "S/8": (33, 0.36), "B/2": (130, 23.01),
             "B/4": (130, 5.56), "B/8": (131, 1.42), "L/2": (458, 80.71), "L/4": (458, 19.70),
             "L/8": (459, 5.01), "XL/2": (675, 118.64), "XL/4": (675, 29.05), "XL/8": (676, 7.39),
    }  # fmt: skip
    for name, (millions, giga) in table.items():
        config = PUBLISHED_DITS[f"DiT-{name}"]
        assert abs(config_parameters(config) / 1e6 - millions) < 1
        assert count_macs(config) / 1e9 == pytest.approx(giga, rel=2e-3, abs=6e-3)
    with pytest.raises(ValueError, match="dict is of no family"):
        count_macs({})


def test_published_layer_maps():
    depths = {"DiT-XL/2": 28, "DiT-D14/2": 14, "other": 7}
    for name, pairs in FACTS["feature_kd_layer_pairs"].items():
        student, teacher = name.split(" <- ")
        found = published_layer_map(int(student[5:-2]), depths[teacher])
        assert found == {f"blocks.{s}": f"blocks.{t}" for s, t in pairs}
    student = TINY.replace(depth=1)
    assert student.layer_map(TINY) == {"blocks.0": "blocks.1"}
    assert student.layer_map(UNET) is None
    with pytest.raises(ValueError, match="a student of 2 blocks is deeper than its teacher of 1"):
        TINY.layer_map(student)


# Files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """As DiT's and TinyFusion's training scripts write them, of the tiny model."""
    folder = tmp_path_factory.mktemp("published")
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.to_torch(tiny()[1]).items()}
    doubled = {name: 2 * value for name, value in tensors.items()}
    torch.save(tensors, folder / "plain.pt")
    training = {"model": doubled, "ema": tensors, "opt": {"step": 3}}
    torch.save(training, folder / "training.pt")
    return lambda name: Path(folder / name)


def test_published_files_load(file):
    tensors = weights.to_torch(tiny()[1])
    for name, entry in (("plain.pt", None), ("training.pt", "ema")):
        found = weights.to_torch(load_checkpoint(file(name), TINY, entry).params)
        for key, value in tensors.items():
            np.testing.assert_array_equal(found[key], value)
    with pytest.raises(ValueError, match=r"several state dicts, \['model', 'ema'\]; choose one"):
        load_checkpoint(file("training.pt"), TINY)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"depth": 5}, ["  depth: 2 -> 5"]),
        ({"depth": 1, "num_classes": 10}, ["  depth: 2 -> 1", "  num_classes: 3 -> 10"]),
        (
            {"hidden_size": 32, "patch_size": 1, "in_channels": 3},
            ["  hidden_size: 16 -> 32", "  in_channels: 1 -> 3", "  patch_size: 2 -> 1"],
        ),
    ],
)
def test_a_file_of_another_model_is_a_line_for_each_field(file, changes, lines):
    with pytest.raises(ValueError, match="plain.pt is not what config.model says") as error:
        load_checkpoint(file("plain.pt"), TINY.replace(**changes))
    assert str(error.value).splitlines()[1:-1] == lines


def test_other_misfits_are_listed_and_folders_must_agree(file, tmp_path):
    with pytest.raises(weights.WeightMismatchError, match="2 tensors do not fit(?s:.*)fc1.bias"):
        tensors = weights.to_torch(tiny()[1])
        del tensors["blocks.0.mlp.fc1.bias"]
        tensors["blocks.1.attn.q_norm.weight"] = np.zeros(8, np.float32)
        weights.write_safetensors(tmp_path / "odd.safetensors", tensors)
        load_checkpoint(tmp_path / "odd.safetensors", TINY)
    weights.save_model(tmp_path / "own", TINY.described(), tiny()[1])
    wanted = TINY.replace(class_dropout=0.2)
    assert load_checkpoint(tmp_path / "own", wanted).config == wanted
    with pytest.raises(ValueError, match="own is not what .*\n  depth: 2 -> 3\nSet config.model"):
        load_checkpoint(tmp_path / "own", TINY.replace(depth=3))
    with pytest.raises(ValueError, match="own is not what .*\n  null_label: 3 -> None\nSet"):
        load_checkpoint(tmp_path / "own", TINY.replace(class_dropout=0.0))
    with pytest.raises(ValueError, match="own is not what .*\n  model: 'dit' -> 'unet'\nSet"):
        load_checkpoint(tmp_path / "own", UNET)
