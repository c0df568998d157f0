"""What came out of a run, in a sentence or two that claim no more than the seeds show."""

from __future__ import annotations

import math
from typing import Any

# What students are ranked by: the first that all of them have; lower is better.
_SCORES = {
    "frechet": ("Frechet distance", ".1f"),
    "output_error": ("output error", ".4f"),
}
_BASELINES = ("output_kd", "no_kd")  # the usual ways to train a student
_Row = dict[str, Any]


def conclude(summary: list[_Row], few: bool = False) -> str:
    """The best method by its score, by how much, and whether seeds differ as much.

    Args:
      summary: as of `report.summarise`: the teacher, then a row for each method.
      few: whether so few samples were drawn that the numbers mean little.
    """
    teacher, *students = summary
    key = next((k for k in _SCORES if all(row[k] is not None for row in students)), None)
    if not students or key is None:
        return "No score was computed for the students."
    ranked = sorted(students, key=lambda row: row[key])
    best = ranked[0]
    text = _alone(best, teacher, key) if len(ranked) == 1 else _against(ranked, teacher, key)
    clipped = "frechet_clipped"
    if key == "frechet" and all(row[clipped] is not None for row in students):
        other = min(students, key=lambda row: row[clipped])
        if other is not best:
            text += (
                f" With clipping {other['method']} has the lowest, {spread(other, clipped, '.1f')} "
                f"against {spread(best, clipped, '.1f')}."
            )
    return text + (" So few samples say little: this was a smoke run." if few else "")


def spread(row: _Row, key: str, form: str, unit: str = "") -> str:
    """A measure of a summary with its standard deviation over seeds, if there are several."""
    if row.get(key) is None:
        return "-"
    deviation = row.get(f"{key}_spread")
    shown = f"{row[key]:{form}}"
    return shown + (f" +- {deviation:{form}}" if deviation is not None else "") + unit


def _alone(row: _Row, teacher: _Row, key: str) -> str:
    name, form = _SCORES[key]
    text = f"{row['method']} reaches a {name} of {spread(row, key, form)}, {_seeds(row)}"
    if teacher[key] is not None:
        text += f"; its teacher, {row['compression']:.1f} times as large, {teacher[key]:{form}}"
    return text + ". The run has no other method to compare it with."


def _against(ranked: list[_Row], teacher: _Row, key: str) -> str:
    name, form = _SCORES[key]
    best, others = ranked[0], {row["method"]: row for row in ranked[1:]}
    rival = next((others[m] for m in _BASELINES if m in others), ranked[1])
    gap = rival[key] - best[key]
    share = f" ({gap / rival[key]:.0%})" if rival[key] else ""
    of = "" if teacher[key] is None else f" (teacher: {teacher[key]:{form}})"
    return (
        f"The lowest {name}, {_seeds(best)}, is that of {best['method']}: "
        f"{spread(best, key, form)}{of}. That is {gap:{form}}{share} below {rival['method']}, "
        f"{spread(rival, key, form)}{_judged(best, rival, key, gap)}."
    )


def _judged(best: _Row, rival: _Row, key: str, gap: float) -> str:
    """What the seeds say of a difference: its standard deviation is that of both sides."""
    deviations = best[f"{key}_spread"], rival[f"{key}_spread"]
    if None in deviations:
        return "; one seed shows no spread, so this may be chance"
    noise = math.hypot(*deviations)
    if gap <= noise:
        return ": within the spread over seeds, so no difference is shown"
    times = f"{gap / noise:.1f} times" if noise else "beyond"
    return f": {times} the spread over seeds"


def _seeds(row: _Row) -> str:
    count = len(row["seeds"])
    return "one seed" if count == 1 else f"mean of {count} seeds"
