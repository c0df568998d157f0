"""diffusers' `DiTTransformer2DModel` folders, against the arrays of one and the library live."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from conftest import nhwc
from diffusers import DiTTransformer2DModel

from liftplace_jax import weights
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.loading import load_checkpoint, read_diffusers, write_diffusers
from liftplace_jax.nn import building
from liftplace_jax.nn.layers import position_embedding
from liftplace_jax.nn.network import make_apply
from liftplace_jax.weights.diffusers import DiffusersError

WEIGHTS = "diffusion_pytorch_model"
FIELDS = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
# config.json of facebook/DiT-XL-2-256, as published.
PUBLISHED = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72,
    "cross_attention_dim": None, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero",
    "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28,
    "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8, "patch_size": 2,
    "sample_size": 32, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
X = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
T, LABELS = np.array([0, 17, 999]), np.array([0, 4, 5])


@functools.cache
def peer(equal):
    """A network of diffusers whose blocks have equal embedders, or each its own."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**FIELDS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if equal:
        first, *others = model.transformer_blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """equal -> the folder of `peer(equal)`."""
    folders = {}
    for equal in (True, False):
        folders[equal] = tmp_path_factory.mktemp("diffusers") / "transformer"
        peer(equal).save_pretrained(folders[equal])
    return folders


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[False], tmp_path / "transformer")


def torch_output(model):
    x = torch.from_numpy(np.moveaxis(X, -1, 1).copy())
    with torch.no_grad():
        return nhwc(model(x, torch.from_numpy(T), torch.from_numpy(LABELS)).sample.numpy())


def output(network, *arrays):
    apply = jax.jit(make_apply(network.graphdef), static_argnums=(3, 4))
    x, t, labels = arrays
    return apply(network.params, x, t, True, None, labels)


def test_published_arrays(golden, tmp_path):
    arrays, meta = golden("peer_dit")
    tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    weights.write_safetensors(tmp_path / f"{WEIGHTS}.safetensors", tensors)
    fields = meta["config"] | {"_class_name": "DiTTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    network = load_checkpoint(tmp_path)
    assert network.config.embedders == "per_block"
    y, features = output(
        network, nhwc(arrays["in/hidden_states"]), arrays["in/timestep"], arrays["in/class_labels"]
    )
    np.testing.assert_allclose(y, nhwc(arrays["out/sample"]), atol=5e-5)
    for name, feature in features.items():
        np.testing.assert_allclose(feature, arrays[f"out/block/transformer_{name}"], atol=5e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_live_and_written_back(saved, equal, tmp_path):
    network = load_checkpoint(saved[equal].parent)  # as a pipeline's
    assert network.config == DiTConfig(
        image_size=8,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        frequency_shift=1,
        norm_epsilon=1e-5,
        embedders="shared" if equal else "per_block",
    )
    np.testing.assert_allclose(
        output(network, X, T, LABELS)[0], torch_output(peer(equal)), atol=1e-5
    )
    write_diffusers(tmp_path / "out", network.config, network.params)
    back = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    fields = [{k: v for k, v in m.config.items() if k[0] != "_"} for m in (back, peer(equal))]
    assert fields[0] == fields[1]
    found, expected = back.state_dict(), peer(equal).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_published_pipelines_layout_loads(copy):
    """The class's former name, PyTorch's file, stored positions."""
    tensors = peer(False).state_dict()
    tensors["pos_embed.pos_embed"] = torch.from_numpy(position_embedding(16, 4))
    torch.save(tensors, copy / f"{WEIGHTS}.bin")
    (copy / f"{WEIGHTS}.safetensors").unlink()
    fields = PUBLISHED | FIELDS
    (copy / "config.json").write_text(json.dumps(fields))
    network = load_checkpoint(copy)
    expected = weights.to_torch(load_checkpoint(copy.parent).params)
    for name, value in weights.to_torch(network.params).items():
        np.testing.assert_array_equal(value, expected[name])
    with pytest.raises(ValueError, match="is the weights of diffusers alone: give its folder"):
        load_checkpoint(copy / f"{WEIGHTS}.bin", network.config)
    with pytest.raises(ValueError, match="transformer is not what .*\n  depth: 2 -> 3\nSet"):
        load_checkpoint(copy, network.config.replace(depth=3))


@pytest.mark.parametrize("changes, message", [
    ({"activation_fn": "geglu"}, "activation_fn 'geglu': must be 'gelu-approximate'"),
    ({"norm_type": "layer_norm", "dropout": 0.1},
     "2 fields cannot(?s:.*)dropout 0.1: must be 0.0\n  norm_type 'layer_norm': must be"),
    ({"num_layers": None}, "num_layers None: must be a number above 0"),
    ({"out_channels": 5}, "out_channels 5: must be in_channels 4, or twice as many"),
    ({"patch_size": 3}, "image_size 8 must be a multiple of patch_size 3"),
    ({"caption_channels": 9}, "caption_channels 9: must be None"),
    ({"window": 7}, "window 7: not a field known here"),
    ({"_class_name": "Transformer2DModel"},
     r"attention_bias False \(the default, as the field is absent\): must be True"),
    ({"_class_name": "FluxTransformer2DModel"},
     "_class_name 'FluxTransformer2DModel': no network known here, .* a DiTTransformer2DModel"),
])  # fmt: skip
def test_fields_that_our_dit_cannot_be_are_listed(tmp_path, changes, message):
    fields = {"_class_name": "DiTTransformer2DModel"} | FIELDS | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DiffusersError, match=f"config.json: (?s:.*){message}"):
        load_checkpoint(tmp_path)


def test_tensors_that_do_not_fit_are_listed_by_their_own_names(copy):
    tensors = weights.read_tensors(copy / f"{WEIGHTS}.safetensors")
    del tensors["transformer_blocks.1.attn1.to_k.weight"]
    tensors["transformer_blocks.0.attn1.to_v.bias"] = np.zeros(9, np.float32)
    tensors["transformer_blocks.2.ff.net.2.bias"] = np.zeros(16, np.float32)
    weights.write_safetensors(copy / f"{WEIGHTS}.safetensors", tensors)
    with pytest.raises(weights.WeightMismatchError, match="transformer: 3 tensors") as error:
        read_diffusers(copy)
    assert error.value.misfits == [
        ("transformer_blocks.0.attn1.to_v.bias", "has shape (9,), the model needs (16,)"),
        ("transformer_blocks.1.attn1.to_k.weight", "missing, the model needs (16, 16)"),
        ("transformer_blocks.2.ff.net.2.bias", "unexpected, of shape (16,)"),
    ]


def test_what_diffusers_cannot_be_is_refused_and_nothing_written(saved, tmp_path):
    published = DiTConfig(
        image_size=4,
        hidden_size=8,
        depth=1,
        num_heads=2,
        num_classes=2,
        mlp_ratio=2.0,
        class_dropout=0.0,
    )
    with pytest.raises(DiffusersError, match="no DiTTransformer2DModel is equal") as error:
        write_diffusers(tmp_path / "out", published, building.create(published)[1])
    for field in ("frequency_shift 0: must be 1, ", "mlp_ratio 2.0: must be 4", "class_dropout 0"):
        assert f"\n  {field}" in str(error.value)
    network = load_checkpoint(saved[True])
    network.params["pos_embed"] += 1
    with pytest.raises(DiffusersError, match="pos_embed is not the sines and cosines"):
        write_diffusers(tmp_path / "out", network.config, network.params)
    with pytest.raises(DiffusersError, match="no network of dict can be written, only a UNet2DM"):
        write_diffusers(tmp_path / "out", {}, network.params)
    assert not list(tmp_path.iterdir())
