"""The autoencoder of Stable Diffusion, against golden arrays and diffusers live."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import nhwc
from diffusers import AutoencoderKL
from flax import nnx
from torch_unet import randomise

from liftplace_jax import weights
from liftplace_jax.diffusion.scaling import from_latents, to_latents
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.encoders.autoencoder_folder import (
    config_from_diffusers,
    load_autoencoder,
)
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.host import sharding
from liftplace_jax.nn import building

# config.json of stabilityai/sd-vae-ft-mse, and of "vae" in stabilityai/stable-diffusion-3-medium.
SD = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": 4 * ["DownEncoderBlock2D"],
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 256, "up_block_types": 4 * ["UpDecoderBlock2D"],
}  # fmt: skip
SD3 = SD | {
    "force_upcast": True, "latent_channels": 16, "latents_mean": None, "latents_std": None,
    "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
TINY = SD | {
    "block_out_channels": [8, 12], "down_block_types": 2 * ["DownEncoderBlock2D"],
    "in_channels": 1, "layers_per_block": 1, "norm_num_groups": 4, "out_channels": 1,
    "sample_size": 8, "scaling_factor": 0.5, "shift_factor": 0.25,
    "up_block_types": 2 * ["UpDecoderBlock2D"],
}  # fmt: skip
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
LATENTS = RNG.normal(size=(8, 4, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def peer():
    return randomise(AutoencoderKL(**{k: v for k, v in TINY.items() if k[0] != "_"}))


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd-vae")
    peer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def network(folder):
    return load_autoencoder(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "autoencoder"))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x, z):
    model = nnx.merge(graphdef, params)
    return *model.encode(x), model.decode(z)


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peer_vae", "peer_vae_sd3"])
def test_golden(golden, tmp_path, name):
    arrays, meta = golden(name)
    tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    fields = {"_class_name": "AutoencoderKL"} | meta["config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    weights.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    network = load_autoencoder(tmp_path)
    assert building.count_parameters(network.params) == meta["num_params"]
    found = run(network.graphdef, network.params, *(nhwc(arrays[f"in/{k}"]) for k in "xz"))
    for key, value in zip(("mean", "logvar", "decoded"), found, strict=True):
        np.testing.assert_allclose(value, nhwc(arrays[f"out/{key}"]), atol=5e-5)


def test_live_outputs_and_gradients(peer, network):
    x, z = (torch.from_numpy(np.moveaxis(a, -1, 1).copy()) for a in (IMAGES, LATENTS))
    z.requires_grad_(True)
    gaussian, decoded = peer.encode(x).latent_dist, peer.decode(z).sample
    (decoded**2).sum().backward()
    expected = [nhwc(v.detach().numpy()) for v in (gaussian.mean, gaussian.logvar, decoded)]
    found = run(network.graphdef, network.params, IMAGES, LATENTS)
    for value, wanted in zip(found, expected, strict=True):
        assert wanted.std() > 0.1
        np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max())

    decoder = network.decoder()

    def loss(latents):
        return (decoder.decode(decoder.params, latents) ** 2).sum()

    # `decode` takes latents as a network sees them.
    scaled = to_latents(LATENTS, TINY["shift_factor"], TINY["scaling_factor"])
    gradient = jax.jit(jax.grad(loss))(scaled)
    wanted = nhwc(z.grad.numpy()) / TINY["scaling_factor"]
    np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max())


def test_log_variance_is_limited(network):
    params = jax.tree.map(lambda value: 30 * value, network.params)
    _, logvar, _ = run(network.graphdef, params, IMAGES, LATENTS)
    assert logvar.min() == -30 and logvar.max() == 20


def test_bfloat16_on_many_devices(network):
    fast = building.abstract(network.config, jnp.bfloat16)[0]
    mesh = sharding.make_mesh({"data": -1})
    inputs = jax.device_put((IMAGES, LATENTS), sharding.batch_sharding(mesh))
    expected = run(network.graphdef, network.params, IMAGES, LATENTS)
    for graphdef, tolerance in ((network.graphdef, 1e-5), (fast, 5e-2)):
        found = run(graphdef, network.params, *inputs)
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == jnp.float32 and len(value.sharding.device_set) == 8
            np.testing.assert_allclose(value, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_decoders_have_a_dtype_of_their_own_and_only_what_decodes(network, dtype, size):
    decoder = network.decoder(dtype)
    needed = {k: v for k, v in network.params.items() if k in ("decoder", "post_quant_conv")}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.params))
    assert held == size * building.count_parameters(needed)
    assert 3 * building.count_parameters(needed) < 2 * building.count_parameters(network.params)
    scaled = to_latents(LATENTS, TINY["shift_factor"], TINY["scaling_factor"])
    found = jax.jit(decoder.decode)(decoder.params, scaled)
    graphdef = building.abstract(network.config, jnp.dtype(dtype))[0]

    @jax.jit
    def casting(params, latents):
        z = from_latents(latents, TINY["shift_factor"], TINY["scaling_factor"])
        return nnx.merge(graphdef, params).decode(z)

    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, casting(network.params, scaled))
    whole = network.decoder()
    wanted = jax.jit(whole.decode)(whole.params, scaled)
    close = 0 if dtype == "float32" else 5e-2 * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=close)


@pytest.mark.parametrize("shape, tile, dtype", [
    ((2, 13, 9), 12, "float32"), ((1, 6, 21), 15, "bfloat16"),
])  # fmt: skip
def test_tiles_are_as_the_whole_image(network, shape, tile, dtype):
    """Sizes that no tile divides, and ones that are narrower than a tile."""
    latents = np.random.default_rng(1).normal(size=(*shape, 4)).astype(np.float32)
    latents[:, : shape[1] // 2] *= 4  # tiles must not go by their own statistics
    whole, tiled = network.decoder(dtype), network.decoder(dtype, tile)
    wanted = np.asarray(jax.jit(whole.decode)(whole.params, latents))
    found = np.asarray(jax.jit(tiled.decode)(tiled.params, latents))
    assert found.shape == (shape[0], 2 * shape[1], 2 * shape[2], 1)
    close = {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * np.ptp(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=close)


def test_tiles_take_less_memory_and_images_within_one_are_as_ever(network):
    whole, tiled = network.decoder(), network.decoder(tile=32)
    large = jax.ShapeDtypeStruct((1, 128, 128, 4), np.float32)
    held = [
        jax.jit(decoder.decode).lower(decoder.params, large).compile().memory_analysis()
        for decoder in (whole, tiled)
    ]
    assert held[1].temp_size_in_bytes * 3 < held[0].temp_size_in_bytes
    small = np.random.default_rng(1).normal(size=(2, 16, 11, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        *(jax.jit(decoder.decode)(decoder.params, small) for decoder in (whole, tiled))
    )


def test_tiles_of_batches_that_are_split_over_devices(network):
    decoder = network.decoder(tile=8)
    wanted = jax.jit(decoder.decode)(decoder.params, LATENTS.repeat(2, axis=1))
    mesh = sharding.make_mesh({"data": -1})
    latents = jax.device_put(LATENTS.repeat(2, axis=1), sharding.batch_sharding(mesh))
    found = jax.jit(decoder.decode)(decoder.params, latents)
    assert not found.sharding.is_fully_replicated
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("fields, count", [(SD, 83_653_863), (SD3, 83_819_683)])
def test_published_configs(fields, count):
    config = config_from_diffusers(fields)
    assert building.count_parameters(building.abstract(config)[1]) == count
    assert config.downsampling == 8
    scales = (config.scaling_factor, config.shift_factor)
    assert scales == ((0.18215, 0.0) if fields is SD else (1.5305, 0.0609))
    if fields is SD:
        assert config == AutoencoderConfig(sample_size=256)


def test_latents_there_and_back():
    scaled = to_latents(LATENTS, 0.0609, 1.5305)
    assert scaled[0, 0, 0, 0] == (LATENTS[0, 0, 0, 0] - 0.0609) * 1.5305
    np.testing.assert_allclose(from_latents(scaled, 0.0609, 1.5305), LATENTS, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_out_channels": ()}, "block_out_channels must be a sequence of widths"),
        ({"block_out_channels": (32, 0)}, r"block_out_channels\[1\] must be a whole number in 1"),
        ({"block_out_channels": (32, 48)}, "norm_num_groups 32 does not divide the width 48"),
        ({"scaling_factor": 0}, r"scaling_factor must be a number in \(0, .*got 0"),
        ({"shift_factor": float("nan")}, r"shift_factor must be a number in \[-1e.06, .*got nan"),
        ({"use_quant_conv": 1}, "use_quant_conv must be a bool"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**changes)


@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 8, 9, 1), (2, 8, 8, 3)])
def test_other_shapes_are_refused(network, shape):
    model = nnx.merge(network.graphdef, network.params)
    message = r"images must have shape \(B, H, W, 1\) with H and W multiples of 2, not"
    with pytest.raises(ValueError, match=message):
        model.encode(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"latents must have shape \(B, h, w, 4\), not"):
        model.decode(jnp.zeros(shape))


# Folders ------------------------------------------------------------------------------------------


def as_old_bin(folder):
    """As the first published folders are: other names of attention, 1x1 convolutions there."""
    path = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in weights.read_tensors(path).items():
        if ".attentions." in name and value.ndim == 2:
            value = value[:, :, None, None]
        name = re.sub("|".join(map(re.escape, old)), lambda match: old[match[0]], name)
        tensors[name] = torch.from_numpy(value.copy())
    assert sum(".proj_attn." in name for name in tensors) == 4
    torch.save(tensors, path.with_suffix(".bin"))
    path.unlink()
    return folder


def as_pipeline(folder):
    (folder.parent / "pipeline").mkdir()
    folder.rename(folder.parent / "pipeline" / "vae")
    (folder.parent / "pipeline" / "model_index.json").write_text("{}")
    return folder.parent / "pipeline"


def as_ours(folder):
    network = load_autoencoder(folder)
    path = folder.parent / "ours"
    weights.save_model(path, network.config.described(), network.params)
    return path


@pytest.mark.parametrize("change", [as_old_bin, as_pipeline, as_ours])
def test_other_layouts_hold_the_same(network, copy, change):
    path = change(copy)
    found = load_autoencoder(path)
    assert found.config == network.config and found.sha256 == network.sha256
    assert found.name == path.name
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, network.params))


def test_the_digest_is_of_the_weights(network, copy):
    assert re.fullmatch("[0-9a-f]{64}", network.sha256)
    path = copy / "diffusion_pytorch_model.safetensors"
    tensors = weights.read_tensors(path)
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"] * 1.01
    weights.write_safetensors(path, tensors)
    assert load_autoencoder(copy).sha256 != network.sha256


def test_every_misfit_is_listed(copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    tensors = weights.read_tensors(path)
    del tensors["quant_conv.bias"]
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"][:, :3]
    tensors["encoder.extra"] = np.zeros(3, np.float32)
    weights.write_safetensors(path, tensors)
    with pytest.raises(weights.WeightMismatchError) as caught:
        load_autoencoder(copy)
    message = str(caught.value)
    assert f"{copy}: 3 tensors do not fit" in message
    assert "quant_conv.bias: missing, the model needs (8,)" in message
    assert "decoder.conv_out.weight: has shape (1, 3, 3, 3)" in message
    assert "encoder.extra: unexpected, of shape (3,)" in message


def test_every_field_that_cannot_be_is_listed(copy):
    changes = {
        "_class_name": "AutoencoderDC", "act_fn": "gelu", "latents_mean": [0.0],
        "mid_block_add_attention": False, "tiling": True,
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    }  # fmt: skip
    (copy / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(ValueError, match="config.json: not .* 7 fields cannot be") as caught:
        load_autoencoder(copy)
    for name in changes:
        assert f"\n  {name} " in str(caught.value)


def write_unet(path):
    config = UNetConfig(image_size=8, ch=8, ch_mult=(1,), num_groups=4)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), building.abstract(config)[1])
    weights.save_model(path, config.described(), zeros)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: shutil.rmtree(path), "no config.json of an autoencoder there, or in vae/"),
        (lambda path: (path / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda path: (path / "config.json").write_text("[1]"), "config.json: cannot be read"),
        (write_unet, "holds a 'unet', not an autoencoder"),
        (
            lambda path: (path / "diffusion_pytorch_model.safetensors").unlink(),
            "no diffusion_pytorch_model.safetensors or .bin there",
        ),
        (
            lambda path: (path / "config.json").write_text(
                json.dumps(TINY | {"norm_num_groups": 5})
            ),
            "config.json: norm_num_groups 5 does not divide the width 8",
        ),
    ],
)
def test_bad_folders(copy, change, message):
    change(copy)
    with pytest.raises(ValueError, match=message):
        load_autoencoder(copy)
