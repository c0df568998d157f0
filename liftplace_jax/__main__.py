"""`python -m liftplace_jax` lists the commands."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

COMMANDS = ("main", "evaluate", "convert", "encode", "benchmark")


def commands() -> str:
    """A line for each command: what its own text begins with."""
    lines = ["Commands of liftplace_jax; each one has --help:", ""]
    for name in COMMANDS:
        path = Path(__file__).parent / f"{name.replace('.', '/')}.py"
        text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        lines += [f"    python -m liftplace_jax.{name:<14}{text.splitlines()[0]}"]
    lines += [
        "",
        "For a start: python -m liftplace_jax.main --config=configs/digits.py"
        " --workdir=runs/digits",
    ]
    return "\n".join(lines)


def entry_point(arguments: list[str]) -> None:
    """Prints the commands; whatever else was meant is refused."""
    if [argument for argument in arguments if argument not in ("--help", "-h", "help")]:
        first = arguments[0].removeprefix("liftplace_jax.")
        meant = f"; did you mean python -m liftplace_jax.{first}?" if first in COMMANDS else ""
        print(f"error: unexpected arguments {arguments}{meant}", file=sys.stderr)
        sys.exit(2)
    print(commands())


if __name__ == "__main__":
    entry_point(sys.argv[1:])
