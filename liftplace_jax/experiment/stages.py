"""An experiment's stages, one after another."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

MODES = ("all", "teacher", "compress", "distill", "evaluate", "report")


def run(config: ConfigDict, workdir: Path, mode: str) -> None:
    """Runs the stages of a mode that are not done yet.

    Args:
      config: ConfigDict of a config file.
      workdir: the work directory.
      mode: one of MODES.

    Raises:
      ValueError: another run has the work directory, or see `Experiment`.
    """
    from liftplace_jax.host import processes
    from liftplace_jax.experiment import workdir as workdirs
    from liftplace_jax.experiment.context import Experiment
    from liftplace_jax.host.locks import locked
    from liftplace_jax.experiment.report import is_reported, write_report
    from liftplace_jax.experiment.scoring import evaluate
    from liftplace_jax.training.profiling import keep_compiled

    keep_compiled(config.compile_cache)
    experiment = Experiment(config, workdir, claim=False)
    stages = {
        "teacher": experiment.train_teacher,
        "compress": experiment.compress,
        "distill": experiment.distill,
        "evaluate": lambda: evaluate(experiment),
        "report": lambda: write_report(experiment),
    }
    with locked(experiment.workdir) as alone:
        experiment.claim()
        if alone and processes.is_first():
            workdirs.remove_leftovers(experiment.workdir)
        processes.log_to(workdir / "logs")
        if mode == "all" and is_reported(experiment):
            print(f"All is done: see {workdir / 'report.md'}")
            return
        for name, stage in stages.items():
            if mode in ("all", name):
                stage()
        if mode in ("all", "report"):
            print(f"Report: {workdir / 'report.md'}")
