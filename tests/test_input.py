"""From the host into the step: batches one ahead on the devices, unpacked where they are used."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from liftplace_jax import evaluation
from liftplace_jax.data import Source, train_batches
from liftplace_jax.host import sharding
from liftplace_jax.training.objective import on_batches
from liftplace_jax.training.state import create_state, random_key
from liftplace_jax.training.step import make_train_step

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 4, 4, 1), np.uint8)


def mesh(devices=8):
    return sharding.make_mesh({"data": -1}, jax.devices()[:devices])


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("placing", "batches"))]


class Batches:
    """Counts what is taken; knows whether it was closed."""

    def __init__(self, count, fails=None):
        self.taken, self.closed, self.waits = 0, False, threading.Semaphore(0)
        self._count, self._fails = count, fails

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self._count:
            raise StopIteration
        if self.taken == self._fails:
            raise ValueError(f"batch {self.taken} cannot be read")
        self.taken += 1
        self.waits.release()
        return {"x": np.full((8, 2), self.taken, np.uint8), "mirrored": np.arange(8) % 2 == 0}

    def close(self):
        self.closed = True


def test_one_batch_is_ahead_and_no_more():
    batches = Batches(9)
    placed = sharding.global_batches(batches, mesh())
    for number in range(1, 9):
        batch = next(placed)
        assert batch["x"].dtype == np.uint8 and batch["mirrored"].dtype == bool
        assert len(batch["x"].sharding.device_set) == 8 and (batch["x"] == number).all()
        for _ in range(2 if number == 1 else 1):  # the next one comes while this one is in use
            assert batches.waits.acquire(timeout=60)
        assert batches.taken == number + 1
    assert len(threads()) == 1
    placed.close()
    assert batches.closed and not threads()


def test_all_batches_come_and_the_end_is_clean():
    batches = Batches(5)
    assert [int(b["x"][0, 0]) for b in sharding.global_batches(batches, mesh())] == [1, 2, 3, 4, 5]
    assert batches.closed and not threads()
    assert list(sharding.global_batches([], mesh())) == []


@pytest.mark.parametrize("fails", [0, 2])
def test_an_error_comes_in_place_of_its_batch(fails):
    batches = Batches(9, fails)
    placed = sharding.global_batches(batches, mesh())
    assert len(list(itertools.islice(placed, fails))) == fails
    with pytest.raises(ValueError, match=f"batch {fails} cannot be read"):
        next(placed)
    assert batches.closed and not threads()


def test_a_batch_that_the_devices_cannot_split_is_an_error():
    with pytest.raises(ValueError, match="(?i)shape|divi"):
        next(sharding.global_batches([{"x": np.zeros((7, 2), np.uint8)}], mesh()))
    assert not threads()


def test_no_batch_is_held_that_is_no_longer_used():
    placed = sharding.global_batches(Batches(50), mesh(1))
    next(placed)
    before = len(jax.live_arrays())
    for _ in range(30):
        next(placed)
    assert len(jax.live_arrays()) <= before + 2 * 2  # one ahead, in the midst of being placed
    placed.close()


def test_closing_stops_the_threads_of_the_data_too():
    source = Source("images", [{"image": x} for x in IMAGES], image_shape=(4, 4, 1))
    placed = sharding.global_batches(
        train_batches(source, batch_size=8, seed=0, flip=True, prefetch=3), mesh()
    )
    next(placed)
    assert len(threads()) > 1
    placed.close()
    assert not threads()


# In the step --------------------------------------------------------------------------------------


def loss_fn(params, teacher_params, batch, step):
    """How well a layer undoes noise."""
    images = batch["image"].reshape(len(batch["image"]), -1)
    noise = jax.random.normal(random_key(0, "noise", step), images.shape)
    noisy = 0.6 * images + 0.8 * noise
    return jnp.square(noisy @ params["student"]["w"] - images).mean(), {}


def trained(objective, batches, accumulation):
    optimizer = optax.adam(1e-2)
    w = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    state = create_state({"student": {"w": w}}, optimizer)
    step = make_train_step(objective, optimizer, ema_decay=0.9, accumulation=accumulation)
    losses = []
    for batch in batches:
        state, metrics = step(state, None, batch)
        losses.append(metrics["loss"])
    return np.asarray(losses), state.params["student"]["w"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_on_bytes_is_the_run_on_what_numpy_makes_of_them(accumulation):
    source = Source("images", [{"image": x} for x in IMAGES], image_shape=(4, 4, 1))
    stream = train_batches(source, batch_size=8, seed=3, flip=True)
    batches = list(itertools.islice(stream, 12))
    stream.close()
    made = []
    for batch in batches:
        images = batch["image"].astype(np.float32) / np.float32(127.5) - 1
        images[batch["mirrored"]] = images[batch["mirrored"], :, ::-1]
        made.append({"image": images, "label": batch["label"]})
    expected = trained(loss_fn, made, accumulation)
    found = trained(on_batches(loss_fn, source.unpack, 3), batches, accumulation)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("devices", [None, 1, 8])
def test_evaluation_sees_what_numpy_makes_of_the_bytes(devices):
    source = Source("images", [{"image": x} for x in IMAGES], image_shape=(4, 4, 1))
    over = devices and sharding.batch_sharding(mesh(devices))
    saw = []

    def noising(images, levels, noise):
        saw.append(np.asarray(images))
        return images, jnp.zeros(len(images))

    model = lambda x, t, batch: x + batch["label"][:, None, None, None]  # noqa: E731
    evaluation.output_error(model, model, noising, source, batch_size=16, seed=0, sharding=over)
    expected = IMAGES.astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(np.concatenate(saw)[:24], expected)
    assert not threads()
