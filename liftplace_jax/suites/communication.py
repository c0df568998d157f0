"""What devices send each other in a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all", "send", "recv",
)  # fmt: skip
_CALL = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$", re.M)
_LOOP = re.compile(r" while\(.*body=%([\w.-]+)(.*)")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r" call\(.*to_apply=%([\w.-]+)")
_ARRAY = re.compile(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")


class Sent(NamedTuple):
    """An array that a collective operation yields on every device.

    Attributes:
      kind: of the operation, such as "all-reduce".
      shape: on one device: of an all-gather the whole, of a reduce-scatter the part.
      dtype: as XLA writes it, such as "f32".
      nbytes: of the array.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def collectives(compiled: Any) -> list[Sent]:
    """All that devices send each other in a program compiled for CPU devices.

    Args:
      compiled: as of `jax.jit(f).lower(...).compile()`.

    Raises:
      ValueError: the program is one for accelerators, whose operations start and end apart.
    """
    return _sent(compiled.as_text())


def _sent(text: str) -> list[Sent]:
    found = []
    for shapes, kind, starts in _CALL.findall(text):
        if starts:
            raise ValueError(f"{kind}-start: only programs for CPU devices can be read")
        for letters, bits, dims in _ARRAY.findall(shapes):
            shape = tuple(map(int, filter(None, dims.split(","))))
            size = math.prod(shape) * max(1, int(bits or 8) // 8)  # pred takes a byte
            found.append(Sent(kind, shape, letters + bits, size))
    return found


def executed(compiled: Any) -> list[Sent]:
    """As `collectives`, each as often as its loop runs.

    Raises:
      ValueError: as of `collectives`, or a loop that sends something has no number of rounds.
    """
    heads = list(_COMPUTATION.finditer(text := compiled.as_text()))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    bodies = {head[2]: text[head.end() : end] for head, end in zip(heads, ends, strict=True)}

    def of(name: str) -> list[Sent]:
        found = _sent(bodies[name])
        for body, rest in _LOOP.findall(bodies[name]):
            inner, rounds = of(body), _ROUNDS.search(rest)
            if inner and rounds is None:
                raise ValueError(f"{body}: a loop of unknown length sends {inner[0]}")
            found += inner * (int(rounds[1]) if rounds else 1)
        for called in _CALLED.findall(bodies[name]):
            found += of(called)
        return found

    return of(next(head[2] for head in heads if head[1]))


def sorted_shapes(compiled: Any) -> list[tuple[int, ...]]:
    """Shapes on one device of all that a compiled program sorts."""
    lines = re.findall(r"= (\(.*?\)|\S+) sort\(", compiled.as_text())
    arrays = [found for line in lines if (found := _ARRAY.search(line))]
    return [tuple(map(int, found[3].split(","))) for found in arrays]


def total_bytes(sent: list[Sent], wanted: Callable[[Sent], bool] = lambda _: True) -> int:
    """Bytes of the arrays that are `wanted`."""
    return int(np.sum([s.nbytes for s in sent if wanted(s)], dtype=np.int64))
