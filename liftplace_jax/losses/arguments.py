"""Checks of what the losses are given: one line that names the argument, before anything runs."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of the names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def whole_number(name: str, value: Any, low: int, high: int, what: str = "") -> int:
    """`value` as an int: any whole number of Python, NumPy or JAX, no bool.

    Args:
      what: said of the range in the message.

    Raises:
      ValueError: it is no such number, is traced, or not in low..high.
    """
    number = None
    # `index` takes True for 1.
    if not isinstance(value, bool | np.bool_) and getattr(value, "ndim", 0) == 0:
        try:
            number = operator.index(value)
        except TypeError:
            pass  # also for traced values, whose number is not known yet
    if number is None or not low <= number <= high:
        known = " known when the program is traced" if isinstance(value, Tracer) else ""
        raise ValueError(
            f"{name} must be a whole number{known} in {low}..{high}{what}, got {value!r}"
        )
    return number


def real_number(
    name: str, value: Any, low: float, high: float = math.inf, traced: bool = True
) -> Any:
    """`value`, if it is one finite real number in low..high, or may still become one.

    Args:
      low, high: smallest and greatest value.
      traced: whether it may be a traced scalar, of which only shape and dtype are checked.

    Returns:
      A float, or the traced value.

    Raises:
      ValueError: it is not.
    """
    if isinstance(value, Tracer):
        fits = value.shape == () and jnp.issubdtype(value.dtype, jnp.number)
        if traced and fits and not jnp.issubdtype(value.dtype, jnp.complexfloating):
            return value
    elif not isinstance(value, bool | np.bool_ | str | bytes) and np.ndim(value) == 0:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        is_bool = jnp.issubdtype(getattr(value, "dtype", float), jnp.bool_)
        if math.isfinite(number) and low <= number <= high and not is_bool:
            return value if isinstance(value, jax.Array) else number
    kind = "a number" if traced else "a number known when the program is traced"
    limit = f"{low:g} or more" if math.isinf(high) else f"in {low:g}..{high:g}"
    raise ValueError(f"{name} must be {kind}, finite and {limit}, got {value!r}")


def floating(name: str, x: Any) -> jax.Array:
    """`x` as an array in float32, or float64 if it is that.

    Raises:
      ValueError: it holds no elements, or not floating-point numbers.
    """
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{name} must be an array of floating-point numbers: {first}") from None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if not x.size:
        raise ValueError(f"{name}: expected a non-empty array, got shape {x.shape}")
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def student_and_teacher(
    student: Any, teacher: Any, least_axes: int = 3
) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype, float32 or float64; the teacher is a constant.

    Raises:
      ValueError: shapes differ, are empty or have too few axes, or values are not floating point.
    """
    if np.shape(student) != np.shape(teacher):
        raise ValueError(
            f"student has shape {np.shape(student)} but teacher has {np.shape(teacher)}"
        )
    if np.ndim(student) < least_axes or not np.size(student):
        raise ValueError(
            f"expected non-empty (batch, *space, channel) arrays, got shape {np.shape(student)}"
        )
    student, teacher = floating("student", student), floating("teacher", teacher)
    if student.dtype != teacher.dtype:
        student, teacher = student.astype(jnp.float64), teacher.astype(jnp.float64)
    return student, jax.lax.stop_gradient(teacher)
