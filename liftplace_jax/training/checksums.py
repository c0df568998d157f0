"""Checksums of a state's arrays, computed on the devices that hold them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def checksums(tree: Any, positions: bool = True) -> dict[str, int]:
    """A number of 32 bits for every array, the same however the arrays are spread over devices.

    It is the sum of mix(bits ^ mix(position)) over the elements, modulo 2^32. Each mix is one to
    one: a change of a single element always changes the number; any other change, elements that
    moved among them, does but for one in 2^32. Positions count the elements of the whole array in
    row-major order, modulo 2^32: two that are a multiple of 2^32 apart may change places unnoticed.

    The devices compute, each on its own shards, by one program for each shape; only the numbers are
    fetched.

    Args:
      tree: of arrays of any shape, whose elements are numbers of 8 to 64 bits or truth values; in a
        pod, every process calls with the same one.
      positions: False for the plain sum of the bits, which older versions wrote.

    Returns:
      name in the tree, such as "params.student.conv_in.bias" -> number in [0, 2^32).
    """
    total = _position_sum if positions else _bit_sum
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    totals = jax.device_get([total(x) for x in leaves])  # all are sent before one is waited for
    return {leaf_name(path): int(n) for path, n in zip(paths, totals, strict=True)}


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of an array in a tree: its keys, joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


# Not one program for all arrays: a state has hundreds of them in a few dozen shapes, and compiling
# takes seconds for each hundred.
@jax.jit
def _position_sum(x: jax.Array) -> jax.Array:
    words = _words(x)
    return jnp.sum(_mix(words ^ _mix(_positions(words.shape))), dtype=jnp.uint32)


@jax.jit
def _bit_sum(x: jax.Array) -> jax.Array:
    words = _words(x)
    return jnp.sum(words[..., 0] if words.ndim > x.ndim else words, dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array; elements of 64 bits are two along a last axis, the lower half first."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    bits = 8 * x.dtype.itemsize
    if bits == 64:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """Of every element, its number in row-major order, modulo 2^32."""
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return position


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser (Austin Appleby, public domain): a bit moves half of the others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
