"""How good students are, read from finished work directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.experiment.report import summarise
from liftplace_jax.families.registry import family_of
from liftplace_jax.host.differences import differences
from liftplace_jax.nn.model_config import DenoiserConfig

Row = dict[str, Any]


def read_quality(
    workdirs: Sequence[Path], teacher: DenoiserConfig, compress: ConfigDict
) -> list[Row]:
    """Mean and spread over seeds of every method at every ratio, and of the teacher.

    Args:
      workdirs: work directories with a report.
      teacher: the teacher's architecture, which all of them must have.
      compress: of the students, config.compress; their ratio is the work directory's.

    Returns:
      Rows with "ratio", "method", "seeds" (how many), and for each of `report.MEASURES` that
      was measured its mean and, over several seeds, "<measure>_spread"; the teacher first, then
      by ratio.

    Raises:
      ValueError: a work directory is not finished, or has other networks, another protocol of
        evaluation, or a student that another one has too; names it.
    """
    pruner = family_of(teacher).pruner(compress.pruner)
    rows: dict[tuple, Row] = {}
    protocols: dict[str, Path] = {}
    for workdir in workdirs:
        report, config = _read(workdir, "report.json"), _read(workdir, "config.json")
        ratio = config["compress"]["ratio"]
        for row in report["rows"]:
            wanted = teacher
            if row["method"] != "teacher":
                wanted = pruner.predict(ConfigDict({**compress, "ratio": ratio}), teacher)
            _check_model(workdir, row, wanted)
            _check_protocol(workdir, row, protocols)
            if row["method"] == "teacher":
                # Work directories of a sweep may share their teacher, sampled again in each.
                key = ("teacher", 0.0, row["seed"], f"{row.get('frechet') or 0:.3g}")
                rows.setdefault(key, row | {"ratio": 0.0, "workdir": workdir})
                continue
            key = (row["method"], ratio, row["seed"])
            if key in rows:
                raise ValueError(
                    f"{rows[key]['workdir']} and {workdir} both have a student {row['method']} of "
                    f"ratio {ratio} and seed {row['seed']}: leave one out"
                )
            rows[key] = row | {"ratio": ratio, "workdir": workdir}
    return _summary(list(rows.values()))


def quality_measure(rows: Sequence[Row]) -> str:
    """The Frechet distance where all students have it, else the error of their outputs."""
    students = [row for row in rows if row["method"] != "teacher"]
    return "frechet" if all("frechet" in row for row in students) else "output_error"


def _summary(rows: list[Row]) -> list[Row]:
    groups = [("teacher", 0.0)] + [("student", r) for r in sorted({row["ratio"] for row in rows})]
    result = []
    for kind, ratio in groups:
        members = [
            row
            for row in rows
            if row["ratio"] == ratio and (row["method"] == "teacher") == (kind == "teacher")
        ]
        for entry in summarise(members):
            values = {k: v for k, v in entry.items() if v is not None}
            result.append(values | {"ratio": ratio, "seeds": len(entry["seeds"])})
    return result


def _read(workdir: Path, name: str) -> Any:
    path = workdir / name
    if not path.exists():
        raise ValueError(
            f"{workdir} has no {name}: it is no finished work directory; finish it with "
            "python -m liftplace_jax.main, or leave it out of --workdirs"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_model(workdir: Path, row: Row, wanted: DenoiserConfig) -> None:
    found = _read(workdir, f"{row['folder']}/config.json")
    wanted_fields = json.loads(json.dumps(wanted.described()))
    lines = differences(wanted_fields, found)
    if lines:
        raise ValueError(
            f"the {row['method']} of {workdir} is another network than the benchmark's "
            f"(benchmark's -> found): {'; '.join(lines[:5])}. Give the config it was made with, or "
            "leave it out of --workdirs"
        )


def _check_protocol(workdir: Path, row: Row, protocols: dict[str, Path]) -> None:
    protocol = {k: v for k, v in row.get("protocol", {}).items() if k != "batch_size"}
    text = json.dumps([row.get("label"), protocol], sort_keys=True)
    protocols.setdefault(text, workdir)
    if len(protocols) > 1:
        one, other = protocols.values()
        raise ValueError(
            f"{one} and {other} were evaluated in different ways, their numbers do not compare: "
            + " against ".join(protocols)
        )
