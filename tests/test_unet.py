"""The DDPM U-Net against the published model's arrays, and its config."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nhwc
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.families import registry
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.nn import building
from liftplace_jax.nn.layers import sinusoidal_embedding

NAMES = ("ddpm_unet_u16", "ddpm_unet_u32", "ddpm_unet_u8odd")
TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=2,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    dropout=0.5,
    num_groups=4,
)
X = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
T = jnp.array([3, 700])


@pytest.fixture(scope="session")
def published(golden):
    """name -> (config, graphdef, params, arrays, meta), each loaded once."""

    @functools.cache
    def load(name):
        arrays, meta = golden(name)
        fields = dict(meta["config"]["model"])
        fields.pop("type")
        config = UNetConfig(
            image_size=meta["config"]["data"]["image_size"],
            out_channels=fields.pop("out_ch"),
            **fields,
        )
        graphdef, params = building.abstract(config)
        tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        return config, graphdef, weights.from_torch(params, tensors), arrays, meta

    return load


@functools.cache
def tiny(**changes):
    return building.create(TINY.replace(**changes), seed=1)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "return_features"))
def apply(graphdef, params, x, t, **options):
    return nnx.merge(graphdef, params)(x, t, **options)


@pytest.mark.parametrize("name", NAMES)
def test_output_features_and_input_gradient(published, name):
    _, graphdef, params, arrays, meta = published(name)
    t = jnp.asarray(arrays["in/t"])

    @jax.jit
    def run(params, x):
        def scalar(x):
            y, features = nnx.merge(graphdef, params)(x, t, return_features=True)
            return jnp.sum(y * nhwc(arrays["in/v"])), (y, features)

        return jax.grad(scalar, has_aux=True)(x)

    gradient, (y, features) = run(params, nhwc(arrays["in/x"]))
    np.testing.assert_allclose(y, nhwc(arrays["out/y"]), atol=5e-5)
    expected = nhwc(arrays["out/grad_x"])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert list(features) == meta["feat_execution_order"]
    for stats in meta["feat_stats"]:
        feature = np.asarray(features[stats["name"]])
        assert list(np.moveaxis(feature, -1, 1).shape) == stats["shape"]
        np.testing.assert_allclose(feature.mean(), stats["mean"], atol=5e-5)
        np.testing.assert_allclose(feature.std(), stats["std"], atol=5e-5)
    for key, value in arrays.items():
        if key.startswith("out/feat0/"):
            found = features[key.removeprefix("out/feat0/")][0]
            np.testing.assert_allclose(found, np.moveaxis(value, 0, -1), atol=5e-5)
        if key.startswith("out/feat/"):
            found = features[key.removeprefix("out/feat/")]
            np.testing.assert_allclose(found, nhwc(value), atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_published_names_and_parameter_count(published, name):
    config, graphdef, params, arrays, meta = published(name)
    assert building.count_parameters(params) == meta["num_params"]
    assert building.count_parameters(building.abstract(config)[1]) == meta["num_params"]
    written = weights.to_torch(params)
    assert {f"param/{key}" for key in written} == {k for k in arrays if k.startswith("param/")}
    for key, value in written.items():
        np.testing.assert_array_equal(value, arrays[f"param/{key}"])


@pytest.mark.parametrize("name", NAMES)
def test_timestep_embedding(golden, name):
    arrays, meta = golden(name)
    found = jax.jit(sinusoidal_embedding, static_argnums=1)(
        arrays["in/t"], meta["config"]["model"]["ch"]
    )
    # At t = 999 the last bit of a float32 frequency is worth 6e-5.
    np.testing.assert_allclose(found, arrays["out/temb_raw"], atol=1e-4)


def test_odd_embedding_ends_in_zero():
    found = sinusoidal_embedding(jnp.array([5, 9]), 9)
    np.testing.assert_array_equal(found[:, :8], sinusoidal_embedding(jnp.array([5, 9]), 8))
    np.testing.assert_array_equal(found[:, 8], [0, 0])


def test_celeba_teacher_has_the_papers_size():
    config = UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4), dropout=0.1)
    assert building.count_parameters(building.abstract(config)[1]) == 78_700_803


def test_dropout_acts_only_in_training_and_follows_its_key():
    model, keys = tiny(), jax.random.split(jax.random.key(0))
    plain, evaluated = apply(*model, X, T), apply(*model, X, T, rngs=keys[0])
    first, again, other = (
        apply(*model, X, T, train=True, rngs=key) for key in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(evaluated, plain)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - other).max() > 1e-3


def test_training_without_dropout_needs_no_key():
    model = building.abstract(TINY.replace(dropout=0.0))[0], tiny()[1]
    np.testing.assert_array_equal(apply(*model, X, T, train=True), apply(*tiny(), X, T))
    with pytest.raises(ValueError, match="needs rngs"):
        apply(*tiny(), X, T, train=True)


def test_bfloat16_stays_close_with_float32_parameters_and_output():
    graphdef, abstract = building.abstract(TINY, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {np.dtype(np.float32)}
    expected = apply(*tiny(), X, T)
    found, features = apply(graphdef, tiny()[1], X, T, return_features=True)
    assert found.dtype == jnp.float32
    assert features["mid.attn_1"].dtype == jnp.bfloat16
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_integer_and_float_timesteps_agree_and_samples_are_independent():
    expected = apply(*tiny(), X, T)
    np.testing.assert_array_equal(expected, apply(*tiny(), X, T.astype(jnp.float32)))
    np.testing.assert_allclose(expected[::-1], apply(*tiny(), X[::-1], T[::-1]), atol=1e-5)


def test_seeds_can_be_mapped_over():
    graphdef, abstract = building.abstract(TINY)
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.jit(jax.vmap(lambda key: building.create(TINY, key)[1]))(keys)
    assert jax.tree.map(lambda leaf: leaf.shape[1:], params) == jax.tree.map(
        lambda leaf: leaf.shape, abstract
    )
    outputs = jax.vmap(lambda p: apply(graphdef, p, X, T))(params)
    assert outputs.shape == (3, 2, 8, 8, 2)
    alone = apply(graphdef, jax.tree.map(lambda leaf: leaf[1], params), X, T)
    np.testing.assert_allclose(outputs[1], alone, atol=1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_graphdefs_of_one_config_are_equal():
    # Else a function that takes a graphdef as a static argument would compile again.
    assert building.create(TINY, 0)[0] == building.create(TINY, 1)[0] == building.abstract(TINY)[0]
    assert hash(building.create(TINY, 0)[0]) == hash(building.abstract(TINY)[0])


def test_initial_weights_are_pytorch_defaults_and_the_output_is_not_constant():
    tensors = weights.to_torch(tiny()[1])
    fan_ins = {"mid.block_1.conv1": 16 * 9, "temb.dense.1": 32, "conv_out": 8 * 9}
    for name, fan_in in fan_ins.items():
        weight, bias, bound = tensors[f"{name}.weight"], tensors[f"{name}.bias"], fan_in**-0.5
        assert max(np.abs(weight).max(), np.abs(bias).max()) <= bound
        assert np.abs(bias).max() > 0
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    np.testing.assert_array_equal(tensors["norm_out.weight"], 1)
    np.testing.assert_array_equal(tensors["norm_out.bias"], 0)
    assert np.abs(tensors["mid.attn_1.q.bias"] - tensors["mid.attn_1.k.bias"]).max() > 0
    assert np.asarray(apply(*tiny(), X, T)).std(axis=(1, 2)).min() > 1e-3


def test_wrong_inputs_name_the_shapes():
    model = nnx.merge(*tiny())
    with pytest.raises(ValueError, match=r"x must have shape \(B, 8, 8, 1\), not \(2, 1, 8, 8\)"):
        model(np.moveaxis(X, -1, 1), T)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 8, 8, 1\), not \(8, 8, 1\)"):
        model(X[0], T[0])
    with pytest.raises(ValueError, match=r"t must have shape \(2,\).*not \(1,\)"):
        model(X, T[:1])
    with pytest.raises(ValueError, match="cond must be None"):
        model(X, T, T)


# ---------------------------------------------------------------------------------------- config


def pruned_widths(**changes):
    return dict(TINY.widths) | {name.replace("__", "."): width for name, width in changes.items()}


PRUNED = TINY.replace(
    widths=pruned_widths()
    | {
        "temb.dense.0": 7,
        "temb.dense.1": 5,
        "conv_in": 4,
        "down.0.block.0.conv1": 12,
        "down.0.block.0.conv2": 4,
        "down.1.attn.0.q": 3,
        "mid.attn_1.q": 1,
        "up.1.upsample.conv": 8,
        "up.0.block.1.conv2": 4,
    }
)


def test_a_pruned_config_is_an_ordinary_config():
    graphdef, params = building.create(PRUNED)
    y, features = apply(graphdef, params, X, T, return_features=True)
    assert y.shape == (2, 8, 8, 2) and np.isfinite(y).all()
    assert features["down.0.block.0"].shape == (2, 8, 8, 4)
    shapes = {name: value.shape for name, value in weights.to_torch(params).items()}
    assert shapes["temb.dense.0.weight"] == (7, 8)
    assert shapes["down.0.block.0.temb_proj.weight"] == (12, 5)
    assert shapes["down.1.attn.0.k.weight"] == (3, 16, 1, 1)
    assert shapes["down.1.attn.0.proj_out.weight"] == (16, 3, 1, 1)
    assert shapes["up.0.block.0.nin_shortcut.weight"] == (8, 12, 1, 1)
    assert shapes["conv_out.weight"] == (2, 4, 3, 3)
    assert shapes.keys() == weights.to_torch(tiny()[1]).keys()


@pytest.mark.parametrize(
    "config", [TINY, PRUNED, UNetConfig(8, ch_mult=[1], resamp_with_conv=False)]
)
def test_block_plan_says_every_parameter_width(config):
    plan = config.block_plan()
    graphdef, params = building.create(config)
    shapes = {name: value.shape for name, value in weights.to_torch(params).items()}
    known = {}
    for node in plan:
        assert node.in_width == sum(known[name] for name in node.inputs) or node.kind == "conv_in"
        known[node.name] = node.out_width
        if node.kind == "block":
            assert shapes[f"{node.name}.conv1.weight"][:2] == (node.hidden_width, node.in_width)
            assert shapes[f"{node.name}.conv2.weight"][:2] == (node.out_width, node.hidden_width)
            assert (f"{node.name}.nin_shortcut.weight" in shapes) == node.shortcut
        elif node.kind == "attention":
            assert shapes[f"{node.name}.v.weight"][:2] == (node.hidden_width, node.in_width)
            assert node.out_width == node.in_width
        elif f"{node.name}.weight" in shapes:
            assert shapes[f"{node.name}.weight"][:2] == (node.out_width, node.in_width)
    _, features = jax.eval_shape(
        lambda x, t: nnx.merge(graphdef, params)(x, t, return_features=True),
        jnp.ones((1, 8, 8, config.in_channels)),
        jnp.ones(1),
    )
    sizes = {node.name: (1, node.resolution, node.resolution, node.out_width) for node in plan}
    assert {name: feature.shape for name, feature in features.items()}.items() <= sizes.items()


def test_a_shortcut_is_where_the_unpruned_model_has_one():
    # Pruned widths that happen to be equal remove no shortcut; unequal ones add none.
    config = TINY.replace(
        widths=pruned_widths()
        | {"down.1.block.0.conv2": 8, "mid.block_1.conv2": 8, "mid.block_2.conv2": 8}
    )
    shortcut = {node.name: node.shortcut for node in config.block_plan()}
    assert shortcut["down.1.block.0"] and not shortcut["mid.block_1"]
    with pytest.raises(ValueError, match="mid.block_1.conv2 has 12 channels, its input 16"):
        TINY.replace(widths=pruned_widths() | {"mid.block_1.conv2": 12})


def test_adapted_groups():
    config = TINY.replace(min_channels_per_group=2)
    assert [config.norm_groups(c, "norm") for c in (2, 4, 6, 7, 8, 64)] == [1, 2, 3, 1, 4, 4]
    narrow = config.replace(widths=pruned_widths() | {"mid.block_1.conv1": 6})
    graphdef, params = building.create(narrow)
    assert nnx.merge(graphdef, params).mid.block_1.norm2.num_groups == 3
    assert np.isfinite(apply(graphdef, params, X, T)).all()
    with pytest.raises(ValueError, match="mid.block_1.norm2: 1 channels are fewer"):
        config.replace(widths=pruned_widths() | {"mid.block_1.conv1": 1})


def test_json_round_trip():
    for config in (TINY, PRUNED, UNetConfig(image_size=32)):
        text = json.dumps(config.described())
        found = registry.config_from_dict(json.loads(text))
        assert found == config and hash(found) == hash(config)


def test_widths_follow_unless_pruned():
    wider = TINY.replace(ch=16)
    assert wider == dataclasses.replace(TINY, ch=16, widths=None)
    assert dict(wider.widths)["conv_in"] == 16
    assert PRUNED.replace(dropout=0.0).widths == PRUNED.widths
    assert UNetConfig(**PRUNED.to_dict()).widths == PRUNED.widths
    from_numpy = {name: np.int64(width) for name, width in PRUNED.widths}
    assert json.dumps(TINY.replace(widths=from_numpy).to_dict()) == json.dumps(PRUNED.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 7}, "image_size 7 cannot be halved 1 times"),
        ({"image_size": 0}, r"image_size must be a whole number in 1\.\.16384, got 0"),
        ({"in_channels": 1.0}, "in_channels must be a whole number"),
        ({"ch": 2}, r"ch must be a whole number in 4\.\."),
        ({"ch_mult": ()}, "ch_mult is empty"),
        ({"ch_mult": 2}, "ch_mult must be a sequence of integers, not 2"),
        ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), got '0.1'"),
        ({"widths": 8}, "widths must map layer names to widths"),
        ({"ch_mult": (1, 0)}, r"ch_mult\[1\] must be a whole number in 1\.\..*, got 0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be"),
        ({"attn_resolutions": (-4,)}, r"attn_resolutions\[0\] must be"),
        ({"attn_resolutions": (4, 5)}, r"attn_resolutions \[5\]: .* only \[8, 4\]"),
        ({"num_res_blocks": 10**9}, r"num_res_blocks must be a whole number in 1\.\.100"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"resamp_with_conv": 1}, "resamp_with_conv must be a bool"),
        ({"num_groups": 3}, "down.0.block.0.norm1: num_groups 3 does not divide 8 channels"),
        ({"min_channels_per_group": 0}, "min_channels_per_group must be"),
        ({"widths": {"conv_in": 8}}, r"widths: unknown layers \[\], missing layers \['down.0"),
        ({"widths": pruned_widths(stem=8)}, r"widths: unknown layers \['stem'\], missing layers"),
        ({"widths": pruned_widths(conv_in=0)}, r"widths\['conv_in'\] must be"),
        ({"widths": pruned_widths(up__0__block__0__conv1=6)}, "up.0.block.0.norm2: num_groups 4"),
    ],
)
def test_bad_configs_name_the_field_or_layer(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_bad_dictionaries():
    fields = TINY.described()
    with pytest.raises(ValueError, match="unknown model 'vit'; known: .*'unet'"):
        registry.config_from_dict(fields | {"model": "vit"})
    with pytest.raises(ValueError, match=r"unknown fields \['depth'\], missing fields \['ch'\]"):
        registry.config_from_dict({k: v for k, v in fields.items() if k != "ch"} | {"depth": 3})


def test_every_model_offers_the_same_contract():
    for name, family in registry.FAMILIES.items():
        config = registry.config_from_dict({"model": name, **family.default_model}, partial=True)
        assert {"to_dict", "from_dict", "replace"} <= set(dir(config))
        assert isinstance(
            nnx.eval_shape(lambda c=config: c.build(rngs=nnx.Rngs(0), dtype=jnp.float32)),
            nnx.Module,
        )
    assert registry.FAMILIES["unet"].config is UNetConfig
