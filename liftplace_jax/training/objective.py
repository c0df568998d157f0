"""What a step minimises: the diffusion loss, and a method's distillation terms.

A new method is one entry in `METHODS`; a new output loss one more in `OUTPUT_LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from liftplace_jax.conditioning import UNCONDITIONAL, Conditioning
from liftplace_jax.diffusion import Process
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
SUM_OR_MEAN = ("sum", "mean")
FEATURE_SCHEDULES = ("constant", "linear")


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


class Task(NamedTuple):
    """What networks learn from the data, teachers as well as students.

    Attributes:
      reduction: of squared errors and of the variational bound: "sum" over the elements of a
        sample, or "mean"; then the mean over the batch.
      scale: factor of the loss on data.
      conditioning: what the network is told.
    """

    reduction: str = "sum"
    scale: float = 1.0
    conditioning: Conditioning = UNCONDITIONAL


PIXELS = Task()


class Inputs(NamedTuple):
    """What a step's networks see, teacher and student the same.

    Attributes:
      t: (B,) timesteps.
      noise: standard normal, of the data's shape.
      cond: a condition, as of `Conditioning`.
    """

    t: jax.Array
    noise: jax.Array
    cond: Any


def draw_inputs(
    process: Process, task: Task, seed: int, batch: Mapping[str, Any], step: jax.Array
) -> Inputs:
    """A step's timesteps, noise and dropped conditions: a function of seed and step."""
    images, conditioning = batch["image"], task.conditioning
    t = process.draw_t(random_key(seed, "timestep", step), images.shape[0])
    noise = jax.random.normal(random_key(seed, "noise", step), images.shape, images.dtype)
    cond = conditioning.drop(random_key(seed, "label", step), conditioning.of(batch))
    return Inputs(t, noise, cond)


def on_batches(objective: LossFn, unpack: Callable[..., Any], seed: int) -> LossFn:
    """An objective of batches as they are sent, of one of what networks see.

    Args:
      objective: as of `make_objective`.
      unpack: of the data's source (see `data.Source`).
      seed: of what is drawn of the data, a function of seed and step.
    """

    def loss_fn(params, frozen, batch, step):
        batch = unpack(batch, random_key(seed, "latent", step))
        return objective(params, frozen, batch, step)

    return loss_fn


def make_objective(
    method: Method,
    apply: Apply,
    process: Process,
    seed: int,
    *,
    task: Task = PIXELS,
    teacher_apply: Apply | None = None,
    scale: float = 1.0,
    feature_scale: float | optax.Schedule = 1e-6,
    layer_map: Mapping[str, str] | None = None,
    weighting: Weighting = ADAPTIVE,
    loss_options: Mapping[str, Any] | None = None,
    feature_options: Mapping[str, Any] | None = None,
) -> LossFn:
    """task.scale * (diffusion [+ vb]) + scale * (output loss [+ vb_kd]) + feature_scale * feature.

    diffusion is ||target - prediction||^2; output and feature losses are the method's. Where the
    process learns the variance, the bounds vb and vb_kd (`diffusion.variational`) train it, and
    all other output terms see the mean half of predictions alone. Teacher and student see the same
    noise, timesteps and dropped conditions. Teachers train with METHODS["no_kd"].

    The function's second argument has the arrays that are not trained: {"teacher": its parameters,
    "text": as of `conditioning.Text`}, each where it is needed.

    Sources: pixel space, "Diff_Pruning_EXP/functions/losses.py" (sums, 1, 1, 1e-6); DiT,
    "TinyFusion_EXP/diffusion/gaussian_diffusion.py", training_losses_kd_rep (means, 0.1, 0.9,
    0.01 falling to 0).

    Args:
      method: which terms.
      apply: the trained network, (params, x, t, return_features, dropout key or None, cond) ->
        (prediction, features).
      process: the diffusion process.
      seed: of timesteps, noise, dropout and dropped labels.
      task: what is learned from the data.
      teacher_apply: the teacher, if the method needs one; it runs without dropout.
      scale: lambda of the output loss.
      feature_scale: of the feature loss; may be a function of the step.
      layer_map: student feature -> teacher feature.
      weighting: of the fine term.
      loss_options: keyword arguments of the output loss.
      feature_options: keyword arguments of the feature loss: mask_sigma, reduction, layers.
    """

    def loss_fn(params, frozen, batch, step):
        images = batch["image"]
        t, noise, cond = draw_inputs(process, task, seed, batch, step)
        # Once, for teacher and student.
        cond = jax.lax.stop_gradient(task.conditioning.embed(frozen, cond))
        x_t = process.add_noise(images, t, noise)
        prediction, features = apply(
            params["student"], x_t, t, method.feature, random_key(seed, "dropout", step), cond
        )
        mean, _ = process.split(prediction)
        total = _task_loss(process, task, mean, process.target(images, noise, t), t)
        metrics = {"diffusion": total}
        bits = images[0].size if task.reduction == "sum" else 1
        bound = process.bound(prediction, images, x_t, t)
        if bound is not None:
            metrics["vb"] = bits * jnp.mean(bound)
            total = total + metrics["vb"]
        total = task.scale * total
        if not method.needs_teacher:
            return total, metrics
        assert teacher_apply is not None, "the method needs a teacher"
        teacher, teacher_features = jax.lax.stop_gradient(
            teacher_apply(frozen["teacher"], x_t, t, method.feature, None, cond)
        )
        teacher_mean, _ = process.split(teacher)
        metrics["output_kd"] = output_kd_loss(mean, teacher_mean, reduction=task.reduction)
        if method.output == "output_kd":
            total = total + scale * metrics["output_kd"]
        elif method.output is not None:
            terms = OUTPUT_LOSSES[method.output](
                mean, teacher_mean, weight=weighting(params, step), **(loss_options or {})
            )
            total = total + scale * terms.loss
            metrics |= _lift_metrics(terms)
        if method.output is not None and bound is not None:
            taught = process.bound(prediction, images, x_t, t, teacher)
            assert taught is not None, "there is one from data"
            metrics["vb_kd"] = bits * jnp.mean(taught)
            total = total + scale * metrics["vb_kd"]
        if method.feature:
            metrics["feature_kd"] = feature_kd_loss(
                features,
                teacher_features,
                layer_map=layer_map,
                adapters=params.get("adapters"),
                **(feature_options or {}),
            )
            factor = feature_scale(step) if callable(feature_scale) else feature_scale
            total = total + factor * metrics["feature_kd"]
        return total, metrics

    return loss_fn


def _task_loss(process, task, mean, target, t):
    """||target - prediction||^2, weighted as the process says."""
    weight = process.weight(t)
    if weight is None:
        return output_kd_loss(mean, target, reduction=task.reduction)
    each = output_kd_loss(mean, target, reduction="per_sample")
    elements = mean[0].size if task.reduction == "sum" else 1
    return elements * jnp.mean(weight * each)


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
