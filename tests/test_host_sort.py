"""The order of errors, found by NumPy inside compiled programs."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liftplace_jax.losses import host_sort
from liftplace_jax.losses.grouping import _packed_order, _pair_order


def errors(shape, seed=0):
    """Many ties, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    values = np.abs(rng.normal(size=shape)).astype(np.float32)
    values[rng.random(shape) < 0.5] = 0.25
    values[rng.random(shape) < 0.1] = np.inf
    values[rng.random(shape) < 0.1] = np.nan
    return values


@pytest.mark.parametrize("order", [host_sort.error_order_on_host, _packed_order, _pair_order])
@pytest.mark.parametrize("shape", [(3, 2, 40), (1, 1, 1), (5, 1, 30000), (40, 3, 4096), (2, 3, 0)])
def test_equals_a_stable_sort(order, shape):
    error = errors(shape)
    found = jax.jit(order)(error)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argsort(error, axis=-1, kind="stable"))


def test_vmap_and_loops():
    error = errors((4, 5, 2, 64))
    expected = np.argsort(error, axis=-1, kind="stable")
    for mapped in (jax.vmap, lambda f: lambda x: jax.lax.map(f, x)):
        found = jax.jit(mapped(host_sort.error_order_on_host))(error)
        np.testing.assert_array_equal(found, expected)


def test_a_failure_on_the_host_is_an_error_of_the_program(monkeypatch):
    def fail(*_):
        raise MemoryError("no room for keys")

    monkeypatch.setattr(host_sort, "_sort_block", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="MemoryError: no room for keys"):
        jax.block_until_ready(jax.jit(host_sort.error_order_on_host)(errors((2, 2, 8))))


def test_an_interruption_on_the_host_is_an_error_of_the_program(monkeypatch):
    """Ctrl-C while threads sort: they end before the memory is given back."""
    slow = host_sort._sort_block
    waited = []

    def interrupted(tasks):
        if not waited:
            waited.append(tasks)
            raise KeyboardInterrupt
        return real_wait(tasks)

    real_wait = host_sort.wait
    monkeypatch.setattr(host_sort, "wait", interrupted)
    monkeypatch.setattr(host_sort, "_sort_block", lambda e, o: (time.sleep(0.05), slow(e, o)))
    error = errors((8, 1, 30000))
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyboardInterrupt"):
        jax.block_until_ready(jax.jit(lambda x: host_sort.error_order_on_host(x) + 1)(error))
    assert waited and all(task.done() for task in waited[0])


ONE_CORE = """
import os
if hasattr(os, "sched_setaffinity"):  # where cores can be chosen
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from liftplace_jax import place_loss
student, teacher = jax.random.normal(jax.random.key(0), (2, 32, 64, 64, 3))
step = jax.jit(jax.value_and_grad(lambda s, t: place_loss(s, t).loss))
for _ in range(30):  # dispatched asynchronously, each waiting for the one before
    loss, gradient = step(student, teacher)
    student = student - gradient
assert jnp.isfinite(loss)
"""


def test_one_core_is_enough():
    """A callback that waits for the thread that runs it would never end."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", ONE_CORE], env=environment, check=True, timeout=300)
