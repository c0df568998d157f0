"""Checksums of a state's arrays, computed on the devices that hold them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils


def checksums(tree: Any, positions: bool = True) -> dict[str, int]:
    """A number of 32 bits for every array, the same however the arrays are spread over devices.

    It is the sum of mix(bits ^ mix(position)) over the elements, modulo 2^32. Each mix is one to
    one: a change of a single element always changes the number; any other change, elements that
    moved among them, does but for one in 2^32. Positions count the elements of the whole array in
    row-major order, modulo 2^32: two that are a multiple of 2^32 apart may change places unnoticed.

    The devices compute, each on its own shards, by one program for each shape of a shard; only the
    numbers are fetched.

    Args:
      tree: of arrays of any shape, whose elements are numbers of 8 to 64 bits or truth values; in a
        pod, every process calls with the same one.
      positions: False for the plain sum of the bits, which older versions wrote.

    Returns:
      name in the tree, such as "params.student.conv_in.bias" -> number in [0, 2^32).
    """
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    parts = [_of_shards(jnp.asarray(leaf), positions) for leaf in leaves]
    parts = jax.device_get(parts)  # all are sent before one is waited for
    totals = np.array([sum(map(int, part)) % 2**32 for part in parts], np.uint32)
    if jax.process_count() > 1:
        totals = multihost_utils.process_allgather(totals)
        totals = totals.sum(axis=0, dtype=np.uint64) % 2**32
    return {leaf_name(path): int(n) for path, n in zip(paths, totals, strict=True)}


def _of_shards(x: jax.Array, positions: bool) -> list[jax.Array]:
    """The sums of this process's shards, of each part of the array once.

    Not of the array as a whole: programs that talk to other devices, many of them under way at
    once, can wait for each other for ever on CPUs.
    """
    shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    if not positions:
        return [_bit_sum(shard.data) for shard in shards]
    halves = (2,) if x.dtype.itemsize == 8 else ()
    shape = (*x.shape, *halves)
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    found = []
    for shard in shards:
        starts = [part.start or 0 for part in shard.index] + [0] * len(halves)
        found.append(
            _position_sum(shard.data, *(np.array(n, np.uint32) for n in (starts, strides)))
        )
    return found


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of an array in a tree: its keys, joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


# Not one program for all arrays: a state has hundreds of them in a few dozen shapes, and compiling
# takes seconds for each hundred.
@jax.jit
def _position_sum(x: jax.Array, starts: jax.Array, strides: jax.Array) -> jax.Array:
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += (index + starts[axis]) * strides[axis]
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


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


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser (Austin Appleby, public domain): a bit moves half of the others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
