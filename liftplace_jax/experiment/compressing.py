"""The compress stage: what every student starts from, by the family's pruner."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax import data, weights
from liftplace_jax.compress import Search, taylor_gradients
from liftplace_jax.compress.pruner import TeacherNetwork, Tensors
from liftplace_jax.evaluation.samples import replicated
from liftplace_jax.experiment.configuration import under
from liftplace_jax.experiment.context import Context
from liftplace_jax.experiment.pictures import draw_search
from liftplace_jax.experiment.training import load_teacher, run_training, save
from liftplace_jax.families.loading import load_checkpoint
from liftplace_jax.host import processes, sharding
from liftplace_jax.host.buckets import as_path
from liftplace_jax.host.files import write_json
from liftplace_jax.host.progress import progress
from liftplace_jax.losses import output_kd_loss
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.nn.network import Network, from_tensors, is_finished, make_apply
from liftplace_jax.training.distillation import make_task
from liftplace_jax.training.objective import METHODS, draw_inputs, make_objective
from liftplace_jax.training.state import random_key


def compress(context: Context) -> None:
    """Makes what every student starts from: the pruned teacher, or a given network.

    Raises:
      ValueError: there is no teacher yet, or a given network does not fit.
    """
    folder = context.pruned_folder
    if is_finished(folder):
        return
    if context.config.compress.checkpoint:
        student = _given_student(context)
    else:
        fields, tools = context.config.teacher, PruningTools(context)
        # Of what is computed with the teacher; a search is a training, and has its own.
        with jax.default_matmul_precision(fields.precision):
            made = context.pruner.prune(
                context.config.compress, load_teacher(context, fields.dtype), tools
            )
        record = {**(made.record or {}), **tools.said}
        if record and processes.is_first():
            write_json(folder / RECORD, record)
            if (folder / SEARCH).exists() and made.record:
                draw_search(folder / SEARCH, made.record["kept"])
        student = from_tensors(made.config, made.tensors, "the pruned teacher")
    save(folder, student.config, student.params)


def predicted_student(context: Context) -> DenoiserConfig | None:
    """The config of the student that `compress` will make; None if it is a given one.

    Raises:
      ValueError: a field of config.compress does not fit; names it.
    """
    if context.config.compress.checkpoint:
        if is_finished(context.pruned_folder):
            return None
        return _given_student(context).config
    with under("compress."):
        return context.pruner.predict(context.config.compress, context.model)


def _given_student(context: Context) -> Network:
    fields, model = context.config.compress, context.model
    path, config = as_path(fields.checkpoint), None
    if path.is_file():  # which does not say what it is
        with under("compress."):
            config = context.pruner.predict(fields, model)
    try:
        student = load_checkpoint(path, config, fields.entry, said_by="config.compress")
    except weights.EntryError as error:
        raise ValueError(f"{error} (config.compress.entry)") from error
    for field in ("image_size", "in_channels", "out_channels"):
        found, wanted = getattr(student.config, field), getattr(model, field)
        if found != wanted:
            raise ValueError(
                f"config.compress.checkpoint {path} has {field} {found}, config.model.{field} "
                f"is {wanted}: change one of them"
            )
    with under(f"compress.checkpoint {path}: "):
        model.conditioning.check_student(student.config.conditioning)
    return student


RECORD = "layers.json"
"""File, in pruned/, that says why the student became this: the pruner's words, and "importances",
the numbers that they were computed in with the teacher."""
SEARCH = "search"
"""Folder, in pruned/, of a training that decides what is pruned."""


@dataclasses.dataclass(frozen=True)
class PruningTools:
    """What pruners get of an experiment; see `compress.Tools`.

    Attributes:
      context: the experiment's.
      said: for the record, what was computed with the teacher.
    """

    context: Context
    said: dict[str, Any] = dataclasses.field(default_factory=dict)

    def _say(self) -> None:
        fields = self.context.config.teacher
        self.said["importances"] = {"dtype": fields.dtype, "precision": fields.precision}

    @property
    def seed(self) -> int:
        return self.context.config.seed

    def tensors(self, params: Any) -> Tensors:
        return weights.to_torch(params)

    def noised(self, count: int, batch_size: int) -> Iterator[tuple[jax.Array, ...]]:
        self._say()
        context, process = self.context, self.context.process
        task = make_task(context.config, context.conditioning)

        @jax.jit
        def noise(frozen, batch, step):
            t, noise, cond = draw_inputs(process, task, self.seed, batch, step)
            cond = task.conditioning.embed(frozen, cond)
            x = process.add_noise(batch["image"], t, noise)
            return x, t, cond, process.target(batch["image"], noise, t)

        batches = self._batches(batch_size, context.config.data.flip)
        with progress("layers", count, unit="batch") as bar, contextlib.closing(batches):
            for step in range(count):
                yield noise(context.frozen, next(batches), step)
                bar.update()

    def gradients(self, teacher: TeacherNetwork, batch_size: int, threshold: float) -> Tensors:
        """On one batch, timestep after timestep."""
        self._say()
        process, apply = self.context.process, make_apply(teacher.graphdef)
        with contextlib.closing(self._batches(batch_size, flip=False)) as batches:
            batch = next(batches)
        images, cond = batch["image"], self.context.embed(batch)
        noise = jax.random.normal(jax.random.key(self.seed), images.shape)
        # Where the images are, on every device once.
        whole = jax.tree.map(lambda _: replicated(images.sharding), teacher.params)
        params = jax.device_put(teacher.params, whole)

        @jax.jit
        @jax.value_and_grad
        def loss(params, images, noise, cond, t):
            t = jnp.full(images.shape[:1], t)
            x_t = process.add_noise(images, t, noise)
            prediction, _ = process.split(apply(params, x_t, t, False, None, cond)[0])
            return output_kd_loss(prediction, process.target(images, noise, t))

        timesteps = process.sweep()
        with progress("taylor", len(timesteps)) as bar:

            def loss_and_gradient(t):
                result = loss(params, images, noise, cond, t)
                bar.update()
                return result

            return self.tensors(taylor_gradients(loss_and_gradient, timesteps, threshold)[0])

    def _batches(self, batch_size: int, flip: bool) -> Generator[dict[str, jax.Array]]:
        """Training data as networks see them, the same in every process.

        They are split over as many devices of it as go.
        """
        devices = jax.local_devices()[: math.gcd(batch_size, jax.local_device_count())]
        split = sharding.batch_sharding(sharding.make_mesh({"data": -1}, devices))
        source = self.context.sources["train"]
        batches = data.train_batches(
            source,
            batch_size=batch_size,
            seed=self.seed,
            flip=flip,
            process_index=0,
            process_count=1,
        )
        unpack = jax.jit(source.unpack)
        with contextlib.closing(batches):
            for step, batch in enumerate(batches):
                yield unpack(jax.device_put(batch, split), random_key(self.seed, "latent", step))

    def search(self, search: Search) -> Any:
        context, fields = self.context, search.fields
        teacher = load_teacher(
            context, fields.dtype, fields.remat, placed=True, scan_blocks=fields.scan_blocks
        )
        task = make_task(context.config, context.told(teacher.config))
        # The parts of an accumulated batch are steps of their own for an objective.
        steps = fields.steps * fields.accumulation

        def loss_fn(params, frozen, batch, step):
            base = frozen["teacher"]
            objective = make_objective(
                METHODS["no_kd"],
                search.apply(teacher.graphdef, base, step, steps),
                context.process,
                self.seed,
                task=task,
            )
            loss, metrics = objective(params, frozen, batch, step)
            return loss, metrics | search.metrics(params["student"], step, steps)

        start = search.init(jax.random.key(self.seed), teacher.params)
        state = run_training(
            context,
            fields,
            loss_fn,
            {"student": start},
            {"teacher": teacher.params},
            self.seed,
            context.pruned_folder / SEARCH,
            "search",
            None,
        )
        return jax.tree.map(np.asarray, sharding.gathered(state.ema))
