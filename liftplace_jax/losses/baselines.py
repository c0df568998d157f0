"""Conventional distillation: on the output (OutKD) and on features (FeatKD, FitNet)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from liftplace_jax.losses.arguments import (
    check_choice,
    floating,
    real_number,
    student_and_teacher,
    whole_number,
)
from liftplace_jax.losses.lift_place import REDUCTIONS

OVER_LAYERS = ("sum", "mean")


def output_kd_loss(student: jax.Array, teacher: jax.Array, *, reduction: str = "sum") -> jax.Array:
    """Squared error between outputs, ||t - s||^2 (OutKD).

    Args:
      student: (batch, ..., channel), floating point.
      teacher: same shape; treated as a constant.
      reduction: "sum" over the elements of a sample, then the mean over the batch; "mean" over
        everything; "per_sample" means, (batch,).

    Returns:
      float32 scalar, or (batch,).

    Raises:
      ValueError: shapes differ, or an argument is out of its range.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    student, teacher = student_and_teacher(student, teacher)
    return _reduce(_squared_error(student, teacher), reduction)


def feature_kd_loss(
    student: Mapping[str, jax.Array],
    teacher: Mapping[str, jax.Array],
    *,
    layer_map: Mapping[str, str] | None = None,
    adapters: Mapping[str, jax.Array] | None = None,
    mask_sigma: float | None = None,
    reduction: str = "sum",
    layers: str = "sum",
) -> jax.Array:
    """FitNet: squared error between features, over all layers.

    Args:
      student: layer name -> features (batch, *space, channel).
      teacher: layer name -> features, treated as constants.
      layer_map: student layer -> teacher layer; default: every student layer to the teacher's
        layer of that name.
      adapters: student layer -> (student channels, teacher channels) matrix of a 1x1 convolution
        without bias (`init_adapters`); None where the widths agree.
      mask_sigma: masked variant (TinyFusion uses 2): before the comparison, values further than
        that many standard deviations from their sample's mean are set to 0, in both features; a
        finite number > 0.
      reduction: as in `output_kd_loss`; the pixel-space code uses "sum", the others "mean".
      layers: "sum" or "mean" of the layers' losses; the DiT code uses "mean", the others "sum".

    Returns:
      float32 scalar, or (batch,).

    Raises:
      ValueError: a layer or adapter is missing, shapes do not fit, or values are not floating
        point; the message names the layer.

    Source: Diff_Pruning_EXP/functions/losses.py, FitNetLoss; TinyFusion_EXP/diffusion.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("layers", layers, OVER_LAYERS)
    layer_map = {name: name for name in student} if layer_map is None else layer_map
    if not layer_map:
        raise ValueError("feature_kd_loss needs at least one layer")
    total = jnp.zeros((), jnp.float32)
    for student_name, teacher_name in layer_map.items():
        for side, features, name in (
            ("student", student, student_name),
            ("teacher", teacher, teacher_name),
        ):
            if name not in features:
                raise ValueError(f"{side} has no feature {name!r}; it has {sorted(features)}")
        s = floating(f"student's feature {student_name!r}", student[student_name])
        t = floating(f"teacher's feature {teacher_name!r}", teacher[teacher_name])
        t = jax.lax.stop_gradient(t)
        if adapters is not None:
            s = _adapt(s, adapters, student_name)
        if s.ndim < 2:
            raise ValueError(f"feature {student_name!r} must be (batch, ...), got shape {s.shape}")
        if s.shape != t.shape:
            raise ValueError(
                f"feature {student_name!r} has shape {s.shape} but the teacher's {teacher_name!r} "
                f"has {t.shape}" + (" (adapters match widths)" if adapters is None else "")
            )
        if mask_sigma is not None:
            s, t = mask_outliers(s, mask_sigma), mask_outliers(t, mask_sigma)
        total = total + _reduce(_squared_error(s, t), reduction)
    return total / len(layer_map) if layers == "mean" else total


def init_adapters(
    key: jax.Array,
    student_channels: Mapping[str, int],
    teacher_channels: Mapping[str, int],
    *,
    layer_map: Mapping[str, str] | None = None,
    scale: float = 0.005,
) -> dict[str, jax.Array]:
    """Adapters for `feature_kd_loss`: layer -> (student, teacher) matrix, uniform in +-scale.

    Raises:
      ValueError: a layer has no channels given, or a number is out of its range.
    """
    layer_map = {name: name for name in student_channels} if layer_map is None else layer_map
    scale = real_number("scale", scale, 0)
    keys = jax.random.split(key, max(len(layer_map), 1))
    adapters = {}
    for k, (name, target) in zip(keys, layer_map.items(), strict=True):
        shape = []
        for side, channels, layer in (
            ("student", student_channels, name),
            ("teacher", teacher_channels, target),
        ):
            if layer not in channels:
                raise ValueError(f"{side} has no channels of {layer!r}; it has {sorted(channels)}")
            number = whole_number(f"{side}'s channels of {layer!r}", channels[layer], 1, 2**31 - 1)
            shape.append(number)
        adapters[name] = jax.random.uniform(k, shape, jnp.float32, -scale, scale)
    return adapters


def mask_outliers(x: jax.Array, sigma: float) -> jax.Array:
    """Sets values at least `sigma` (unbiased) standard deviations off their sample's mean to 0.

    Args:
      x: floating point, (batch, ...), two values or more a sample.
      sigma: > 0.
    """
    sigma = real_number("mask_sigma", sigma, float(jnp.finfo(jnp.float32).tiny))
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2 or x[:1].size < 2:
        raise ValueError(
            "mask_sigma needs floating-point features (batch, ...) with two values or more a "
            f"sample, got {x.dtype} of shape {x.shape}"
        )
    width = jnp.asarray(sigma, x.dtype)
    axes = tuple(range(1, x.ndim))
    frozen = jax.lax.stop_gradient(x)
    mean = jnp.mean(frozen, axis=axes, keepdims=True)
    spread = jnp.std(frozen, axis=axes, keepdims=True, ddof=1)
    return jnp.where(jnp.abs(frozen - mean) < width * spread, x, 0)


def _adapt(features, adapters, name):
    if name not in adapters:
        raise ValueError(f"no adapter for feature {name!r}; adapters: {sorted(adapters)}")
    kernel = floating(f"the adapter of {name!r}", adapters[name])
    if kernel.ndim != 2:
        raise ValueError(f"the adapter of {name!r} must be a matrix, got shape {kernel.shape}")
    if kernel.shape[0] != features.shape[-1]:
        raise ValueError(
            f"the adapter of {name!r} takes {kernel.shape[0]} channels, got {features.shape[-1]}"
        )
    return features @ kernel.astype(features.dtype)


@jax.custom_jvp
def _squared_error(student, teacher):
    return jnp.square(teacher - student)


@_squared_error.defjvp
def _squared_error_jvp(primals, tangents):
    # The difference the other way round: XLA then makes one pass for the loss and one for the
    # gradient, where a shared difference became an array of its own (4-8 times slower on CPU).
    student, teacher = primals
    change = tangents[0] - tangents[1]
    return _squared_error(student, teacher), 2 * (student - teacher) * change


def _reduce(squares, reduction):
    per_sample = squares.reshape(squares.shape[0], -1)
    if reduction == "sum":
        return jnp.mean(jnp.sum(per_sample, axis=-1))
    per_sample = jnp.mean(per_sample, axis=-1)
    return jnp.mean(per_sample) if reduction == "mean" else per_sample
