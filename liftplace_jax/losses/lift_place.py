"""LIFT and PLACE: distillation through the least-squares fit of the teacher on the student.

Every variant of the paper is a choice of grouping, norm, normalisation, reduction and weight of
the one function `lift_terms`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.losses import grouping as grouping_lib
from liftplace_jax.losses.arguments import (
    check_choice,
    real_number,
    student_and_teacher,
    whole_number,
)
from liftplace_jax.losses.fit import NORMALIZE, least_squares_fit
from liftplace_jax.losses.grouping import Groups
from liftplace_jax.losses.weighting import adaptive_weight

NORMS = ("l1", "l2")
REDUCTIONS = ("sum", "mean", "per_sample")
TERMS = ("both", "coarse", "fine")
PER = ("channel", "sample")
GROUPINGS = ("error", "space")

PUBLISHED: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        # Diff_Pruning_EXP/functions/losses.py, LIFT_PLACE
        "pixel": types.MappingProxyType(
            {"norm": "l1", "eps": 1e-7, "normalize": "mean", "reduction": "sum"}
        ),
        # TinyFusion_EXP/losses.py, imp_regression_constraint_loss
        "dit": types.MappingProxyType(
            {"norm": "l2", "eps": 1e-4, "normalize": "sum", "reduction": "mean"}
        ),
        # BK_SDM_EXP/src/kd_t2i.py, LIFT_PLACE
        "sd": types.MappingProxyType(
            {"norm": "l1", "eps": 1e-8, "normalize": "sum", "reduction": "mean"}
        ),
    }
)
"""Keyword arguments of the published variants: `place_loss(s, t, **PUBLISHED["dit"])`."""


class LiftTerms(NamedTuple):
    """What `lift_loss` and `place_loss` return; float32 arrays.

    Attributes:
      loss: coarse + weight * fine, or the one term asked for; scalar, or (batch,) for
        reduction="per_sample".
      coarse: the reduced coarse term |b0| + |b1 - 1| (or its squares).
      fine: the reduced fine term ||t - (sg(b0) + sg(b1) s)||^2, not yet weighted.
      weight: scalar w that multiplied `fine`.
      slope: b1 of every fit, (batch, rows, groups); rows are channels, or 1 for per="sample".
      intercept: b0 of every fit, same shape.
    """

    loss: jax.Array
    coarse: jax.Array
    fine: jax.Array
    weight: jax.Array
    slope: jax.Array
    intercept: jax.Array


def lift_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    per: str = "channel",
    norm: str = "l1",
    eps: float = 1e-7,
    normalize: str = "mean",
    reduction: str = "sum",
    terms: str = "both",
    weight: str | float | jax.Array = "adaptive",
    coarse_scale: float | None = None,
    axis_name: str | None = None,
) -> LiftTerms:
    """LIFT with one fit per channel or per sample (paper, "LIFT").

    Args:
      student: predictions (batch, *space, channel), any number of space axes, floating point.
      teacher: same shape; treated as a constant.
      per: "channel" or "sample": what one fit covers.

    The other arguments, the result and the errors are those of `place_loss`.
    """
    check_choice("per", per, PER)
    student, teacher = student_and_teacher(student, teacher)
    return lift_terms(
        grouping_lib.whole(student, teacher, per),
        norm=norm,
        eps=eps,
        normalize=normalize,
        reduction=reduction,
        terms=terms,
        weight=weight,
        coarse_scale=coarse_scale,
        axis_name=axis_name,
    )


def place_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    group_size: int | Sequence[int] = 16,
    num_groups: int | None = None,
    grouping: str = "error",
    norm: str = "l1",
    eps: float = 1e-7,
    normalize: str = "mean",
    reduction: str = "sum",
    terms: str = "both",
    weight: str | float | jax.Array = "adaptive",
    coarse_scale: float | None = None,
    axis_name: str | None = None,
) -> LiftTerms:
    """PLACE: LIFT with one fit per group of elements of similar error (paper, "PLACE").

    Per sample and channel the elements are sorted by squared error (no gradient through the
    order, ties by position), cut into groups of `group_size`, and each group is fitted by itself.
    The defaults are the published pixel-space variant, `PUBLISHED["pixel"]`.

    Works under jit, vmap, grad and forward differentiation (jvp, jacfwd, linearize). Derivatives
    are closed-form and reach the student only; those forward are of the loss as the gradient sees
    it, with order, weight and the fine term's fits as constants. bfloat16, float16 and float8
    inputs are computed in float32. NaN in gives NaN out.

    Args:
      student: predictions (batch, *space, channel), any number of space axes, floating point.
      teacher: same shape; treated as a constant.
      group_size: elements per group, 1..number of elements of a channel; if it does not divide
        that number, the last group is smaller and weighs less. With grouping="space" also a patch
        shape such as (4, 4); a plain number then stands for a cubic patch of that many elements.
      num_groups: instead of `group_size`, how many groups a channel is cut into.
      grouping: "error" (PLACE), or "space" (ablation: patches).
      norm: of the coarse term, "l1" or "l2" (squares).
      eps: added to the variance of the student, > 0; a number that is known when traced.
      normalize: "mean" or "sum": whether variance and covariance are divided by the group's size.
      reduction: "sum": both terms are sums over the elements of a sample (each fit counted once
        for each of its elements), averaged over the batch, like the diffusion loss of the
        pixel-space code. "mean": means over all elements. "per_sample": means over the elements
        of each sample, (batch,) values.
      terms: "both", or the ablations "coarse" and "fine", each by itself and unweighted.
      weight: of the fine term: "adaptive" is 1 - min(1, mean|b1 - 1| + mean|b0|) over all fits of
        the global batch, without gradient; or a number of 0 or more, or a schedule's value
        (`liftplace_jax.losses.weighting`), which may be traced and gets its gradient.
      coarse_scale: with reduction="sum", what each fit's coarse term is multiplied with; default
        the number of elements of the fit; 0 or more, may be traced.
      axis_name: for `shard_map`/`pmap` users: the axis the batch is split over, for the adaptive
        weight. Not needed under `jit` with sharded arrays.

    Returns:
      `LiftTerms`.

    Raises:
      ValueError: shapes differ, are empty or have fewer than three axes; values are not floating
        point; an argument is of another kind (True is no whole number) or out of its range. The
        message names it.
    """
    check_choice("grouping", grouping, GROUPINGS)
    student, teacher = student_and_teacher(student, teacher)
    space = student.shape[1:-1]
    if grouping == "error":
        size = _elements_per_group(math.prod(space), group_size, num_groups)
        groups = grouping_lib.by_error(student, teacher, size)
    else:
        patch = _patch_shape(space, group_size, num_groups)
        groups = grouping_lib.by_space(student, teacher, patch)
    return lift_terms(
        groups,
        norm=norm,
        eps=eps,
        normalize=normalize,
        reduction=reduction,
        terms=terms,
        weight=weight,
        coarse_scale=coarse_scale,
        axis_name=axis_name,
    )


def lift_terms(
    groups: Groups,
    *,
    norm: str = "l1",
    eps: float = 1e-7,
    normalize: str = "mean",
    reduction: str = "sum",
    terms: str = "both",
    weight: str | float | jax.Array = "adaptive",
    coarse_scale: float | None = None,
    axis_name: str | None = None,
) -> LiftTerms:
    """LIFT with one fit per group, for any grouping: what `lift_loss` and `place_loss` call.

    Args:
      groups: student and teacher cut into groups; the teacher is treated as a constant.

    The other arguments, the result and the errors are those of `place_loss`.
    """
    student, teacher, mask = _checked_groups(groups)
    check_choice("norm", norm, NORMS)
    check_choice("normalize", normalize, NORMALIZE)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("terms", terms, TERMS)
    eps = _checked_eps(eps, student.dtype)
    factor = None
    if coarse_scale is not None:
        if reduction != "sum":
            raise ValueError(f"coarse_scale goes with reduction='sum', got reduction={reduction!r}")
        factor = jnp.asarray(real_number("coarse_scale", coarse_scale, 0), student.dtype)
    adaptive = isinstance(weight, str) and weight == "adaptive"
    if not adaptive:
        weight = real_number("weight must be 'adaptive' or a number: it", weight, 0)

    fit = least_squares_fit(student, teacher, mask, eps, normalize)
    _, rows, num_groups, _ = student.shape
    counts = None if mask is None else mask.sum(axis=-1)
    elements = num_groups * student.shape[-1] if counts is None else float(counts.sum())
    share = None if counts is None else counts / elements

    power = jnp.abs if norm == "l1" else jnp.square
    distance = power(fit.slope - 1) + power(fit.intercept)
    # Means over the elements of a sample, (batch,).
    if share is None:
        coarse = jnp.mean(distance, axis=(1, 2))
    else:
        coarse = jnp.mean(jnp.sum(distance * share, axis=-1), axis=-1)
    fine = jnp.sum(fit.residual, axis=(1, 2)) / (rows * elements)

    if reduction == "sum":
        if factor is None:
            coarse = jnp.mean(coarse) * (rows * elements)
        else:
            coarse = jnp.mean(jnp.sum(distance, axis=(1, 2))) * factor
        fine = jnp.mean(fine) * (rows * elements)
    elif reduction == "mean":
        coarse, fine = jnp.mean(coarse), jnp.mean(fine)

    if terms == "coarse":
        weight, loss = jnp.zeros_like(coarse, shape=()), coarse
    elif terms == "fine":
        weight, loss = jnp.ones_like(fine, shape=()), fine
    else:
        if adaptive:
            weight = adaptive_weight(fit.slope, fit.intercept, share, axis_name=axis_name)
        weight = jnp.asarray(weight, fine.dtype)
        loss = coarse + weight * fine
    return LiftTerms(loss, coarse, fine, weight, fit.slope, fit.intercept)


def _checked_groups(groups):
    student, teacher, mask = groups
    if student.ndim != 4:
        raise ValueError(
            f"Groups hold (batch, rows, groups, group_size) arrays, got shape {student.shape}"
        )
    if mask is not None and mask.shape != student.shape[2:]:
        raise ValueError(
            f"the mask of Groups has shape {mask.shape}, expected (groups, group_size), "
            f"{student.shape[2:]}"
        )
    student, teacher = student_and_teacher(student, teacher)
    if mask is not None:
        if isinstance(mask, np.ndarray) and not (np.isin(mask, (0, 1)).all() and mask.any(1).all()):
            raise ValueError("the mask of Groups must hold 0 and 1, and a 1 in every group")
        mask = mask.astype(student.dtype)
    return student, teacher, mask


def _checked_eps(eps, dtype):
    """A float that the fits' dtype can tell from 0."""
    limits = jnp.finfo(dtype)
    try:
        return float(real_number("eps", eps, float(limits.tiny), float(limits.max), traced=False))
    except ValueError as error:
        raise ValueError(f"eps must be > 0 in {dtype}: {error}") from None


def _elements_per_group(elements, group_size, num_groups):
    of_channel = " (the elements of a channel)"
    if num_groups is not None:
        num_groups = whole_number("num_groups", num_groups, 1, elements, of_channel)
        group_size = math.ceil(elements / num_groups)
        if math.ceil(elements / group_size) != num_groups:
            raise ValueError(
                f"{elements} elements cannot be cut into num_groups={num_groups} groups of which "
                f"only the last is smaller; the nearest is {math.ceil(elements / group_size)}"
            )
    return whole_number("group_size", group_size, 1, elements, of_channel)


def _patch_shape(space, group_size, num_groups):
    if num_groups is not None:
        raise ValueError("num_groups goes with grouping='error'; give group_size as a patch shape")
    if np.ndim(group_size) == 0:
        size = whole_number(
            "group_size", group_size, 1, math.prod(space), " (the elements of the space)"
        )
        edge = round(size ** (1 / len(space)))
        if edge ** len(space) != size:
            raise ValueError(
                f"group_size={size} is no cubic patch in {len(space)} dimensions; give the "
                f"patch shape, such as group_size={(4,) * len(space)}"
            )
        group_size = (edge,) * len(space)
    patch = tuple(group_size)
    if len(patch) != len(space):
        raise ValueError(f"group_size (patch shape) {patch} does not fit the space {space}")
    return tuple(
        whole_number(
            f"group_size (patch shape) {patch} does not fit the space {space}: axis {i}",
            edge,
            1,
            size,
        )
        for i, (edge, size) in enumerate(zip(patch, space, strict=True))
    )
