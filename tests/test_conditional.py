"""Classes and latents outside the networks: sampling by class, guidance, labels of folders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from liftplace_jax import evaluation
from liftplace_jax.data import load_source
from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.host.sharding import batch_sharding, make_mesh

CLASSES = 5
MODEL = DiTConfig(
    image_size=2,
    patch_size=1,
    hidden_size=4,
    depth=1,
    num_heads=1,
    in_channels=2,
    num_classes=CLASSES,
)
FIELDS = dict(
    sampler="ddim",
    sample_steps=4,
    skip_type="uniform",
    eta=0.0,
    guidance=1.0,
    guidance_channels=None,
    precision="highest",
)
PROCESS = GaussianDiffusion(beta_schedule("linear", 8), variance="learned_range")
KEYS = jax.random.split(jax.random.key(0), 6)


def apply(params, x, t, return_features, dropout_key, cond):
    """A network that says the class (twice it, in the first channel); the null label says 0."""
    said = jnp.where(cond == CLASSES, 0.0, cond + 1.0)[:, None, None, None]
    mean = jnp.concatenate([2 * said, said], -1) + params * x
    return jnp.concatenate([mean, jnp.zeros_like(mean)], -1), {}


def sampler(**changes):
    decode = changes.pop("decode", None)
    return make_sampler(ConfigDict(FIELDS | changes), PROCESS, MODEL, apply, decode=decode)


def test_classes_are_drawn_from_the_keys_and_can_be_given():
    sample = jax.jit(sampler())
    images = sample(0.1, KEYS)
    assert images.shape == (6, 2, 2, 2)
    np.testing.assert_allclose(sample(0.1, KEYS[::-1])[::-1], images, atol=1e-5)
    one = jax.random.split(jax.random.key(1), 1)
    by_class = [sample(0.1, one, jnp.array([label])) for label in range(CLASSES)]
    # The class that the key draws is one of them; all differ.
    drawn = sample(0.1, one)
    assert sum(np.allclose(drawn, images, atol=1e-5) for images in by_class) == 1
    assert len({float(images.sum()) for images in by_class}) == CLASSES
    # Over many keys each class comes up about as often: the network says it, from pure noise.
    many = jax.random.split(jax.random.key(2), 400)
    by_class = np.stack([sample(0.0, many, jnp.full(400, label)) for label in range(CLASSES)])
    drawn = np.abs(by_class - sample(0.0, many)).max(axis=(2, 3, 4)) < 1e-4
    assert (drawn.sum(0) == 1).all() and drawn.sum(1).min() > 50


def test_random_samplers_need_no_memory_for_noise_to_come():
    """The noise of a step is drawn in that step; an image depends on its key alone."""
    process = GaussianDiffusion(beta_schedule("linear", 1000), variance="learned_range")

    def compiled(steps):
        fields = ConfigDict(FIELDS | {"sampler": "ancestral", "sample_steps": steps})
        return jax.jit(make_sampler(fields, process, MODEL, apply)).lower(0.1, KEYS).compile()

    few, many = (compiled(steps).memory_analysis().temp_size_in_bytes for steps in (10, 1000))
    noise = 1000 * 6 * np.prod(MODEL.shape) * 4
    assert many - few < noise / 2
    sample = jax.jit(sampler(sampler="ancestral", sample_steps=8))
    np.testing.assert_allclose(sample(0.1, KEYS[3:])[0], sample(0.1, KEYS)[3], atol=1e-5)
    assert np.abs(sample(0.1, KEYS)[0] - sample(0.1, KEYS)[1]).max() > 1e-3


def test_guidance_acts_on_the_channels_it_is_given():
    labels = jnp.array([0, 2, 3, 4, 2, 0])  # never such that the triple says the null label
    # Without the x term of the network, guidance by 3 is a class that says three times as much.
    plain, full, first = (
        sampler(**changes)(0.0, KEYS, labels)
        for changes in ({}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_channels": 1})
    )
    assert np.abs(full - plain).min() > 1e-3
    np.testing.assert_allclose(first[..., 0], full[..., 0], rtol=1e-5)
    np.testing.assert_allclose(first[..., 1], plain[..., 1], rtol=1e-5)
    tripled = 3 * (labels + 1) - 1
    np.testing.assert_allclose(sampler()(0.0, KEYS, tripled), full, rtol=1e-4, atol=1e-4)


def test_guidance_without_classes_or_without_a_null_label_is_refused():
    fields = ConfigDict(FIELDS | {"guidance": 2.0})
    with pytest.raises(ValueError, match="guidance 2.0 needs a network that is told something"):
        make_sampler(fields, PROCESS, UNetConfig(image_size=8, ch=8, num_groups=4), apply)
    with pytest.raises(ValueError, match="guidance_channels must be in 1..2, not 3"):
        sampler(guidance_channels=3)
    never_dropped = MODEL.replace(class_dropout=0.0)
    with pytest.raises(ValueError, match="guidance 2.0 needs .* null label"):
        make_sampler(fields, PROCESS, never_dropped, apply)(0.1, KEYS)


def test_latents_are_decoded_and_never_clipped():
    def decode(scale, latents):
        return scale * jnp.repeat(latents.sum(-1, keepdims=True), 2, axis=1)

    latents = sampler()(0.1, KEYS)
    images = sampler(decode=decode)((0.1, 10.0), KEYS)
    assert images.shape == (6, 4, 2, 1)
    np.testing.assert_allclose(images[:, ::2, :, 0], 10 * latents.sum(-1), rtol=1e-4, atol=1e-3)
    # Ancestral sampling clips pixels to 1, as published; latents have no range.
    noisy = {"sampler": "ancestral", "sample_steps": 8}
    assert np.abs(sampler(**noisy)(0.0, KEYS)).max() <= 1 + 1e-5
    assert np.abs(sampler(**noisy, decode=decode)((0.0, 1.0), KEYS)).max() > 2


@pytest.mark.parametrize("sharded", [False, True])
def test_samples_of_given_classes_count_exactly_on_any_devices(sharded):
    mesh = make_mesh({"data": -1})
    sharding = batch_sharding(mesh) if sharded else None
    labels = np.arange(11) % CLASSES

    @functools.cache
    def by_class():
        return lambda params, keys, labels=None: (
            jnp.ones((len(keys), 1, 1, 1))
            * (jnp.zeros(len(keys)) if labels is None else labels)[:, None, None, None]
            / 10
            + params
        )

    samples = evaluation.collect(
        by_class(),
        0.0,
        11,
        batch_size=8,
        extractor=None,
        seed=0,
        sharding=sharding,
        keep_images=11,
        condition=labels,
    )
    expected = np.round((labels / 10 + 1) * 127.5)
    np.testing.assert_array_equal(samples.images[:, 0, 0, 0], expected)
    with pytest.raises(ValueError, match="want 11 conditions, got an array of .10,."):
        evaluation.collect(
            by_class(), 0.0, 11, batch_size=8, extractor=None, seed=0, condition=labels[:10]
        )


def test_the_subfolders_of_a_folder_are_its_classes(tmp_path):
    for name, grey in (("b/one", 10), ("a/two", 20), ("a/deep/three", 30)):
        path = tmp_path / "train" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), grey).save(path)
    source = load_source("folder", "train", path=tmp_path)
    batch = source.get(np.arange(3))
    assert source.num_classes == 2
    assert dict(zip(batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist(), strict=True)) == {
        20: 0,
        30: 0,
        10: 1,
    }
    # One image beside the subfolders, and they are no classes.
    Image.new("L", (4, 4), 40).save(tmp_path / "train" / "loose.png")
    source = load_source("folder", "train", path=tmp_path)
    assert source.num_classes is None and not source.get(np.arange(4))["label"].any()
