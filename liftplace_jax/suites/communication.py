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
    found = []
    for shapes, kind, starts in _CALL.findall(compiled.as_text()):
        if starts:
            raise ValueError(f"{kind}-start: only programs for CPU devices can be read")
        for letters, bits, dims in _ARRAY.findall(shapes):
            shape = tuple(map(int, filter(None, dims.split(","))))
            size = math.prod(shape) * max(1, int(bits or 8) // 8)  # pred takes a byte
            found.append(Sent(kind, shape, letters + bits, size))
    return found


def sorted_shapes(compiled: Any) -> list[tuple[int, ...]]:
    """Shapes on one device of all that a compiled program sorts."""
    lines = re.findall(r"= (\(.*?\)|\S+) sort\(", compiled.as_text())
    arrays = [found for line in lines if (found := _ARRAY.search(line))]
    return [tuple(map(int, found[3].split(","))) for found in arrays]


def total_bytes(sent: list[Sent], wanted: Callable[[Sent], bool] = lambda _: True) -> int:
    """Bytes of the arrays that are `wanted`."""
    return int(np.sum([s.nbytes for s in sent if wanted(s)], dtype=np.int64))
