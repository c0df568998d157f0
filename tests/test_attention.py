"""Attention: which implementation a program has, and that on CPUs nothing moves."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.nn import building
from liftplace_jax.nn.attention import attention
from liftplace_jax.nn.network import make_apply

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


@pytest.fixture
def with_cudnn(monkeypatch):
    """As on a machine that has it: programs for CUDA are lowered without a GPU, not run."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    jax.clear_caches()
    yield
    jax.clear_caches()


def arrays(width, dtype=jnp.bfloat16, tokens=16, heads=2):
    rng = np.random.default_rng(width)
    return [jnp.asarray(rng.normal(size=(3, tokens, heads, width)), dtype) for _ in range(3)]


def total(q, k, v):
    return attention(q, k, v).astype(jnp.float32).sum()


gradient = jax.grad(total, (0, 1, 2))


def lowered(function, args, platform):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [7, 72])
def test_cpus_compute_what_jax_computes_to_the_same_bits(width, dtype, with_cudnn):
    args = arrays(width, dtype)

    def expected(q, k, v):
        return jax.nn.dot_product_attention(q, k, v)

    for ours, theirs in (
        (attention, expected),
        (gradient, jax.grad(lambda *x: expected(*x).astype(jnp.float32).sum(), (0, 1, 2))),
        (jax.vmap(attention), jax.vmap(expected)),
    ):
        given = [x[None] for x in args] if ours not in (attention, gradient) else args
        found, wanted = jax.jit(ours)(*given), jax.jit(theirs)(*given)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert one.dtype == dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [8, 72, 128])
def test_cuda_has_the_kernel_of_cudnn(width, dtype, with_cudnn):
    args = arrays(width, dtype)
    assert lowered(attention, args, "cuda").count(FORWARD) == 1
    text = lowered(gradient, args, "cuda")
    assert FORWARD in text and BACKWARD in text
    assert FORWARD in lowered(jax.vmap(attention), [x[None] for x in args], "cuda")
    # JAX's own path of float16 has no program for CPUs.
    for platform in ("tpu", "cpu") if dtype == jnp.bfloat16 else ("tpu",):
        assert "cudnn" not in lowered(gradient, args, platform)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(4, jnp.bfloat16), (76, jnp.bfloat16), (136, jnp.float16), (64, jnp.float32)],
)
def test_what_cudnn_does_not_take_is_left_to_xla(width, dtype, with_cudnn):
    for function in (attention, gradient):
        text = lowered(function, arrays(width, dtype), "cuda")
        assert "cudnn" not in text and "exponential" in text


def test_without_cudnn_programs_for_cuda_have_xlas_path():
    text = lowered(gradient, arrays(64), "cuda")
    assert "cudnn" not in text and "exponential" in text


def test_networks_of_16_bits_have_it(with_cudnn):
    config = DiTConfig(image_size=4, patch_size=1, hidden_size=32, depth=2, num_heads=2)
    graphdef, params = building.abstract(config, jnp.dtype("bfloat16"))
    apply, x = make_apply(graphdef), jax.ShapeDtypeStruct((1, *config.shape), jnp.float32)
    t = label = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = lowered(
        lambda p, x, t, y: apply(p, x, t, False, None, y)[0], (params, x, t, label), "cuda"
    )
    assert "cudnn$fmhaSoftmax" in text
