"""One student's distillation, from the config: what it minimises and what it trains."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from liftplace_jax.checks import read_layer_map
from liftplace_jax.diffusion import GaussianDiffusion
from liftplace_jax.losses import PUBLISHED
from liftplace_jax.networks import Network, make_adapters, make_apply
from liftplace_jax.training.objective import (
    METHODS,
    OUTPUT_LOSSES,
    Method,
    Weighting,
    make_objective,
)
from liftplace_jax.training.step import LossFn


def student_objective(
    config: ConfigDict, process: GaussianDiffusion, name: str, seed: int, start: Network,
    teacher: Network,
) -> tuple[LossFn, dict[str, Any]]:  # fmt: skip
    """A method's loss on a student, and the parameters it trains.

    Args:
      config: the experiment's.
      process: the diffusion process.
      name: of METHODS.
      seed: of its randomness and adapters.
      start: the student before training.
      teacher: its teacher.

    Returns:
      (loss function, parameters), as of `make_objective` and `TrainState.params`.

    Raises:
      ValueError: the layer map of a feature method does not fit.
    """
    fields, method = config.distill, METHODS[name]
    layer_map = read_layer_map(fields.layer_map)
    params = {"student": start.params}
    if method.feature:
        params["adapters"] = make_adapters(start, teacher, layer_map, seed)
    if fields.weight.name == "learnable" and method.output in OUTPUT_LOSSES:
        value = fields.weight.value
        params["weight_logit"] = jnp.float32(math.log(value / (1 - value)))
    objective = make_objective(
        method, make_apply(start.graphdef), process, seed,
        teacher_apply=make_apply(teacher.graphdef), scale=fields.scale,
        feature_scale=fields.feature_scale, layer_map=layer_map,
        weighting=Weighting(**fields.weight.to_dict(), total_steps=fields.steps),
        loss_options=loss_options(fields.loss, method),
    )  # fmt: skip
    return objective, params


def loss_options(fields: ConfigDict, method: Method) -> dict[str, Any]:
    """Keyword arguments of a method's output loss: the variant's, with the config's changes."""
    options = dict(PUBLISHED[fields.variant]) | {"terms": fields.terms}
    options |= {k: fields[k] for k in ("norm", "eps") if fields[k] is not None}
    if method.output == "lift":
        options["per"] = fields.per
    elif method.output == "place":
        options |= {"group_size": fields.group_size, "grouping": fields.grouping}
    return options
