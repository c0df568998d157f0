"""Suite "grouping": is a sort of all pairs needed? Ways to the moments of PLACE's groups, compared.

A fit needs five sums over each group. Besides sorting elements and summing runs, one can sort the
errors alone, read off the groups' thresholds, and find each element's group by comparison. Ties at
a threshold then share a group, so groups are no longer of equal size: these ways are close to the
loss, not equal to it, and are measured here only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from liftplace_jax.losses import permute
from liftplace_jax.losses.grouping import rows_per_channel
from liftplace_jax.suites.losses import SHAPES, draw
from liftplace_jax.suites.options import Options, Result
from liftplace_jax.suites.timing import milliseconds, time_side_by_side

GROUP_SIZE = 16
RADIX = "radix sort with gather"


def run(options: Options) -> Result:
    """Measures each way on each shape; quick: one small shape."""
    rows = []
    shapes = ((4, 16, 16, 3),) if options.quick else SHAPES
    for shape in tqdm.tqdm(shapes, desc="grouping", unit="shape"):
        student, teacher = map(jnp.asarray, draw(shape))
        calls = {}
        for name, way in WAYS.items():
            if name == RADIX and jax.default_backend() != "cpu":
                continue
            if name == "comparison and matrix product" and student[0, ..., 0].size > 4096:
                continue  # elements x groups would be gigabytes
            compiled = jax.jit(way)
            calls[name] = _call(compiled, student, teacher)
        times = time_side_by_side(calls, options.repeats, rounds=3)
        base = times["packed sort, gather"].median
        rows += [
            {
                "shape": "x".join(map(str, shape)),
                "way": name,
                "ms": milliseconds(timing),
                "over_packed": f"{timing.median / base:.2f}",
                "seconds": timing._asdict(),
            }
            for name, timing in times.items()
        ]
    return {
        "title": f"Sums over PLACE's groups of {GROUP_SIZE}: ways to get them, forward pass",
        "columns": ["shape", "way", "ms", "over_packed"],
        "rows": rows,
        "notes": ["over_packed: median time / that of the packed sort, XLA's best on CPU."],
    }


def _call(compiled, student, teacher) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(compiled(student, teacher))


def _values(s, t):
    """What is summed: student, teacher and their products, (5, batch, rows, elements)."""
    return jnp.stack([s, t, s * s, s * t, jnp.ones_like(s)])


def _rows(s, t):
    """Student, teacher and their distance, each (batch, channel, elements)."""
    s, t = rows_per_channel(s), rows_per_channel(t)
    return s, t, jnp.abs(t - s)


def _channels_last(x):
    return x.reshape(len(x), -1, x.shape[-1])


def _sorted_sums(order_of, s, t):
    s, t, _ = permute.sort_with(order_of, _channels_last(s), _channels_last(t))
    return _sums_of_runs(s, t)


def _sums_of_runs(s, t):
    return _values(s, t).reshape(5, *s.shape[:2], -1, GROUP_SIZE).sum(-1)


def pair_sort(s, t):
    """A stable sort of (error, position) pairs: the losses' way on accelerators."""
    return _sorted_sums(permute.pair_order, s, t)


def radix_sort(s, t):
    """Machine code that sorts and gathers at once: the losses' way on CPUs."""
    s, t, _ = permute.sort_by_error(_channels_last(s), _channels_last(t))
    return _sums_of_runs(s, t)


def packed_sort(s, t):
    """XLA's sort of packed 64-bit keys: the losses' way on CPUs without numba."""
    return _sorted_sums(permute.packed_order, s, t)


def multi_operand_sort(s, t):
    """Student and teacher carried along by the sort: no gather."""
    s, t, error = _rows(s, t)
    _, s, t = jax.lax.sort((permute.error_bits(error), s, t), dimension=-1, num_keys=1)
    return _sums_of_runs(s, t)


def _thresholds(error):
    return jnp.sort(permute.error_bits(error), axis=-1)[..., GROUP_SIZE - 1 :: GROUP_SIZE]


def binary_search(s, t):
    """Errors sorted alone; each element's group by binary search; sums by scatter."""
    s, t, error = _rows(s, t)
    groups = s.shape[-1] // GROUP_SIZE

    def one_row(bits, limits, values):
        ids = jnp.searchsorted(limits, bits)
        return jax.ops.segment_sum(values.T, ids, num_segments=groups).T

    rows = jax.vmap(jax.vmap(one_row))
    values = jnp.moveaxis(_values(s, t), 0, 2)
    return jnp.moveaxis(rows(permute.error_bits(error), _thresholds(error), values), 2, 0)


def comparison(s, t):
    """Errors sorted alone; membership by comparison with all thresholds; sums by matrix product."""
    s, t, error = _rows(s, t)
    below = permute.error_bits(error)[..., None] <= _thresholds(error)[..., None, :]
    cumulative = jnp.einsum("kbrn,brng->kbrg", _values(s, t), below.astype(jnp.float32))
    return jnp.diff(cumulative, axis=-1, prepend=0.0)


WAYS = {
    RADIX: radix_sort,
    "packed sort, gather": packed_sort,
    "pair sort, gather": pair_sort,
    "sort carrying both": multi_operand_sort,
    "value sort, binary search, scatter": binary_search,
    "comparison and matrix product": comparison,
}
