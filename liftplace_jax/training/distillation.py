"""What networks minimise and train, from the config."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from liftplace_jax.conditioning import Conditioning
from liftplace_jax.diffusion import Process
from liftplace_jax.losses import PUBLISHED
from liftplace_jax.nn.network import Network, make_apply
from liftplace_jax.training.features import make_adapters, match_features, read_layer_map
from liftplace_jax.training.objective import (
    METHODS,
    OUTPUT_LOSSES,
    Method,
    Task,
    Weighting,
    make_objective,
)
from liftplace_jax.training.step import LossFn

FEATURE_OPTIONS = ("mask_sigma", "reduction", "layers")


def make_task(config: ConfigDict, conditioning: Conditioning) -> Task:
    """What a network learns from the data, be it teacher or student.

    Args:
      config: the experiment's.
      conditioning: what the network is told.
    """
    return Task(config.process.reduction, conditioning=conditioning)


def student_objective(
    config: ConfigDict,
    process: Process,
    name: str,
    seed: int,
    start: Network,
    teacher: Network,
    conditioning: Conditioning | None = None,
) -> tuple[LossFn, dict[str, Any]]:
    """A method's loss on a student, and the parameters it trains.

    Args:
      config: the experiment's.
      process: the diffusion process.
      name: of METHODS.
      seed: of its randomness and adapters.
      start: the student before training.
      teacher: its teacher.
      conditioning: what both are told; None: as their configs say, which is enough where it is
        no text.

    Returns:
      (loss function, parameters), as of `make_objective` and `TrainState.params`.

    Raises:
      ValueError: the layer map of a feature method does not fit.
    """
    fields, method = config.distill, METHODS[name]
    task = make_task(config, conditioning or start.config.conditioning)
    layer_map, params = None, {"student": start.params}
    if method.feature:
        matched = match_features(
            start, teacher, read_layer_map(fields.layer_map), fields.feature.adapters
        )
        layer_map = {student: name for student, (name, _, _) in matched.items()}
        if fields.feature.adapters:
            params["adapters"] = make_adapters(start, teacher, layer_map, seed)
    if fields.weight.name == "learnable" and method.output in OUTPUT_LOSSES:
        value = fields.weight.value
        params["weight_logit"] = jnp.float32(math.log(value / (1 - value)))
    # The parts of an accumulated batch are steps of their own for an objective.
    steps = fields.steps * fields.accumulation
    objective = make_objective(
        method,
        make_apply(start.graphdef),
        process,
        seed,
        task=task._replace(scale=fields.task_scale),
        teacher_apply=make_apply(teacher.graphdef),
        scale=fields.scale,
        feature_scale=_feature_scale(fields, steps),
        layer_map=layer_map,
        weighting=Weighting(**fields.weight.to_dict(), total_steps=steps),
        loss_options=loss_options(fields.loss, method),
        feature_options={key: fields.feature[key] for key in FEATURE_OPTIONS},
    )
    return objective, params


def _feature_scale(fields: ConfigDict, steps: int) -> float | optax.Schedule:
    if fields.feature.schedule == "constant":
        return fields.feature_scale
    return optax.linear_schedule(fields.feature_scale, 0.0, steps)


def loss_options(fields: ConfigDict, method: Method) -> dict[str, Any]:
    """Keyword arguments of a method's output loss: the variant's, with the config's changes."""
    options = dict(PUBLISHED[fields.variant]) | {"terms": fields.terms}
    options |= {k: fields[k] for k in ("norm", "eps") if fields[k] is not None}
    if method.output == "lift":
        options["per"] = fields.per
    elif method.output == "place":
        options |= {"group_size": fields.group_size, "grouping": fields.grouping}
    return options
