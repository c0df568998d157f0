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

from liftplace_jax.losses.arguments import student_and_teacher, whole_number
from liftplace_jax.losses.permute import sort_by_error


class Groups(NamedTuple):
    """Student and teacher cut into groups.

    Attributes:
      student: (batch, rows, groups, group_size); rows are channels, or 1 for a fit per sample.
      teacher: same shape.
      mask: None if every group is full, else (groups, group_size): 0 marks padding.
    """

    student: jax.Array
    teacher: jax.Array
    mask: np.ndarray | jax.Array | None


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
    student, teacher, _ = sort_by_error(_channels_last(student), _channels_last(teacher))
    return Groups(*_cut(student, teacher, group_size))


def by_space(student: jax.Array, teacher: jax.Array, patch: Sequence[int]) -> Groups:
    """Non-overlapping patches of shape `patch`, per sample and channel.

    Patches at the far border are smaller where `patch` does not divide the space.
    """
    space = student.shape[1:-1]
    mask = np.asarray(_patches(np.ones((1, *space, 1), np.float32), patch)[0, 0])
    cut = jnp.asarray(_patches(student, patch)), jnp.asarray(_patches(teacher, patch))
    return Groups(*cut, None if mask.all() else mask)


def error_order(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Stable ascending order of the error, per sample and channel, without gradient.

    Args:
      student: (batch, *space, channel).
      teacher: same shape.

    Returns:
      int32 (batch, channel, elements): positions in the flattened space.
    """
    samples = map(_channels_last, (student, teacher))
    return sort_by_error(*map(jax.lax.stop_gradient, samples))[2]


def _channels_last(x):
    """(batch, *space, channel) -> (batch, elements, channel)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def error_groups(student: jax.Array, teacher: jax.Array, group_size: int) -> jax.Array:
    """Index of the PLACE group of every element: int32, the shape of `student`.

    0 holds the smallest errors. For pictures such as the paper's group map.

    Raises:
      ValueError: as of `place_loss`.
    """
    student, teacher = student_and_teacher(student, teacher)
    elements = math.prod(student.shape[1:-1])
    group_size = whole_number("group_size", group_size, 1, elements)
    order = error_order(student, teacher)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    ids = (rank // group_size).reshape(order.shape[:2] + student.shape[1:-1])
    return jnp.moveaxis(ids, 1, -1)


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
