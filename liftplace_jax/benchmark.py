"""Measurements: each against a peer in the same run, or of how small a teacher can get.

    python -m liftplace_jax.benchmark --suite=losses
    python -m liftplace_jax.benchmark --suite=sizes
    python -m liftplace_jax.benchmark --suite=compression --config=configs/digits.py

Writes JSON, CSV and a markdown table, and a suite's pictures.
"""

from __future__ import annotations

import glob
import importlib
import shlex
import sys
from pathlib import Path

from absl import flags

from liftplace_jax.experiment.config_flag import define_config_flag
from liftplace_jax.host.buckets import on_this_machine
from liftplace_jax.host.flags import (
    EXIT_INTERRUPTED,
    REFUSED,
    given,
    quieten_libraries,
    refuse,
    start,
)
from liftplace_jax.host.ranges import INT32, SHARE

# Suite -> the flags that are for it, beside those that all have.
SUITES = {
    "losses": (),
    "steps": (),
    "grouping": (),
    "evaluation": (),
    "sizes": (),
    "scaling": (),
    "input": (),
    "loading": (),
    "compression": ("config", "ratios", "batch_size", "workdirs"),
    "capacity_gap": ("config", "workdir"),
}

_SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "what to measure")
_OUT = flags.DEFINE_string("out", "benchmarks", "folder of the results")
_REPEATS = flags.DEFINE_integer(
    "repeats", 9, "timed calls of each case", lower_bound=3, upper_bound=10_000
)
_QUICK = flags.DEFINE_bool("quick", False, "a small part, to see that the suite works")
_CONFIG = define_config_flag("compression, capacity_gap: config file, FILE.py[:key=value,...]")
_RATIOS = flags.DEFINE_list("ratios", [], "compression: shares of channels removed, in [0, 1)")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "compression: of training and sampling (default: the config's)",
    lower_bound=1,
    upper_bound=INT32,
)
_WORKDIRS = flags.DEFINE_list(
    "workdirs", [], "compression: finished work directories, patterns such as runs/sweep/*"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "capacity_gap: where its runs are kept")
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a refused input")


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        refuse(f"unexpected arguments: {argv[1:]}")
    quieten_libraries()
    try:
        options = read_options()
    except ValueError as error:
        refuse(str(error))
    # Late, so that --help and a misspelt flag answer at once.
    from liftplace_jax.suites.writing import machine, write
    from liftplace_jax.training.loop import Interrupted

    suite = importlib.import_module(f"liftplace_jax.suites.{_SUITE.value}")
    try:
        result = {"name": _SUITE.value} | suite.run(options)
    except (KeyboardInterrupt, Interrupted):
        print("\nInterrupted: no results are written.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except REFUSED as error:
        if _DEBUG.value:
            raise
        refuse(str(error))
    result |= {"command": f"python -m liftplace_jax.benchmark {shlex.join(sys.argv[1:])}"}
    result |= {"machine": machine()}
    print(write(options.out, result))


def read_options():
    """The flags, as the suite takes them.

    Raises:
      ValueError: a flag that is not for this suite, is lacking, or has a bad value.
    """
    from liftplace_jax.experiment.fields import check_fields
    from liftplace_jax.suites.options import Options

    suite = given(_SUITE)
    known = SUITES[suite]
    for name in {name for names in SUITES.values() for name in names} - set(known):
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} is not for --suite={suite}")
    for name in {"config", "workdir"} & set(known):
        if flags.FLAGS[name].value is None:
            raise ValueError(f"--suite={suite} needs --{name}")
    if _CONFIG.value is not None:
        check_fields(_CONFIG.value)
    return Options(
        quick=_QUICK.value,
        repeats=_REPEATS.value,
        out=on_this_machine(_OUT.value, "--out"),
        workdir=on_this_machine(_WORKDIR.value, "--workdir") if _WORKDIR.value else None,
        config=_CONFIG.value,
        ratios=tuple(map(_ratio, _RATIOS.value)),
        batch_size=_BATCH_SIZE.value,
        workdirs=tuple(path for pattern in _WORKDIRS.value for path in _directories(pattern)),
    )


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise ValueError(f"--ratios must be numbers such as 0,0.5,0.9, got {text!r}") from None
    SHARE.check("--ratios", ratio)
    return ratio


def _directories(pattern: str) -> list[Path]:
    paths = sorted(map(Path, glob.glob(str(on_this_machine(pattern, "--workdirs")))))
    found = [path for path in paths if path.is_dir()]
    if not found:
        raise ValueError(f"--workdirs: no directory matches {pattern!r}")
    return found


def entry_point() -> None:
    """For `python -m`."""
    start(main, required=["suite"])


if __name__ == "__main__":
    entry_point()
