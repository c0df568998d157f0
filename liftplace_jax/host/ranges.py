"""What a number may be: its kind and range, with one message for all that are not."""

from __future__ import annotations

import ctypes
import math
import numbers
from typing import Any, NamedTuple

INT32 = 2**31 - 1
LARGE = 1e6
"""Of factors of losses and the like: squares of gradients stay far below float32's 3.4e38."""
SIDE = 2**16
"""Of images in pixels, and of widths in channels: four bytes for each square are 17 GB."""


class Range(NamedTuple):
    """What a number may be.

    Attributes:
      kind: int or float; a float may be given as a whole number, never as a boolean or text.
      low: least value.
      high: greatest value.
      above: whether `low` itself is too small.
      below: whether `high` itself is too large.
      optional: whether None is a value too.
      many: whether it is a sequence of such numbers.
      why: of the greatest value, for messages.
    """

    kind: type
    low: float
    high: float
    above: bool = False
    below: bool = False
    optional: bool = False
    many: bool = False
    why: str = ""

    def __str__(self) -> str:
        if self.kind is int:
            span = f"{_text(self.low)}..{_text(self.high)}"
            text = f"a whole number in {span}"
        else:
            span = f"{_text(self.low)}, {_text(self.high)}"
            text = f"a number in {'(' if self.above else '['}{span}{')' if self.below else ']'}"
        text = f"a sequence, each {text}" if self.many else text
        return text + (" or None" if self.optional else "")

    def check(self, name: str, value: Any) -> None:
        """Raises a ValueError naming what is no such number."""
        if value is None and self.optional:
            return
        if self.many and isinstance(value, list | tuple):
            one = self._replace(many=False, optional=False)
            for index, item in enumerate(value):
                one.check(f"{name}[{index}]", item)
        elif self.many or not self._holds(value):
            number: Any = value if isinstance(value, numbers.Real) else math.nan
            why = f" ({self.why})" if self.why and number > self.high else ""
            if self.kind is float and self._spans(number):
                why = ", also when rounded to float32"
            raise ValueError(f"{name} must be {self}{why}, got {value!r}")

    def _holds(self, value: Any) -> bool:
        kind = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        exact: Any = value  # a whole number may be larger than any float
        if not self._spans(exact):
            return False
        # What is computed with is rounded: a decay of 1 - 1e-9 is 1, a rate of 1e-50 is 0.
        return self.kind is int or self._spans(ctypes.c_float(float(value)).value)

    def _spans(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)


def _text(value: float) -> str:
    if value == INT32:
        return "2^31 - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)


def whole(low: int = 1, high: float = INT32, **options: Any) -> Range:
    """A whole number."""
    if high == INT32:
        options.setdefault("why", "counted in 32 bits")
    return Range(int, low, high, **options)


def factor(high: float = LARGE, **options: Any) -> Range:
    """A number from 0 on."""
    return Range(float, 0.0, high, **options)


def positive(high: float = LARGE, **options: Any) -> Range:
    """A number above 0."""
    return Range(float, 0.0, high, above=True, **options)


SHARE = Range(float, 0.0, 1.0, below=True)
COUNT = whole()
