"""Saving while training goes on, and checksums that see where a value stands."""

import asyncio
import json
import os
import resource
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization

from liftplace_jax.host import sharding
from liftplace_jax.training.checkpoints import Checkpoints
from liftplace_jax.training.checksums import checksums
from liftplace_jax.training.loop import Interrupted, NonFiniteLossError, train
from liftplace_jax.training.state import create_state
from liftplace_jax.training.step import make_train_step

# Checksums --------------------------------------------------------------------------------------

TYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool", "float64", "int64"]


def mixed(x):
    """MurmurHash3's finaliser in NumPy."""
    x = x.astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x


def words(values):
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.itemsize == 8:
        return flat.view(np.uint32)
    return flat.view(f"uint{8 * flat.itemsize}").astype(np.uint32)


def by_hand(values):
    """The sum with positions, from the whole array."""
    bits = words(values)
    terms = mixed(bits ^ mixed(np.arange(bits.size)))
    return int(terms.sum(dtype=np.uint64) % 2**32)


def older(values):
    """The sum that versions before wrote."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return int(flat.view(f"uint{8 * flat.itemsize}").sum(dtype=np.uint64) % 2**32)


def any_values(dtype, shape):
    """Random bits: NaNs with payloads, infinities, denormal numbers and zeros of both signs."""
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind).reshape(shape)


def checksum(values):
    return checksums({"a": values})["a"]


@pytest.mark.parametrize("dtype", TYPES)
def test_checksums_are_those_of_numpy_on_any_number_of_devices(dtype):
    with jax.enable_x64(dtype in ("float64", "int64")):
        for shape in ((), (0,), (3, 0), (5,), (8, 2, 3)):
            values = any_values(dtype, shape)
            array = jnp.asarray(values)
            assert array.dtype.name == dtype and checksum(array) == by_hand(values)
            assert checksums({"a": array}, positions=False) == {"a": older(values)}
        mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, jax.devices())
        for spec in (("fsdp", "data"), (("data", "fsdp"),), (None, "data"), ()):
            # From the host: between devices, XLA's CPU program may change the bits of NaNs.
            placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
            assert checksum(placed) == by_hand(values)
            assert checksums({"a": placed}, positions=False) == {"a": older(values)}


def nan(payload):
    return np.array([0x7FC00000 + payload], np.uint32).view(np.float32)[0]


CHANGES = {
    "one bit": lambda a: a.view(np.uint32).__setitem__((1, 2), a.view(np.uint32)[1, 2] ^ 1),
    "the sign of a zero": lambda a: a.__setitem__((0, 0), -0.0),
    "the payload of a NaN": lambda a: a.__setitem__((0, 1), nan(2)),
    "neighbours": lambda a: a.__setitem__((2, slice(0, 2)), a[2, 1::-1].copy()),
    "distant elements": lambda a: a.reshape(-1).__setitem__([5, 700], a.reshape(-1)[[700, 5]]),
    "two rows": lambda a: a.__setitem__([3, 9], a[[9, 3]]),
    "all rows by one": lambda a: a.__setitem__(slice(None), np.roll(a, 1, axis=0)),
    "two columns": lambda a: a.__setitem__((slice(None), [4, 8]), a[:, [8, 4]]),
    "the layout": lambda a: a.__setitem__(slice(None), a.T.reshape(a.shape).copy()),
    "halves": lambda a: a.__setitem__(slice(None), np.concatenate([a[32:], a[:32]])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checksums_see_what_moved_and_what_changed(change):
    values = np.random.default_rng(1).normal(size=(64, 12)).astype(np.float32)
    values[0, :2] = 0.0, nan(1)
    other = values.copy()
    CHANGES[change](other)
    assert other.tobytes() != values.tobytes()
    assert checksum(jnp.asarray(other)) != checksum(jnp.asarray(values))
    moved = np.sort(other.view(np.uint32), axis=None) == np.sort(values.view(np.uint32), axis=None)
    # Where elements only moved, the sums of versions before are the same.
    assert (older(other) == older(values)) == moved.all()


def test_arrays_of_more_than_4_billion_elements_have_checksums():
    """Compiled, not run."""
    from liftplace_jax.training.checksums import _position_sum

    array = jax.ShapeDtypeStruct((2**17, 3, 2**16), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct((3,), jnp.uint32)
    assert _position_sum.lower(array, numbers, numbers).compile().as_text()


# Checkpoints ------------------------------------------------------------------------------------

ADAM = optax.adam(0.1)


def squares(params, teacher_params, batch, step):
    return ((params["student"]["w"] - 1) ** 2).sum() + 0 * step, {}


def new_state(size=200):
    weights = {"w": jax.random.normal(jax.random.key(0), (size, size))}
    return create_state({"student": weights}, ADAM)


STEP = make_train_step(squares, ADAM, ema_decay=0.9)


def looped(folder, total_steps, batches=lambda first: (None for _ in range(99)), **options):
    """A run of the loop, checkpoints after every 3 steps."""
    return train(
        STEP,
        new_state(),
        None,
        batches,
        total_steps=total_steps,
        folder=folder,
        title="test",
        checkpoint_every=3,
        **options,
    )


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Arrays are written only while it is set; it is, at first."""
    opened = threading.Event()
    opened.set()
    store = serialization.async_serialize_from_host

    async def store_when_open(*args, **options):
        while not opened.is_set():
            await asyncio.sleep(0.01)
        await store(*args, **options)

    monkeypatch.setattr(serialization, "async_serialize_from_host", store_when_open)
    yield opened
    opened.set()


def rewrite_sums(folder, change):
    path = folder / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"custom_metadata": change(content["custom_metadata"])}))


def test_a_checkpoint_with_moved_values_is_refused(tmp_path):
    state = new_state(8)
    moved = state._replace(ema={"w": state.ema["w"][::-1]})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, moved)
    kept = {"position_sums": checksums(state._asdict())}
    rewrite_sums(tmp_path / "1", lambda _: kept)
    with pytest.raises(ValueError, match=r"not what was saved: ema\.w\n"):
        checkpoints.restore(state)


def test_sums_of_older_versions_are_checked_as_before(tmp_path, capsys):
    state = new_state(8)
    Checkpoints(tmp_path).save(1, state)
    sums = {}

    def as_before(found):
        assert list(found) == ["position_sums"]
        leaves = jax.tree.leaves(state._asdict())
        for name, leaf in zip(found["position_sums"], leaves, strict=True):
            sums[name] = older(jax.device_get(leaf))
        return {"sums": sums}

    rewrite_sums(tmp_path / "1", as_before)
    mesh = sharding.make_mesh({"fsdp": 8}, jax.devices())
    split = sharding.tree_shardings(state, ((".*w", ("fsdp",)),), mesh)
    for shardings in (None, split):
        equal(Checkpoints(tmp_path).restore(state, shardings), state)
    rewrite_sums(tmp_path / "1", lambda _: {"sums": sums | {"ema.w": sums["ema.w"] ^ 1}})
    with pytest.raises(ValueError, match=r"not what was saved: ema\.w\n"):
        Checkpoints(tmp_path).restore(state)
    assert capsys.readouterr().err == ""


def test_what_is_trained_on_meanwhile_does_not_reach_the_checkpoint(tmp_path, gate):
    """The step takes over the state's memory while the file is still to be written."""
    mesh = sharding.make_mesh({"fsdp": 4, "data": 2}, jax.devices())
    state = new_state()
    split = sharding.tree_shardings(state, ((".*w", ("fsdp",)),), mesh)
    step = make_train_step(squares, ADAM, ema_decay=0.9, shardings=split)
    state, _ = step(jax.device_put(state, split), None, None)
    saved = jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(state))
    with Checkpoints(tmp_path) as checkpoints:
        gate.clear()
        checkpoints.save(1, state, background=True)
        for _ in range(5):
            state, _ = step(state, None, None)
        jax.block_until_ready(state)
        assert checkpoints.latest_step() is None and not (tmp_path / "1").exists()
        gate.set()
        checkpoints.wait()
        assert checkpoints.latest_step() == 1
        equal(checkpoints.restore(saved), saved)
    assert np.abs(jax.device_get(state.ema["w"]) - saved.ema["w"]).min() > 0


def test_one_that_is_being_written_is_not_the_latest(tmp_path, gate):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, new_state(2))
        gate.clear()
        checkpoints.save(2, new_state(2), background=True)
        assert checkpoints.latest_step() == Checkpoints(tmp_path).latest_step() == 1
        assert any(name.startswith("2.") for name in names(tmp_path))
        threading.Timer(0.2, gate.set).start()
        checkpoints.save(2, new_state(2))  # waits, and finds it there
        assert checkpoints.latest_step() == Checkpoints(tmp_path).latest_step() == 2
    assert names(tmp_path) == ["2"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, gate):
    """Written only when step 5 is done; the result is that of a run that is not disturbed."""
    seen = []

    def on_log(step, state):
        if step == 2:
            gate.clear()
        if step == 5:
            seen.extend(names(tmp_path / "a" / "checkpoints"))
            gate.set()
        return {}

    state = looped(tmp_path / "a", 8, log_every=1, on_log=on_log)
    assert [name.partition(".")[0] for name in seen] == ["3"] and seen != ["3"]
    assert names(tmp_path / "a" / "checkpoints") == ["6", "8"]
    equal(state, looped(tmp_path / "b", 8))
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "8")
    equal(looped(tmp_path / "a", 8), state)


def test_a_run_that_fails_waits_for_what_is_being_written(tmp_path, gate):
    def batches(first):
        for step in range(first, 9):
            if step == 4:
                threading.Timer(0.3, gate.set).start()
                raise ValueError("example 4")
            if step == 2:
                gate.clear()
            yield None

    with pytest.raises(ValueError, match="example 4"):
        looped(tmp_path, 9, batches)
    assert names(tmp_path / "checkpoints") == ["3"]


def test_a_signal_waits_for_both(tmp_path, gate):
    def on_log(step, state):
        if step == 2:
            gate.clear()
        if step == 4:
            threading.Timer(0.3, gate.set).start()
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted, match="SIGTERM at step 4"):
        looped(tmp_path, 9, log_every=1, on_log=on_log)
    assert names(tmp_path / "checkpoints") == ["3", "4"]


# Faults -----------------------------------------------------------------------------------------


@pytest.fixture
def disk():
    """Sets how many bytes a file may have."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=limits[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield limit
    limit()


@pytest.mark.parametrize("ends_by", ["save", "wait", "restore", "close"])
def test_a_full_disk_is_named_whoever_comes_next(tmp_path, gate, disk, ends_by):
    state = new_state()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state)
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # another process has begun
    gate.clear()
    checkpoints.save(6, state, background=True)
    disk(10_000)
    gate.set()
    call = {
        "save": lambda: checkpoints.save(8, state),
        "wait": checkpoints.wait,
        "restore": lambda: checkpoints.restore(state),
        "close": checkpoints.close,
    }[ends_by]
    with pytest.raises(OSError, match="(?s)checkpoint of step 6 cannot be .*too large") as error:
        call()
    disk()
    assert str(tmp_path) in str(error.value) and "That of step 3 is whole." in str(error.value)
    assert names(tmp_path) == ["3", "9.orbax-checkpoint-tmp"]
    assert checkpoints.latest_step() == 3
    if ends_by != "close":
        equal(checkpoints.restore(state), state)
        checkpoints.save(8, state, background=True)
        checkpoints.close()
        assert names(tmp_path)[-2:] == ["8", "9.orbax-checkpoint-tmp"]


def test_the_loop_raises_what_went_wrong_in_the_background(tmp_path, gate, disk):
    def on_log(step, state):
        if step == 5:
            while "3" not in names(tmp_path / "checkpoints"):
                time.sleep(0.01)
            gate.clear()
        if step == 7:
            disk(10_000)
            gate.set()
        return {}

    for total in (8, 20):  # at the end, and when the next is due
        with pytest.raises(OSError, match="(?s)of step 6 cannot be written.*That of step 3 is"):
            looped(tmp_path, total, log_every=1, on_log=on_log)
        disk()
        assert names(tmp_path / "checkpoints") == ["3"]
    equal(looped(tmp_path, 8), looped(tmp_path.with_name("whole"), 8))


def test_an_error_of_training_is_not_hidden_by_one_of_saving(tmp_path, gate, disk, capsys):
    def batches(first):
        for step in range(first, 9):
            if step == 3:
                disk(10_000)
                gate.set()
                raise NonFiniteLossError("step 4: loss=nan")
            if step == 2:
                gate.clear()
            yield None

    with pytest.raises(NonFiniteLossError, match="step 4"):
        looped(tmp_path, 9, batches)
    disk()
    assert "checkpoint of step 3 cannot be written" in capsys.readouterr().err
    assert names(tmp_path / "checkpoints") == []


def test_a_process_whose_writing_failed_waits_for_no_other(monkeypatch):
    """Of a pod: the others wait for it elsewhere, so that it must come to say what failed."""
    from liftplace_jax.training import checkpoints

    waited = []
    monkeypatch.setattr(
        checkpoints.ocp.multihost, "get_barrier_sync_fn", lambda: lambda **key: waited.append(key)
    )

    def meet(failing):
        try:
            if failing:
                raise OSError("no space left")
        except OSError:
            checkpoints._meet(key="a", timeout_ms=1)
        else:
            checkpoints._meet(key="b", timeout_ms=1)

    for failing in (True, False):
        thread = threading.Thread(target=meet, args=(failing,))
        thread.start()
        thread.join()
    assert waited == [{"key": "b", "timeout_ms": 1}]
    meet(True)  # the main thread keeps in step with the others
    assert [call["key"] for call in waited] == ["b", "a"]


def test_a_lost_process_is_not_called_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, new_state(2), background=True)
    lost = TimeoutError("barrier")
    lost.__cause__ = jax.errors.JaxRuntimeError("tasks are unhealthy")

    def fail():
        raise lost

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="unhealthy"):
        checkpoints.wait()
