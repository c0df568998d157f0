"""How a run is watched: traces, guarded transfers, memory, compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from liftplace_jax.experiment.checks import check_config
from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.host import sharding
from liftplace_jax.training.profiling import keep_compiled, memory_line, watched
from liftplace_jax.training.state import create_state
from liftplace_jax.training.step import make_train_step

OPTIMIZER = optax.sgd(0.1)


def config(**fields):
    found = default_config()
    found.update(**fields)
    return found


@pytest.fixture(scope="module")
def parts():
    """A step, a fresh state, and a batch on the devices."""
    mesh = sharding.make_mesh({"data": -1})

    def loss_fn(params, frozen, batch, step):
        error = jnp.mean((batch["image"] @ params["student"]) ** 2)
        return error, {}

    def state():
        fresh = create_state({"student": jnp.ones((3, 1))}, OPTIMIZER)
        return jax.device_put(fresh, sharding.tree_shardings(fresh, (), mesh))

    shardings = sharding.tree_shardings(state(), (), mesh)
    step = make_train_step(loss_fn, OPTIMIZER, ema_decay=0.9, shardings=shardings)
    batch = {"image": np.ones((8, 3), np.float32)}
    return step, state, next(iter(sharding.global_batches([batch], mesh))), batch


def traces(folder):
    return list(folder.rglob("*.xplane.pb"))


def test_the_steps_asked_for_are_traced(parts, tmp_path, monkeypatch):
    step, state, batch, _ = parts
    traced, started = [], jax.profiler.start_trace
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda folder: (traced.append("start"), started(folder))
    )
    with watched(step, config(profile_steps="2:3"), tmp_path) as watched_step:
        current = state()
        for _ in range(4):
            current, _ = watched_step(current, None, batch)
            traced.append(int(current.step))
            assert len(traces(tmp_path / "profile")) == (int(current.step) >= 3)
    assert traced == [1, "start", 2, 3, 4]


def test_a_run_cut_off_keeps_its_trace_and_one_that_goes_on_traces_the_rest(parts, tmp_path):
    step, state, batch, _ = parts
    with (
        pytest.raises(KeyboardInterrupt),
        watched(step, config(profile_steps="1:9"), tmp_path / "first") as watched_step,
    ):
        current, _ = watched_step(state(), None, batch)
        raise KeyboardInterrupt
    assert len(traces(tmp_path / "first")) == 1
    with watched(step, config(profile_steps="1:2"), tmp_path / "second") as watched_step:
        current, _ = watched_step(current, None, batch)
        assert len(traces(tmp_path / "second")) == 1
        watched_step(current, None, batch)
    assert len(traces(tmp_path / "second")) == 1


def test_nothing_is_between_where_nothing_is_asked_for(parts, tmp_path):
    with watched(parts[0], config(), tmp_path) as step:
        assert step is parts[0]


def test_batches_that_the_host_sends_by_accident_are_refused(parts, tmp_path):
    step, state, batch, on_host = parts
    with watched(step, config(transfer_guard="disallow"), tmp_path) as watched_step:
        current, metrics = watched_step(state(), None, batch)
        assert float(metrics["loss"]) == 9
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            watched_step(current, None, on_host)


@pytest.mark.parametrize("text", ["100", "5:3", "0:3", "a:b", "1:2:3", "-1:4"])
def test_bad_steps_are_named(text):
    with pytest.raises(ValueError, match=f"config.profile_steps must be FIRST:LAST.*'{text}'"):
        check_config(config(profile_steps=text))


def test_bad_guards_and_threads_are_named():
    with pytest.raises(ValueError, match=r"config.transfer_guard must be one of \['disallow', 'lo"):
        check_config(config(transfer_guard="allow"))
    with pytest.raises(ValueError, match="config.input_threads must be .* 1..1024, got 0"):
        check_config(config(input_threads=0))


def test_memory_of_a_device_is_what_it_holds():
    mesh = sharding.make_mesh({"data": -1})
    split = jax.device_put(np.zeros((8, 10**5), np.float32), sharding.batch_sharding(mesh))
    assert memory_line("run", split, {"none": None}).startswith(
        "run: 0.0004 GB of parameters and optimizer state on each of 8 devices (cpu)"
    )


def test_compiled_programs_are_kept(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        keep_compiled(None)
        assert jax.config.jax_compilation_cache_dir == before
        keep_compiled(str(tmp_path / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.jit(lambda x: jnp.sin(x) * 17)(jnp.ones(3))
        assert list((tmp_path / "cache").iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()
