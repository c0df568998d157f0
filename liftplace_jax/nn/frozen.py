"""Frozen networks: their parameters in the dtype that they are computed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_CALLS = ("jit", "pjit", "checkpoint", "remat2")
"""Primitives that hand their arguments, one by one, to the one program inside."""


def kept(program: Callable[..., Any], params: Any, *inputs: Any) -> Any:
    """How parameters that never change may be kept, so that a program gives the same numbers.

    A parameter that is cast to one dtype wherever it is used is kept in this dtype: then that cast
    does nothing. All others stay as they are.

    Args:
      program: (params, *inputs) -> any arrays.
      params: arrays or `jax.ShapeDtypeStruct`.
      inputs: likewise.

    Returns:
      The tree of params with a `jax.ShapeDtypeStruct` for each.
    """
    jaxpr = jax.make_jaxpr(program)(params, *inputs).jaxpr
    leaves, treedef = jax.tree.flatten(params)
    found = _dtypes(jaxpr)[: len(leaves)]
    return treedef.unflatten(
        [
            jax.ShapeDtypeStruct(leaf.shape, next(iter(dtypes)) if len(dtypes) == 1 else leaf.dtype)
            for leaf, dtypes in zip(leaves, found, strict=True)
        ]
    )


def _dtype(variable: Any) -> Any:
    return variable.aval.dtype


def cast(params: Any, kept: Any) -> Any:
    """Parameters as `kept` says; what is of its dtype stays the same array."""
    return jax.tree.map(lambda x, k: x if x.dtype == k.dtype else x.astype(k.dtype), params, kept)


def _dtypes(jaxpr: Jaxpr) -> list[set[np.dtype]]:
    """The dtypes in which each argument is used; none for one that is not."""
    found = {var: set() for var in jaxpr.invars}
    for equation in jaxpr.eqns:
        inner = _inner(equation)
        for place, var in enumerate(equation.invars):
            if isinstance(var, Literal) or var not in found:
                continue
            if equation.primitive.name == "convert_element_type":
                found[var].add(np.dtype(equation.params["new_dtype"]))
            else:
                found[var] |= inner[place] if inner else {_dtype(var)}
    for var in jaxpr.outvars:
        if not isinstance(var, Literal) and var in found:
            found[var].add(_dtype(var))
    return [found[var] for var in jaxpr.invars]


def _inner(equation: Any) -> list[set[np.dtype]] | None:
    if equation.primitive.name not in _CALLS:
        return None
    inside = equation.params["jaxpr"]
    return _dtypes(inside.jaxpr if isinstance(inside, ClosedJaxpr) else inside)
