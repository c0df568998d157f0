"""Which elements share one fit: sorted by error (PLACE), by place (patches), or all of them (LIFT).

Every grouping turns two arrays (batch, *space, channel) into `Groups`; a new one is one more
function of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.losses.host_sort import error_order_on_host

HOST_LEAST = 2**15  # elements; for fewer, a call to the host costs more than it saves


class Groups(NamedTuple):
    """Student and teacher cut into groups.

    Attributes:
      student: (batch, rows, groups, group_size); rows are channels, or 1 for a fit per sample.
      teacher: same shape.
      mask: None if every group is full, else (groups, group_size): 0 marks padding.
    """

    student: jax.Array
    teacher: jax.Array
    mask: np.ndarray | None


def rows_per_channel(x: jax.Array) -> jax.Array:
    """(batch, *space, channel) -> (batch, channel, elements)."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1)


def whole(student: jax.Array, teacher: jax.Array, per: str) -> Groups:
    """One group per channel or per sample: LIFT."""
    if per == "channel":
        rows = rows_per_channel
    else:

        def rows(x):
            return x.reshape(x.shape[0], 1, -1)

    return Groups(rows(student)[:, :, None], rows(teacher)[:, :, None], None)


def by_error(student: jax.Array, teacher: jax.Array, group_size: int) -> Groups:
    """Groups of consecutive elements in the order of their squared error: PLACE.

    Per sample and channel. Ties are broken by position. If `group_size` does not divide the
    number of elements, the last group (largest errors) is smaller.
    """
    order = error_order(student, teacher)
    return Groups(*_cut(take(student, order), take(teacher, order), group_size))


def by_space(student: jax.Array, teacher: jax.Array, patch: Sequence[int]) -> Groups:
    """Non-overlapping patches of shape `patch`, per sample and channel.

    Patches at the far border are smaller where `patch` does not divide the space.
    """
    space = student.shape[1:-1]
    mask = _patches(np.ones((1, *space, 1), np.float32), patch)[0, 0]
    student, teacher = _patches(student, patch), _patches(teacher, patch)
    return Groups(student, teacher, None if mask.all() else mask)


def error_order(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Stable ascending order of the error, per sample and channel, without gradient.

    Args:
      student: (batch, *space, channel).
      teacher: same shape.

    Returns:
      int32 (batch, channel, elements): positions in the flattened space.
    """
    # |t - s| orders as (t - s)^2 does, but neither overflows nor underflows.
    error = jnp.abs(jax.lax.stop_gradient(teacher) - jax.lax.stop_gradient(student))
    error = rows_per_channel(error)
    if error.dtype.itemsize == 4:
        return jax.lax.platform_dependent(error, cpu=_cpu_order, default=_pair_order)
    return _pair_order(error)


def _bits(error):
    # Non-negative floats sort like their bits, and XLA sorts integers faster.
    return jax.lax.bitcast_convert_type(error, jnp.dtype(f"int{error.dtype.itemsize * 8}"))


def _pair_order(error):
    """A stable sort of (error, position) pairs."""
    position = jax.lax.broadcasted_iota(jnp.int32, error.shape, error.ndim - 1)
    operands = (_bits(error), position)
    return jax.lax.sort(operands, dimension=-1, is_stable=True, num_keys=1)[1]


def _cpu_order(error):
    if _one_device() and error.size >= HOST_LEAST:
        return error_order_on_host(error)
    return _packed_order(error)


def _packed_order(error):
    """One sort of error << 32 | position: on CPU XLA sorts one array much faster than a pair.

    Unlike a call to the host, it is split over devices as its operand is.
    """
    with jax.enable_x64(True):
        position = jax.lax.broadcasted_iota(jnp.int64, error.shape, error.ndim - 1)
        keys = (_bits(error).astype(jnp.int64) << 32) | position
        keys = jax.lax.sort(keys, dimension=-1, is_stable=False)
        return (keys & 0xFFFFFFFF).astype(jnp.int32)


def error_groups(student: jax.Array, teacher: jax.Array, group_size: int) -> jax.Array:
    """Index of the PLACE group of every element: int32, the shape of `student`.

    0 holds the smallest errors. For pictures such as the paper's group map.
    """
    order = error_order(student, teacher)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    ids = (rank // group_size).reshape(order.shape[:2] + student.shape[1:-1])
    return jnp.moveaxis(ids, 1, -1)


def _one_device() -> bool:
    """With several devices the batch may be sharded: then its axis must stay an axis of its own,
    so that nothing crosses devices. With one, flat indices and the host's sort are faster."""
    return jax.device_count() == 1


def _indices(order, one_array: bool):
    """Positions in the space -> positions in a flat sample, or in the flat array; (..., all)."""
    batch, channels, elements = order.shape
    index = order * channels + jax.lax.broadcasted_iota(jnp.int32, order.shape, 1)
    if not one_array:
        return index.reshape(batch, -1)
    index = index + jax.lax.broadcasted_iota(jnp.int32, order.shape, 0) * (elements * channels)
    return index.reshape(-1)


def take(x: jax.Array, order: jax.Array) -> jax.Array:
    """Every channel of every sample in its own order; the gradient is a plain write-back.

    The indices reach into the array as it lies, so that no transposed copy is made of it.

    Args:
      x: (batch, *space, channel).
      order: int32 (batch, channel, elements): permutations of the flattened space.

    Returns:
      (batch, channel, elements).
    """
    return _take(x.reshape(x.shape[0], -1), order)


@jax.custom_vjp
def _take(samples, order):
    index = _indices(order, _one_device())
    if _one_device():
        taken = samples.reshape(-1).at[index].get(mode="promise_in_bounds", unique_indices=True)
    else:
        taken = jnp.take_along_axis(samples, index, axis=-1, mode="promise_in_bounds")
    return taken.reshape(order.shape)


def _take_forward(samples, order):
    return _take(samples, order), order


def _take_backward(order, cotangent):
    def put_back(index, values):
        return jnp.zeros_like(values).at[index].set(
            values, unique_indices=True, mode="promise_in_bounds"
        )

    index = _indices(order, _one_device())
    if not _one_device():
        put_back = jax.vmap(put_back)
    flat = put_back(index, cotangent.reshape(index.shape))
    return flat.reshape(order.shape[0], -1), None


_take.defvjp(_take_forward, _take_backward)


def _cut(student, teacher, group_size):
    size = student.shape[-1]
    groups = math.ceil(size / group_size)
    missing = groups * group_size - size
    shape = (*student.shape[:-1], groups, group_size)
    if not missing:
        return student.reshape(shape), teacher.reshape(shape), None
    pad = [(0, 0)] * (student.ndim - 1) + [(0, missing)]
    mask = np.pad(np.ones(size, np.float32), (0, missing)).reshape(groups, group_size)
    return jnp.pad(student, pad).reshape(shape), jnp.pad(teacher, pad).reshape(shape), mask


def _patches(x, patch):
    """(batch, *space, channel) -> (batch, channel, patches, elements of a patch), zero-padded."""
    library = np if isinstance(x, np.ndarray) else jnp
    space = x.shape[1:-1]
    counts = [math.ceil(n / p) for n, p in zip(space, patch, strict=True)]
    pad = [(0, c * p - n) for n, p, c in zip(space, patch, counts, strict=True)]
    x = library.pad(x, [(0, 0), *pad, (0, 0)])
    split = [n for pair in zip(counts, patch, strict=True) for n in pair]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    dims = len(space)
    outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
    x = library.transpose(x, (0, 2 * dims + 1, *outer, *inner))
    return x.reshape(x.shape[0], x.shape[1], math.prod(counts), math.prod(patch))
