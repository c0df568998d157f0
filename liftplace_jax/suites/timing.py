"""Timing of alternatives side by side, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

PAUSE = 0.05  # seconds


class Timing(NamedTuple):
    """Seconds of one call: median, and the quartiles as spread."""

    median: float
    low: float
    high: float


def time_side_by_side(
    calls: Mapping[str, Callable[[], object]], repeats: int, rounds: int | None = None
) -> dict[str, Timing]:
    """Times each call `repeats` times.

    Args:
      calls: name -> function that returns when its work is done; called once before, to compile.
      repeats: at least 3.
      rounds: None: in turn, call by call. A number, for libraries whose threads spin for a while
        after a call and so take a core from the next: in so many rounds, each call has a block,
        which begins with a pause, and with two calls that are not timed and wake its own threads.
    """
    seconds = {name: [] for name in calls}
    block = 1 if rounds is None else -(-repeats // rounds)
    for call in calls.values():
        call()
    for _ in range(rounds or repeats):
        for name, call in calls.items():
            if rounds:
                time.sleep(PAUSE)
                call()
                call()
            for _ in range(block):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = Timing(median, low, high)
    return result


def milliseconds(timing: Timing) -> str:
    """For a table: median and quartiles."""
    return f"{timing.median * 1e3:.1f} ({timing.low * 1e3:.1f}..{timing.high * 1e3:.1f})"
