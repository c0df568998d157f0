"""Trains a teacher, prunes and distills students, evaluates and reports.

    python -m liftplace_jax.main --config=configs/digits.py --workdir=runs/digits

The same command resumes what was cut off, and says so when all is done.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("all", "teacher", "compress", "distill", "evaluate", "report")
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file, FILE.py[:key=value,...]")
_WORKDIR = flags.DEFINE_string("workdir", None, "work directory; made if missing")
_MODE = flags.DEFINE_enum("mode", "all", MODES, "which stage to run; all: whatever is missing")
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a refused input")


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        # orbax, TFDS and TensorFlow tell much; errors of ours are raised, never logged.
        logging.set_verbosity(logging.ERROR)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Late, so that --help and a misspelt flag answer at once.
    from liftplace_jax.training.loop import Interrupted

    # Outside the training loop, which saves first, SIGTERM is as good as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(_CONFIG.value, Path(_WORKDIR.value).expanduser(), _MODE.value)
    except Interrupted as stop:
        print(f"\n{stop}: saved. The same command goes on from there.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from what is saved.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, RuntimeError, OSError) as error:
        if _DEBUG.value:
            raise
        _refuse(str(error))


def run(config, workdir: Path, mode: str) -> None:
    """Runs the stages of a mode that are not done yet.

    Args:
      config: ConfigDict of a config file.
      workdir: the work directory.
      mode: one of MODES.
    """
    from liftplace_jax.experiment import Experiment
    from liftplace_jax.report import is_reported, write_report
    from liftplace_jax.scoring import evaluate

    experiment = Experiment(config, workdir)
    stages = {
        "teacher": experiment.train_teacher,
        "compress": experiment.compress,
        "distill": experiment.distill,
        "evaluate": lambda: evaluate(experiment),
        "report": lambda: write_report(experiment),
    }
    if mode == "all" and is_reported(experiment):
        print(f"All is done: see {workdir / 'report.md'}")
        return
    for name, stage in stages.items():
        if mode in ("all", name):
            stage()
    if mode in ("all", "report"):
        print(f"Report: {workdir / 'report.md'}")


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but whatever is refused is one line on stderr."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A config file's complaint comes with its traceback; its last line says it all.
        complaint = re.search(r"\n\s*ValueError: (.*)\Z", str(error).rstrip())
        _refuse(complaint[1] if complaint else str(error))
    except OSError as error:
        _refuse(str(error))
    except (AttributeError, KeyError) as error:
        # ml_collections says of --config.a.b=1 only that there is no b.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        changes = " ".join(part for part in argv if part.lstrip("-").startswith("config."))
        _refuse(f"unknown config field in {changes}: " + " ".join(str(error.args[0]).split()))


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def entry_point() -> None:
    """For `python -m` and the installed command."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    entry_point()
