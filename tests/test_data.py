"""Data: the embedded digits, the named data sets, and batches that are a function of the step."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from liftplace_jax.data import Source, eval_batches, load_source, train_batches
from liftplace_jax.data.digits import Digits, split_indices
from liftplace_jax.data.folder import SUFFIXES


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
    return np.round((batch["image"][:, 0, 1:-1].max((1, 2)) + 1) * 127.5).astype(int)


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
    assert batch["image"].shape == (4, *shape) and batch["image"].dtype == np.float32
    assert -1 <= batch["image"].min() < -0.5 and 0.5 < batch["image"].max() <= 1
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
    np.testing.assert_allclose(batch["image"].ravel(), [-1, 1, -0.6], atol=1e-6)


@pytest.mark.parametrize("start", [1, 4, 11])
def test_resume_at_any_step_gives_the_same_batches(start):
    source = array_source()
    whole = take(train_batches(source, batch_size=4, seed=5, flip=True), start + 3)
    resumed = take(train_batches(source, batch_size=4, seed=5, flip=True, start_step=start), 3)
    for one, other in zip(whole[start:], resumed, strict=True):
        assert np.array_equal(one["image"], other["image"])
        assert np.array_equal(one["label"], other["label"])


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
        joined = np.concatenate([part[step]["image"] for part in parts])
        assert np.array_equal(batch["image"], joined)


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
    mirrored = (flipped["image"] == plain["image"][:, :, ::-1]).all((1, 2, 3))
    same = (flipped["image"] == plain["image"]).all((1, 2, 3))
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
    assert np.array_equal(next(eval_batches(source, batch_size=2))["image"], images)
    bad = Source("floats", [{"image": images[0] * np.nan}], image_shape=(2, 2, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="floats, example 0: image has non-finite values"):
        next(train_batches(bad, batch_size=1, seed=0))


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
    for value, name in enumerate(names):
        picture(tmp_path / name, 40 * value)
    for name in ("notes.txt", ".hidden.png", ".cache/e.png", "f.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert {Path(name).suffix.lower() for name in names} == set(SUFFIXES)
    source = load_source("folder", "train", path=tmp_path)
    assert source.image_shape == (4, 4, 3) and source.num_classes is None
    # a/b/c, a/d, a/z, b, c
    assert greys(source) == pytest.approx([80, 160, 40, 0, 120], abs=2)
    assert not source.get([0, 1])["label"].any()
    assert greys(load_source("folder", "test", path=str(tmp_path))) == greys(source)
    (batch,) = take(train_batches(source, batch_size=4, seed=0), 1)
    assert batch["image"].shape == (4, 4, 4, 3) and batch["image"].dtype == np.float32


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
    ours = load_source("folder", "train", path=tmp_path, crop=crop, image_size=64)
    with pytest.raises(ValueError, match=r"example 1 \(.*2.png\): the crop .* is not within \(180"):
        ours.get([0, 1])


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
    "options, message",
    [
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
