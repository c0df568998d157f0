"""Benchmarks, each against a peer in the same run; writes JSON and a markdown table.

    python -m liftplace_jax.benchmark --suite=losses --out=benchmarks
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

SUITES = ("losses", "steps", "grouping")

_SUITE = flags.DEFINE_enum("suite", None, SUITES, "what to measure")
_OUT = flags.DEFINE_string("out", "benchmarks", "folder for <suite>.json and <suite>.md")
_REPEATS = flags.DEFINE_integer("repeats", 9, "timed calls of each case", lower_bound=3)
_QUICK = flags.DEFINE_bool("quick", False, "a small part, to see that the suite works")


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    import importlib

    from liftplace_jax.files import replacing, write_json

    suite = importlib.import_module(f"liftplace_jax.suites.{_SUITE.value}")
    result = suite.run(_QUICK.value, _REPEATS.value)
    result |= {"command": f"python -m liftplace_jax.benchmark {shlex.join(sys.argv[1:])}"}
    result |= {"machine": machine()}
    out = Path(_OUT.value)
    text = markdown(result)
    write_json(out / f"{_SUITE.value}.json", result)
    with replacing(out / f"{_SUITE.value}.md") as temporary:
        temporary.write_text(text)
    print(text)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import jax

    device = jax.devices()[0]
    found = {
        "device": device.device_kind, "backend": device.platform, "cores": os.cpu_count(),
        "processor": platform.machine(), "python": platform.python_version(),
        "jax": jax.__version__,
    }  # fmt: skip
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result as a table with its command and machine."""
    columns = result["columns"]
    lines = [f"# {result['title']}", "", f"`{result['command']}`", ""]
    lines += [", ".join(f"{k} {v}" for k, v in result["machine"].items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in result["rows"]]
    notes = [note for note in result["notes"] if note]
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    flags.mark_flag_as_required("suite")
    app.run(main)
