"""An experiment's stages, one after another."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from liftplace_jax.experiment.compressing import compress
from liftplace_jax.experiment.context import Context, make_context
from liftplace_jax.experiment.fields import check_fields
from liftplace_jax.experiment.foresight import check_stages
from liftplace_jax.experiment.report import is_reported, read_report, write_report
from liftplace_jax.experiment.scoring import evaluate, model_folders
from liftplace_jax.experiment.training import distill, train_teacher
from liftplace_jax.experiment.workdir import claim as claim_workdir
from liftplace_jax.experiment.workdir import remove_leftovers
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import reaching
from liftplace_jax.host.locks import locked
from liftplace_jax.nn.network import is_saved
from liftplace_jax.training.profiling import keep_compiled

STAGES: dict[str, Callable[[Context], None]] = {
    "teacher": train_teacher,
    "compress": compress,
    "distill": distill,
    "evaluate": evaluate,
    "report": write_report,
}


def open_experiment(
    config: ConfigDict, workdir: str | os.PathLike, *, claim: bool = True
) -> Context:
    """A checked context: what can be known to fail fails here, before anything is computed.

    Args:
      config: as of `configuration.default_config`.
      workdir: the work directory, of this machine or a bucket (gs://...); made if missing.
      claim: whether it becomes (or must be) this config's; otherwise it is only read, and nothing
        is trained.

    Raises:
      ValueError: a field of the config is out of its range, or the work directory belongs to
        another config; nothing is written then.
    """
    context = _checked(config, workdir, trains=claim)
    if claim:
        claim_workdir(context.workdir, config)
    return context


def _checked(config: ConfigDict, workdir: str | os.PathLike, trains: bool) -> Context:
    context = make_context(config, workdir, writes=trains)
    with reaching(context.workdir):
        check_stages(context, trains=trains)
    return context


def run(config: ConfigDict, workdir: str | os.PathLike, mode: str) -> None:
    """Runs the stages of a mode that are not done yet.

    Args:
      config: ConfigDict of a config file.
      workdir: the work directory.
      mode: one of MODES.

    Raises:
      ValueError: another run has the work directory, or see `open_experiment`.
    """
    check_fields(config)  # or compile_cache may not be there
    keep_compiled(config.compile_cache)
    context = _checked(config, workdir, trains=True)
    with locked(context.workdir) as alone:
        claim_workdir(context.workdir, config)
        if alone and processes.is_first():
            remove_leftovers(context.workdir)
        processes.log_to(context.workdir / "logs")
        _run_stages(context, mode)


def _run_stages(context: Context, mode: str) -> None:
    workdir = context.workdir
    if mode == "all" and is_reported(context):
        _conclude("All is done: see", workdir)
        return
    for number, (name, stage) in enumerate(STAGES.items(), 1):
        if mode in ("all", name):
            if processes.is_first():
                done = _done(context, name)
                print(f"stage {number} of {len(STAGES)}: {name}{done}", file=sys.stderr)
            stage(context)
    if mode in ("all", "report"):
        _conclude("Report:", workdir)


def _conclude(words: str, workdir: Path) -> None:
    if processes.is_first():
        print(read_report(workdir), end="\n\n")
    print(words, workdir / "report.md")


def _done(context: Context, stage: str) -> str:
    """What of a stage is there already and left as it is; "" if nothing is."""
    folders = model_folders(context)
    students = {title: folder for title, folder in folders.items() if title != "teacher"}
    parts = {
        "teacher": {"teacher": is_saved(context.teacher_folder)},
        "compress": {"pruned": is_saved(context.pruned_folder)},
        "distill": {title: is_saved(folder) for title, folder in students.items()},
        "evaluate": {t: (folder / "evaluation.json").exists() for t, folder in folders.items()},
    }.get(stage, {})
    done = [title for title, there in parts.items() if there]
    if not done:
        return f", {len(parts)} students" if stage == "distill" and len(parts) > 1 else ""
    if len(done) == len(parts):
        return ", done before"
    return f", {len(done)} of {len(parts)} done before: {', '.join(done)}"
