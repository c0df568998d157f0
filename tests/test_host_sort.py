"""The order of errors, found by machine code inside compiled programs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liftplace_jax import place_loss
from liftplace_jax.losses import permute
from liftplace_jax.suites.communication import collectives

SHAPES = [
    (3, 40, 2), (1, 1, 1), (5, 30000, 1), (40, 4096, 3), (2, 0, 3), (0, 4, 2), (3, 2047, 2),
    (2, 3, 65, 4), (2049, 3), (64, 64, 1), (1, 200001, 2),
]  # fmt: skip


def pair(shape, seed=0):
    """Many ties, infinities and NaN of several kinds among the distances."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, *shape)).astype(np.float32)
    student[rng.random(shape) < 0.5] = 0.25
    teacher[student == 0.25] = 0.5
    teacher[rng.random(shape) < 0.1] = np.inf
    nan = np.array([0x7FC00000, 0xFFC00001, 0x7FC12345], np.uint32).view(np.float32)
    student = np.where(rng.random(shape) < 0.1, rng.choice(nan, shape), student)
    return student.astype(np.float32), teacher


def expected(student, teacher):
    rows = [np.swapaxes(x, -1, -2) for x in (student, teacher)]
    order = np.argsort(np.abs(rows[1] - rows[0]), axis=-1, kind="stable")
    return *(np.take_along_axis(x, order, axis=-1) for x in rows), order


@pytest.fixture(params=["machine code", "numba is not there"])
def any_cpu(request, monkeypatch):
    monkeypatch.setattr(permute, "HOST_LEAST", 0)
    if request.param != "machine code":
        monkeypatch.setattr(permute, "_native", lambda: False)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.fixture
def machine_code_alone(monkeypatch):
    monkeypatch.setattr(permute, "HOST_LEAST", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_equals_a_stable_sort(any_cpu):
    for shape in SHAPES:
        student, teacher = pair(shape)
        function = jax.jit(permute.sort_by_error)
        found = function(student, teacher)
        assert found[2].dtype == jnp.int32
        for mine, want in zip(found, expected(student, teacher), strict=True):
            np.testing.assert_array_equal(mine, want)
        assert ("liftplace_sort" in function.lower(student, teacher).as_text()) == (
            any_cpu == "machine code"
        )


def test_accelerators_order_is_the_same():
    student, teacher = pair((5, 300, 2))
    error = np.swapaxes(np.abs(teacher - student), -1, -2)
    order = expected(student, teacher)[2]
    np.testing.assert_array_equal(jax.jit(permute.pair_order)(error), order)


def test_put_is_the_way_back(any_cpu):
    for shape in SHAPES:
        samples = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        order = expected(*pair(shape))[2].astype(np.int32)
        rows = jax.jit(permute.take)(samples, order)
        want = np.take_along_axis(np.swapaxes(samples, -1, -2), order, axis=-1)
        np.testing.assert_array_equal(rows, want)
        np.testing.assert_array_equal(jax.jit(permute.put)(rows, order), samples)


def test_vmap_and_loops(any_cpu):
    student, teacher = pair((4, 5, 64, 2))
    want = expected(student, teacher)
    loop = lambda f: lambda s, t: jax.lax.map(lambda x: f(*x), (s, t))  # noqa: E731
    for mapped in (jax.vmap, loop):
        found = jax.jit(mapped(permute.sort_by_error))(student, teacher)
        for mine, numbers in zip(found, want, strict=True):
            np.testing.assert_array_equal(mine, numbers)
    # One teacher for all, along another axis.
    found = jax.jit(jax.vmap(permute.sort_by_error, (1, None), 1))(student, teacher[:, 0])
    same = np.broadcast_to(teacher[:, :1], teacher.shape)
    np.testing.assert_array_equal(found[2], expected(student, same)[2])


def test_several_devices_sort_their_own_samples(any_cpu):
    """Machine code or not, under any split of the batch, nothing but sums crosses devices."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 8, 16, 16, 3)).astype(np.float32)
    value = jax.jit(jax.value_and_grad(lambda s, t: place_loss(s, t).loss))
    alone = value(student, teacher)
    for mesh, spec in (
        (Mesh(jax.devices(), ("data",)), P("data")),
        (Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "fsdp")), P(("data", "fsdp"))),
        (Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "fsdp")), P("data")),
    ):
        split = jax.device_put((student, teacher), NamedSharding(mesh, spec))
        program = value.lower(*split).compile()
        sent = collectives(program)
        assert {s.kind for s in sent} == {"all-reduce"}
        assert all(np.prod(s.shape) == 1 for s in sent)
        loss, gradient = value(*split)
        np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, alone[1], atol=1e-4)
        if any_cpu == "machine code":
            local = gradient.sharding.shard_shape(student.shape)[0]
            text = program.as_text()
            assert f"f32[{local},256,3]" in text and "liftplace_sort" in text
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put((student, teacher), P("data"))
        np.testing.assert_allclose(value(*split)[0], alone[0], rtol=1e-5)


def test_a_batch_that_devices_do_not_share_evenly(machine_code_alone):
    """shard_map, and a teacher that all devices have."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 8, 8, 8, 1)).astype(np.float32)
    mesh = Mesh(jax.devices(), ("data",))

    def each(s, t):
        return jax.lax.pmean(place_loss(s, t, axis_name="data").loss, "data")

    for specs, arrays in (
        ((P("data"), P("data")), (student, teacher)),
        ((P("data"), P()), (student, teacher[:1])),
        ((P(), P("data")), (student[:1], teacher)),
    ):
        mapped = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P())
        alone = place_loss(*(np.broadcast_to(x, student.shape) for x in arrays)).loss
        np.testing.assert_allclose(jax.jit(mapped)(*arrays), alone, rtol=1e-5)


def test_buffers_of_another_kind_are_an_error_of_the_program(machine_code_alone):
    x = np.zeros((2, 4, 3), np.float32)
    jax.block_until_ready(jax.jit(permute.sort_by_error)(x, x))  # registers
    rows = jax.ShapeDtypeStruct((2, 3, 4), np.float32)
    for operands in ((x, x), (x, np.zeros((2, 3, 5), np.int32)), (x,)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="another shape or type"):
            jax.block_until_ready(
                jax.jit(lambda *a: jax.ffi.ffi_call("liftplace_take", rows)(*a))(*operands)
            )


def test_numba_that_cannot_be_used_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "liftplace_jax.losses.host_sort", None)
    with pytest.warns(UserWarning, match="PLACE sorts with XLA, slower: numba cannot be used"):
        assert not permute._native.__wrapped__()


SETUP = """
import gc, importlib, os, sys
if hasattr(os, "sched_setaffinity") and "one core" in sys.argv:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, numpy as np
from liftplace_jax import place_loss
student, teacher = np.random.default_rng(0).normal(size=(2, 32, 64, 64, 3)).astype(np.float32)
assert "numba" not in sys.modules
step = jax.jit(jax.grad(lambda s, t: place_loss(s, t).loss))
first = step(student, teacher)
assert "numba" in sys.modules
x = student
for _ in range(8):  # dispatched asynchronously, each waiting for the one before
    x = step(x, teacher)
"""
# How a script goes on while steps are under way -> its status.
ENDINGS = {
    "pass": 0,
    "raise ValueError('a bad image')": 1,
    "sys.exit(7)": 7,
    "assert jax.numpy.isfinite(x).all(), 'one core'": 0,
    """
for name in ("host_sort", "permute", "grouping", "lift_place"):
    importlib.reload(sys.modules[f"liftplace_jax.losses.{name}"])
again = jax.jit(jax.grad(lambda s, t: sys.modules[
    "liftplace_jax.losses.lift_place"].place_loss(s, t).loss))
for f in (step, again):
    assert (np.asarray(f(student, teacher)) == np.asarray(first)).all()
""": 0,
    """
for name in [name for name in sys.modules if name.startswith("liftplace_jax")]:
    del sys.modules[name]
del place_loss
gc.collect()
from liftplace_jax import place_loss
again = jax.jit(jax.grad(lambda s, t: place_loss(s, t).loss))
for f in (step, again):
    assert (np.asarray(f(student, teacher)) == np.asarray(first)).all()
x = again(x, teacher)
""": 0,
}


@pytest.mark.parametrize("ending", ENDINGS, ids=range(len(ENDINGS)))
def test_a_script_may_end_raise_and_reload_while_steps_are_under_way(ending):
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", SETUP + ending, "one core" if "one core" in ending else "all"],
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == ENDINGS[ending], done.stderr
