"""Trains a teacher, prunes and distills students, evaluates and reports.

    python -m liftplace_jax.main --config=configs/digits.py --workdir=runs/digits

The same command resumes what was cut off, and says so when all is done.
"""

from __future__ import annotations

import sys

from absl import flags

from liftplace_jax.experiment.config_flag import define_config_flag
from liftplace_jax.host.flags import (
    EXIT_INTERRUPTED,
    define_runtime_flags,
    given,
    quieten_libraries,
    refuse,
    running,
    start,
)

MODES = ("all", "teacher", "compress", "distill", "evaluate", "report")

_CONFIG = define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "work directory, also gs://...; made if missing")
_MODE = flags.DEFINE_enum("mode", "all", MODES, "which stage to run; all: whatever is missing")
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a refused input")
define_runtime_flags()


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        refuse(f"unexpected arguments: {argv[1:]}")
    quieten_libraries()
    with running(_DEBUG.value):
        # Late, so that JAX's processes are joined before anything else of it runs.
        from liftplace_jax.experiment.stages import run
        from liftplace_jax.host.buckets import as_path
        from liftplace_jax.training.loop import Interrupted

        try:
            run(_CONFIG.value, as_path(given(_WORKDIR)), _MODE.value)
        except Interrupted as stop:
            print(f"\n{stop}: saved. The same command goes on from there.", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)


def entry_point() -> None:
    """For `python -m` and the installed command."""
    start(main, required=["config", "workdir"])


if __name__ == "__main__":
    entry_point()
