"""What the compiled losses are made of: platforms, memory."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from liftplace_jax import lift_loss, place_loss
from liftplace_jax.losses import permute
from liftplace_jax.losses.permute import TARGET, packed_order

pytestmark = pytest.mark.usefixtures("machine_code")
SHAPE = (8, 16, 16, 3)


def value_and_grad(loss):
    array = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    return jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).loss)), (array, array)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    """One sort of (error, position) pairs, and no 64-bit tensor, which TPUs do not have."""
    function, arrays = value_and_grad(place_loss)
    text = export.export(function, platforms=[platform])(*arrays).mlir_module()
    assert len(re.findall(r"= \"?stablehlo\.sort", text)) == 1
    assert not re.search(r"tensor<[0-9x]+xi64>", text)


def test_a_cpu_program_sorts_by_machine_code():
    function, arrays = value_and_grad(place_loss)
    text = function.lower(*arrays).as_text()
    assert "stablehlo.sort" not in text and "stablehlo.scatter" not in text
    assert len(re.findall(rf"@{TARGET}sort\b", text)) == 1
    assert len(re.findall(rf"@{TARGET}put\b", text)) == 1


def test_small_arrays_stay_in_the_program(monkeypatch):
    monkeypatch.setattr(permute, "HOST_LEAST", 2**15)
    sort = jax.jit(permute.sort_by_error)
    for batch, native in ((7, False), (8, True)):
        array = jax.ShapeDtypeStruct((batch, 4096, 1), jnp.float32)
        assert (TARGET in sort.lower(array, array).as_text()) == native


def test_without_machine_code_cpus_sort_packed_keys():
    """64-bit keys inside, although the user has not enabled x64; XLA can split the sort."""
    text = jax.jit(packed_order).lower(jnp.ones((8, 3, 256))).as_text()
    assert len(re.findall(r"= \"?stablehlo\.sort", text)) == 1
    assert re.search(r"tensor<[0-9x]+xi64>", text)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("loss, most", [(place_loss, 6), (lift_loss, 2)])
def test_memory(loss, most):
    """Temporaries, in arrays of the output's size."""
    function, arrays = value_and_grad(loss)
    memory = function.lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= most * 4 * math.prod(SHAPE)
