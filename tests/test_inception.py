"""The FID network against arrays of the PyTorch port, with generated weights."""

import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.evaluation import feature_extractor, resize_bilinear
from liftplace_jax.evaluation.inception import Inception


def generated(shapes):
    """The weights of the golden arrays, by the recipe that came with them."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.endswith("bn.weight"):
            value = rng.uniform(0.8, 1.2, shape)
        elif name.endswith(".bias"):
            value = 0.1 * rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        tensors[name] = value.astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def network(golden):
    _, meta = golden("inception_fid")
    tensors = generated(meta["shapes"])
    for name, (*first, total) in meta["probe"].items():
        np.testing.assert_allclose(tensors[name].ravel()[: len(first)], first, rtol=1e-6)
        np.testing.assert_allclose(tensors[name].sum(dtype=np.float64), total, rtol=1e-6)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Inception(nnx.Rngs(0))))
    params = jax.tree.map(jnp.asarray, weights.from_torch(params, tensors))
    return nnx.merge(graphdef, params), tensors


CASES = {
    "images64_bilinear": ("half_pixel", lambda x: x / 127.5 - 1),
    "images64_tf1_128": ("tensorflow1", lambda x: (x - 128) / 128),
    "image299": ("half_pixel", lambda x: x / 127.5 - 1),
}


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_the_pytorch_port(golden, network, case):
    arrays, _ = golden("inception_fid")
    model, tensors = network
    style, scale = CASES[case]
    images = np.moveaxis(arrays["in/images_uint8"], 1, -1)
    if case == "image299":
        images = np.random.default_rng(299).integers(0, 256, (1, 3, 299, 299)).astype(np.uint8)
        images = np.moveaxis(images, 1, -1)

    @jax.jit
    def features(images):
        x = scale(resize_bilinear(images, (299, 299), style))
        blocks = dict(model.blocks(x))
        means = {
            k: blocks[n].mean((1, 2))
            for k, n in (("64", "pool_3"), ("192", "pool_6"), ("768", "Mixed_6e"))
        }
        return model(x), means

    found, means = features(images)
    pool = arrays[f"out/{case}/pool_2048"]
    np.testing.assert_allclose(found["pool"], pool, atol=1e-4 * np.abs(pool).max())
    logits = arrays[f"out/{case}/logits_1008_unbiased"]
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4 * np.abs(logits).max())
    assert found["spatial"].shape == (len(images), 17 * 17 * 7)
    for width, mean in means.items():
        if f"out/{case}/spatial_mean_{width}" in arrays:
            expected = arrays[f"out/{case}/spatial_mean_{width}"]
            np.testing.assert_allclose(mean, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("style, name", [("tensorflow1", "tf1"), ("half_pixel", "bilinear")])
def test_resizing_is_that_of_the_published_tools(golden, style, name):
    arrays, _ = golden("eval_metrics")
    image = np.moveaxis(arrays["in/resize/image"], 1, -1)
    for shape in ((37, 37), (9, 11)):
        expected = np.moveaxis(arrays[f"out/resize/{name}_{shape[0]}x{shape[1]}"], 1, -1)
        found = resize_bilinear(image, shape, style)
        np.testing.assert_allclose(found, expected, atol=1e-5 * 255)
    large = resize_bilinear(image, (299, 299), style)
    expected = arrays[f"out/resize/{name}_299x299_first_image_channel0"]
    np.testing.assert_allclose(large[0, ..., 0], expected, atol=1e-5 * 255)
    np.testing.assert_array_equal(resize_bilinear(image, (16, 16), style), image)


def test_a_file_that_does_not_fit_is_refused_with_every_misfit(tmp_path):
    weights.write_safetensors(tmp_path / "other.safetensors", {"fc.bias": np.zeros(3, np.float32)})
    with pytest.raises(weights.WeightMismatchError) as error:
        feature_extractor("inception", tmp_path / "other.safetensors")
    text = str(error.value)
    assert "other.safetensors" in text and "fc.bias: has shape (3,)" in text
    assert len(text.splitlines()) < 20 and re.search(r"\n  and \d+ more$", text)
    assert "Mixed_7c.branch1x1.conv.weight" in dict(error.value.misfits)
    with pytest.raises(ValueError, match="'digits' come with their weights"):
        feature_extractor("digits", "some.pth")


def test_bad_input(network):
    with pytest.raises(ValueError, match=r"takes \(B, 299, 299, 3\), got \(1, 64, 64, 3\)"):
        network[0](jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="style must be one of"):
        resize_bilinear(jnp.zeros((1, 4, 4, 3)), (8, 8), "bicubic")
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, C\)"):
        resize_bilinear(jnp.zeros((4, 4, 3)), (8, 8), "half_pixel")
