"""Layers shared by the models, against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from liftplace_jax.nn import layers


def norm(channels, groups, dtype=jnp.float32):
    layer = layers.group_norm(channels, groups, rngs=nnx.Rngs(0), dtype=dtype)
    rng = np.random.default_rng(1)
    layer.scale[...] = jnp.asarray(rng.normal(size=channels), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.normal(size=channels), jnp.float32)
    return layer


@pytest.mark.parametrize("shape", [(3, 5, 4, 12), (2, 7, 12)])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm_and_its_gradient(shape, groups):
    layer = norm(12, groups)
    rng = np.random.default_rng(0)
    x, v = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    found, pull = jax.vjp(jax.jit(layer), x)
    theirs = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    scale, bias = (torch.tensor(np.asarray(p[...])) for p in (layer.scale, layer.bias))
    expected = torch.nn.functional.group_norm(theirs, groups, scale, bias, eps=1e-6)
    expected.backward(torch.tensor(np.moveaxis(v, -1, 1)))
    np.testing.assert_allclose(found, np.moveaxis(expected.detach().numpy(), 1, -1), atol=2e-6)
    gradient = np.moveaxis(theirs.grad.numpy(), 1, -1)
    np.testing.assert_allclose(pull(jnp.asarray(v))[0], gradient, atol=1e-5)


def test_group_norm_of_values_far_from_zero():
    """A variance as the mean square less the squared mean would be lost here."""
    layer, rng = norm(8, 2), np.random.default_rng(0)
    x = (1000 + rng.normal(size=(2, 16, 16, 8))).astype(np.float32)
    whole = x.astype(np.float64).reshape(2, 256, 2, 4)
    mean, deviation = (f(whole, axis=(1, 3), keepdims=True) for f in (np.mean, np.std))
    expected = ((whole - mean) / deviation).reshape(x.shape) * layer.scale[...] + layer.bias[...]
    np.testing.assert_allclose(layer(x), expected, atol=1e-3)


def test_group_norm_has_its_dtype():
    layer = norm(8, 2, jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    low = layer(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), norm(8, 2)(x), atol=0.05)
