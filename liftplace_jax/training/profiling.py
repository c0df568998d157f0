"""How a run is watched: traces, transfers that nobody asked for, memory, compiled programs kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from liftplace_jax.host.buckets import as_path, is_in_bucket, upload

TRANSFER_GUARDS = ("log", "disallow")
_GIGA = 1e9


def read_profile_steps(text: str | None) -> tuple[int, int] | None:
    """config.profile_steps, "100:105" -> (100, 105): the first step of the trace and the last.

    Raises:
      ValueError: it is neither None nor of that form.
    """
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"config.profile_steps must be FIRST:LAST, such as 100:105, counted from 1; got "
            f"{text!r}"
        )
    return int(first), int(last)


def keep_compiled(folder: str | None) -> None:
    """Programs are compiled once for all runs with the same config.compile_cache.

    Args:
      folder: made if missing, may be gs://...; None: nothing is kept, but for what
        $JAX_COMPILATION_CACHE_DIR says.
    """
    if folder:
        path = as_path(folder)
        if not is_in_bucket(path):
            path = path.absolute()
        jax.config.update("jax_compilation_cache_dir", os.fspath(path))
        compilation_cache.reset_cache()  # or what was compiled before decides that there is none


def memory_line(title: str, *trees: Any) -> str:
    """What is on a device before the first step, for people.

    Args:
      title: of the run.
      trees: arrays on the devices, such as state and teacher.
    """
    devices = jax.local_devices()
    held = dict.fromkeys(devices, 0)
    for leaf in jax.tree.leaves(trees):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    line = f"{title}: {max(held.values()) / _GIGA:.3g} GB of parameters and optimizer state on "
    line += f"each of {len(devices)} devices ({devices[0].device_kind})"
    stats = [stats for device in devices if (stats := device.memory_stats())]
    if stats and all("bytes_limit" in s for s in stats):
        used = max(s["bytes_in_use"] for s in stats) / _GIGA
        line += f", {used:.3g} of {min(s['bytes_limit'] for s in stats) / _GIGA:.3g} GB in use"
    return line


@contextlib.contextmanager
def watched(
    step: Callable[..., Any], config: ConfigDict, folder: str | os.PathLike
) -> Iterator[Callable]:
    """A train step that is traced and guarded as the config says; itself if it says nothing.

    Args:
      step: of `make_train_step`.
      config: the experiment's: profile_steps, and transfer_guard, under which a step must not
        ("disallow"), or not silently ("log"), move arrays between host and devices.
      folder: of the run; the trace goes to its "profile", for TensorBoard's profiler or xprof.

    Raises:
      jax.errors.JaxRuntimeError: (by the step) a transfer that is disallowed.
    """
    steps, guard = read_profile_steps(config.profile_steps), config.transfer_guard
    if not steps and not guard:
        yield step
        return
    trace = _Trace(steps, as_path(folder) / "profile")

    def watched_step(state, frozen, batch):
        trace.before(state)
        with jax.transfer_guard(guard) if guard else contextlib.nullcontext():
            result = step(state, frozen, batch)
        trace.after(result)
        return result

    try:
        yield watched_step
    finally:
        trace.stop()


class _Trace:
    """A trace of the steps first..last; of those that are left, where a run goes on among them."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._in_bucket = steps, folder, is_in_bucket(folder)
        self._local = folder
        self._number: int | None = None  # of the step under way
        self._running = False

    def before(self, state: Any) -> None:
        if not self._steps:
            return
        # Asked once: to look at the state each time would stall the devices.
        self._number = int(state.step) + 1 if self._number is None else self._number + 1
        if not self._running and self._steps[0] <= self._number <= self._steps[1]:
            jax.block_until_ready(state)
            if self._in_bucket:  # JAX writes to this machine alone
                self._local = Path(tempfile.mkdtemp(prefix="liftplace-"))
            jax.profiler.start_trace(self._local)
            self._running = True

    def after(self, result: Any) -> None:
        if self._running and self._steps and self._number == self._steps[1]:
            jax.block_until_ready(result)
            self.stop()

    def stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._in_bucket:
                try:
                    upload(self._local, self._folder)
                except OSError as error:  # no reason to end a run
                    print(f"the trace stays in {self._local}: {error}", file=sys.stderr)
                else:
                    shutil.rmtree(self._local)
