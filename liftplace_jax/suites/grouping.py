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

from liftplace_jax.losses import grouping as lib
from liftplace_jax.suites.losses import SHAPES, draw
from liftplace_jax.suites.timing import milliseconds, time_side_by_side

GROUP_SIZE = 16


def run(quick: bool, repeats: int) -> dict[str, Any]:
    """Measures each way on each shape; see `losses.run`."""
    rows = []
    for shape in tqdm.tqdm(((4, 16, 16, 3),) if quick else SHAPES, desc="grouping", unit="shape"):
        student, teacher = (lib.rows_per_channel(jnp.asarray(x)) for x in draw(shape))
        calls = {}
        for name, way in WAYS.items():
            if name == "comparison and matrix product" and student.shape[-1] > 4096:
                continue  # elements x groups would be gigabytes
            compiled = jax.jit(way)
            calls[name] = _call(compiled, student, teacher)
        times = time_side_by_side(calls, repeats)
        base = times["packed sort, gather"].median
        rows += [
            {"shape": "x".join(map(str, shape)), "way": name, "ms": milliseconds(timing),
             "over_packed": f"{timing.median / base:.2f}", "seconds": timing._asdict()}
            for name, timing in times.items()
        ]  # fmt: skip
    return {
        "title": f"Sums over PLACE's groups of {GROUP_SIZE}: ways to get them, forward pass",
        "columns": ["shape", "way", "ms", "over_packed"],
        "rows": rows,
        "notes": ["over_packed: median time / that of the packed sort, the losses' way on CPU."],
    }


def _call(compiled, student, teacher) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(compiled(student, teacher))


def _values(s, t):
    """What is summed: student, teacher and their products, (5, batch, rows, elements)."""
    return jnp.stack([s, t, s * s, s * t, jnp.ones_like(s)])


def _sorted_sums(order, s, t):
    s, t = lib.permute(s, order), lib.permute(t, order)
    return _values(s, t).reshape(5, *s.shape[:2], -1, GROUP_SIZE).sum(-1)


def pair_sort(s, t):
    """A stable sort of (error, position) pairs: the losses' way on accelerators."""
    return _sorted_sums(lib._pair_order(jnp.abs(t - s)), s, t)


def packed_sort(s, t):
    """A sort of packed 64-bit keys: the losses' way on CPU."""
    return _sorted_sums(lib._packed_order(jnp.abs(t - s)), s, t)


def multi_operand_sort(s, t):
    """Student and teacher carried along by the sort: no gather."""
    _, s, t = jax.lax.sort((lib._bits(jnp.abs(t - s)), s, t), dimension=-1, num_keys=1)
    return _values(s, t).reshape(5, *s.shape[:2], -1, GROUP_SIZE).sum(-1)


def _thresholds(error):
    return jnp.sort(lib._bits(error), axis=-1)[..., GROUP_SIZE - 1 :: GROUP_SIZE]


def binary_search(s, t):
    """Errors sorted alone; each element's group by binary search; sums by scatter."""
    error = jnp.abs(t - s)
    groups = s.shape[-1] // GROUP_SIZE

    def one_row(bits, limits, values):
        ids = jnp.searchsorted(limits, bits)
        return jax.ops.segment_sum(values.T, ids, num_segments=groups).T

    rows = jax.vmap(jax.vmap(one_row))
    values = jnp.moveaxis(_values(s, t), 0, 2)
    return jnp.moveaxis(rows(lib._bits(error), _thresholds(error), values), 2, 0)


def comparison(s, t):
    """Errors sorted alone; membership by comparison with all thresholds; sums by matrix product."""
    error = jnp.abs(t - s)
    below = lib._bits(error)[..., None] <= _thresholds(error)[..., None, :]
    cumulative = jnp.einsum("kbrn,brng->kbrg", _values(s, t), below.astype(jnp.float32))
    return jnp.diff(cumulative, axis=-1, prepend=0.0)


WAYS = {
    "packed sort, gather": packed_sort,
    "pair sort, gather": pair_sort,
    "sort carrying both": multi_operand_sort,
    "value sort, binary search, scatter": binary_search,
    "comparison and matrix product": comparison,
}
