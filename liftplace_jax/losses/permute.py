"""Every channel of every sample in an order of its own: three operations and their derivatives.

`sort_by_error` gives PLACE its rows, `take` and `put` carry derivatives forward and back: each of
the two is linear and the other's transposition. On CPUs they are machine code (`host_sort.py`),
where numba is installed, else and on other platforms operations of XLA's, with equal results. The
platform that a program is compiled for decides, not the one that this process runs on. Leading
axes may be split over devices: every device does its own part, and nothing crosses.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

TARGET = "liftplace_"
HOST_LEAST = 2**15  # elements; fewer are not worth numba's import
LETTERS = "ijklmnopqrstuvwxyz"  # names of axes in a rule of the partitioner


def sort_by_error(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Student and teacher in the stable ascending order of their distance, channel by channel.

    Args:
      student: (..., elements, channel), float32 or float64.
      teacher: same shape and dtype.

    Returns:
      Student and teacher, (..., channel, elements), and int32 positions of that shape: the order.
      NaN sorts last. Derivatives leave the order as it is.
    """
    return tuple(sort_p.bind(student, teacher))


def take(samples: jax.Array, order: jax.Array) -> jax.Array:
    """Elements in the given order.

    Args:
      samples: (..., elements, channel).
      order: int32 (..., channel, elements): permutations.

    Returns:
      (..., channel, elements).
    """
    return take_p.bind(samples, order)


def put(rows: jax.Array, order: jax.Array) -> jax.Array:
    """Elements back in their places: put(take(samples, order), order) are the samples."""
    return put_p.bind(rows, order)


def error_bits(error):
    """Integers in the order of non-negative floats, which XLA sorts faster; every NaN the same."""
    dtype = jnp.dtype(f"int{error.dtype.itemsize * 8}")
    bits = jax.lax.bitcast_convert_type(error, dtype)
    infinity = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, error.dtype), dtype)
    return jnp.minimum(bits, infinity + 1)


def pair_order(error: jax.Array) -> jax.Array:
    """The order of non-negative numbers by a stable sort of (error, position) pairs."""
    position = jax.lax.broadcasted_iota(jnp.int32, error.shape, error.ndim - 1)
    operands = (error_bits(error), position)
    return jax.lax.sort(operands, dimension=-1, is_stable=True, num_keys=1)[1]


def packed_order(error: jax.Array) -> jax.Array:
    """The same, float32, by one sort of error << 32 | position, which XLA does faster on CPUs."""
    with jax.enable_x64(True):
        position = jax.lax.broadcasted_iota(jnp.int64, error.shape, error.ndim - 1)
        keys = (error_bits(error).astype(jnp.int64) << 32) | position
        keys = jax.lax.sort(keys, dimension=-1, is_stable=False)
        return (keys & 0xFFFFFFFF).astype(jnp.int32)


def sort_with(
    order_of: Callable[[jax.Array], jax.Array], student: jax.Array, teacher: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sort_by_error` by XLA's operations, with one of the two orders above."""
    error = jnp.abs(teacher - student)  # orders as its square does, but does not overflow
    order = order_of(jnp.swapaxes(error, -1, -2))
    return _take(student, order), _take(teacher, order), order


def _sort_on_cpu(student, teacher):
    packed = student.dtype.itemsize == 4
    return sort_with(packed_order if packed else pair_order, student, teacher)


def _indices(order):
    """Positions in a channel -> positions in a flat sample, as it lies; (..., all)."""
    channels, elements = order.shape[-2:]
    channel = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 2)
    return (order * channels + channel).reshape(*order.shape[:-2], channels * elements)


def _take(samples, order):
    index = _indices(order)
    flat = samples.reshape(index.shape)
    return jnp.take_along_axis(flat, index, axis=-1, mode="promise_in_bounds").reshape(order.shape)


def _put(rows, order):
    def put_back(index, values):
        return (
            jnp.zeros_like(values)
            .at[index]
            .set(values, unique_indices=True, mode="promise_in_bounds")
        )

    for _ in order.shape[:-2]:  # an axis of its own each, so that it can be split
        put_back = jax.vmap(put_back)
    index = _indices(order)
    channels, elements = order.shape[-2:]
    return put_back(index, rows.reshape(index.shape)).reshape(*order.shape[:-2], elements, channels)


@functools.cache
def _native() -> bool:
    """Whether numba is there; then the machine code is compiled and known to XLA."""
    if sys.platform == "win32" or importlib.util.find_spec("numba") is None:
        return False
    try:
        host_sort = importlib.import_module("liftplace_jax.losses.host_sort")
    except ImportError as error:  # such as a version that refuses this NumPy
        warnings.warn(f"PLACE sorts with XLA, slower: numba cannot be used ({error})", stacklevel=2)
        return False
    host_sort.register(TARGET)
    return True


def _rule(avals_in, avals_out):
    """For the partitioner: leading axes may be split, alike in all arrays; the last two may not."""
    shape = avals_in[0].shape
    batch, (one, other) = list(LETTERS[: len(shape) - 2]), LETTERS[len(shape) - 2 : len(shape)]

    def names(aval):
        last = [one, other] if aval.shape == shape else [other, one]
        return f"[{', '.join([*batch, *last])}]"

    sizes = ", ".join(f"{n}={s}" for n, s in zip([*batch, one, other], shape, strict=True))
    arrays = "->".join(f"({', '.join(map(names, avals))})" for avals in (avals_in, avals_out))
    text = f"{arrays} {{{sizes}}} need_replication={{{one}, {other}}}, custom"
    return mlir.ir.Attribute.parse(f"#sdy.op_sharding_rule<{text}>")


def _lower_on_cpu(name, fallback):
    """The lowering for CPUs: a call of machine code, or XLA's operations."""
    in_program = mlir.lower_fun(fallback, multiple_results=name == "sort")

    def lower(context, *operands):
        first = context.avals_in[0]
        known = all(isinstance(size, int) for size in first.shape)
        fits = known and first.dtype == jnp.float32 and first.size >= HOST_LEAST
        if not (fits and first.ndim <= len(LETTERS) and _native()):
            return in_program(context, *operands)
        attributes = {
            "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(first.ndim - 2)}),
            "sdy.sharding_rule": _rule(context.avals_in, context.avals_out),
        }
        lowering = jax.ffi.ffi_lowering(TARGET + name, extra_attributes=attributes)
        return lowering(context, *operands)

    return lower


def _swapped(aval, dtype=None):
    *batch, one, other = aval.shape
    return aval.update(shape=(*batch, other, one), dtype=dtype or aval.dtype)


def _primitive(name, abstract, on_accelerators, on_cpu):
    """An operation on arrays whose leading axes mean nothing to it."""
    primitive = Primitive(TARGET + name)
    primitive.multiple_results = several = name == "sort"
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(jax.jit(primitive.bind))
    mlir.register_lowering(primitive, mlir.lower_fun(on_accelerators, multiple_results=several))
    mlir.register_lowering(primitive, _lower_on_cpu(name, on_cpu), platform="cpu")

    def batched(operands, axes):
        pairs = list(zip(operands, axes, strict=True))
        size = next(x.shape[axis] for x, axis in pairs if axis is not None)
        found = primitive.bind(
            *(
                jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
                for x, axis in pairs
            )
        )
        return found, [0] * len(found) if several else 0

    batching.primitive_batchers[primitive] = batched
    return primitive


def _sort_abstract(student, teacher):
    if student.shape != teacher.shape or student.dtype != teacher.dtype:
        raise TypeError(f"sort_by_error: {student} and {teacher} differ")
    return [_swapped(student), _swapped(teacher), _swapped(student, jnp.dtype(jnp.int32))]


sort_p = _primitive("sort", _sort_abstract, functools.partial(sort_with, pair_order), _sort_on_cpu)
take_p = _primitive("take", lambda samples, order: _swapped(samples), _take, _take)
put_p = _primitive("put", lambda rows, order: _swapped(rows), _put, _put)


def _zero(value):
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _sort_jvp(primals, tangents):
    *rows, order = sort_p.bind(*primals)
    changes = [
        _zero(row) if isinstance(change, ad.Zero) else take(change, order)
        for row, change in zip(rows, tangents, strict=True)
    ]
    return [*rows, order], [*changes, _zero(order)]


def _linear(primitive, transposed):
    """Derivatives of an operation that is linear in its first operand."""

    def jvp(primals, tangents):
        values, order = primals
        found = primitive.bind(values, order)
        change = tangents[0]
        if isinstance(change, ad.Zero):
            return found, _zero(found)
        return found, primitive.bind(change, order)

    def transpose(cotangent, values, order):
        if isinstance(cotangent, ad.Zero):
            return ad.Zero(values.aval), None
        return transposed.bind(cotangent, order), None

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


ad.primitive_jvps[sort_p] = _sort_jvp
_linear(take_p, put_p)
_linear(put_p, take_p)
