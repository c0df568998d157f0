"""Encoded data sets: what is written, what training reads of it, and what is refused."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from liftplace_jax import weights
from liftplace_jax.data import Column, eval_batches, load_latents, load_source, train_batches
from liftplace_jax.data import encoded as store
from liftplace_jax.data.encoded import check_autoencoder
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.encoders.autoencoder_folder import load_autoencoder
from liftplace_jax.experiment import encoding
from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.host import buckets, sharding
from liftplace_jax.nn import building
from liftplace_jax.training.objective import on_batches
from liftplace_jax.training.state import random_key
from liftplace_jax.training.step import _parts

ROOT = Path(__file__).parent.parent
TINY = AutoencoderConfig(
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    in_channels=1,
    out_channels=1,
    sample_size=8,
    scaling_factor=0.5,
    shift_factor=0.25,
)
SPLITS = {"train[:3%]": 43, "test[:5%]": 18}
TRAIN = "train[:3%]"
SHARDS = 5  # three of the one, two of the other


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    load_source("digits", "train", data_dir=path)
    return path


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "tiny"
    weights.save_model(path, TINY.described(), building.create(TINY)[1])
    return path


def latent_config(data_dir, autoencoder, path):
    config = default_config()
    config.data.train_split, config.data.test_split = SPLITS
    config.data.data_dir = str(data_dir)
    config.model.image_size, config.model.in_channels = 4, 4
    config.latents.autoencoder, config.latents.path = str(autoencoder), str(path)
    return config


def encode(config, **options):
    over = sharding.batch_sharding(sharding.make_mesh({"data": -1}))
    return encoding.encode_data(config, over, **{"batch_size": 8, "shard_size": 16} | options)


@pytest.fixture(scope="module")
def encoded(data_dir, autoencoder, tmp_path_factory):
    """A whole folder, to be read or copied."""
    path = tmp_path_factory.mktemp("latents") / "digits"
    said = encode(latent_config(data_dir, autoencoder, path))
    assert said == (
        f"Done: {path} holds latents 4x4x4 of 43 images of 'train[:3%]' and 18 images of "
        "'test[:5%]', both flips"
    )
    return path


@pytest.fixture
def copy(encoded, tmp_path):
    return Path(shutil.copytree(encoded, tmp_path / "copy"))


@pytest.fixture(scope="module")
def source(encoded):
    return load_latents(encoded, TRAIN)


@pytest.fixture(scope="module")
def moments(data_dir, autoencoder):
    """(images, mirrored ones) x (mean, log variance), computed here, in stored order."""
    images = load_source("digits", TRAIN, data_dir=data_dir).get(np.arange(43))["image"]
    network = load_autoencoder(autoencoder)
    run = jax.jit(lambda params, x: nnx.merge(network.graphdef, params).encode(x))
    x = images.astype(np.float32) / 127.5 - 1
    return np.stack([np.stack(run(network.params, each)) for each in (x, x[:, :, ::-1])])


def take(batches, count):
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


# What is written ----------------------------------------------------------------------------------


def test_a_folder_in_a_bucket_is_copied_and_read(encoded, source, autoencoder, bucket, tmp_path):
    buckets.upload(encoded, buckets.as_path(f"{bucket}/latents"))
    check_autoencoder(f"{bucket}/latents", load_autoencoder(autoencoder).identity)
    copied = load_latents(f"{bucket}/latents", TRAIN, tmp_path)
    for name, values in copied.get(np.arange(43)).items():
        np.testing.assert_array_equal(values, source.get(np.arange(43))[name])


def test_the_folder_says_what_it_holds(encoded, autoencoder):
    manifest = json.loads((encoded / "latents.json").read_text())
    assert manifest["splits"] == SPLITS and manifest["num_classes"] == 10
    assert manifest["shape"] == [4, 4, 4] and manifest["dtype"] == "float16"
    assert manifest["data"]["name"] == "digits"
    assert manifest["autoencoder"] == {
        "name": "tiny",
        "sha256": load_autoencoder(autoencoder).sha256,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    assert "jax" in manifest["versions"]
    assert len(shards(encoded)) == SHARDS == len(list(encoded.iterdir())) - 1


def test_evaluation_reads_the_means(source, moments, data_dir):
    assert len(source) == 43 and source.image_shape == (4, 4, 4) and source.num_classes == 10
    images = load_source("digits", TRAIN, data_dir=data_dir)
    batches = list(eval_batches(source, batch_size=16))
    assert all(batch["moments"].dtype == np.float16 for batch in batches)
    unpacked = [(source.unpack(batch)["image"], batch["mask"]) for batch in batches]
    found = np.concatenate([np.asarray(image)[mask] for image, mask in unpacked])
    assert found.dtype == np.float32 and found.std() > 0.1
    np.testing.assert_allclose(found, (moments[0, 0] - 0.25) * 0.5, rtol=1e-3, atol=5e-4)
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert np.array_equal(labels, images.get(np.arange(43))["label"])


def test_training_draws_from_the_moments_of_either_flip(source, moments, data_dir):
    options = {"batch_size": 32, "seed": 3, "flip": True}
    latents = take(train_batches(source, **options), 3)
    images = take(train_batches(load_source("digits", TRAIN, data_dir=data_dir), **options), 3)
    # The same order and flips as of the images; which ones they are is found by their pixels.
    stored = load_source("digits", TRAIN, data_dir=data_dir).get(np.arange(43))["image"]
    for step, (latent, image) in enumerate(zip(latents, images, strict=True)):
        assert np.array_equal(latent["label"], image["label"]) and "mirrored" not in latent
        key = jax.random.fold_in(jax.random.key(3), step)
        noise = np.asarray(jax.random.normal(key, (32, 4, 4, 4)))
        drawn = np.asarray(source.unpack(latent, key)["image"])
        for row in range(32):
            index = np.argwhere((stored == image["image"][row]).all((1, 2, 3)))[0, 0]
            mean, logvar = moments[int(image["mirrored"][row]), :, index]
            np.testing.assert_allclose(latent["moments"][row], [mean, logvar], rtol=2e-3, atol=1e-3)
            expected = (mean + np.exp(logvar / 2) * noise[row] - 0.25) * 0.5
            np.testing.assert_allclose(drawn[row], expected, rtol=2e-2, atol=1e-2)


@functools.cache
def drawing(unpack, seed, accumulation=1):
    """Jitted (batch, step) -> what an objective of training sees."""
    saw = on_batches(lambda params, teacher, batch, step: (batch["image"], {}), unpack, seed)

    def run(batch, step):
        cut = _parts(batch, accumulation)
        parts = [
            saw(None, None, jax.tree.map(lambda x: x[part], cut), step * accumulation + part)[0]  # noqa: B023
            for part in range(accumulation)
        ]
        return jnp.stack(parts, axis=1).reshape(-1, 4, 4, 4)

    return jax.jit(run)


def test_draws_are_independent_normal_numbers(source):
    mean, logvar = source.get([7])["moments"][0].astype(np.float32)
    batch = source.get(np.full(400, 7))
    drawn = np.stack([drawing(source.unpack, 0)(batch, step) for step in range(25)])
    noise = (drawn / 0.5 + 0.25 - mean) / np.exp(logvar / 2)  # (step, example, h, w, C)
    flat = noise.reshape(10_000, -1)
    np.testing.assert_allclose(flat.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(flat.std(0), 1, atol=0.04)
    np.testing.assert_allclose(np.corrcoef(flat.T), np.eye(64), atol=0.05)
    # Neither do the steps of a run share anything, nor the examples of a batch.
    by_step, by_example = noise.reshape(25, -1), noise.swapaxes(0, 1).reshape(400, -1)
    np.testing.assert_allclose(np.corrcoef(by_step), np.eye(25), atol=0.04)
    np.testing.assert_allclose(np.corrcoef(by_example), np.eye(400), atol=0.15)
    values = noise.ravel()
    assert abs((values**4).mean() - 3) < 0.05 and 4 < np.abs(values).max() < 7


def test_draws_differ_by_seed_step_and_part_and_by_nothing_else(source):
    batch = source.get(np.arange(8))
    first = drawing(source.unpack, 0)(batch, 3)
    np.testing.assert_array_equal(first, drawing(source.unpack, 0)(batch, 3))
    for other in (drawing(source.unpack, 1)(batch, 3), drawing(source.unpack, 0)(batch, 4)):
        assert (np.asarray(first) != other).mean() > 0.99
    halves = drawing(source.unpack, 0, 2)(source.get([7, 7, 7, 7]), 0)
    assert len(np.unique(np.asarray(halves).reshape(4, -1), axis=0)) == 4
    # The noise of diffusion is another stream.
    mean, logvar = np.moveaxis(batch["moments"].astype(np.float32), 1, 0)
    noise = (np.asarray(first) / 0.5 + 0.25 - mean) / np.exp(logvar / 2)
    diffusion = jax.random.normal(random_key(0, "noise", 3), noise.shape)
    assert abs(np.corrcoef(noise.ravel(), np.ravel(diffusion))[0, 1]) < 0.2


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_devices_draw_the_same_numbers(source, devices, accumulation):
    """Of a batch that is split over devices, as those of several processes are."""
    run = drawing(source.unpack, 5, accumulation)
    batch = source.get(np.arange(16), np.arange(16) % 2 == 0)
    mesh = sharding.make_mesh({"data": -1}, jax.devices()[:devices])
    (placed,) = sharding.global_batches([batch], mesh)
    assert len(placed["moments"].sharding.device_set) == devices
    found = run(placed, 2)
    np.testing.assert_allclose(found, run(batch, 2), rtol=0, atol=1e-6)
    noise = np.asarray(jax.random.normal(random_key(5, "latent", 2), (16, 4, 4, 4)))
    if accumulation == 1:
        mean, logvar = np.moveaxis(batch["moments"].astype(np.float32), 1, 0)
        expected = (mean + np.exp(0.5 * logvar) * noise - 0.25) * 0.5
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes, start, prefetch", [(1, 3, 4), (2, 0, 2), (4, 2, 1)])
def test_resume_and_processes_see_the_same_numbers(source, processes, start, prefetch):
    whole = take(train_batches(source, batch_size=8, seed=5, flip=True), 6)[start:]
    parts = [
        take(
            train_batches(
                source,
                batch_size=8,
                seed=5,
                flip=True,
                start_step=start,
                prefetch=prefetch,
                process_index=i,
                process_count=processes,
            ),
            6 - start,
        )
        for i in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in ("moments", "label"):
            joined = np.concatenate([part[step][name] for part in parts])
            assert np.array_equal(batch[name], joined)


# Columns ------------------------------------------------------------------------------------------


@pytest.fixture
def with_states(monkeypatch):
    """Images of every split come with made-up text states; returns their values by split."""
    states = {
        split: np.random.default_rng(n).normal(size=(n, 5, 2)).astype(np.float16)
        for split, n in SPLITS.items()
    }
    load = encoding.load_split

    def load_split(config, split, channels):
        return load(config, split, channels).with_column(
            "text", Column.of(states[split], {"encoder": "tiny"})
        )

    monkeypatch.setattr(encoding, "load_split", load_split)
    return states


def test_shards_hold_the_columns_of_the_images(
    with_states, data_dir, autoencoder, source, tmp_path
):
    config = latent_config(data_dir, autoencoder, tmp_path)
    encode(config)
    manifest = json.loads((tmp_path / "latents.json").read_text())
    assert manifest["columns"] == {
        "label": {"shape": [], "dtype": "int32"},
        "text": {"shape": [5, 2], "dtype": "float16", "identity": {"encoder": "tiny"}},
    }
    found = load_latents(tmp_path, TRAIN)
    assert {name: spec.shape for name, spec in found.columns.items()} == {
        "label": (),
        "text": (5, 2),
    }
    indices = np.array([20, 3, 42])
    batch, plain = found.get(indices), source.get(indices)
    np.testing.assert_array_equal(batch.pop("text"), with_states[TRAIN][indices])
    for name, values in plain.items():
        np.testing.assert_array_equal(batch[name], values)
    assert batch.keys() == plain.keys()
    told = found.fingerprint()
    assert told.pop("columns") == {"text": {"encoder": "tiny"}}
    assert told == source.fingerprint()
    assert encode(config).startswith("Done: ")  # nothing is made anew


def test_other_columns_are_other_data(with_states, data_dir, autoencoder, encoded):
    before = shards(encoded)
    with pytest.raises(ValueError, match=r"other settings(.|\n)*columns\.text"):
        encode(latent_config(data_dir, autoencoder, encoded))
    assert shards(encoded) == before


def test_both_splits_have_the_same_columns(with_states, data_dir, autoencoder, tmp_path):
    with_states["test[:5%]"] = with_states["test[:5%]"][:, :4]
    with pytest.raises(ValueError, match="has the columns .'label', 'text'.*must have the same"):
        encode(latent_config(data_dir, autoencoder, tmp_path / "latents"))
    assert not (tmp_path / "latents").exists()


def test_a_folder_that_names_no_columns_has_labels(copy, encoded, source, data_dir, autoencoder):
    """As versions wrote it that knew no columns."""
    path = copy / "latents.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("columns") == {"label": {"shape": [], "dtype": "int32"}}
    path.write_text(json.dumps(manifest))
    old = load_latents(copy, TRAIN)
    assert old.fingerprint() == source.fingerprint() and "columns" not in old.fingerprint()
    for name, values in old.get(np.arange(43)).items():
        np.testing.assert_array_equal(values, source.get(np.arange(43))[name])
    first(copy).unlink()
    assert encode(latent_config(data_dir, autoencoder, copy)).startswith("Done: ")
    assert shards(copy) == shards(encoded)


# Going on, and sharing ----------------------------------------------------------------------------


def test_what_is_cut_off_goes_on(encoded, data_dir, autoencoder, tmp_path, monkeypatch):
    config = latent_config(data_dir, autoencoder, tmp_path / "latents")
    write, written = store.write_shard, []

    def interrupted(shard, batches):
        if len(written) == 2:
            write(shard, (_ for _ in [next(iter(batches)), stop()]))
        written.append(shard)
        write(shard, batches)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config)
    folder = tmp_path / "latents"
    assert len(shards(folder)) == 2 == len(list(folder.iterdir())) - 1
    with pytest.raises(ValueError, match="1 of 3 shards of 'train.*are missing.*go on with python"):
        load_latents(folder, TRAIN)
    monkeypatch.setattr(store, "write_shard", write)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert encode(config).startswith("Done: ")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert shards(folder) == shards(encoded)
    monkeypatch.setattr(encoding, "_program", None)  # nothing is left to do
    assert encode(config).startswith("Done: ")


def test_processes_share_the_shards(encoded, data_dir, autoencoder, tmp_path):
    config = latent_config(data_dir, autoencoder, tmp_path)
    said = encode(config, process_index=1, process_count=2)
    assert said == (
        f"{tmp_path}: this process's shards are written; 3 of other processes are not yet"
    )
    with pytest.raises(ValueError, match="2 of 3 shards of .* encoding is not finished; go on"):
        load_latents(tmp_path, TRAIN)
    assert encode(config, process_index=0, process_count=2).startswith("Done: ")
    assert shards(tmp_path) == shards(encoded)


def test_folders_of_images_without_labels(autoencoder, tmp_path):
    for index in range(3):
        pixels = np.full((9, 12), 40 * index, np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    config = latent_config(None, autoencoder, tmp_path / "latents")
    config.data.update(name="folder", path=str(tmp_path / "images"), image_size=8)
    config.data.train_split = config.data.test_split = "train"
    encode(config, process_index=0)
    source = load_latents(tmp_path / "latents", "train")
    assert source.num_classes is None
    assert source.get([2, 0])["label"].tolist() == [0, 0]


# What is refused ----------------------------------------------------------------------------------


def other_weights(config, tmp_path):
    params = building.create(TINY, 1)[1]
    weights.save_model(tmp_path / "other", TINY.described(), params)
    config.latents.autoencoder = str(tmp_path / "other")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config, _: config.data.update(test_split="test"), r"splits\.test: None -> 360"),
        (lambda config, _: config.data.update(crop=(0, 0, 8, 8)), r"crop: None -> \[0, 0, 8, 8\]"),
        (other_weights, r"autoencoder\.sha256: '\w+' -> '\w+'\nChoose another config.latents.path"),
    ],
)
def test_other_settings_are_refused(encoded, data_dir, autoencoder, tmp_path, change, message):
    before = shards(encoded)
    config = latent_config(data_dir, autoencoder, encoded)
    change(config, tmp_path)
    with pytest.raises(ValueError, match=f"was encoded with other settings(.|\n)*{message}"):
        encode(config)
    assert shards(encoded) == before


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: config.model.update(image_size=8),
            r"images \(8, 8, 1\); latents of config.model.image_size 8 are made of \(16, 16, 1\)",
        ),
        (
            lambda config: config.model.update(in_channels=3),
            "makes latents of 4 channels, config.model.in_channels is 3",
        ),
        (
            lambda config: setattr(config.latents, "autoencoder", None),
            "config.latents.autoencoder is not set",
        ),
        (
            lambda config: setattr(config.latents, "path", str(ROOT / "tests")),
            "tests is not empty and has no latents.json",
        ),
    ],
)
def test_configs_that_do_not_fit(data_dir, autoencoder, tmp_path, change, message):
    config = latent_config(data_dir, autoencoder, tmp_path / "latents")
    change(config)
    with pytest.raises(ValueError, match=message):
        encode(config)
    assert not (tmp_path / "latents").exists()


def test_latents_that_are_not_finite_name_the_example(data_dir, autoencoder, tmp_path):
    network = load_autoencoder(autoencoder)
    params = jax.tree.map(lambda value: 1e5 * value, network.params)
    weights.save_model(tmp_path / "loud", TINY.described(), params)
    config = latent_config(data_dir, tmp_path / "loud", tmp_path / "latents")
    with pytest.raises(ValueError, match=r"digits \(train.*, example \d+: its latents are not fin"):
        encode(config)
    assert not shards(tmp_path / "latents")


def edit(folder, **changes):
    path = folder / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(folder):
    return sorted(folder.glob("train*"))[0]


def flip_a_bit(folder):
    content = bytearray(first(folder).read_bytes())
    record = store._open(first(folder)).read([3])[0]
    content[content.index(record) + 9] ^= 1
    first(folder).write_bytes(content)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "latents.json").unlink(), "no latents.json in .* encode the data first"),
        (lambda f: (f / "latents.json").write_text("{"), "latents.json is damaged: JSONDecodeErr"),
        (lambda f: edit(f, shape=None), "latents.json is damaged: TypeError"),
        (lambda f: edit(f, columns={"a": {"shape": [], "dtype": "O"}}), "damaged: .*'a' is of obj"),
        (lambda f: edit(f, columns={"mask": {"shape": [], "dtype": "int8"}}), "damaged: .*no colu"),
        (lambda f: edit(f, columns=["label"]), "latents.json is damaged: AttributeError"),
        (lambda f: edit(f, columns={}), "00000-of-00003.array_record is damaged"),
        (lambda f: edit(f, splits={TRAIN: -1}), "latents.json is damaged: .*out of their range"),
        (lambda f: edit(f, splits={"test": 1}), r"no latents of the split 'train.*only \['test'\]"),
        (lambda f: first(f).unlink(), "1 of 3 shards of .* first is train.*00000-of-00003"),
        (lambda f: os.truncate(first(f), 4000), "00000-of-.* is damaged: delete it and encode"),
        (flip_a_bit, "00000-of-00003.array_record is damaged: .* hash mismatch"),
        (lambda f: edit(f, shape=[4, 4, 2]), "00000-of-00003.array_record is damaged"),
    ],
)
def test_damaged_folders(copy, change, message):
    change(copy)
    with pytest.raises(ValueError, match=message):
        take(train_batches(load_latents(copy, TRAIN), batch_size=43, seed=0), 1)


def test_a_truncated_shard_is_made_anew(copy, encoded, data_dir, autoencoder):
    os.truncate(first(copy), 4000)
    assert encode(latent_config(data_dir, autoencoder, copy)).startswith("Done: ")
    assert shards(copy) == shards(encoded)


def test_another_autoencoder_than_that_of_the_latents(encoded, autoencoder, tmp_path):
    identity = load_autoencoder(autoencoder).identity
    check_autoencoder(encoded, identity | {"name": "a copy of it"})
    check_autoencoder(tmp_path, identity)  # nothing encoded yet
    for change in ({"sha256": "0" * 64}, {"scaling_factor": 1.0}, {"shift_factor": 0.1}):
        message = rf"was encoded by another autoencoder \(tiny\)(.|\n)*{[*change][0]}: "
        with pytest.raises(ValueError, match=message):
            check_autoencoder(encoded, identity | change)


def test_labels_that_are_no_class_are_refused_where_labels_are_used(copy):
    edit(copy, num_classes=3)
    source = load_latents(copy, TRAIN)
    assert source.get(np.arange(43))["label"].max() > 2
    source.check_labels = True
    with pytest.raises(ValueError, match="label . is no class, there are 3 from 0"):
        source.get(np.arange(43))


# The command --------------------------------------------------------------------------------------


def test_the_command(encoded, data_dir, autoencoder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "liftplace_jax.encode",
        "--config=tests/tiny_config.py",
        f"--config.data.data_dir={data_dir}",
        f"--config.data.train_split={TRAIN}",
        "--config.data.test_split=test[:5%]",
        "--config.model.image_size=4",
        "--config.model.in_channels=4",
        f"--config.latents.autoencoder={autoencoder}",
    ]
    path = tmp_path / "latents"
    done = subprocess.run(
        [*command, f"--config.latents.path={path}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Done: {path} holds latents 4x4x4 of 43 images")
    assert "encode: 100%" in done.stderr and "61/61" in done.stderr
    assert len(load_latents(path, "test[:5%]")) == 18
