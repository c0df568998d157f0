"""A suite's result as JSON, CSV, markdown and pictures."""

from __future__ import annotations

import csv
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from liftplace_jax.host import versions as provenance
from liftplace_jax.host.files import replacing, write_json
from liftplace_jax.suites.options import Result

DPI = 200


def write(out: Path, result: Result) -> str:
    """Writes <name>.json, .csv and .md, <name>_<table>.csv, and figures; returns the markdown.

    Args:
      out: folder, made if missing.
      result: as of a suite, with "name", "command" and "machine".
    """
    figures, name = result.get("figures", {}), result["name"]
    text = markdown(result)
    out.mkdir(parents=True, exist_ok=True)
    for file, figure in figures.items():
        path = out / file
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format=path.suffix[1:])
    tables = {name: result} | {f"{name}_{k}": v for k, v in result.get("tables", {}).items()}
    for stem, table in tables.items():
        _write_csv(out / f"{stem}.csv", table)
    with replacing(out / f"{name}.md") as temporary:
        temporary.write_text(text)
    write_json(out / f"{name}.json", {k: v for k, v in result.items() if k != "figures"})
    return text


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "backend": device.platform,
        "cores": os.cpu_count(),
        **provenance.processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__
    return found


def markdown(result: Result) -> str:
    """The result's tables with command, machine, pictures and notes."""
    lines = [f"# {result['title']}", "", f"`{result['command']}`", ""]
    lines += [", ".join(f"{k} {v}" for k, v in result["machine"].items()), ""]
    lines += _table(result)
    for table in result.get("tables", {}).values():
        lines += [f"## {table['title']}", "", *_table(table)]
    for file in result.get("figures", {}):
        if file.endswith(".png"):
            lines += [f"![{Path(file).stem}]({file})", ""]
    # Blank lines between, or they become one paragraph.
    return "\n".join([*lines, "\n\n".join(note for note in result["notes"] if note), ""])


def _table(table: Mapping[str, Any]) -> list[str]:
    columns, formats = table["columns"], table.get("formats", {})
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in table["rows"]:
        cells = [_cell(row.get(column), formats.get(column, "")) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form).replace("|", "\\|")


def _write_csv(path: Path, table: Mapping[str, Any]) -> None:
    """All that rows hold, unrounded; nested entries as a_b."""
    rows = [dict(_flat(row)) for row in table["rows"]]
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        keys = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}_")
        else:
            yield f"{prefix}{key}", value
