"""The order of errors on a CPU, found by NumPy's vectorised sort inside the compiled program.

XLA sorts on CPU with one comparator call after another; with NumPy's sort of the same 64-bit keys
PLACE's sums take a fifth of the time (benchmarks/grouping.md). `jax.pure_callback` would reach it
too, but its arguments pass through JAX once more, which never ends on one core (jax issue 24255).
XLA's foreign function interface hands over plain memory instead: the structures below are the part
of its stable C interface (xla/ffi/api/c_api.h) that a sort needs, read through ctypes so that
nothing has to be compiled.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp
import numpy as np

TARGET = "liftplace_error_order"
BLOCK = 65536  # elements sorted at once: their keys stay in a core's cache
API = (0, 3)  # version of the interface whose header these structures follow
METADATA, EXECUTE, INTERNAL = 1, 3, 13  # constants of the interface


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p), ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    ]  # fmt: skip


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64), ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]  # fmt: skip


class _Version(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int), ("minor", ctypes.c_int),
    ]  # fmt: skip


class _Metadata(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]  # fmt: skip


class _ErrorArguments(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p), ("code", ctypes.c_int),
    ]  # fmt: skip


class _Api(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.c_void_p), ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))),
    ]  # fmt: skip


class _Frame(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)), ("context", ctypes.c_void_p), ("stage", ctypes.c_int),
        ("arguments", _Buffers), ("results", _Buffers),
    ]  # fmt: skip


def error_order_on_host(error: jax.Array) -> jax.Array:
    """Stable ascending order along the last axis; for programs that run on one CPU device.

    Args:
      error: float32 (..., elements), no negative numbers. NaN sorts last.

    Returns:
      int32, the same shape.
    """
    result = jax.ShapeDtypeStruct(error.shape, jnp.int32)
    # The result takes the place of the positions: whatever stops the sort, indices stay in bounds.
    positions = jax.lax.broadcasted_iota(jnp.int32, error.shape, error.ndim - 1)
    call = jax.ffi.ffi_call(
        TARGET, result, vmap_method="broadcast_all", input_output_aliases={1: 0}
    )
    return call(error, positions)


def sort_rows(error: np.ndarray, order: np.ndarray) -> None:
    """Writes the stable ascending order of every row into `order`.

    Args:
      error: float32 (rows, elements), no negative numbers.
      order: int32 (rows, elements).
    """
    step = max(1, BLOCK // max(1, error.shape[-1]))
    blocks = [slice(i, i + step) for i in range(0, len(error), step)]
    if len(blocks) <= 1:
        _sort_block(error, order)
        return
    tasks = []  # NumPy lets go of the interpreter's lock, so that threads share the work
    try:
        for block in blocks:
            tasks.append(_threads().submit(_sort_block, error[block], order[block]))
    finally:
        _wait(tasks)
    for task in tasks:
        task.result()


def _wait(tasks):
    """Until no thread uses the memory any more, also if Ctrl-C comes meanwhile."""
    interruption = None
    while not all(task.done() for task in tasks):
        try:
            wait(tasks)
        except BaseException as exception:
            interruption = exception
    if interruption:
        raise interruption


def _sort_block(error, order):
    # Non-negative floats sort like their bits; the position below them breaks ties.
    keys = error.view(np.int32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(error.shape[-1])
    keys.sort(axis=-1)
    order[...] = keys  # the lower half


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=TARGET)


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
def _handler(frame):
    """What XLA calls: with a question about versions when it compiles, then once per execution."""
    try:
        _answer(frame.contents)
    except BaseException as exception:  # it must not pass through C: XLA raises it again for us
        message = f"{TARGET}: {type(exception).__name__}: {exception}".encode()
        size = ctypes.sizeof(_ErrorArguments)
        details = _ErrorArguments(size, None, message, INTERNAL)
        return frame.contents.api.contents.create_error(ctypes.byref(details))
    return None


def _answer(frame):
    if frame.extension and frame.extension.contents.type == METADATA:
        metadata = frame.extension.contents.metadata.contents
        metadata.version.major, metadata.version.minor = API
        metadata.traits = 0
    elif frame.stage == EXECUTE:
        error = _view(frame.arguments.buffers[0], np.float32)
        sort_rows(error, _view(frame.results.buffers[0], np.int32))


def _view(buffer, dtype) -> np.ndarray:
    """(rows, elements) on XLA's own memory."""
    buffer = buffer.contents
    shape = buffer.dims[: buffer.rank]
    count = int(np.prod(shape))
    if not count:
        return np.empty((0, 1), dtype)
    memory = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(buffer.data)
    return np.frombuffer(memory, dtype).reshape(-1, shape[-1])


jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_handler), platform="cpu")
