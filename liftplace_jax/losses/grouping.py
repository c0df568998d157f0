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

CPU_SORTS = 16  # measured on two cores; more parts than cores even out their load


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
    student, teacher = rows_per_channel(student), rows_per_channel(teacher)
    order = error_order(student, teacher)
    student, teacher = permute(student, order), permute(teacher, order)
    return Groups(*_cut(student, teacher, group_size))


def by_space(student: jax.Array, teacher: jax.Array, patch: Sequence[int]) -> Groups:
    """Non-overlapping patches of shape `patch`, per sample and channel.

    Patches at the far border are smaller where `patch` does not divide the space.
    """
    space = student.shape[1:-1]
    mask = _patches(np.ones((1, *space, 1), np.float32), patch)[0, 0]
    student, teacher = _patches(student, patch), _patches(teacher, patch)
    return Groups(student, teacher, None if mask.all() else mask)


def error_order(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Stable ascending order of the error along the last axis, int32, without gradient.

    Args:
      student: (batch, rows, elements).
      teacher: same shape.
    """
    # |t - s| orders as (t - s)^2 does, but neither overflows nor underflows.
    error = jnp.abs(jax.lax.stop_gradient(teacher) - jax.lax.stop_gradient(student))
    if error.dtype.itemsize == 4:
        return jax.lax.platform_dependent(error, cpu=_packed_order, default=_pair_order)
    return _pair_order(error)


def _bits(error):
    # Non-negative floats sort like their bits, and XLA sorts integers faster.
    return jax.lax.bitcast_convert_type(error, jnp.dtype(f"int{error.dtype.itemsize * 8}"))


def _pair_order(error):
    """A stable sort of (error, position) pairs."""
    position = jax.lax.broadcasted_iota(jnp.int32, error.shape, error.ndim - 1)
    operands = (_bits(error), position)
    return jax.lax.sort(operands, dimension=-1, is_stable=True, num_keys=1)[1]


def _packed_order(error):
    """One sort of error << 32 | position: on CPU XLA sorts one array much faster than a pair.

    Parts of the batch are sorted by themselves, so that XLA can run them side by side.
    """
    parts = math.gcd(error.shape[0], CPU_SORTS) if _one_device() else 1
    return jnp.concatenate([_packed_sort(part) for part in jnp.split(error, parts)])


def _packed_sort(error):
    with jax.enable_x64(True):
        position = jax.lax.broadcasted_iota(jnp.int64, error.shape, error.ndim - 1)
        keys = (_bits(error).astype(jnp.int64) << 32) | position
        keys = jax.lax.sort(keys, dimension=-1, is_stable=False)
        return (keys & 0xFFFFFFFF).astype(jnp.int32)


def error_groups(student: jax.Array, teacher: jax.Array, group_size: int) -> jax.Array:
    """Index of the PLACE group of every element: int32, the shape of `student`.

    0 holds the smallest errors. For pictures such as the paper's group map.
    """
    rows = rows_per_channel(student)
    order = error_order(rows, rows_per_channel(teacher))
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    ids = (rank // group_size).reshape(rows.shape[:2] + student.shape[1:-1])
    return jnp.moveaxis(ids, 1, -1)


def _one_device() -> bool:
    """With several devices the batch may be sharded: then its axis must stay an axis of its own,
    so that nothing crosses devices. With one, flat indices and parts of the batch are faster."""
    return jax.device_count() == 1


def _flat(order):
    """Positions along the last axis -> positions in the flat array, (elements,)."""
    rows = math.prod(order.shape[:-1])
    start = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) * order.shape[-1]
    return (order.reshape(rows, -1) + start).reshape(-1)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array) -> jax.Array:
    """`take_along_axis` on the last axis for a permutation; its gradient is a plain write-back."""
    if _one_device():
        taken = x.reshape(-1).at[_flat(order)].get(mode="promise_in_bounds", unique_indices=True)
        return taken.reshape(x.shape)
    return jnp.take_along_axis(x, order, axis=-1, mode="promise_in_bounds")


def _permute_forward(x, order):
    return permute(x, order), order


def _permute_backward(order, cotangent):
    def put_back(indices, values):
        return jnp.zeros_like(values).at[indices].set(
            values, unique_indices=True, mode="promise_in_bounds"
        )

    if _one_device():
        flat = put_back(_flat(order), cotangent.reshape(-1))
        return flat.reshape(cotangent.shape), None
    for _ in range(order.ndim - 1):
        put_back = jax.vmap(put_back)
    return put_back(order, cotangent), None


permute.defvjp(_permute_forward, _permute_backward)


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
