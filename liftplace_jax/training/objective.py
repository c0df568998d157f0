"""What a step minimises: the diffusion loss, and a method's distillation terms.

A new method is one entry in `METHODS`; a new output loss one more in `OUTPUT_LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from liftplace_jax.diffusion import GaussianDiffusion
from liftplace_jax.losses import (
    LiftTerms,
    cosine_weight,
    feature_kd_loss,
    learnable_weight,
    lift_loss,
    linear_weight,
    output_kd_loss,
    place_loss,
)
from liftplace_jax.training.state import random_key
from liftplace_jax.training.step import LossFn

WEIGHTS = ("adaptive", "constant", "cosine", "linear", "learnable")


class Method(NamedTuple):
    """A distillation method.

    Attributes:
      output: the loss on outputs: "output_kd", one of OUTPUT_LOSSES, or None.
      feature: whether the feature loss (FitNet) is added.
    """

    output: str | None
    feature: bool

    @property
    def needs_teacher(self) -> bool:
        return self.output is not None or self.feature


METHODS: dict[str, Method] = {
    "no_kd": Method(None, False),
    "output_kd": Method("output_kd", False),
    "feature_kd": Method(None, True),
    "output_feature_kd": Method("output_kd", True),
    "lift": Method("lift", False),
    "lift_place": Method("place", False),
    "lift_feature_kd": Method("lift", True),
    "lift_place_feature_kd": Method("place", True),
}
BASIC_METHODS = ("no_kd", "output_kd", "feature_kd", "output_feature_kd", "lift", "lift_place")
"""What method=all compares."""

OUTPUT_LOSSES: dict[str, Callable[..., LiftTerms]] = {"lift": lift_loss, "place": place_loss}
Apply = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Weighting(NamedTuple):
    """The weight of the fine term, by name.

    Attributes:
      name: one of WEIGHTS.
      value: of "constant", and the start of "learnable".
      direction: of the schedules, "increase" or "decrease".
      total_steps: when the schedules end.
    """

    name: str = "adaptive"
    value: float = 1.0
    direction: str = "increase"
    total_steps: int = 1

    def __call__(self, params: Mapping[str, Any], step: jax.Array) -> Any:
        return {
            "adaptive": lambda: "adaptive",
            "constant": lambda: self.value,
            "cosine": lambda: cosine_weight(step, self.total_steps, self.direction),
            "linear": lambda: linear_weight(step, self.total_steps, self.direction),
            "learnable": lambda: learnable_weight(params["weight_logit"]),
        }[self.name]()


ADAPTIVE = Weighting()


def make_objective(
    method: Method,
    apply: Apply,
    process: GaussianDiffusion,
    seed: int,
    *,
    teacher_apply: Apply | None = None,
    scale: float = 1.0,
    feature_scale: float = 1e-6,
    layer_map: Mapping[str, str] | None = None,
    weighting: Weighting = ADAPTIVE,
    loss_options: Mapping[str, Any] | None = None,
) -> LossFn:
    """diffusion + scale * output loss + feature_scale * feature loss (published pixel-space form).

    The diffusion loss is ||target - prediction||^2, summed over elements, averaged over the batch.
    Teacher and student see the same noise and timesteps. Teachers train with METHODS["no_kd"].

    Args:
      method: which terms.
      apply: the trained network, (params, x, t, return_features, dropout key or None) ->
        (prediction, features).
      process: the diffusion process.
      seed: of timesteps, noise and dropout.
      teacher_apply: the teacher, if the method needs one; it runs without dropout.
      scale: lambda of the output loss.
      feature_scale: of the feature loss.
      layer_map: student feature -> teacher feature.
      weighting: of the fine term.
      loss_options: keyword arguments of the output loss.
    """

    def loss_fn(params, teacher_params, batch, step):
        images = batch["image"]
        t = process.antithetic_timesteps(random_key(seed, "timestep", step), images.shape[0])
        noise = jax.random.normal(random_key(seed, "noise", step), images.shape, images.dtype)
        x_t = process.q_sample(images, t, noise)
        dropout_key = random_key(seed, "dropout", step)
        prediction, features = apply(params["student"], x_t, t, method.feature, dropout_key)
        total = output_kd_loss(prediction, process.target(images, noise, t))
        metrics = {"diffusion": total}
        if not method.needs_teacher:
            return total, metrics
        teacher, teacher_features = jax.lax.stop_gradient(
            teacher_apply(teacher_params, x_t, t, method.feature, None)
        )
        metrics["output_kd"] = output_kd_loss(prediction, teacher)
        if method.output == "output_kd":
            total = total + scale * metrics["output_kd"]
        elif method.output is not None:
            terms = OUTPUT_LOSSES[method.output](
                prediction, teacher, weight=weighting(params, step), **(loss_options or {})
            )
            total = total + scale * terms.loss
            metrics |= _lift_metrics(terms)
        if method.feature:
            metrics["feature_kd"] = feature_kd_loss(
                features, teacher_features, layer_map=layer_map, adapters=params["adapters"]
            )
            total = total + feature_scale * metrics["feature_kd"]
        return total, metrics

    return loss_fn


def _lift_metrics(terms: LiftTerms) -> dict[str, jax.Array]:
    return {
        "lift": terms.loss,
        "coarse": terms.coarse,
        "fine": terms.fine,
        "weight": terms.weight,
        "slope": jnp.mean(terms.slope),
        "intercept": jnp.mean(terms.intercept),
        "slope_error": jnp.mean(jnp.abs(terms.slope - 1)),
        "intercept_error": jnp.mean(jnp.abs(terms.intercept)),
    }

