"""The U-Net of Stable Diffusion against the arrays of diffusers', its sizes and its students."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, nhwc
from ml_collections import ConfigDict

from liftplace_jax import weights
from liftplace_jax.experiment.presets import family_config, runlocal
from liftplace_jax.families import registry
from liftplace_jax.families.sd_unet.config import SDUNetConfig, published_layer_map
from liftplace_jax.families.sd_unet.diffusers import config_from_diffusers
from liftplace_jax.families.sd_unet.pruning import BlockPruner
from liftplace_jax.families.sd_unet.published import PUBLISHED_SD_UNETS
from liftplace_jax.families.sd_unet.students import kept_layers, prune_blocks, student_config
from liftplace_jax.losses import feature_kd_loss, output_kd_loss
from liftplace_jax.nn import building
from liftplace_jax.nn.network import from_tensors, make_apply

STUDENTS = ("base", "small", "tiny")
TINY = SDUNetConfig(
    image_size=4,
    widths=(8, 16),
    layers=(1, 1),
    heads=(2, 2),
    down_attention=(True, False),
    up_attention=(False, True),
    context_dim=6,
    linear_projection=False,
    num_groups=4,
)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, x, t, context):
    return make_apply(graphdef)(params, x, t, True, None, context)


def run(network, x, t, context):
    """(prediction, features); networks of one config share a program."""
    return _run(network.graphdef, network.params, x, t, context)


@pytest.fixture(scope="module")
def inputs(golden):
    arrays, _ = golden("peer_sd21_unet")
    return nhwc(arrays["in/sample"]), arrays["in/timestep"], arrays["in/encoder_hidden_states"]


@pytest.fixture(scope="module")
def published(golden, inputs):
    """name of a file -> (network, its results), each once."""

    @functools.cache
    def load(name):
        arrays, meta = golden(name)
        tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        network = from_tensors(config_from_diffusers(meta["config"]), tensors)
        return network, run(network, *inputs)

    return load


@pytest.fixture(scope="module")
def teacher(published):
    return published("peer_sd21_unet")[0]


@pytest.fixture(scope="module")
def pruned(teacher):
    """A student's name -> (config, tensors, names of what is cut), of the golden teacher."""
    tensors = weights.to_torch(teacher.params)

    @functools.cache
    def make(student):
        return prune_blocks(teacher.config, tensors, kept_layers(student, teacher.config))

    return make


def channels_last(array):
    return nhwc(array) if array.ndim == 4 else array


# Arrays of diffusers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peer_sd21_unet", "peer_bk_small_unet", "peer_bk_tiny_unet"])
def test_output_and_features(golden, published, name):
    arrays, meta = golden(name)
    network, (y, features) = published(name)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, nhwc(arrays["out/sample"]), atol=5e-5)
    wanted = {k.removeprefix("out/block/"): v for k, v in arrays.items() if k.startswith("out/blo")}
    assert len(wanted) >= 6
    for feature, value in wanted.items():
        np.testing.assert_allclose(
            features[feature],
            channels_last(value),
            rtol=0,
            err_msg=feature,
            atol=1e-4 if np.abs(value).max() > 5 else 5e-5,
        )
    assert building.count_parameters(network.params) == meta["num_params"]
    assert registry.config_parameters(network.config) == meta["num_params"]


@pytest.mark.parametrize("student", STUDENTS)
def test_students_have_the_published_tensors(golden, teacher, pruned, student):
    _, meta = golden(f"peer_bk_{student}_unet")
    config, tensors, cuts = pruned(student)
    assert config == config_from_diffusers(meta["config"]) and not cuts
    source = weights.to_torch(teacher.params)
    assert tensors.keys() == meta["copied_from_teacher"].keys()
    for name, theirs in meta["copied_from_teacher"].items():
        np.testing.assert_array_equal(tensors[name], source[theirs], err_msg=name)


@pytest.mark.parametrize("student", STUDENTS)
def test_students_start_with_the_published_prediction(golden, inputs, pruned, student):
    arrays, _ = golden(f"peer_bk_{student}_unet")
    y, _ = run(from_tensors(*pruned(student)[:2]), *inputs)
    wanted = arrays["out/sample_with_weights_copied_from_teacher"]
    np.testing.assert_allclose(y, nhwc(wanted), atol=5e-5)


@pytest.mark.parametrize("student", STUDENTS)
def test_layer_maps_are_the_published_ones(golden, teacher, student):
    _, meta = golden(f"peer_bk_{student}_unet")
    config = config_from_diffusers(meta["config"])
    pairs = dict(zip(meta["mapping_layers_student"], meta["mapping_layers_teacher"], strict=True))
    assert config.layer_map(teacher.config) == pairs


@pytest.mark.parametrize("student", ["small", "tiny"])
def test_feature_and_output_losses(golden, published, student):
    _, meta = golden(f"peer_bk_{student}_unet")
    network, (y, features) = published(f"peer_bk_{student}_unet")
    teacher, (teacher_y, teacher_features) = published("peer_sd21_unet")
    pairs = network.config.layer_map(teacher.config)
    options = {"reduction": "mean", "layers": "sum"}
    found = feature_kd_loss(features, teacher_features, layer_map=pairs, **options)
    np.testing.assert_allclose(found, meta["kd_feat"], rtol=1e-5)
    for name, value in zip(meta["mapping_layers_student"], meta["kd_feat_per_layer"], strict=True):
        one = {name: pairs[name]}
        found = feature_kd_loss(features, teacher_features, layer_map=one, **options)
        np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(
        output_kd_loss(y, teacher_y, reduction="mean"), meta["kd_output_mse"], rtol=1e-5
    )


# Sizes --------------------------------------------------------------------------------------------


def test_every_published_size():
    facts = json.loads((GOLDEN / "sd_facts.json").read_text())["models"]
    assert len(facts) == 15
    for name, row in facts.items():
        config = config_from_diffusers(row["config"])
        assert registry.config_parameters(config) == row["total_params"], name
        assert registry.count_macs(config) == row["macs_thop_unet"], name
    ours = {
        "SD-2.1-base (teacher)": "sd-2.1-base",
        "SD-1.4 (teacher)": "sd-1.4",
        **{f"v2-base/bk_{name}": f"bk-v2-{name}" for name in (*STUDENTS, "extreme")},
        **{f"v1/bk_{name}": f"bk-v1-{name}" for name in STUDENTS},
        **{
            f"v1/C_{name}": f"bk-v1-channels-{name}"
            for name in ("base", "small", "tiny", "micro", "extreme")
        },
    }
    for theirs, name in ours.items():
        assert PUBLISHED_SD_UNETS[name] == config_from_diffusers(facts[theirs]["config"]), name


def test_the_formula_counts_what_is_built():
    for config in (TINY, TINY.replace(linear_projection=True, mid_block=False)):
        assert registry.config_parameters(config) == building.count_parameters(
            building.abstract(config)[1]
        )


# Students by blocks -------------------------------------------------------------------------------


def predict(student, teacher=PUBLISHED_SD_UNETS["sd-2.1-base"]):
    return BlockPruner().predict(ConfigDict({"student": student}), teacher)


def test_a_list_of_layers_says_what_a_published_student_is():
    teacher = PUBLISHED_SD_UNETS["sd-1.4"]
    up = "+".join(f"up_blocks.{i}.0+up_blocks.{i}.2" for i in range(1, 4))
    down = "down_blocks.0.0, down_blocks.1.0 down_blocks.2.0"
    assert predict(f"{up}+{down}", teacher) == predict("tiny", teacher)
    assert kept_layers("base", teacher)[3:7] == (
        "down_blocks.3.0",
        "mid_block",
        "up_blocks.0.0",
        "up_blocks.0.2",
    )


def test_any_layers_that_fit_make_a_student(teacher):
    """Two layers of one level, one of another; the last level gone, the middle kept."""
    text = (
        "down_blocks.0,down_blocks.1.0,down_blocks.2.0,mid_block,"
        "up_blocks.1.0,up_blocks.1.2,up_blocks.2.0,up_blocks.2.2,up_blocks.3"
    )
    kept = kept_layers(text, teacher.config)
    tools = ConfigDict()
    tools.tensors = weights.to_torch
    made = BlockPruner().prune(ConfigDict({"student": text}), teacher, tools)
    assert made.config.layers == (2, 1, 1) and made.config.mid_block
    assert made.config.widths == (16, 32, 48) and made.config.up_attention == (True,) * 3
    assert made.record == {"student": text, "kept": list(kept), "cut": []}
    from_tensors(made.config, made.tensors)  # which names every tensor that does not fit
    assert made.config == student_config(teacher.config, kept)
    assert published_layer_map(made.config, teacher.config)["up_blocks.2"] == "up_blocks.3"


def test_the_extreme_student_drops_channels_of_the_level_that_is_gone(teacher, pruned, inputs):
    config, tensors, cuts = pruned("extreme")
    source = weights.to_torch(teacher.params)
    name, theirs = "up_blocks.0.resnets.0", "up_blocks.2.resnets.0"
    leaves = ("norm1.weight", "norm1.bias", "conv1.weight", "conv_shortcut.weight")
    assert sorted(cuts) == sorted(f"{name}.{leaf}" for leaf in leaves)
    # 48 channels come from the level below there and 32 here; 32 of the skip follow.
    stay = np.r_[0:32, 48:80]
    np.testing.assert_array_equal(
        tensors[f"{name}.conv1.weight"], source[f"{theirs}.conv1.weight"][:, stay]
    )
    np.testing.assert_array_equal(
        tensors[f"{name}.norm1.weight"], source[f"{theirs}.norm1.weight"][stay]
    )
    for ours, value in tensors.items():
        if ours not in cuts:
            same = re.sub("(?<=up_blocks.)([01])", lambda m: str(int(m[1]) + 2), ours)
            same = same.replace("s.1.", "s.2.") if ours.startswith("up_") else ours
            np.testing.assert_array_equal(value, source[same], err_msg=ours)
    network = from_tensors(config, tensors)
    _, features = run(network, *inputs)
    pairs = config.layer_map(teacher.config)
    assert pairs == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1.attentions.0.proj_out": "down_blocks.1.attentions.1.proj_out",
        "up_blocks.0": "up_blocks.2",
        "up_blocks.1": "up_blocks.3",
    }
    _, theirs = run(teacher, *inputs)
    assert all(features[s].shape == theirs[t].shape for s, t in pairs.items())


@pytest.mark.parametrize("student, message", [
    ("huge", "must be one of .*'base', .* or layers that stay such as .*, got 'huge'"),
    ("down_blocks.4.0", "the teacher has no down_blocks.4.0: it has .*'down_blocks.3', 'mid_"),
    ("down_blocks.0.2", "no down_blocks.0.2: down_blocks.0 has 2 layers"),
    ("down_blocks.1,up_blocks.2", "no layer of down_blocks.0 stays"),
    ("down_blocks.0,down_blocks.2,up_blocks.3", "no layer of down_blocks.1 stays"),
    ("down_blocks.0.0,up_blocks.3", "1 layers of down_blocks.0 stay, so 2 of up_blocks.3 must, "
     "which takes their outputs, not 3"),
    ("down_blocks.0,up_blocks.3,up_blocks.0.0", "0 layers of down_blocks.3 .* 0 of up_blocks.0"),
    ("down_blocks.0,down_blocks.1.1,up_blocks.2.0,up_blocks.2.2,up_blocks.3",
     "down_blocks.1.1 of the teacher takes 640 channels of the layer before it and 0 of a skip, in "
     "the student it would get 320 and 0"),
    ("down_blocks.0,down_blocks.1.0,up_blocks.2.0,up_blocks.2.1,up_blocks.3",
     "up_blocks.2.1 of the teacher takes 640 .* 640 of a skip, .* would get 640 and 320"),
    ("down_blocks.0,mid_block,up_blocks.3",
     "mid_block has 1280 channels and 20 heads, the last level that stays 320 and 5: leave mid_b"),
    (",".join(b.name for b in PUBLISHED_SD_UNETS["sd-1.4"].blocks()), "all of .* layers stay"),
])  # fmt: skip
def test_layers_that_make_no_student_are_refused(student, message):
    with pytest.raises(ValueError, match=f"^student.*{message}"):
        predict(student)


def test_students_that_a_small_teacher_has_not():
    with pytest.raises(ValueError, match="'extreme' has 2 levels less, the teacher has 2"):
        predict("extreme", TINY)
    with pytest.raises(ValueError, match="all of the teacher's layers stay"):
        predict("base", TINY)
    with pytest.raises(ValueError, match="a student of 2 levels has more than its teacher of 1"):
        TINY.layer_map(predict("tiny", TINY))


@pytest.mark.parametrize("network, student", [
    ("sd-2.1-base", "base"), ("sd-1.4", "small"), ("sd-2.1", "tiny"), ("sd-1.5", "extreme"),
])  # fmt: skip
def test_published_experiments_and_their_miniatures(network, student):
    config, _ = family_config(None, "sd", "sd_unet", network, student=student)
    assert (
        registry.config_from_dict(config.model.to_dict(), partial=True)
        == (PUBLISHED_SD_UNETS[network])
    )
    assert (config.process.schedule, config.process.beta_start) == ("scaled_linear", 0.00085)
    assert config.distill.optimizer.weight_decay == 1e-2 and config.distill.loss.variant == "sd"
    small = runlocal(config)
    teacher = registry.config_from_dict(small.model.to_dict(), partial=True)
    blocks = [block.name for block in teacher.blocks()]
    assert blocks == [block.name for block in PUBLISHED_SD_UNETS[network].blocks()]
    made = BlockPruner().predict(small.compress, teacher)
    assert made.layers == tuple(1 for _ in made.widths) and registry.config_parameters(made) < 6e5


# The config and the network -----------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"widths": (8, 18)}, r"widths\[1\] 18 is no multiple of num_groups 4"),
    ({"heads": (3, 2)}, "heads: 3 do not divide the 8 channels of down_blocks.0"),
    ({"heads": (2, 3)}, "heads: 3 do not divide the 16 channels of mid_block"),
    ({"layers": (1,)}, r"layers \(1,\) must have one for each of the 2 widths"),
    ({"layers": 1}, "layers must be a sequence, one for each level, not 1"),
    ({"layers": (1, 0)}, r"layers\[1\] must be a whole number in 1..100"),
    ({"image_size": 5}, "image_size 5 cannot be halved 1 times"),
    ({"mid_block": None}, "mid_block must be a bool, not None"),
    ({"up_attention": (1, 0)}, r"up_attention\[0\] must be a bool, not 1"),
    ({"widths": (), "layers": (), "heads": (), "down_attention": (), "up_attention": ()},
     "widths is empty"),
])  # fmt: skip
def test_bad_configs_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_a_config_survives_json():
    fields = json.loads(json.dumps(TINY.described()))
    assert registry.config_from_dict(fields) == TINY
    assert TINY.replace(upcast_attention=True).architecture() == TINY.architecture()


def test_what_tensors_tell_of_a_config():
    params = building.abstract(TINY)[1]
    shapes = weights.published_shapes(params)
    tensors = {name: np.empty(shape) for name, shape in shapes.items()}
    seen = TINY.visible_in(tensors)
    assert seen == {name: getattr(TINY, name) for name in seen} and len(seen) == 5
    assert TINY.visible_in({"conv_in.weight": np.empty(3)}) == {}


X = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
T, CONTEXT = np.array([3, 700]), np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)


def test_remat_has_the_same_gradients_and_bfloat16_is_near():
    def gradient(graphdef, params):
        def loss(params):
            y, features = make_apply(graphdef)(params, X, T, True, None, CONTEXT)
            return jnp.sum(y**2) + jnp.sum(features["down_blocks.0.attentions.0.proj_out"] ** 2), y

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    # One level, for less to compile: two residual blocks on the way up, three transformers.
    small = TINY.replace(
        widths=(8,),
        layers=(1,),
        heads=(2,),
        down_attention=(True,),
        up_attention=(True,),
        mid_block=False,
    )
    graphdef, params = building.create(small, seed=1)
    expected, y = gradient(graphdef, params)
    found, same = gradient(building.abstract(small, remat="nothing_saveable")[0], params)
    np.testing.assert_allclose(same, y, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
    half, low = gradient(building.abstract(small, jnp.bfloat16)[0], params)
    assert low.dtype == jnp.float32 and not np.array_equal(low, y)
    np.testing.assert_allclose(low, y, atol=0.05)
    leaves = jax.tree.leaves(half)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in leaves)


def test_bad_inputs_name_the_argument():
    graphdef, params = building.create(TINY)
    for x, t, cond, message in [
        (X, T, None, r"cond must be the states of a text, of shape \(2, T, 6\), not None"),
        (X, T, CONTEXT[:1], r"not of shape \(1, 5, 6\)"),
        (X, T, CONTEXT[..., :5], r"not of shape \(2, 5, 5\)"),
        (X[:, :2], T, CONTEXT, r"x must have shape \(B, 4, 4, 4\), not"),
        (X, T[:1], CONTEXT, r"t must have shape \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda p, x, t, c: make_apply(graphdef)(p, x, t, False, None, c), params, x, t, cond
            )


def test_the_network_takes_what_its_conditioning_makes():
    graphdef, params = building.abstract(TINY)
    y, _ = jax.eval_shape(
        lambda p, x, t, c: make_apply(graphdef)(p, x, t, False, None, c),
        params,
        X,
        T,
        TINY.conditioning.inputs(2),
    )
    assert y.shape == X.shape
    TINY.conditioning.check_student(TINY.replace(widths=(16, 32)).conditioning)
    with pytest.raises(ValueError, match="text of width 8, the teacher's is 6"):
        TINY.conditioning.check_student(TINY.replace(context_dim=8).conditioning)


def test_initial_weights_are_those_of_pytorch():
    _, params = building.create(TINY, seed=0)
    tensors = weights.to_torch(params)
    for name, fan_in in (
        ("conv_in", 36),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 6),
    ):
        weight = tensors[f"{name}.weight"]
        assert 0.9 / np.sqrt(fan_in) < np.abs(weight).max() <= 1 / np.sqrt(fan_in)
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.bias" not in tensors
    assert (tensors["conv_norm_out.weight"] == 1).all()
