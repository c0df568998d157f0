"""Data: the embedded digits, the named data sets, and batches that are a function of the step."""

import itertools
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_digits

from liftplace_jax.conditioning import UNCONDITIONAL, Classes
from liftplace_jax.data import Source, eval_batches, load_source, train_batches, unpack_images
from liftplace_jax.data.digits import Digits, split_indices
from liftplace_jax.data.pictures import SUFFIXES, read_header, read_pixels
from liftplace_jax.data.unpacking import _computed


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    load_source("digits", "train", data_dir=path)
    return path


def array_source(count=10, shape=(4, 4, 1), **kwargs):
    """A source whose image i is filled with i, but for a brighter left column."""
    records = []
    for index in range(count):
        image = np.full(shape, index, np.uint8)
        image[:, 0] = 200
        records.append({"image": image, "label": index % 3})
    return Source("numbers", records, image_shape=shape, num_classes=3, **kwargs)


def values(batch):
    """The example numbers of a batch of `array_source`."""
    return batch["image"][:, 0, 1:-1].max((1, 2)).astype(int)


def seen(batch):
    """What networks see of the images of a batch, by NumPy alone."""
    images = batch["image"].astype(np.float32) / np.float32(127.5) - 1
    mirrored = batch.get("mirrored", np.zeros(len(images), bool))
    images[mirrored] = images[mirrored, :, ::-1]
    return images


def take(batches, count):
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


def test_digits_are_those_of_scikit_learn(data_dir):
    train = load_source("digits", "train", data_dir=data_dir)
    test = load_source("digits", "test", data_dir=data_dir)
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (8, 8, 1) and train.num_classes == 10
    parts = [source.get(np.arange(len(source))) for source in (train, test)]
    assert parts[0]["image"].dtype == np.uint8 and parts[0]["label"].dtype == np.int32
    assert np.bincount(parts[1]["label"]).tolist() == [36] * 10

    def rows(images, labels):
        return sorted(map(bytes, np.c_[images.reshape(len(images), -1), labels].astype(np.uint8)))

    original = load_digits()
    images = np.concatenate([part["image"] for part in parts])
    labels = np.concatenate([part["label"] for part in parts])
    assert rows(images, labels) == rows(np.round(original.images * 255 / 16), original.target)


def test_digits_split_is_fixed():
    train, test = split_indices(load_digits().target)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    assert test[:8].tolist() == [0, 3, 8, 9, 14, 15, 18, 19]


def test_library_import_leaves_tensorflow_datasets_alone():
    code = "import sys, liftplace_jax.data; assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_default_data_dir_is_that_of_tfds(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load_source("digits", "test[:10%]")) == 36


def test_losing_the_race_to_prepare_uses_the_winners_data(tmp_path, monkeypatch):
    prepare = Digits.download_and_prepare

    def lose(self, **kwargs):
        prepare(Digits(data_dir=tmp_path), **kwargs)  # the other process
        raise OSError("Directory not empty")

    monkeypatch.setattr(Digits, "download_and_prepare", lose)
    assert len(load_source("digits", "test", data_dir=tmp_path)) == 360


@pytest.mark.parametrize(
    "name, options, shape, classes",
    [
        ("cifar10", {}, (32, 32, 3), 10),
        ("celeb_a", {}, (128, 128, 3), None),
        ("celeb_a", {"image_size": 64}, (64, 64, 3), None),
        ("lsun/bedroom", {"image_size": 32}, (32, 32, 3), None),
        ("lsun/church_outdoor", {"image_size": 32}, (32, 32, 3), None),
        ("mnist", {"image_size": 14}, (14, 14, 1), 10),
    ],
)
def test_named_data_sets(name, options, shape, classes, monkeypatch):
    monkeypatch.setattr("liftplace_jax.data.named._need_tensorflow_io", lambda: None)
    with tfds.testing.mock_data(num_examples=5):
        source = load_source(name, "train", **options)
        assert (len(source), source.image_shape, source.num_classes) == (5, shape, classes)
        (batch,) = take(train_batches(source, batch_size=4, seed=0, flip=True), 1)
        assert len(list(eval_batches(source, batch_size=4))) == 2
    images = np.asarray(source.unpack(batch)["image"])
    assert images.shape == (4, *shape) and images.dtype == np.float32
    assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
    assert batch["label"].dtype == np.int32 and (classes or not batch["label"].any())


def test_celeb_a_crop_is_the_published_one():
    image = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    with tfds.testing.mock_data(as_data_source_fn=lambda *args, **kwargs: [{"image": image}]):
        whole = load_source("celeb_a", "train").get([0])["image"][0]
        small = load_source("celeb_a", "train", image_size=64).get([0])["image"][0]
    centre_x, centre_y = 89, 121
    expected = image[centre_y - 64 : centre_y + 64, centre_x - 64 : centre_x + 64]
    assert np.array_equal(whole, expected)
    # Antialiased bilinear by two: the triangle (1, 3, 3, 1) / 8 along both axes.
    kernel = np.array([1, 3, 3, 1]) / 8
    wide = sum(w * expected[:, i + 1 : i + 125 : 2].astype(float) for i, w in enumerate(kernel))
    both = sum(w * wide[i + 1 : i + 125 : 2] for i, w in enumerate(kernel))
    assert np.abs(small[1:-1, 1:-1] - both).max() <= 1


def test_oblong_images_are_resized_then_cropped_in_the_centre():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 100
    source = Source("wide", [{"image": image}], image_shape=(None, None, 3), image_size=4)
    assert source.get([0])["image"].shape == (1, 4, 4, 3)
    assert (source.get([0])["image"] == 100).all()


def test_images_are_scaled_to_plus_minus_one():
    images = np.array([0, 255, 51], np.uint8).reshape(3, 1, 1, 1)
    source = Source("points", [{"image": image} for image in images], image_shape=(1, 1, 1))
    (batch,) = eval_batches(source, batch_size=3)
    images = source.unpack(batch)["image"]
    np.testing.assert_allclose(np.asarray(images).ravel(), [-1, 1, -0.6], atol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
def test_every_value_is_scaled_and_mirrored_to_the_bit(jit):
    images = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), 12))
    batch = {"image": images.reshape(16, 8, 8, 3), "mirrored": np.arange(16) % 3 == 0}
    batch |= {"label": np.arange(16), "tokens": np.ones((16, 7), np.int32)}
    unpack = jax.jit(unpack_images) if jit else unpack_images
    result = unpack(batch)
    assert result.keys() == {"image", "label", "tokens"}
    found = np.asarray(result["image"])
    assert np.array_equal(found.view(np.int32), seen(batch).view(np.int32))

    # Also where a step goes on with them, as with images that came scaled.
    def noised(images, noise):
        return 0.3 * images + jnp.sqrt(0.91) * noise

    noise = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    in_step = jax.jit(lambda batch, noise: noised(unpack_images(batch)["image"], noise))
    assert np.array_equal(in_step(batch, noise), jax.jit(noised)(seen(batch), noise))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_compute_what_cpus_look_up(platform):
    batch = {"image": np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)}
    program = jax.jit(unpack_images).trace(batch).lower(lowering_platforms=(platform,)).as_text()
    assert "divide" in program and "gather" not in program
    np.testing.assert_allclose(_computed(batch["image"]), seen(batch), atol=1e-6)


def test_batches_are_as_small_as_images_are_stored():
    (batch,) = take(train_batches(array_source(), batch_size=4, seed=0, flip=True), 1)
    assert batch["image"].dtype == np.uint8 and batch["mirrored"].dtype == bool
    (plain,) = take(train_batches(array_source(), batch_size=4, seed=0), 1)
    assert "mirrored" not in plain
    for batch in eval_batches(array_source(), batch_size=4):
        assert batch["image"].dtype == np.uint8 and "mirrored" not in batch


def test_order_and_flips_are_those_of_every_version():
    """Philox's bits: the first half sorts an epoch, the lowest bits of the second mirror."""
    source = array_source()
    stored = source.get(np.arange(10))["image"]
    batches = take(train_batches(source, batch_size=4, seed=7, flip=True), 5)
    found = np.concatenate([source.unpack(batch)["image"] for batch in batches])
    expected = []
    for epoch in range(2):
        bits = np.random.Philox(np.random.SeedSequence([7, epoch])).random_raw(20)
        for index, flip in zip(np.argsort(bits[:10], kind="stable"), bits[10:] & 1, strict=True):
            image = stored[index].astype(np.float32) / np.float32(127.5) - 1
            expected.append(image[:, ::-1] if flip else image)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("start", [1, 4, 11])
def test_resume_at_any_step_gives_the_same_batches(start):
    source = array_source()
    whole = take(train_batches(source, batch_size=4, seed=5, flip=True), start + 3)
    resumed = take(train_batches(source, batch_size=4, seed=5, flip=True, start_step=start), 3)
    for one, other in zip(whole[start:], resumed, strict=True):
        for name in ("image", "mirrored", "label"):
            assert np.array_equal(one[name], other[name])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_slices_of_the_global_batch(processes):
    source = array_source()
    whole = take(train_batches(source, batch_size=8, seed=1, flip=True), 4)
    parts = [
        take(
            train_batches(
                source, batch_size=8, seed=1, flip=True, process_index=i, process_count=processes
            ),
            4,
        )
        for i in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in ("image", "mirrored", "label"):
            joined = np.concatenate([part[step][name] for part in parts])
            assert np.array_equal(batch[name], joined)


@pytest.mark.parametrize("batch_size", [5, 4, 20])
def test_every_epoch_has_each_example_once_in_its_own_order(batch_size):
    batches = take(train_batches(array_source(), batch_size=batch_size, seed=0), 40 // batch_size)
    epochs = np.concatenate([values(batch) for batch in batches]).reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_fixed_for_ever_and_differs_by_seed():
    batches = [train_batches(array_source(), batch_size=10, seed=seed) for seed in (0, 1)]
    orders = [values(take(batch, 1)[0]) for batch in batches]
    assert orders[0].tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert orders[1].tolist() != orders[0].tolist()


def test_flip_mirrors_about_half_of_the_images():
    source = array_source(100)
    (plain,) = take(train_batches(source, batch_size=100, seed=0), 1)
    (flipped,) = take(train_batches(source, batch_size=100, seed=0, flip=True), 1)
    plain, flipped = (np.asarray(source.unpack(batch)["image"]) for batch in (plain, flipped))
    mirrored = (flipped == plain[:, :, ::-1]).all((1, 2, 3))
    same = (flipped == plain).all((1, 2, 3))
    assert (mirrored ^ same).all() and 30 < mirrored.sum() < 70


@pytest.mark.parametrize("cached", [True, False])
def test_large_data_sets_are_read_again_small_ones_kept(cached):
    reads = []

    class Records(list):
        def __getitem__(self, index):
            reads.append(index)
            return list.__getitem__(self, index)

    records = Records({"image": np.full((2, 2, 1), i, np.uint8), "label": i} for i in range(4))
    source = Source(
        "counted", records, image_shape=(2, 2, 1), num_classes=4, memory_mb=256 if cached else 0
    )
    for _ in range(2):
        got = source.get([3, 1])
        assert got["image"][:, 0, 0, 0].tolist() == got["label"].tolist() == [3, 1]
    assert reads == ([3, 1] if cached else [3, 1, 3, 1])


@pytest.mark.parametrize(
    "count, limit, processes", [(10, None, 1), (10, 7, 2), (9, 9, 4), (3, 1, 2)]
)
def test_evaluation_counts_every_example_once(count, limit, processes):
    source = array_source(count)
    parts = [
        list(
            eval_batches(
                source, batch_size=4, limit=limit, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert all(len(batch["image"]) == len(batch["mask"]) == 4 // processes for batch in batches)
    seen = np.concatenate([values(batch)[batch["mask"]] for batch in batches])
    index = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    assert np.array_equal(seen, index)
    assert np.array_equal(np.sort(seen), np.arange(limit or count))


def test_close_and_errors_leave_no_threads():
    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("batches")]

    batches = train_batches(array_source(), batch_size=2, seed=0, prefetch=3)
    next(batches)
    assert threads()
    batches.close()
    assert not threads()
    records = [{"image": np.zeros((height, 2, 1), np.uint8)} for height in (2, 2, 2, 3)]
    batches = eval_batches(Source("mixed", records, image_shape=(2, 2, 1)), batch_size=2)
    next(batches)
    with pytest.raises(ValueError, match=r"mixed, example 3: image has shape \(3, 2, 1\)"):
        next(batches)
    assert not threads()


def test_float_images_are_used_as_they_are_and_checked():
    images = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 2, 2, 1)
    records = [{"image": image} for image in images]
    source = Source("floats", records, image_shape=(2, 2, 1), dtype=np.float32)
    batch = next(eval_batches(source, batch_size=2))
    assert np.array_equal(batch["image"], images)
    assert np.array_equal(source.unpack(batch)["image"], images)
    bad = Source("floats", [{"image": images[0] * np.nan}], image_shape=(2, 2, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="floats, example 0: image has non-finite values"):
        next(train_batches(bad, batch_size=1, seed=0))


@pytest.mark.parametrize("dtype, sent", [("float16", "float16"), ("float64", "float32")])
def test_float_images_are_sent_as_the_smaller_of_theirs_and_float32(dtype, sent):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 1)).astype(dtype)
    records = [{"image": image} for image in images]
    source = Source("floats", records, image_shape=(2, 2, 1), dtype=dtype)
    (batch,) = take(train_batches(source, batch_size=8, seed=0, flip=True), 1)
    assert batch["image"].dtype == sent
    found, mirrored = np.asarray(source.unpack(batch)["image"]), batch["mirrored"]
    assert found.dtype == np.float32 and 0 < mirrored.sum() < 8
    expected = batch["image"].astype(np.float32)
    expected[mirrored] = expected[mirrored, :, ::-1]
    assert np.array_equal(found, expected)
    assert {*expected.ravel()} == {*images.astype(np.float32).ravel()}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 5, "process_index": 0, "process_count": 2}, "batch_size 5 .* 2 processes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, r"process_index 2"),
        ({"batch_size": 4, "seed": -1}, "seed >= 0"),
    ],
)
def test_bad_batch_options_fail_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(array_source(), **{"seed": 0, **options})


def test_bad_limit():
    with pytest.raises(ValueError, match="limit 11 is not in 1..10"):
        eval_batches(array_source(), batch_size=2, limit=11)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_shape": (None, None, 3)}, "pictures has images of mixed sizes: set image_size"),
        ({"image_shape": (4, 6, 3)}, "images of 4x6, not square"),
        ({"image_shape": (4, 4, 3), "dtype": np.uint16}, "uint16, want uint8 or floats"),
        ({"image_shape": (4, 4, 3), "dtype": np.float32, "image_size": 2}, "cropped or resized"),
        ({"image_shape": (4, 4, 3), "records": []}, "pictures has no images"),
    ],
)
def test_bad_sources(options, message):
    with pytest.raises(ValueError, match=message):
        Source("pictures", **{"records": [{}], **options})


def test_wrong_image_type_names_the_example():
    source = Source("pictures", [{"image": np.zeros((2, 2, 1))}], image_shape=(2, 2, 1))
    with pytest.raises(ValueError, match="pictures, example 0: image is float64, want uint8"):
        source.get([0])


def test_unknown_names_and_splits(data_dir):
    with pytest.raises(ValueError, match="no data set 'cifar11'"):
        load_source("cifar11", "train", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"digits has no split 'validation', only \['test'"):
        load_source("digits", "validation", data_dir=data_dir)


def test_data_without_images(tmp_path):
    with tfds.testing.mock_data(num_examples=1):
        with pytest.raises(ValueError, match="imdb_reviews has no feature 'image'"):
            load_source("imdb_reviews", "train", data_dir=tmp_path)


def test_data_that_cannot_be_prepared_says_how_to(tmp_path, monkeypatch):
    def offline(self, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(RuntimeError) as caught:
        load_source("cifar10", "train", data_dir=tmp_path)
    message = str(caught.value)
    assert "cifar10" in message and str(tmp_path) in message and "no route to host" in message
    assert "download_and_prepare(file_format='array_record')" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, hint",
    [
        ("celeb_a", "img_align_celeba.zip.*into {path}/downloads/manual and run it again"),
        ("cifar10", "tfds.builder.'cifar10', data_dir='{path}'.*"),
        ("lsun/bedroom", "export the images of LSUN's lmdb files"),
        ("lsun/church_outdoor", "export the images of LSUN's lmdb files"),
    ],
)
def test_each_published_data_set_says_what_to_do_offline(name, hint, tmp_path, monkeypatch):
    def offline(self, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(RuntimeError, match=hint.format(path=tmp_path)) as caught:
        load_source(name, "train", data_dir=tmp_path)
    assert "--config.data.name=folder --config.data.path=<folder>" in str(caught.value)
    assert "\n\n" not in str(caught.value) and "{" not in str(caught.value)


def test_lsun_asks_for_its_reader_before_it_downloads(tmp_path, monkeypatch):
    def download(self, **kwargs):
        raise AssertionError("45 GB for nothing")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="TFDS reads LSUN's files with the package tensorflow-"):
        load_source("lsun/bedroom", "train", data_dir=tmp_path)


def test_data_prepared_without_random_access(tmp_path):
    Digits(data_dir=tmp_path).download_and_prepare(file_format="tfrecord")
    with pytest.raises(RuntimeError, match="prepared in a format without random access"):
        load_source("digits", "train", data_dir=tmp_path)


# Folders of images ----------------------------------------------------------------------------


def picture(path, value, size=(4, 4), mode="RGB"):
    """Saves a picture of one grey value; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = value if mode in ("L", "I;16") else (value,) * 3
    Image.new(mode, size, color).save(path)


def greys(source):
    return source.get(np.arange(len(source)))["image"][:, 0, 0, 0].tolist()


def test_a_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    names = ["b.png", "a/z.JPG", "a/b/c.jpeg", "c.bmp", "a/d.webp"]
    names += [f"d/{suffix[1:]}{suffix}" for suffix in SUFFIXES if suffix != ".webp"]
    for value, name in enumerate(names):
        picture(tmp_path / name, 10 * value)
    for name in ("notes.txt", ".hidden.png", ".cache/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert {Path(name).suffix.lower() for name in names} == set(SUFFIXES)
    source = load_source("folder", "train", path=tmp_path)
    assert source.image_shape == (4, 4, 3) and source.num_classes is None
    # a/b/c, a/d, a/z, b, c
    assert greys(source)[:5] == pytest.approx([20, 40, 10, 0, 30], abs=2)
    rest = [10 * names.index(name) for name in sorted(names)[5:]]
    assert greys(source)[5:] == pytest.approx(rest, abs=2)
    assert not source.get([0, 1])["label"].any()
    assert greys(load_source("folder", "test", path=str(tmp_path))) == greys(source)
    (batch,) = take(train_batches(source, batch_size=4, seed=0), 1)
    assert batch["image"].shape == (4, 4, 4, 3) and batch["image"].dtype == np.uint8


def test_a_subfolder_named_like_the_split_is_the_split(tmp_path):
    picture(tmp_path / "train" / "x.png", 10)
    picture(tmp_path / "test" / "y.png", 20)
    assert greys(load_source("folder", "train", path=tmp_path)) == [10]
    assert greys(load_source("folder", "test", path=tmp_path)) == [20]
    with pytest.raises(ValueError, match=r"no subfolder 'validation', only \['train', 'test'\]"):
        load_source("folder", "validation", path=tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1"])
def test_images_of_a_folder_get_the_channels_of_the_model(tmp_path, channels, mode):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 2:] = 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x.png")
    source = load_source("folder", "train", path=tmp_path, channels=channels)
    assert source.image_shape == (4, 4, channels)
    assert np.array_equal(source.get([0])["image"][0], pixels[..., :channels])


def test_images_of_a_folder_are_cropped_and_resized_as_those_of_tfds(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "1.png")
    with tfds.testing.mock_data(as_data_source_fn=lambda *args, **kwargs: [{"image": image}]):
        theirs = load_source("celeb_a", "train", image_size=64).get([0])["image"]
    crop = (25, 57, 153, 185)
    ours = load_source("folder", "train", path=tmp_path, crop=crop, image_size=64)
    assert np.array_equal(ours.get([0])["image"], theirs)
    picture(tmp_path / "2.png", 7, size=(200, 180))
    with pytest.raises(ValueError, match=r"2.png: image has shape \(180, .*the crop .* is not wit"):
        load_source("folder", "train", path=tmp_path, crop=crop, image_size=64)
    (tmp_path / "2.png").unlink()
    ours = load_source("folder", "train", path=tmp_path, crop=crop, image_size=64)
    picture(tmp_path / "1.png", 7, size=(200, 180))
    with pytest.raises(ValueError, match=r"example 0 \(.*1.png\): the crop .* is not within \(180"):
        ours.get([0])


def test_images_are_prepared_as_adm_does(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (70, 96, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "1.png")
    # 70 >= 2 * 16, and 35 too: 2x2 means, twice; then bicubic to a side of 16, and the centre.
    twice = Image.fromarray(image).resize((48, 35), Image.BOX).resize((24, 17), Image.BOX)
    small = np.asarray(twice.resize((23, 16), Image.BICUBIC))
    found = load_source("folder", "train", path=tmp_path, image_size=16, resize="adm").get([0])
    assert np.array_equal(found["image"][0], small[:, 3:19])
    with pytest.raises(ValueError, match="unknown resize 'nearest'; known: .'bilinear', 'adm'"):
        load_source("folder", "train", path=tmp_path, image_size=16, resize="nearest")


def test_unreadable_images_are_named_when_they_are_read(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png", 5, size=(64, 64))
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:60])
    source = load_source("folder", "train", path=tmp_path)
    with pytest.raises(ValueError, match=f"cannot read image {tmp_path}/b.png: "):
        source.get([0, 1])
    with pytest.raises(ValueError, match=f"cannot read image {tmp_path}/b.png: "):
        take(train_batches(source, batch_size=3, seed=0), 1)
    picture(tmp_path / "b.png", 3, size=(64, 32))
    with pytest.raises(ValueError, match=r"example 1 \(.*b.png\): image has shape \(32, 64, 3\)"):
        source.get([1])
    picture(tmp_path / "b.png", 3000, mode="I;16")
    with pytest.raises(ValueError, match="b.png: pixels of mode I;16, want 8 bits a channel"):
        source.get([1])


@pytest.mark.parametrize(
    "train, test, left_out",
    [
        ("Train", "Test", "loose.png, more"), ("TRAIN", "TEST", ""),
        ("training", "Testing", ""), ("Train", "test", ""),
    ],
)  # fmt: skip
def test_splits_have_their_usual_names(tmp_path, capfd, train, test, left_out):
    for value, name in enumerate((f"{train}/a", f"{train}/b", f"{test}/a", f"{test}/b")):
        picture(tmp_path / name / "x.png", value)
    for name in filter(None, left_out.split(", ")):
        picture(tmp_path / name if "." in name else tmp_path / name / "y.png", 9)
    sources = [load_source("folder", split, path=tmp_path) for split in ("train", "test")]
    assert [greys(source) for source in sources] == [[0, 1], [2, 3]]
    assert [source.classes for source in sources] == [("a", "b"), ("a", "b")]
    said = capfd.readouterr().err
    assert (f"left out beside the folders of splits: {left_out}" in said) == bool(left_out)
    assert bool(said) == bool(left_out)  # nothing else is to be said
    whole = load_source("folder", "all", path=tmp_path)
    assert len(whole) == 4 + 2 * bool(left_out) and whole.num_classes is None
    assert "which therefore" in whole.note or "are splits, read together" in whole.note


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION", "validation"])
def test_validation_has_several_names(tmp_path, name):
    picture(tmp_path / "train" / "x.png", 1)
    picture(tmp_path / name / "x.png", 2)
    assert greys(load_source("folder", "validation", path=tmp_path)) == [2]
    assert greys(load_source("folder", "val", path=tmp_path)) == [2]
    with pytest.raises(ValueError, match=f"no subfolder 'test', only .'train', '{name}'.: choose"):
        load_source("folder", "test", path=tmp_path)


@pytest.mark.parametrize(
    "folders, split, message",
    [
        (["train", "Train"], "train", r"subfolders \['Train', 'train'\], and each may be the"),
        (["val", "validation", "test"], "validation", r"\['val', 'validation'\], and each may be"),
        (["train2017", "val2017"], "train", r"\['train2017', 'val2017'\], which look like splits"),
        (["DIV2K_train_HR", "DIV2K_valid_HR"], "test", "which look like splits"),
        (["photos/Train", "photos/Test"], "train", r"\['photos/Test', 'photos/Train'\], which"),
        (["cats/train", "cats/val", "dogs/train"], "train", r"\['cats/train', 'cats/val'\], which"),
        (["cats", "dogs"], "trian", "no subfolder 'trian': choose another split"),
    ],
)
def test_folders_that_may_be_splits_are_refused_by_name(tmp_path, folders, split, message):
    for folder in folders:
        picture(tmp_path / folder / "x.png", 1)
    with pytest.raises(ValueError, match=message):
        load_source("folder", split, path=tmp_path)
    assert len(load_source("folder", "all", path=tmp_path)) == len(folders)


def test_folders_that_are_no_splits_are_read(tmp_path, capfd):
    for name in ("train_station", "valley", "contest", "stained_glass"):
        picture(tmp_path / name / "x.png", 1)
    source = load_source("folder", "train", path=tmp_path)
    assert source.num_classes == 4
    assert "no subfolder for a split, so 'train' is all of them" in capfd.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
def test_images_are_upright_as_pillow_turns_them(tmp_path, orientation, suffix):
    greys = np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40
    pixels = np.kron(greys, np.ones((8, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"quality": 100} if suffix == "jpg" else {"lossless": True}
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))
    assert np.array_equal(read_pixels(path, "RGB"), expected)
    header = read_header(path)
    assert header.size == expected.shape[1::-1]
    assert header.changes == ("turned as their EXIF data say",) * (orientation > 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of such data
def test_damaged_exif_data_spoil_no_image(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "maker"
    path = tmp_path / "x.jpg"
    Image.new("RGB", (16, 8)).save(path, exif=exif)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    start = whole.index(b"Exif")
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(start + 6, start + len(exif.tobytes()), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        assert read_pixels(path, "RGB").shape in ((8, 16, 3), (16, 8, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_lie_on_white(tmp_path, mode, channels):
    """A black drawing on nothing, below which there is black too."""
    alpha = Image.fromarray(np.tile(np.array([0, 255, 51, 0], np.uint8), (4, 1)))
    if mode in ("RGBA", "LA"):
        image = Image.new(mode[:-1], (4, 4))
        image.putalpha(alpha)
        image.save(tmp_path / "x.png")
        expected = [255, 0, 204, 255]
    else:  # one colour is transparent
        grey = np.tile(np.array([7, 0, 50, 7], np.uint8), (4, 1))
        image = Image.fromarray(grey).convert(mode)
        key = image.getpixel((0, 0))
        image.save(tmp_path / "x.png", transparency=key)
        expected = [255, 0, 50, 255]
    source = load_source("folder", "all", path=tmp_path, channels=channels)
    found = source.get([0])["image"][0]
    assert found.shape == (4, 4, channels) and (found == np.array(expected)[:, None]).all()
    assert "1 with transparency, laid on white" in source.note


def test_what_is_left_out_or_converted_is_said_in_one_line(tmp_path, capfd):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        picture(tmp_path / name, 5, size=(8, 8))
    picture(tmp_path / "b" / "4.png", 5, size=(8, 4), mode="L")
    frames = [Image.new("L", (2, 2), value) for value in (3, 9)]
    frames[0].save(tmp_path / "b" / "5.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b" / "6.tiff", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (8, 8)).save(tmp_path / "b" / "7.jpg")
    (tmp_path / "empty").mkdir()
    for name in ("a/x.heic", "a/y.heic", "list.CSV", "README", ".DS_Store", "a/._1.png"):
        (tmp_path / name).write_text("x")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    source = load_source("folder", "all", path=tmp_path, image_size=4)
    assert len(source) == 7 and source.classes == ("a", "b")
    assert greys(source)[4:6] == [3, 3]
    load_source("folder", "all", path=tmp_path, image_size=4)
    said = capfd.readouterr().err
    assert said == (
        f"{tmp_path}: 7 images; left out: 1 of .csv (list.CSV), 2 of .heic (a/x.heic), 1 of no "
        "suffix (README), 2 hidden (.DS_Store, ._1.png), 1 links to folders that are read "
        "(a/back); no images, and so no class, in empty; converted to RGB: 1 CMYK, 2 grey, 1 P; "
        "2 of several frames, of which the first is taken; 1 not square, cropped to the centre; "
        "2 smaller than 4, enlarged\n"
    )


def test_an_ordinary_folder_needs_no_words(tmp_path, capfd):
    for name in ("train/a/1.png", "train/b/1.jpg", "test/a/1.png", "test/b/1.webp"):
        picture(tmp_path / name, 5)
    for split in ("train", "test"):
        assert load_source("folder", split, path=tmp_path).note == ""
    assert capfd.readouterr().err == ""


def test_an_image_beside_the_classes_is_named(tmp_path):
    for name in ("a/1.png", "b/2.png", "stray.png"):
        picture(tmp_path / name, 5)
    source = load_source("folder", "train", path=tmp_path)
    why = "stray.png lies beside the subfolders, which therefore are no classes"
    assert source.num_classes is None and why in source.note
    with pytest.raises(ValueError, match=f"has no classes, config.model.num_classes is 2 .{why}"):
        Classes(2, None, 0.0).check_data([source])
    UNCONDITIONAL.check_data([source])


def test_classes_that_differ_by_case_are_said(tmp_path):
    for name in ("Cat/1.png", "cat/1.PNG", "dog/1.png", "dog/1.PNG"):
        picture(tmp_path / name, 5)
    source = load_source("folder", "all", path=tmp_path)
    assert source.classes == ("Cat", "cat", "dog") and len(source) == 4
    assert "Cat, cat differ by case alone: classes of their own" in source.note


def test_the_upper_bits_of_16_are_taken(tmp_path):
    """Colours, as every viewer does; grey ones keep all, and are refused."""
    values = np.array([[0x1234, 0xFFFF, 0x80FF]], ">u2")

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" + values.tobytes()))
        + chunk(b"IEND", b"")
    )
    source = load_source("folder", "all", path=tmp_path)
    assert source.get([0])["image"].ravel().tolist() == [0x12, 0xFF, 0x80]
    assert "1 with 16 bits a channel, of which the upper 8 are taken" in source.note


def broken_files(folder):
    """Name -> what is wrong with it; each beside a good image."""
    picture(folder / "a.png", 1)
    (folder / "empty.png").touch()
    (folder / "text.tif").write_text("no image")
    (folder / "drawing.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    (folder / "link.gif").symlink_to(folder / "nowhere.gif")
    os.mkfifo(folder / "pipe.bmp")
    picture(folder / "deep.png", 3000, mode="I;16")
    picture(folder / "large.png", 1, size=(8, 17))
    return {
        "empty.png": "it is empty",
        "text.tif": "it is of no format that is known here",
        "drawing.jpg": "it is of no format",
        "link.gif": "No such file",
        "pipe.bmp": "no regular",
        "deep.png": "pixels of mode I;16, want 8 bits",
        "large.png": "decompression bomb",
    }


def test_broken_images_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 8)
    faults = broken_files(tmp_path)
    for name, message in faults.items():
        with pytest.raises(ValueError, match=f"^cannot read image .*{name}: .*{message}") as caught:
            read_pixels(tmp_path / name, "RGB")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"deep.png: .*\(and 6 other images cannot be read\): m"):
        load_source("folder", "train", path=tmp_path)
    for name in faults:
        (tmp_path / name).unlink()
    assert greys(load_source("folder", "train", path=tmp_path)) == [1]


def test_images_of_other_sizes_are_refused_before_any_work(tmp_path):
    for name, size in (("a.png", (4, 4)), ("b.png", (8, 4)), ("c.png", (8, 4)), ("d.png", (2, 2))):
        picture(tmp_path / name, 1, size=size)
    message = r"b.png: image has shape \(4, 8, 3\), want \(4, 4, 3\).*: set image_size; so have 3"
    with pytest.raises(ValueError, match=message):
        load_source("folder", "all", path=tmp_path)
    assert len(load_source("folder", "all", path=tmp_path, image_size=4)) == 4


def test_of_very_many_images_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("liftplace_jax.data.folder.LOOKED_AT", 3)
    for name in "abcdefg":
        picture(tmp_path / f"{name}.png", 1, mode="L")
    note = load_source("folder", "all", path=tmp_path).note
    assert "7 images; converted to RGB: 3 grey; numbers are of 3 that were looked at" in note


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path": "good/x.png"}, "x.png is no folder"),
        ({"path": "missing"}, "there is no folder .*missing"),
        ({"path": "empty"}, r"no images \(.png, .jpg, .*\) in .*empty"),
        ({"path": "broken"}, "cannot read image .*broken/x.png: "),
        ({"path": "wide"}, "images of 4x8, not square: set image_size"),
        ({"path": "good", "split": "train[:90%]"}, "slices are not supported; name a subfolder"),
        ({"path": "good", "channels": 2}, "a folder of images has 1 or 3 channels, not 2"),
        ({"path": "good", "crop": (3, 0, 2, 4)}, "crop must be .left, upper, right, lower. in pix"),
        ({"path": "good", "crop": (1, 2)}, "crop must be .* got"),
    ],
)
def test_bad_folders(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "good" / "x.png", 1)
    picture(tmp_path / "wide" / "x.png", 1, size=(8, 4))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("no image")
    options = {"split": "train"} | options | {"path": tmp_path / options["path"]}
    with pytest.raises(ValueError, match=message):
        load_source("folder", **options)
