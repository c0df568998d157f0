"""An experiment's stages, one after another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

if TYPE_CHECKING:
    from liftplace_jax.experiment.context import Experiment

MODES = ("all", "teacher", "compress", "distill", "evaluate", "report")


def run(config: ConfigDict, workdir: Path, mode: str) -> None:
    """Runs the stages of a mode that are not done yet.

    Args:
      config: ConfigDict of a config file.
      workdir: the work directory.
      mode: one of MODES.
    """
    from liftplace_jax.host import processes
    from liftplace_jax.experiment.context import Experiment
    from liftplace_jax.experiment.report import is_reported, write_report
    from liftplace_jax.experiment.scoring import evaluate
    from liftplace_jax.training.profiling import keep_compiled

    keep_compiled(config.compile_cache)
    experiment = Experiment(config, workdir)
    processes.log_to(workdir / "logs")
    stages = {
        "teacher": experiment.train_teacher,
        "compress": experiment.compress,
        "distill": experiment.distill,
        "evaluate": lambda: evaluate(experiment),
        "report": lambda: write_report(experiment),
    }
    if mode == "all" and is_reported(experiment):
        _conclude("All is done: see", workdir)
        return
    for number, (name, stage) in enumerate(stages.items(), 1):
        if mode in ("all", name):
            if processes.is_first():
                done = _done(experiment, name)
                print(f"stage {number} of {len(stages)}: {name}{done}", file=sys.stderr)
            stage()
    if mode in ("all", "report"):
        _conclude("Report:", workdir)


def _conclude(words: str, workdir: Path) -> None:
    from liftplace_jax.host import processes
    from liftplace_jax.experiment.report import read_report

    if processes.is_first():
        print(read_report(workdir), end="\n\n")
    print(words, workdir / "report.md")


def _done(experiment: Experiment, stage: str) -> str:
    """What of a stage is there already and left as it is; "" if nothing is."""
    from liftplace_jax.nn.network import is_saved
    from liftplace_jax.experiment.scoring import model_folders

    folders = model_folders(experiment)
    students = {title: folder for title, folder in folders.items() if title != "teacher"}
    parts = {
        "teacher": {"teacher": is_saved(experiment.teacher_folder)},
        "compress": {"pruned": is_saved(experiment.workdir / "pruned")},
        "distill": {title: is_saved(folder) for title, folder in students.items()},
        "evaluate": {t: (folder / "evaluation.json").exists() for t, folder in folders.items()},
    }.get(stage, {})
    done = [title for title, there in parts.items() if there]
    if not done:
        return f", {len(parts)} students" if stage == "distill" and len(parts) > 1 else ""
    if len(done) == len(parts):
        return ", done before"
    return f", {len(done)} of {len(parts)} done before: {', '.join(done)}"
