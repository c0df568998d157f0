"""What would fail after hours of training is found before, from shapes alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from liftplace_jax import evaluation
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.experiment.checks import check_batches, check_neighbours
from liftplace_jax.experiment.compressing import predicted_student
from liftplace_jax.experiment.configuration import under
from liftplace_jax.experiment.context import Context
from liftplace_jax.experiment.pipelines import check_pipelines
from liftplace_jax.experiment.unused import unused_fields
from liftplace_jax.host import processes, sharding
from liftplace_jax.nn import building
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.nn.network import Network, is_finished
from liftplace_jax.training.distillation import loss_options
from liftplace_jax.training.features import match_features, read_layer_map
from liftplace_jax.training.objective import METHODS, OUTPUT_LOSSES
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.state import create_state


def check_stages(context: Context, trains: bool) -> None:
    """Checks what the stages that are still to run will need.

    Args:
      context: the experiment's.
      trains: whether anything will be trained; else samples are drawn alone.

    Raises:
      ValueError: a stage would fail; names the field of the config.
    """
    check_pipelines(context, trains)
    _ = context.conditioning  # its texts are read now, if there are any
    _check_batches(context, trains)
    _check_shapes(context)
    _check_judging(context)
    for method in {METHODS[run.method] for run in context.runs}:
        if method.output in OUTPUT_LOSSES:
            options = loss_options(context.config.distill.loss, method)
            loss = functools.partial(OUTPUT_LOSSES[method.output], **options)
            image = jax.ShapeDtypeStruct((1, *context.model.shape), jnp.float32)
            with under("distill.loss."):
                jax.eval_shape(loss, image, image)
    if trains:
        for line in unused_fields(context.config):
            processes.say_once(line)
        _check_students(context)


def _check_batches(context: Context, trains: bool) -> None:
    """Batches must be shared by the devices, those of stages that are still to run."""
    config, fields = context.config, ["evaluation"]
    if trains and not (config.teacher.checkpoint or is_finished(context.teacher_folder)):
        fields.append("teacher")
    if trains and not all(is_finished(run.folder) for run in context.runs):
        fields.append("distill")
    if trains and not (config.compress.checkpoint or is_finished(context.pruned_folder)):
        fields += [f"compress.{name}" for name in context.pruner.trainings(config.compress)]
    for name in fields:
        room = functools.reduce(lambda part, key: part[key], name.split("."), config)
        if room.batch_size % context.mesh.size:
            raise ValueError(
                f"config.{name}.batch_size {room.batch_size} is not a multiple of the "
                f"{context.mesh.size} devices of the mesh"
            )


def _check_shapes(context: Context) -> None:
    config, model, outputs = context.config, context.model, context.process.outputs
    check_batches(config, model.shape)
    if model.out_channels != outputs * model.in_channels:
        raise ValueError(
            f"config.model: the network predicts {model.out_channels} channels for an input of "
            f"{model.in_channels}; config.process.kind={config.process.kind} with "
            f"variance={config.process.variance} needs {outputs * model.in_channels}"
        )
    size = config.data.image_size
    if size is not None and size != context.image_shape[0]:
        raise ValueError(
            f"images of config.data.image_size {size} do not fit: config.model takes "
            f"{model.image_size}x{model.image_size}"
            + (
                f", latents of {context.image_shape[0]}"
                if context.autoencoder
                else "; change one of them, or set config.latents (latent diffusion)"
            )
        )


def _check_judging(context: Context) -> None:
    fields, model, judge = context.config.evaluation, context.model, context.judge
    _ = judge.prompts, judge.clip  # read now, if there are any; they name their own fields
    with under("evaluation: "):
        shape = judge.handling.shape(context.image_shape)
        if judge.extractor:
            judge.extractor.check_shape(shape)
            counts = ["num_samples", *(["curve_samples"] if fields.curve_every else [])]
            for name in counts:
                if fields[name] < judge.extractor.dim and not fields.allow_few:
                    raise ValueError(
                        f"{name} {fields[name]} is fewer than the {judge.extractor.dim} features "
                        f"of {judge.extractor.name!r}, and the distance of so few compares with "
                        "nothing: draw more, or set config.evaluation.allow_few"
                    )
        if fields.reference:
            if not judge.extractor:
                raise ValueError("reference is set, but features are not: set both or neither")
            evaluation.check_reference(judge.real, judge.extractor, fields.neighbours)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        sampler = make_sampler(
            fields,
            context.process,
            model,
            lambda params, x, *_: (jnp.concatenate(context.process.outputs * [x], axis=-1), {}),
            texts=judge.prompts and judge.prompts.conditioning,
        )
        params = (None, judge.prompts.frozen) if judge.prompts else None
        latents = jax.eval_shape(sampler, params, keys)
    if fields.reference and judge.real and judge.real.features is not None:
        check_neighbours(context.config, len(judge.real.features))
    if context.decoder:
        jax.eval_shape(context.decoder.decode, context.decoder.params, latents)


def _check_students(context: Context) -> None:
    fields, config = context.config.distill, predicted_student(context)
    if context.config.sharding_rules:
        _say_idle_rules(context, [c for c in (context.model, config) if c])
    if config and any(METHODS[run.method].feature for run in context.runs):
        student, teacher = (Network(c, *building.abstract(c)) for c in (config, context.model))
        match_features(student, teacher, read_layer_map(fields.layer_map), fields.feature.adapters)


def _say_idle_rules(context: Context, configs: list[DenoiserConfig]) -> None:
    """Says which sharding rules do nothing, of teacher and student while they are trained."""
    fields = context.config.distill
    optimizer, _ = make_optimizer(fields.optimizer, fields.steps, context.family.frozen)
    make = functools.partial(create_state, optimizer=optimizer)
    states = [jax.eval_shape(make, {"student": building.abstract(c)[1]}) for c in configs]
    rules, mesh = context.config.sharding_rules, context.mesh
    idle = [set(sharding.idle_rules(state, rules, mesh)) for state in states]
    for line in sorted(set.intersection(*idle)):
        processes.say_once(line)
