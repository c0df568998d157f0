"""The stages that train, and what they leave: teacher and students."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from liftplace_jax import data, weights
from liftplace_jax.experiment.context import Context, Run
from liftplace_jax.experiment.pipelines import write_student
from liftplace_jax.families.loading import load_checkpoint, load_network
from liftplace_jax.host import processes, sharding
from liftplace_jax.host.buckets import as_path
from liftplace_jax.nn import building
from liftplace_jax.nn.model_config import DenoiserConfig, StackConfig
from liftplace_jax.nn.network import Network, is_finished, make_apply
from liftplace_jax.training import profiling
from liftplace_jax.training.distillation import make_task, student_objective
from liftplace_jax.training.loop import train
from liftplace_jax.training.objective import METHODS, make_objective, on_batches
from liftplace_jax.training.prepare import prepare
from liftplace_jax.training.state import TrainState
from liftplace_jax.training.step import LossFn


def train_teacher(context: Context) -> None:
    """Trains the teacher, or loads the one of config.teacher.checkpoint."""
    fields, folder = context.config.teacher, context.teacher_folder
    if is_finished(folder):
        return
    if fields.checkpoint:
        try:
            network = load_checkpoint(as_path(fields.checkpoint), context.model, fields.entry)
        except weights.EntryError as error:
            raise ValueError(f"{error} (config.teacher.entry)") from error
        save(folder, network.config, network.params)
        return
    seed = context.config.seed
    graphdef, params = building.create(
        context.model,
        seed,
        jnp.dtype(fields.dtype),
        fields.remat,
        shardings(context, "params.student."),
        fields.scan_blocks,
    )
    objective = make_objective(
        METHODS["no_kd"],
        make_apply(graphdef),
        context.process,
        seed,
        task=make_task(context.config, context.conditioning),
    )
    state = run_training(
        context,
        fields,
        objective,
        {"student": params},
        {},
        seed,
        folder,
        "teacher",
        Network(context.model, graphdef, {}),
    )
    save_trained(folder, context.model, state)


def load_teacher(
    context: Context,
    dtype: str = "float32",
    remat: str | None = None,
    placed: bool = False,
    is_frozen: bool = False,
    scan_blocks: bool = False,
) -> Network:
    """The finished teacher.

    Args:
      context: the experiment's.
      dtype: of the computation.
      remat: as of `building.create`.
      placed: whether its parameters are where training has them, read straight to there;
        otherwise they are on the default device.
      is_frozen: as of `network.from_tensors`.
      scan_blocks: as of `building.create`.

    Raises:
      ValueError: there is none yet.
    """
    return load_network(
        context.teacher_folder,
        dtype,
        "run --mode=teacher first",
        remat=remat,
        shardings=shardings(context) if placed else None,
        is_frozen=is_frozen,
        scan_blocks=scan_blocks,
    )


def distill(context: Context) -> None:
    """Trains every student of the config."""
    for run in context.runs:
        if not is_finished(run.folder):
            _distill_one(context, run)
        write_student(context, run.folder)


def _distill_one(context: Context, run: Run) -> None:
    fields = context.config.distill
    teacher = load_teacher(
        context, fields.dtype, placed=True, is_frozen=True, scan_blocks=fields.scan_blocks
    )
    start = load_network(
        context.pruned_folder,
        fields.dtype,
        "run --mode=compress first",
        remat=fields.remat,
        shardings=shardings(context, "params.student."),
        scan_blocks=fields.scan_blocks,
    )
    objective, params = student_objective(
        context.config,
        context.process,
        run.method,
        run.seed,
        start,
        teacher,
        context.told(start.config),
    )
    frozen = {"teacher": teacher.params} if METHODS[run.method].needs_teacher else {}
    title = f"{run.method} seed {run.seed}"
    state = run_training(
        context, fields, objective, params, frozen, run.seed, run.folder, title, start
    )
    save_trained(run.folder, start.config, state)


def run_training(
    context: Context,
    fields: ConfigDict,
    objective: LossFn,
    params: dict[str, Any],
    frozen: Mapping[str, Any],
    seed: int,
    folder: Path,
    title: str,
    network: Network | None,
) -> TrainState:
    """Trains on the data, or goes on.

    Args:
      context: the experiment's.
      fields: such as config.teacher.
      objective: what is minimised, of data as networks see them.
      params: what is trained, as of `TrainState.params`.
      frozen: handed to the objective, beside the arrays of the experiment's frozen encoders.
      seed: of the order of the data.
      folder: of checkpoints and metrics.
      title: of the progress line.
      network: of params["student"], for config.evaluation.curve_every; None if that is no network.
    """
    config, source = context.config, context.sources["train"]
    run = prepare(
        fields,
        on_batches(objective, source.unpack, seed),
        params,
        {**frozen, **context.frozen},
        context.mesh,
        config.sharding_rules,
        untrained=context.family.frozen,
        stack=_stack(context.model),
    )
    every = config.evaluation.curve_every
    curve = context.judge.curve(network) if every and network else None

    def on_log(step: int, state: TrainState) -> dict[str, float]:
        values = {"learning_rate": float(np.asarray(run.schedule(step - 1)))}
        if curve and step % every == 0:
            values["frechet_float32"] = curve(state.ema)
        return values

    def make_batches(first: int) -> Generator[Any]:
        batches = data.train_batches(
            source,
            batch_size=fields.batch_size,
            seed=seed,
            start_step=first,
            flip=config.data.flip,
            prefetch=config.input_threads,
        )
        return sharding.global_batches(batches, context.mesh)

    print(profiling.memory_line(title, run.state, run.frozen), file=sys.stderr)
    with profiling.watched(run.step, config, folder) as step:
        return train(
            step,
            run.state,
            run.frozen,
            make_batches,
            total_steps=fields.steps,
            folder=folder,
            title=title,
            shardings=run.shardings,
            log_every=fields.log_every,
            checkpoint_every=fields.checkpoint_every,
            tensorboard=config.tensorboard,
            on_log=on_log,
        )


def _stack(model: DenoiserConfig) -> str | None:
    """As of `make_train_step`."""
    return model.STACK if isinstance(model, StackConfig) else None


def shardings(context: Context, prefix: str = "") -> Callable[[Any], Any]:
    """Parameters -> their shardings; prefix as of `tree_shardings`."""
    return functools.partial(
        sharding.tree_shardings,
        rules=context.config.sharding_rules,
        mesh=context.mesh,
        prefix=prefix,
    )


def save_trained(folder: Path, config: DenoiserConfig, state: TrainState) -> None:
    """Writes a trained model's folder: averaged and raw parameters."""
    raw, ema = sharding.gathered((state.params["student"], state.ema))
    if processes.is_first():
        weights.save_raw(folder, raw)
    save(folder, config, ema)


def save(folder: Path, config: DenoiserConfig, params: Any) -> None:
    """Writes a model's folder; process 0 does, all wait for it."""
    if processes.is_first():
        weights.save_model(folder, config.described(), params)
    processes.wait_for(folder / "config.json")
