"""Suite "capacity_gap": one tiny student under teachers of growing size (the paper's first figure).

The config's own teacher, pruned, is the student that starts every run; only the teacher, the method
and the seed change. Conventional distillation is `output_kd`.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import tqdm
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from liftplace_jax.experiment import stages
from liftplace_jax.experiment.configuration import under
from liftplace_jax.families import registry
from liftplace_jax.suites.options import Options, Result

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = ("output_kd", "lift_place")
WIDTHS = (1, 0.5, 0.75, 1.5)  # of the teachers, over config.model.ch; the first makes the student
SCORES = {"frechet": "as published", "frechet_clipped": "predicted data clipped"}
COLOURS = {"output_kd": "#d95f02", "lift_place": "#1b6ca8"}


def run(options: Options) -> Result:
    """Trains whatever is missing in the work directory, and compares.

    Args:
      options: `config` gives data, teachers (around its model.ch), student (its teacher, pruned),
        seeds and steps; `workdir` holds one work directory for each teacher; `quick` takes two
        teachers.

    Raises:
      ValueError: a work directory of another config, or a config without Frechet distance.
    """
    base, workdir = options.need("capacity_gap", "model.ch", "compress.ratio"), options.workdir
    assert workdir is not None, "suite capacity_gap takes --workdir"
    if not base.evaluation.features:
        raise ValueError("capacity_gap compares Frechet distances: set config.evaluation.features")
    if base.teacher.checkpoint:
        raise ValueError("capacity_gap trains its teachers: leave config.teacher.checkpoint out")
    widths = WIDTHS[:2] if options.quick else WIDTHS
    folders = [workdir / f"ch{round(base.model.ch * w)}" for w in widths]
    for width in widths:  # before hours of training
        with under(f"model, teacher of width {width} x {base.model.ch}: "):
            fields = _config(base, width, None).model.to_dict()
            registry.config_from_dict(fields, partial=True)
    for width, folder in tqdm.tqdm(
        list(zip(widths, folders, strict=True)), desc="capacity_gap", unit="teacher"
    ):
        student = None if folder == folders[0] else folders[0] / "pruned"
        stages.run(_config(base, width, student), folder, "all")
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    reports.sort(key=lambda report: report["rows"][0]["parameters"])
    rows = [row for report in reports for row in _rows(report)]
    student = next(row for row in reports[0]["rows"] if row["method"] != "teacher")
    scores = [name for name in SCORES if name in student]
    columns = ["teacher_parameters", "method", "seeds"]
    columns += [f"{name}{part}" for name in scores for part in ("", "_each")]
    return {
        "title": f"One student of {student['parameters']:,} parameters under growing teachers",
        "columns": columns,
        "rows": rows,
        "notes": [
            "frechet: mean +- standard deviation over seeds; _each: every seed. "
            "frechet_clipped: predicted data clipped to the image range while sampling.",
            f"Every student starts from the teacher of width {base.model.ch}, pruned by "
            f"{base.compress.ratio:.0%}.",
        ],
        "figures": {"capacity_gap.png": figure(rows, scores, student["parameters"])},
    }


def _config(base: ConfigDict, width: float, student: Path | None) -> ConfigDict:
    config = copy.deepcopy(base)
    config.model.ch = round(base.model.ch * width)
    config.name = f"{base.name}, teacher of width {config.model.ch}"
    config.method = "+".join(METHODS)
    if student is not None:
        config.compress.checkpoint = os.path.relpath(student)
    return config


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for the teacher and for each method, of a work directory's report."""
    teacher, rows = report["rows"][0], []
    for method in ("teacher", *METHODS):
        members = [row for row in report["rows"] if row["method"] == method]
        row = {
            "teacher_parameters": teacher["parameters"],
            "method": method,
            "seeds": "+".join(str(member["seed"]) for member in members),
        }
        for name in (name for name in SCORES if name in teacher):
            values = [member[name] for member in members]
            spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row[name] = f"{statistics.fmean(values):.1f}{spread}"
            row[f"{name}_each"] = ", ".join(f"{value:.1f}" for value in values)
            row.setdefault("values", {})[name] = values
        rows.append(row)
    return rows


def figure(rows: list[dict[str, Any]], scores: list[str], parameters: int) -> Figure:
    """Frechet distance over the teacher's parameters: every seed, mean and range of each method."""
    picture, axes = plt.subplots(
        1, len(scores), figsize=(5 * len(scores), 3.8), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], scores, strict=True):
        last = {}
        for method, colour in COLOURS.items():
            points = [
                (r["teacher_parameters"], r["values"][name]) for r in rows if r["method"] == method
            ]
            x = [size for size, _ in points]
            means = [statistics.fmean(values) for _, values in points]
            low, high = ([f(values) for _, values in points] for f in (min, max))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            axis.plot(x, means, color=colour, marker="o", lw=1.8)
            axis.plot(
                [s for s, v in points for _ in v],
                [y for _, v in points for y in v],
                ".",
                color=colour,
                alpha=0.6,
                ms=4,
            )
            last[method] = means[-1]
        ranked = sorted(last, key=lambda method: last[method])
        for method, align in zip(ranked, ("top", "bottom"), strict=True):
            axis.annotate(
                method,
                (x[-1], last[method]),
                xytext=(7, 0),
                va=align,
                textcoords="offset points",
                color=COLOURS[method],
            )
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{size / 1e6:.2g}M" for size in x], minor=False)
        axis.minorticks_off()
        axis.set_xlim(right=x[-1] * 1.6)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("teacher's parameters")
        axis.set_title(
            f"sampled {SCORES[name]}" if name == "frechet" else SCORES[name], fontsize=10
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("Frechet distance")
    picture.suptitle(
        f"One student of {parameters:,} parameters under growing teachers", fontsize=11
    )
    return picture
