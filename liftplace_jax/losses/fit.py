"""The least-squares fit of a teacher on a student, one per group, with hand-written derivatives.

Paper, "Parametrised distillation": b1 = cov(s, t) / (var(s) + eps), b0 = mean(t) - b1 mean(s).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

NORMALIZE = ("mean", "sum")


class Fit(NamedTuple):
    """One fit per group: all arrays have the shape of the groups, (batch, channel, groups).

    Attributes:
      slope: b1. Differentiable with respect to the student.
      intercept: b0. Differentiable with respect to the student.
      residual: sum over the group of (t - (sg(b0) + sg(b1) s))^2; its gradient treats slope and
        intercept as constants.
    """

    slope: jax.Array
    intercept: jax.Array
    residual: jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def least_squares_fit(student, teacher, mask, eps: float, normalize: str) -> Fit:
    """Fits `teacher ~ intercept + slope * student` along the last axis.

    The derivatives, forward and back, are closed-form and reach the student only: the teacher is a
    constant.

    Args:
      student: float array (..., p).
      teacher: float array (..., p).
      mask: None, or a (..., p) array broadcastable to `student`: 1 for elements that count, 0 for
        padding.
      eps: added to the variance, > 0.
      normalize: "mean" divides covariance and variance by the number of elements (pixel-space
        code), "sum" does not (DiT and Stable Diffusion code), so that the same eps weighs less.

    Returns:
      A `Fit` of (...) arrays. A constant student gives slope 0 and the teacher's mean.
    """
    return _fit_forward(student, teacher, mask, eps, normalize)[0]


def _fit_forward(student, teacher, mask, eps, normalize):
    if mask is None:
        count = student.shape[-1]

        def average(values):
            return jnp.mean(values, axis=-1, keepdims=True)
    else:
        mask = jnp.broadcast_to(mask, student.shape).astype(student.dtype)
        count = jnp.sum(mask, axis=-1, keepdims=True)

        def average(values):
            return jnp.sum(values * mask, axis=-1, keepdims=True) / count

    # Centred first, so that a large offset does not swallow the spread.
    mean_s, mean_t = average(student), average(teacher)
    x, y = student - mean_s, teacher - mean_t
    if mask is not None:
        x, y = x * mask, y * mask
    denominator = jnp.sum(x * x, axis=-1, keepdims=True)
    numerator = jnp.sum(x * y, axis=-1, keepdims=True)
    if normalize == "mean":
        # cov / (var + eps) with both sides times the count: the same number, one division less.
        denominator = denominator + eps * count
    else:
        denominator = denominator + eps
    slope = numerator / denominator
    intercept = mean_t - slope * mean_s
    residual = jnp.sum(jnp.square(y - slope * x), axis=-1)
    fit = Fit(slope[..., 0], intercept[..., 0], residual)
    return fit, (x, y, mask, mean_s, slope, denominator, count)


@least_squares_fit.defjvp
def _fit_jvp(eps, normalize, primals, tangents):
    """Written so that its transposition is the closed form of the gradient, on_y y + on_x x + c."""
    student, teacher, mask = primals
    fit, residuals = _fit_forward(student, teacher, mask, eps, normalize)
    x, y, mask, mean_s, slope, denominator, count = residuals
    change = tangents[0]
    if mask is not None:
        change = change * mask
    # d slope/d s_i = (y_i - 2 slope x_i) / denominator
    # d intercept/d s_i = -slope / count - mean_s d slope/d s_i
    # d residual/d s_i = -2 slope (y_i - slope x_i): slope and intercept are constants there.
    by_one = jnp.sum(change, axis=-1, keepdims=True)
    by_x = -2 * slope * jnp.sum(x * change, axis=-1, keepdims=True)
    by_y = jnp.sum(y * change, axis=-1, keepdims=True)
    d_slope = (by_y + by_x) / denominator
    d_intercept = -(d_slope * mean_s) - by_one / count * slope
    d_residual = -2 * slope * by_y - slope * by_x
    return fit, Fit(d_slope[..., 0], d_intercept[..., 0], d_residual[..., 0])
