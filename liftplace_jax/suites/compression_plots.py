"""Pictures of the compression suite: what students save, and quality against size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from liftplace_jax.training.objective import METHODS

Row = Mapping[str, Any]
# Okabe and Ito's colours, which the colour-blind tell apart; the paper's method stands out.
_ORDER = ("no_kd", "output_kd", "feature_kd", "output_feature_kd", "lift")
_HUES = ("#7f7f7f", "#0072B2", "#56B4E9", "#009E73", "#E69F00")
COLORS = {name: "#CC79A7" for name in METHODS} | dict(zip(_ORDER, _HUES, strict=True))
COLORS |= {"lift_place": "#D55E00"}
_GREY, _LABEL_GAP = "0.35", 0.062  # of the axis' height
TITLES = {"frechet": "Fréchet distance", "output_error": "error against the teacher's output"}


def cost_figure(networks: Sequence[Row], training: Sequence[Row]) -> Figure:
    """Step time, its memory, latency and throughput over the compression factor.

    Args:
      networks: the suite's rows; the teacher's is that of ratio 0.
      training: the rows of the training steps.
    """
    figure, axes = _figure(2, 2, (10, 7))
    sizes = {row["ratio"]: row["compression"] for row in networks if "compression" in row}
    for axis, key, title in (
        (axes[0, 0], "step_ms", "Training step (ms)"),
        (axes[0, 1], "memory_mb", "Memory of a training step (MB)"),
    ):
        labels = []
        own = [row for row in training if row["ratio"] == 0 and key in row]
        for name in dict.fromkeys(row["method"] for row in training):
            rows = [row for row in training if row["method"] == name and row["ratio"]]
            rows = [row for row in rows if key in row]
            if rows:
                x, y = [sizes[row["ratio"]] for row in rows], [row[key] for row in rows]
                _line(axis, x, y, name)
                labels.append((x[-1], y[-1], name, COLORS[name]))
        _teacher(axis, [(1, row[key]) for row in own], "teacher, its own training", "upper right")
        axis.set_title(title)
        _finish(axis, sizes, labels)
    for axis, key, title in (
        (axes[1, 0], "evaluation_ms", "One network evaluation, batch 1 (ms)"),
        (axes[1, 1], "images_per_s", "Sampling (images/s)"),
    ):
        rows = [row for row in networks if key in row]
        axis.plot(
            [row["compression"] for row in rows],
            [row[key] for row in rows],
            "-o",
            color="#0072B2",
            lw=2,
            ms=6,
        )
        place = "upper right" if key == "evaluation_ms" else "lower right"
        _teacher(axis, [(1, row[key]) for row in rows if not row["ratio"]], "teacher", place)
        axis.set_title(title)
        _finish(axis, sizes, [])
    for axis in axes[1]:
        axis.set_xlabel("times fewer parameters (share of channels removed)")
    return figure


def pareto_figure(rows: Sequence[Row], measure: str) -> Figure:
    """Quality against parameters, MACs and latency; lower and further left is better.

    Args:
      rows: of the suite's quality table.
      measure: which of MEASURES is the quality.
    """
    figure, axes = _figure(1, 3, (13, 4.8), sharey=True)
    teacher = [row for row in rows if row["method"] == "teacher"]
    students = [row for row in rows if row["method"] != "teacher" and measure in row]
    ends = []
    for axis, key, title in zip(
        axes[0],
        ("parameters", "macs", "evaluation_ms"),
        ("parameters", "MACs of an evaluation", "ms of an evaluation, batch 1"),
        strict=True,
    ):
        labels = []
        for name in dict.fromkeys(row["method"] for row in students):
            points = [row for row in students if row["method"] == name and row.get(key)]
            if points:
                points.sort(key=lambda row: row[key])
                x, y = [row[key] for row in points], [row[measure] for row in points]
                _line(axis, x, y, name, [row.get(f"{measure}_spread", 0) for row in points])
                labels.append((x[0], y[0], name, COLORS[name]))
        stars = [(row[key], row[measure]) for row in teacher if measure in row and row.get(key)]
        _teacher(axis, stars, "teacher", "lower left")
        for _, level in stars:
            axis.axhline(level, color="black", lw=0.8, ls=":", zorder=1)
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.grid(axis="y", alpha=0.3, lw=0.6)
        # On the first, room for the labels.
        axis.set_xlim(*_padded(axis.get_xlim(), 0.5 if axis is axes[0, 0] else 0.02, 0.02))
        _ticks(axis.xaxis)
        ends = ends or labels
        _ratios(axis, {row["ratio"]: row[key] for row in students if row.get(key)})
    axes[0, 0].set_ylim(*_padded(axes[0, 0].get_ylim(), 0.08, 0.06))
    for axis in axes[0]:
        _ticks(axis.yaxis)
    _direct_labels(axes[0, 0], ends, side=-1)
    axes[0, 0].set_ylabel(TITLES[measure] + " (lower is better)")
    figure.suptitle(
        "Quality against size and speed; on top: share of channels removed", fontsize=11
    )
    return figure


def _figure(lines: int, columns: int, size: tuple[float, float], **options: Any):
    style = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(cast(Any, style)):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(lines, columns, squeeze=False, **options)


def _line(axis: Axes, x: list, y: list, name: str, spread: list | None = None) -> None:
    strong = name == "lift_place"
    axis.errorbar(
        x,
        y,
        yerr=spread,
        fmt="-o",
        color=COLORS[name],
        lw=2.4 if strong else 1.4,
        ms=7 if strong else 5,
        capsize=3,
        zorder=4 if strong else 3,
    )


def _teacher(axis: Axes, points: list, text: str, place: str) -> None:
    """A star with its name to the "upper right", "lower right" or "lower left"."""
    vertical, horizontal = place.split()
    for x, y in points:
        axis.plot(x, y, "*", color="black", ms=14, zorder=5)
        axis.annotate(
            text,
            (x, y),
            (0 if horizontal == "left" else 5, 7 if vertical == "upper" else -9),
            textcoords="offset points",
            fontsize=9,
            ha="right" if horizontal == "left" else "left",
            va="bottom" if vertical == "upper" else "top",
        )


def _finish(axis: Axes, sizes: Mapping[float, float], labels: list) -> None:
    """Axis of compression factors, with a tick at each that was measured."""
    axis.set(xscale="log", yscale="log")
    axis.grid(axis="y", alpha=0.3, lw=0.6)
    ticks = [f"{v:.2g}x\n({k:.0%})" for k, v in sizes.items()]
    axis.set_xticks(list(sizes.values()), ticks, fontsize=7.5)
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = 1, max(sizes.values(), default=1)
    axis.set_xlim(low / 1.15, max(high, 1.5) * ((high / low) ** 0.44 if labels else 1.15))
    axis.set_ylim(*_padded(axis.get_ylim(), 0.1, 0.12))
    _ticks(axis.yaxis)
    _direct_labels(axis, labels, side=1)


def _ratios(axis: Axes, places: Mapping[float, float]) -> None:
    """The share of channels removed above each size; neighbours too close share a label."""
    groups: list[list[tuple[float, float]]] = []
    for ratio, x in sorted(places.items(), key=lambda item: item[1]):
        if groups and np.log10(x / groups[-1][-1][1]) < 0.06 * _decades(axis):
            groups[-1].append((ratio, x))
        else:
            groups.append([(ratio, x)])
    for group in groups:
        middle = float(np.exp(np.mean([np.log(x) for _, x in group])))
        axis.text(
            middle,
            1.01,
            ", ".join(f"{ratio:.0%}" for ratio, _ in group),
            ha="center",
            va="bottom",
            transform=axis.get_xaxis_transform(),
            fontsize=8,
            color=_GREY,
        )


def _ticks(axis: Axis) -> None:
    """Few readable numbers, also where an axis spans less than a decade."""
    low, high = sorted(axis.get_view_interval())
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = [m * d for d in decades for m in (1, 2, 5) if low <= m * d <= high]
    if len(ticks) > 7:
        ticks = [d for d in decades if low <= d <= high]
    elif len(ticks) < 3:
        ticks = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(_si))
    axis.set_minor_locator(NullLocator())


def _padded(limits: tuple[float, float], below: float, above: float) -> np.ndarray:
    """Limits of a logarithmic axis with more space, in shares of its length."""
    low, high = np.log10(limits)
    return 10 ** np.array([low - below * (high - low), high + above * (high - low)])


def _direct_labels(axis: Axes, labels: list, side: int) -> None:
    """Names beside the ends of lines, moved apart where they would overlap."""
    labels = sorted(labels, key=lambda label: label[1])
    low, high = np.log10(axis.get_ylim())
    ends = [(np.log10(y) - low) / (high - low) for _, y, _, _ in labels]
    heights = []
    for end in ends:
        heights.append(max(end, heights[-1] + _LABEL_GAP) if heights else end)
    # What the pile grew by goes half below, and none of it above the axes.
    lower = np.mean(np.subtract(heights, ends)) if labels else 0
    lower = max(lower, max(heights, default=0) - 0.97)
    for height, (x, y, text, color) in zip(heights, labels, strict=True):
        target = 10 ** (low + (height - lower) * (high - low))
        axis.annotate(
            text,
            (x, y),
            (x * 10 ** (side * 0.04 * _decades(axis)), target),
            textcoords="data",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=9,
            color=color,
            fontweight="bold" if text == "lift_place" else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "lw": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (0 if side > 0 else 1, 0.5),
            },
        )


def _decades(axis: Axes) -> float:
    low, high = axis.get_xlim()
    return float(np.log10(high / low))


def _si(value: float, _: Any = None) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"
