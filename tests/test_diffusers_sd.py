"""diffusers' `UNet2DConditionModel` folders, against the library live."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import nhwc
from diffusers import UNet2DConditionModel

from liftplace_jax import weights
from liftplace_jax.families.loading import load_checkpoint, read_diffusers, write_diffusers
from liftplace_jax.families.sd_unet.config import SDUNetConfig
from liftplace_jax.families.sd_unet.diffusers import config_from_diffusers, config_to_diffusers
from liftplace_jax.families.sd_unet.published import PUBLISHED_SD_UNETS
from liftplace_jax.nn.network import make_apply
from liftplace_jax.weights.diffusers import DiffusersError

WEIGHTS = "diffusion_pytorch_model"
FIELDS = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
PEERS = {
    "v1": FIELDS | {"attention_head_dim": 2, "cross_attention_dim": 6},
    "v2": FIELDS | {"attention_head_dim": [2, 4], "cross_attention_dim": 10, "norm_eps": 1e-6,
                    "use_linear_projection": True, "upcast_attention": True},
    # Other layers and transformers at each level, nothing in the middle.
    "student": FIELDS | {"layers_per_block": [2, 1], "attention_head_dim": 4, "in_channels": 3,
                         "mid_block_type": None, "cross_attention_dim": 6, "out_channels": 5,
                         "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
}  # fmt: skip
# config.json of CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-2-1, as published.
SD14 = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": [*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": ["UpBlock2D", *3 * ["CrossAttnUpBlock2D"]],
}  # fmt: skip
SD21 = SD14 | {
    "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip


def inputs(config):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *config.shape)).astype(np.float32)
    return x, np.array([1, 999]), rng.normal(size=(2, 5, config.context_dim)).astype(np.float32)


@functools.cache
def peer(name):
    """A network of diffusers whose every parameter matters."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**PEERS[name]).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the folder of that peer, in a pipeline's."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name) / "unet"
        peer(name).save_pretrained(folder)
        return folder

    return save


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, x, t, context):
    """((gradients of half the sum of squares with respect to x and context), prediction)."""

    def loss(x, context):
        y = make_apply(graphdef)(params, x, t, False, None, context)[0]
        return 0.5 * jnp.sum(y**2), y

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, context)


@pytest.mark.parametrize("name", PEERS)
def test_live_and_written_back(saved, name, tmp_path):
    network = load_checkpoint(saved(name).parent)
    x, t, context = inputs(network.config)
    gradients, found = apply(network.graphdef, network.params, x, t, context)
    theirs = [torch.from_numpy(a.copy()).requires_grad_() for a in (np.moveaxis(x, -1, 1), context)]
    expected = peer(name)(theirs[0], torch.from_numpy(t), theirs[1]).sample
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, nhwc(expected.detach().numpy()), atol=2e-5)
    expected.square().sum().mul(0.5).backward()
    wanted = nhwc(theirs[0].grad.numpy()), theirs[1].grad.numpy()
    for gradient, value in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, value, rtol=0, atol=1e-4 * np.abs(value).max())

    write_diffusers(tmp_path / "out", network.config, network.params)
    back = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    both = [{k: v for k, v in m.config.items() if k[0] != "_"} for m in (back, peer(name))]
    assert both[0] == both[1] | {"attention_head_dim": both[0]["attention_head_dim"]}
    values, wanted = back.state_dict(), peer(name).state_dict()
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[key], value) for key, value in wanted.items())


def test_the_fields_are_read():
    assert config_from_diffusers(PEERS["student"]) == SDUNetConfig(
        image_size=8,
        in_channels=3,
        out_channels=5,
        widths=(8, 16),
        layers=(2, 1),
        heads=(4, 4),
        down_attention=(True, False),
        up_attention=(True, False),
        mid_block=False,
        context_dim=6,
        linear_projection=False,
        num_groups=4,
    )
    assert config_from_diffusers(SD14) == PUBLISHED_SD_UNETS["sd-1.4"]
    assert config_from_diffusers(SD21) == PUBLISHED_SD_UNETS["sd-2.1"]
    # One value for each level, the size as a pair, and the whole of a newer file.
    alike = {"cross_attention_dim": 4 * [768], "only_cross_attention": 4 * [False],
             "sample_size": [64, 64], "transformer_layers_per_block": 4 * [1]}  # fmt: skip
    assert config_from_diffusers(SD14 | alike) == PUBLISHED_SD_UNETS["sd-1.4"]
    assert config_from_diffusers(dict(peer("v2").config)) == config_from_diffusers(PEERS["v2"])
    for config in PUBLISHED_SD_UNETS.values():
        assert config_from_diffusers(config_to_diffusers(config)) == config


def renamed(folder):
    """Names of attention before diffusers 0.12."""
    path = folder / f"{WEIGHTS}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in weights.read_tensors(path).items():
        for ours, theirs in old.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        tensors[name] = value
    assert sum(".query." in name for name in tensors) == 8
    weights.write_safetensors(path, tensors)


def saved_as(**options):
    def save(folder):
        (folder / f"{WEIGHTS}.safetensors").unlink()
        peer("v2").save_pretrained(folder, **options)
        assert len(list(folder.glob(f"{WEIGHTS}*index.json"))) == ("max_shard_size" in options)

    return save


@pytest.mark.parametrize(
    "change, entry",
    [
        (renamed, None),
        (saved_as(safe_serialization=False), None),
        (saved_as(max_shard_size="40KB"), None),
        (saved_as(max_shard_size="40KB", safe_serialization=False), None),
        (saved_as(variant="fp16"), "fp16"),
        (saved_as(variant="fp16", safe_serialization=False), "fp16"),
    ],
    ids=["old names", "bin", "shards", "shards of bin", "fp16", "fp16 of bin"],
)
def test_all_layouts_of_files_are_read(saved, tmp_path, change, entry):
    folder = shutil.copytree(saved("v2"), tmp_path / "unet")
    change(folder)
    config, tensors = read_diffusers(tmp_path, entry)
    expected = read_diffusers(saved("v2"))
    assert config == expected[0] and tensors.keys() == expected[1].keys()
    assert all(np.array_equal(tensors[name], value) for name, value in expected[1].items())
    if entry:
        with pytest.raises(weights.EntryError, match=r"only the variants \['fp16'\]: choose one"):
            read_diffusers(tmp_path)


def test_a_file_alone_is_read_with_its_config(saved):
    """The names are those of our own files, so nothing is to be told apart."""
    path = saved("v1") / f"{WEIGHTS}.safetensors"
    config = config_from_diffusers(PEERS["v1"])
    assert load_checkpoint(path, config).config == config
    # What no weight tells is as the config says.
    larger = config.replace(image_size=16, upcast_attention=True)
    assert load_checkpoint(saved("v1"), larger).config == larger
    with pytest.raises(ValueError, match=r"safetensors is not what .*\n  layers: .*\n  mid_block"):
        load_checkpoint(path, config.replace(layers=(1, 2), mid_block=False))


def test_tensors_that_do_not_fit_are_listed_by_their_own_names(saved, tmp_path):
    folder = shutil.copytree(saved("v1"), tmp_path / "unet")
    tensors = weights.read_tensors(folder / f"{WEIGHTS}.safetensors")
    block = "down_blocks.0.attentions.0"
    del tensors[f"{block}.proj_in.bias"]
    tensors[f"{block}.proj_out.weight"] = np.zeros((8, 8), np.float32)
    tensors["up_blocks.2.resnets.0.conv1.bias"] = np.zeros(8, np.float32)
    weights.write_safetensors(folder / f"{WEIGHTS}.safetensors", tensors)
    with pytest.raises(weights.WeightMismatchError, match="unet: 3 tensors") as error:
        read_diffusers(folder)
    assert error.value.misfits == [
        (f"{block}.proj_in.bias", "missing, the model needs (8,)"),
        (f"{block}.proj_out.weight", "has shape (8, 8), the model needs (8, 8, 1, 1)"),
        ("up_blocks.2.resnets.0.conv1.bias", "unexpected, of shape (8,)"),
    ]


@pytest.mark.parametrize("changes, message", [
    ({"addition_embed_type": "text_time", "transformer_layers_per_block": [1, 2]},
     r"2 fields cannot(?s:.*)addition_embed_type 'text_time': must be None\n  transformer_layers_"
     r"per_block \[1, 2\]: must be 1"),  # SDXL
    ({"class_embed_type": "projection"}, "class_embed_type 'projection': must be None"),
    ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type 'UNetMidBlock2D': must be UNetMidBlock"),
    ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
     r"down_block_types \['SimpleCrossAttnDownBlock2D'\]: must be one DownBlock2D or CrossAttnDo"),
    ({"up_block_types": ["UpBlock2D"]}, "up_block_types .* for each of the 2 block_out_channels"),
    ({"layers_per_block": [1]}, r"layers_per_block \[1\]: must be a number above 0, or one for"),
    ({"attention_head_dim": 3},
     r"heads: 3 do not divide .* \(heads is diffusers' attention_head_dim\)"),
    ({"norm_num_groups": 3}, r"widths\[0\] 8 is no multiple of num_groups 3"),
    ({"block_out_channels": 8}, "block_out_channels 8: must be widths"),
    ({"cross_attention_dim": [6, 8]}, r"cross_attention_dim \[6, 8\]: must be a number above 0"),
    ({"sample_size": None}, "sample_size None: must be the height and width of square images"),
    ({"sample_size": [8, 16]}, r"sample_size \[8, 16\]: must be"),
    ({"time_embedding_dim": 40}, "time_embedding_dim 40: must be 32, or null"),
    ({"use_linear_projection": None}, "use_linear_projection None: must be true or false"),
    ({"window": 7}, "window 7: not a field known here"),
])  # fmt: skip
def test_fields_that_our_unet_cannot_be_are_listed(tmp_path, changes, message):
    fields = {"_class_name": "UNet2DConditionModel"} | PEERS["v1"] | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DiffusersError, match=f"config.json: (?s:.*){message}"):
        load_checkpoint(tmp_path)
