"""An experiment's stages, one after another."""

from __future__ import annotations

import os
from collections.abc import Callable

from ml_collections import ConfigDict

from liftplace_jax.experiment.compressing import compress
from liftplace_jax.experiment.context import Context, make_context
from liftplace_jax.experiment.foresight import check_stages
from liftplace_jax.experiment.report import is_reported, write_report
from liftplace_jax.experiment.scoring import evaluate
from liftplace_jax.experiment.training import distill, train_teacher
from liftplace_jax.experiment.workdir import claim as claim_workdir
from liftplace_jax.host import processes
from liftplace_jax.training.profiling import keep_compiled

STAGES: dict[str, Callable[[Context], None]] = {
    "teacher": train_teacher,
    "compress": compress,
    "distill": distill,
    "evaluate": evaluate,
    "report": write_report,
}


def open_experiment(config: ConfigDict, workdir: str | os.PathLike, *, claim: bool = True) -> Context:
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
    context = make_context(config, workdir)
    check_stages(context, trains=claim)
    if claim:
        claim_workdir(context.workdir, config)
    return context


def run(config: ConfigDict, workdir: str | os.PathLike, mode: str) -> None:
    """Runs the stages of a mode that are not done yet.

    Args:
      config: ConfigDict of a config file.
      workdir: the work directory.
      mode: one of MODES.
    """
    keep_compiled(config.compile_cache)
    context = open_experiment(config, workdir)
    workdir = context.workdir
    processes.log_to(workdir / "logs")
    if mode == "all" and is_reported(context):
        print(f"All is done: see {workdir / 'report.md'}")
        return
    for name, stage in STAGES.items():
        if mode in ("all", name):
            stage(context)
    if mode in ("all", "report"):
        print(f"Report: {workdir / 'report.md'}")
