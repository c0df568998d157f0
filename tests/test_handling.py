"""What is done to images before they are looked at: JPEG, resizing, splits, by Pillow and peers."""

import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from torch_fidelity.metric_isc import isc_features_to_metric

from liftplace_jax import evaluation
from liftplace_jax.evaluation import Extractor, inception_features
from liftplace_jax.evaluation.handling import handling_of, said_of_reference
from liftplace_jax.evaluation.metrics import INCEPTION_RULES, inception_score
from liftplace_jax.evaluation.sides import open_images
from liftplace_jax.experiment.checks import check_config
from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.host import sharding

RNG = np.random.default_rng(0)


def picture(height, width, channels=3):
    """Smooth, as photographs are, with some noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (5 + c)) * np.cos(y / (7 - c)) for c in range(channels)], -1)
    noisy = 127 + 100 * waves + RNG.normal(0, 8, (height, width, channels))
    return noisy.clip(0, 255).astype(np.uint8)


def published(image, folder):
    """A sample as BK-SDM handles it, by files: saved, read, resized, saved, read."""
    grey = image.shape[2] == 1
    Image.fromarray(image[..., 0] if grey else image).save(folder / "512.jpg")
    small = Image.open(folder / "512.jpg").resize((256, 256))
    small.save(folder / "256.jpg")
    return np.asarray(Image.open(folder / "256.jpg")).reshape(256, 256, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_handled_as_bk_sdm_handles_files(tmp_path, channels):
    handling = evaluation.Handling(jpeg_before=75, resize=256, jpeg=75)
    assert handling.identity == {
        name: evaluation.BK_SDM[name] for name in ("jpeg_before", "resize", "jpeg")
    }
    image = picture(512, 512, channels)
    np.testing.assert_array_equal(handling(image), published(image, tmp_path))
    assert handling.shape((512, 512, channels)) == (256, 256, channels)
    # Every part can be switched off, and makes a difference.
    parts = [
        evaluation.Handling(**handling.identity | {name: None if name == "resize" else 0})
        for name in handling.identity
    ]
    found = [part(image) for part in (handling, *parts)]
    assert found[2].shape == (512, 512, channels)
    assert len({one.tobytes() for one in found}) == 4
    assert not evaluation.Handling() and evaluation.Handling()(image) is image


def test_real_images_are_squeezed_and_saved_once(tmp_path, colours_extractor):
    folder = tmp_path / "real"
    folder.mkdir()
    for number, (height, width) in enumerate([(40, 64), (64, 40), (48, 48)]):
        Image.fromarray(picture(height, width)).save(folder / f"{number}.png")
    handling = evaluation.Handling(jpeg_before=75, resize=32, jpeg=75).of_real
    assert handling == evaluation.Handling(resize=32, jpeg=75)
    source = open_images(folder, colours_extractor, None, handling, squeeze=True)
    found = evaluation.reference(
        source, None, batch_size=2, keep_images=3, look=evaluation.Look(handling)
    ).images
    for number, image in enumerate(found):
        file = io.BytesIO()
        Image.open(folder / f"{number}.png").resize((32, 32)).save(file, "JPEG")
        np.testing.assert_array_equal(image, np.asarray(Image.open(file)))
    with pytest.raises(ValueError, match="squeezed to --resize, and --image_size would crop"):
        open_images(folder, colours_extractor, 32, handling, squeeze=True)
    with pytest.raises(ValueError, match="image_size"):
        open_images(folder, colours_extractor, None, handling)  # sizes differ


@pytest.fixture(scope="module")
def colours_extractor():
    return Extractor("colours", "mean colour", 3, (None, None, 3), colours, {}, {})


def colours(params, images):
    return {"features": images.mean((1, 2)), "logits": 40 * images[:, 0, :5, 0]}


def sample(params, keys, condition=None):
    """Smooth colours, another one for each key."""

    def one(key):
        x = jnp.linspace(0, 6, 24)
        phases = jax.random.uniform(key, (3,), maxval=6)
        return jnp.sin(x[:, None, None] + x[:, None] + phases)

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("sharded", [False, True])
def test_features_are_of_handled_samples(colours_extractor, sharded):
    handling = evaluation.Handling(jpeg_before=75, resize=16, jpeg=50)
    mesh = sharding.batch_sharding(sharding.make_mesh({"data": -1})) if sharded else None
    options = {"seed": 5, "batch_size": 8, "keep_images": 20, "sharding": mesh}
    plain = evaluation.collect(sample, (), 20, extractor=None, **options)
    found = evaluation.collect(
        sample, (), 20, extractor=colours_extractor, look=evaluation.Look(handling), **options
    )
    expected = np.stack([handling(image) for image in plain.images])
    np.testing.assert_array_equal(found.images, expected)
    means = expected.mean((1, 2)) / 127.5 - 1
    np.testing.assert_allclose(found.features, means, atol=1e-5)
    np.testing.assert_allclose(found.moments.mean, means.mean(0) - found.moments.shift, atol=1e-4)
    assert found.moments.count == 20
    score = evaluation.score(found, found, inception_rule="torch_fidelity")
    theirs = isc_features_to_metric(torch.from_numpy(found.logits))
    assert score["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert score["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-5)


def test_a_sample_that_is_not_finite_is_named(colours_extractor):
    def broken(params, keys):
        return sample(params, keys).at[3].set(jnp.nan)

    with pytest.raises(ValueError, match="image 3 or its features have non-finite values"):
        evaluation.collect(
            broken,
            (),
            12,
            extractor=colours_extractor,
            batch_size=4,
            seed=0,
            look=evaluation.Look(evaluation.Handling(jpeg=75)),
        )


@pytest.mark.parametrize("count", [10, 999, 1003])
def test_the_named_rule_of_the_inception_score_is_torch_fidelitys(count):
    logits = RNG.normal(0, 2, (count, 7)).astype(np.float32)
    found = inception_score(logits, **INCEPTION_RULES["torch_fidelity"])
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-7)
    assert found != inception_score(logits)
    with pytest.raises(ValueError, match="9 images do not make 10 splits"):
        inception_score(logits[:9], **INCEPTION_RULES["torch_fidelity"])


def test_bk_sdms_features_are_pytorch_fids_and_its_logits_torch_fidelitys(monkeypatch):
    class Net(nnx.Module):
        def __call__(self, x):
            return {"pool": x[:, 0, 0], "spatial": x[:, 1, 1], "logits": x[:, 0, 1]}

    monkeypatch.setattr(inception_features, "load_inception", lambda path: nnx.split(Net()))
    make = inception_features.inception_extractor.__wrapped__
    images = jnp.asarray(picture(16, 16)[None] / 127.5 - 1, jnp.float32)
    both, fid, inception = (
        make(name, "w.pth") for name in ("inception_bk_sdm", "inception_pytorch_fid", "inception")
    )
    for key, of in (("features", fid), ("spatial", fid), ("logits", inception)):
        np.testing.assert_array_equal(both(images)[key], of(images)[key])
    assert not np.array_equal(both(images)["logits"], fid(images)["logits"])
    assert both.label == fid.label == "FID (resized as pytorch-fid)"
    assert both.info["resize"] == "bilinear, half_pixel (of the logits tensorflow1), to 299"


def test_the_protocol_is_fields_of_a_config():
    config = default_config()
    assert not handling_of(config.evaluation)
    config.evaluation.update(evaluation.BK_SDM)
    assert str(handling_of(config.evaluation)) == (
        "saved as JPEG of quality 75, then squeezed to 256x256 (bicubic), then saved as JPEG of "
        "quality 75"
    )
    config.evaluation.weights = "w.pth"
    check_config(config)
    for field, value, message in (
        ("jpeg", 101, "config.evaluation.jpeg must be a whole number in 0..100"),
        ("resize", 0, "config.evaluation.resize must be a whole number in 1.."),
        ("inception_rule", "ten", "config.evaluation.inception_rule must be one of ['adm', 'tor"),
        ("num_samples", 9, "config.evaluation.num_samples 9 must be at least 10, the splits"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.evaluation[field] = value
        with pytest.raises(ValueError, match=re.escape(message)):
            check_config(wrong)


def test_what_cannot_be_handled_is_refused():
    handling = evaluation.Handling(jpeg=75)
    with pytest.raises(ValueError, match="images of 4 channels cannot be resized or saved as JPEG"):
        handling.shape((8, 8, 4))
    with pytest.raises(ValueError, match="images are float32, and only uint8 can be handled"):
        handling(np.zeros((8, 8, 3), np.float32))


def test_references_that_were_handled_otherwise_are_told_apart():
    handling = evaluation.Handling(resize=256, jpeg=75)
    ours = {"extractor": "inception", "handling": handling.identity}
    assert said_of_reference(handling, ours) == said_of_reference(handling, {}) == ""
    for info, other in (({}, handling), ({"handling": "none"}, handling), (ours, handling.of_real)):
        said = said_of_reference(other, {"extractor": "inception"} | info)
        assert bool(said) == (info is not ours)
    assert "'jpeg': 75}, not {" in said_of_reference(evaluation.Handling(), ours)
