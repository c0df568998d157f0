"""Sort, gather and scatter of rows on CPUs, as machine code that XLA's threads call: no Python.

XLA sorts on CPU with one comparator call after another. A radix sort of the errors' bits takes a
small part of the time (benchmarks/grouping.md), and it is stable by nature. Numba compiles it, once
for a machine (some seconds; later starts read its cache, which looks at this file's time alone: so
all of it is here), to functions of C's kind which XLA calls through its foreign function interface.
They read the frame of the call as plain memory (xla/ffi/api/c_api.h, whose layout is stable), share
rows with XLA's own threads, and never need the interpreter, so that a script may end, raise or
reload while they run.

Only `permute.py` imports this module, when the first program for a CPU is lowered.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import llvmlite.binding
import llvmlite.ir as ir
import numba
import numpy as np
from numba.core import cgutils
from numba.core.types import ExternalFunction, float32, int32, intp, uint32, uint64
from numba.extending import intrinsic

API = 3 << 32  # version 0.3 of the interface, as the two halves of a word
METADATA, EXECUTE = 1, 3
INVALID, EXHAUSTED = 3, 8  # codes of errors
# Words (8 bytes) of the structures of c_api.h.
EXTENSION, TABLE, CONTEXT, STAGE, ARGUMENTS, RESULTS = 1, 2, 3, 4, 7, 12  # of a call's frame
DTYPE, DATA, RANK, DIMS = 2, 3, 4, 5  # of a buffer
CREATE_ERROR, DESTROY_ERROR, SCHEDULE, COUNT_THREADS = 6, 8, 17, 18  # of the table of functions
F32, S32 = 11, 4

SORT, TAKE, PUT = range(3)
# Words of a job, memory that the threads of one call share.
NEXT, DONE, OWNERS, SLOTS, BLOCKS, BLOCK, KIND, ROWS, ELEMENTS, CHANNELS, SCRATCH = range(11)
FIRST = 11  # addresses of arguments and results
HEADER = 24
GRAIN = 16384  # elements that are worth another thread
COUNTERS = 4096  # of all passes of one sort
LARGE = 2048  # elements of a row for which three passes beat four
HELPER = "liftplace_jax_help"
# Where what is registered lives on if this module is reloaded: XLA keeps its address for ever.
KEPT = "_liftplace_jax_registered"

# Numba's own types know neither what it hands to an intrinsic nor what compiling makes of one.
_intrinsic: Any = intrinsic
_carray: Any = numba.carray  # pyright: ignore[reportPrivateImportUsage] (as numba documents it)
_cfunc: Any = numba.cfunc
_compile = numba.njit(nogil=True, error_model="numpy", boundscheck=False)
_malloc = ExternalFunction("malloc", intp(intp))
_free = ExternalFunction("free", numba.void(intp))
_yield = ExternalFunction("sched_yield", int32())


@_intrinsic
def _pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(intp), generate


@_intrinsic
def _call(typing, function, argument):
    """function(argument), both addresses."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        function = builder.inttoptr(arguments[0], ir.FunctionType(word, [word]).as_pointer())
        return builder.call(function, [arguments[1]])

    return intp(intp, intp), generate


@_intrinsic
def _add(typing, address, amount):
    """Adds to a word that threads share; returns what it held."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return intp(intp, intp), generate


@_intrinsic
def _stack(typing):
    """Address of eight words on the stack of the function that asks."""

    def generate(context, builder, signature, arguments):
        words = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), 8))
        return builder.ptrtoint(words, ir.IntType(64))

    return intp(), generate


@_intrinsic
def _helper_address(typing):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        function = cgutils.get_or_insert_function(builder.module, kind, HELPER)
        return builder.ptrtoint(function, ir.IntType(64))

    return intp(), generate


@_compile
def _words(address):
    return _carray(_pointer(address), HEADER, intp)


@_compile
def _sums(counts, start, stop):
    """Counts -> how many come before."""
    total = uint32(0)
    for i in range(start, stop):
        count = counts[i]
        counts[i] = total
        total += count


@_compile
def _pass(source, target, places, shift, mask):
    for value in source:
        digit = uint32(value >> shift) & mask
        place = places[digit]
        places[digit] = place + uint32(1)
        target[place] = value


@_compile
def _order_row(keys, order, a, b, counts):
    """Stable ascending order of `keys`, 31 bits each, into `order`; a, b: as long, for 64 bits."""
    if len(keys) >= LARGE:
        first, bits, passes = uint32(11), uint32(10), 3
    else:
        first, bits, passes = uint32(8), uint32(8), 4
    low, high = uint32((1 << first) - 1), uint32((1 << bits) - 1)
    one, two = intp(1) << first, intp(1) << bits
    third = one + two
    last = third + two if passes == 4 else third
    counts[: last + two] = 0
    for key in keys:
        counts[key & low] += uint32(1)
        counts[one + intp((key >> first) & high)] += uint32(1)
        counts[third + intp((key >> (first + bits)) & high)] += uint32(1)
    if passes == 4:
        for key in keys:
            counts[last + intp(key >> (first + bits + bits))] += uint32(1)
        _sums(counts, last, last + two)
    _sums(counts, 0, one)
    _sums(counts, one, third)
    _sums(counts, third, third + two)

    position = uint32(0)
    for key in keys:
        digit = key & low
        place = counts[digit]
        counts[digit] = place + uint32(1)
        a[place] = (uint64(key) << uint64(32)) | uint64(position)
        position += uint32(1)
    shift = uint64(32) + uint64(first)
    _pass(a, b, counts[one:], shift, high)
    source = b
    if passes == 4:
        shift += uint64(bits)
        _pass(b, a, counts[third:], shift, high)
        source = a
    shift += uint64(bits)
    places = counts[last:]
    for value in source:
        digit = uint32(value >> shift)
        place = places[digit]
        places[digit] = place + uint32(1)
        order[place] = int32(value)


@_compile
def _sort(job, scratch, row):
    elements, channels = job[ELEMENTS], job[CHANNELS]
    start = row // channels * channels * elements + row % channels
    student = _carray(_pointer(job[FIRST] + 4 * start), elements * channels, float32)
    teacher = _carray(_pointer(job[FIRST + 1] + 4 * start), elements * channels, float32)
    there = 4 * row * elements
    student_out = _carray(_pointer(job[FIRST + 2] + there), elements, float32)
    teacher_out = _carray(_pointer(job[FIRST + 3] + there), elements, float32)
    order = _carray(_pointer(job[FIRST + 4] + there), elements, int32)
    a = _carray(_pointer(scratch), elements, uint64)
    b = _carray(_pointer(scratch + 8 * elements), elements, uint64)
    error = _carray(_pointer(scratch + 16 * elements), elements, float32)
    keys = _carray(_pointer(scratch + 16 * elements), elements, uint32)
    counts = _carray(_pointer(scratch + 20 * elements), COUNTERS, uint32)
    for i in range(elements):
        error[i] = abs(teacher[i * channels] - student[i * channels])
    for i in range(elements):
        keys[i] = min(keys[i], uint32(0x7F800001))  # every NaN is the same, and last
    _order_row(keys, order, a, b, counts)
    for i in range(elements):
        student_out[i] = student[intp(order[i]) * channels]
        teacher_out[i] = teacher[intp(order[i]) * channels]


@_compile
def _move(job, row, back):
    elements, channels = job[ELEMENTS], job[CHANNELS]
    start = row // channels * channels * elements + row % channels
    there = 4 * row * elements
    samples, rows = (job[FIRST + 2], job[FIRST]) if back else (job[FIRST], job[FIRST + 2])
    sample = _carray(_pointer(samples + 4 * start), elements * channels, float32)
    order = _carray(_pointer(job[FIRST + 1] + there), elements, int32)
    row_ = _carray(_pointer(rows + there), elements, float32)
    if back:
        for i in range(elements):
            sample[intp(order[i]) * channels] = row_[i]
    else:
        for i in range(elements):
            row_[i] = sample[intp(order[i]) * channels]


@_compile
def _work(address):
    """Takes blocks of rows until none is left."""
    job = _words(address)
    scratch = job[SCRATCH]
    if scratch:
        size = 20 * job[ELEMENTS] + 4 * COUNTERS
        scratch += _add(address + 8 * SLOTS, 1) * ((size + 63) // 64 * 64)
    block = _add(address + 8 * NEXT, 1)
    while block < job[BLOCKS]:
        for row in range(block * job[BLOCK], min((block + 1) * job[BLOCK], job[ROWS])):
            if job[KIND] == SORT:
                _sort(job, scratch, row)
            else:
                _move(job, row, job[KIND] == PUT)
        _add(address + 8 * DONE, 1)
        block = _add(address + 8 * NEXT, 1)


@_compile
def _leave(address):
    if _add(address + 8 * OWNERS, -1) == 1:
        _free(address)


@_compile
def _help(address):
    """What another of XLA's threads does, perhaps after the call is over."""
    _work(address)
    _leave(address)
    return 0


@_compile
def _threads(frame):
    """How many threads XLA has for this call."""
    arguments = _stack()
    words = _words(arguments)
    words[0], words[1], words[2], words[3], words[4] = 32, 0, frame[CONTEXT], arguments + 32, 1
    error = _call(_words(frame[TABLE])[COUNT_THREADS], arguments)
    if error:
        words[0], words[1], words[2] = 24, 0, error
        _call(_words(frame[TABLE])[DESTROY_ERROR], arguments)
        return 1
    return max(1, words[4])


@_compile
def _error(frame, message, code):
    arguments = _stack()
    words = _words(arguments)
    words[0], words[1], words[2], words[3] = 32, 0, message.ctypes.data, code
    return _call(_words(frame[TABLE])[CREATE_ERROR], arguments)


@_compile
def _shared(frame, job, threads):
    """Does the job with XLA's other threads, and returns when it is done."""
    address = job.ctypes.data
    arguments = _stack()
    words = _words(arguments)
    for _ in range(threads - 1):
        words[0], words[1], words[2] = 40, 0, frame[CONTEXT]
        words[3], words[4] = _helper_address(), address
        error = _call(_words(frame[TABLE])[SCHEDULE], arguments)
        if error:
            words[0], words[1], words[2] = 24, 0, error
            _call(_words(frame[TABLE])[DESTROY_ERROR], arguments)
            _add(address + 8 * OWNERS, -1)
    _work(address)
    # The others hold blocks that they are at work on; one that comes later finds none.
    while _add(address + 8 * DONE, 0) < job[BLOCKS]:
        _yield()
    _leave(address)


NO_MEMORY = np.frombuffer(b"liftplace_jax: no memory for the sort of errors\0", np.uint8)
NO_FIT = np.frombuffer(b"liftplace_jax: buffers of another shape or type were expected\0", np.uint8)
PATTERNS = np.array([[F32, F32, F32, F32, S32], [F32, S32, F32, 0, 0], [F32, S32, F32, 0, 0]])


@_compile
def _buffer(frame, number, arguments):
    if number < arguments:
        address = _words(frame[ARGUMENTS + 2])[number]
    else:
        address = _words(frame[RESULTS + 2])[number - arguments]
    return _words(address)


@_compile
def _answer(address, kind):
    """A call of XLA's: with a question about versions when it compiles, then per execution."""
    frame = _words(address)
    if frame[EXTENSION]:
        extension = _words(frame[EXTENSION])
        if extension[1] & 0xFFFFFFFF == METADATA:
            _words(extension[3])[3] = API
            return 0
    if frame[STAGE] & 0xFFFFFFFF != EXECUTE:
        return 0
    results = 3 if kind == SORT else 1
    if frame[ARGUMENTS] != 2 or frame[RESULTS] != results:
        return _error(frame, NO_FIT, INVALID)
    # The shape of what is sorted, (..., channel, elements): of the last result, or the order.
    shape = _buffer(frame, 4 if kind == SORT else 1, 2)
    rank = shape[RANK]
    if rank < 2:
        return _error(frame, NO_FIT, INVALID)
    dims = _carray(_pointer(shape[DIMS]), rank, intp)
    size = intp(1)
    for dim in dims:
        size *= dim
    for number in range(2 + results):
        buffer = _buffer(frame, number, 2)
        other = intp(1)
        for dim in _carray(_pointer(buffer[DIMS]), buffer[RANK], intp):
            other *= dim
        if other != size or buffer[DTYPE] & 0xFFFFFFFF != PATTERNS[kind, number]:
            return _error(frame, NO_FIT, INVALID)
    if not size:
        return 0

    elements, channels = dims[rank - 1], dims[rank - 2]
    rows = size // elements
    threads = min(_threads(frame), max(1, size // GRAIN))
    block = max(1, GRAIN // elements)
    if kind == PUT and rows // channels >= threads:  # samples whose memory no two threads write
        block = (block + channels - 1) // channels * channels
    blocks = (rows + block - 1) // block
    threads = min(threads, blocks)
    scratch = (20 * elements + 4 * COUNTERS + 63) // 64 * 64 if kind == SORT else 0
    memory = _malloc(8 * HEADER + threads * scratch)
    if not memory:
        return _error(frame, NO_MEMORY, EXHAUSTED)
    job = _words(memory)
    job[NEXT], job[DONE], job[SLOTS], job[OWNERS] = 0, 0, 0, threads
    job[BLOCKS], job[BLOCK], job[KIND] = blocks, block, kind
    job[ROWS], job[ELEMENTS], job[CHANNELS] = rows, elements, channels
    job[SCRATCH] = memory + 8 * HEADER if scratch else 0
    for number in range(2 + results):
        job[FIRST + number] = _buffer(frame, number, 2)[DATA]
    _shared(frame, job, threads)
    return 0


def _sort_handler(frame):
    return _answer(frame, SORT)


def _take_handler(frame):
    return _answer(frame, TAKE)


def _put_handler(frame):
    return _answer(frame, PUT)


def _helper(job):
    return _help(job)


def _native(function: Callable) -> Any:
    """C's kind of the function; it lives as long as the process."""
    try:
        compiled = _cfunc(intp(intp), nopython=True, cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError):  # no folder in which to keep it
        compiled = _cfunc(intp(intp), nopython=True, **OPTIONS)(function)
    # XLA's threads may be in it when the interpreter ends: its memory must outlive all objects.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(compiled))
    return compiled.ctypes


OPTIONS = {"error_model": "numpy"}
HANDLERS = {"sort": _sort_handler, "take": _take_handler, "put": _put_handler}
_lock = threading.Lock()


def register(prefix: str) -> None:
    """Registers the targets `prefix`sort, `prefix`take and `prefix`put with XLA, once a process.

    Each takes rows from samples (..., elements, channel), float32, and rows are (..., channel,
    elements); leading axes may be split over devices:

      sort: student, teacher -> both as rows in the stable ascending order of |teacher - student|,
        NaN last, and that order, int32.
      take: samples, order -> rows.
      put: rows, order -> samples.
    """
    with _lock:
        if KEPT in sys.modules:
            return
        llvmlite.binding.add_symbol(HELPER, ctypes.cast(_native(_helper), ctypes.c_void_p).value)
        for name, function in HANDLERS.items():
            capsule = jax.ffi.pycapsule(_native(function))
            jax.ffi.register_ffi_target(prefix + name, capsule, platform="cpu")
            jax.ffi.register_ffi_target_as_batch_partitionable(prefix + name)
        sys.modules[KEPT] = types.ModuleType(KEPT)
