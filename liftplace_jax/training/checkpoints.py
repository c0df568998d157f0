"""Checkpoints of a training run: orbax behind one room."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from liftplace_jax.host.buckets import (
    UnreachableError,
    as_path,
    is_in_bucket,
    is_of_bucket,
    may_pass,
)
from liftplace_jax.host.processes import is_first, say, told_by_first
from liftplace_jax.training.checksums import checksums, leaf_name

_METADATA = "_CHECKPOINT_METADATA"  # orbax' file of what it was given beside the arrays
_SUMS, _OLDER_SUMS = "position_sums", "sums"  # names in it: `checksums`, and without positions
_PATIENCE = 24 * 3600  # seconds that a save may take; of a lost process, JAX knows sooner


class Checkpoints:
    """Saves and restores a `TrainState`; saving is atomic, and only the newest few are kept.

    As a context manager it is closed at the end of the block; if the block fails, its error is
    raised, and that of a save in the background is said. A program that ends without closing leaves
    what it was writing unfinished.

    Attributes:
      unfinished: names of the checkpoints that were found half-written; the first `save` removes
        them, for whoever only reads may look while another process is saving.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        """Opens (or makes) a folder of checkpoints; local, or a bucket such as gs://...

        Args:
          folder: where they are.
          keep: how many to keep, at least 1.

        Raises:
          ValueError: what orbax wrote beside a checkpoint is damaged.
        """
        folder = as_path(folder)
        # orbax takes no relative paths.
        self._folder = epath.Path(folder if is_in_bucket(folder) else folder.absolute())
        self.unfinished = self._find_unfinished()
        self._leftovers = self.unfinished
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # In the background no folder is made: where that fails, it fails at once.
            async_options=ocp.AsyncOptions(
                timeout_secs=_PATIENCE,
                create_directories_asynchronously=False,
                barrier_sync_fn=_meet,
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(
                os.fspath(self._folder),
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),  # or it cannot tell what is saved
            )
        except (ValueError, TypeError, LookupError) as error:
            if is_of_bucket(error):
                raise
            raise ValueError(
                f"a checkpoint in {self._folder} cannot be read: {error}. Look at the "
                f"{_METADATA} in each, and delete the checkpoint whose is damaged"
            ) from error
        self._latest: int | None = self._manager.latest_step()
        self._writing: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            say(str(failed))

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None; one that is being written is none."""
        return self._latest

    def save(self, step: int, state: Any, background: bool = False) -> None:
        """Writes the state unless that step is there already.

        Args:
          step: its number.
          state: it is copied before the call returns, and may be donated then.
          background: whether to write while the caller goes on. What goes wrong then is raised by
            the next `save`, `wait`, `restore` or `close`; each waits for the writing to end.

        Raises:
          OSError: it, or the one before, cannot be written, the disk is full, or another process is
            writing it; the ones before, and what the other is writing, stay as they are.
        """
        self.wait()
        if self._latest == step:
            return
        state = state._asdict()
        sums = {_SUMS: checksums(state)}
        self._remove(self._leftovers)
        self._leftovers = []
        if told_by_first(lambda: bool(self._find_unfinished(step))):  # orbax would remove that one
            raise OSError(
                f"the checkpoint of step {step} in {self._folder} is being written by another "
                "process: end one of the two"
            )
        with self._failing(step):
            self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=sums)
        self._writing = step
        if not background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          OSError: the state cannot be written; as `save`.
        """
        if self._writing is None:
            return
        with self._failing(self._writing):
            self._manager.wait_until_finished()
        self._latest, self._writing = self._writing, None
        _give_back_memory()

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """If writing that step fails in the block, nothing of it is left, and that is said."""
        try:
            yield
        except Exception as error:
            self._writing = None
            cause = error.__cause__
            if isinstance(cause, jax.errors.JaxRuntimeError):
                # Another process is gone, and not the disk. JAX has no types for its error.
                raise cause from None  # pyright: ignore[reportGeneralTypeIssues]
            if not (isinstance(error, OSError | ValueError) or is_of_bucket(error)):
                raise
            with contextlib.suppress(Exception):  # a bucket that is away cannot be cleaned either
                self._remove_all_of(step)  # it would keep a full disk full
            before = self._latest
            kept = "there is none before" if before is None else f"that of step {before} is whole"
            kind = UnreachableError if may_pass(error) else OSError
            raise kind(
                f"the checkpoint of step {step} cannot be written to {self._folder}: {error}\n"
                f"{kept.capitalize()}. Make room, or see to the folder's permissions; the same "
                "command goes on from there."
            ) from error

    def _remove(self, names: list[str]) -> None:
        for name in names if is_first() else []:
            with contextlib.suppress(OSError):
                (self._folder / name).rmtree()

    def _remove_all_of(self, step: int) -> None:
        """What of a step is unfinished; threads of tensorstore may still add to it for a moment."""
        quiet = 0
        for _ in range(100 if is_first() else 0):
            names = self._find_unfinished(step)
            self._remove(names)
            quiet = 0 if names else quiet + 1
            if quiet > 9:
                break
            time.sleep(0.1)

    def _find_unfinished(self, step: int | None = None) -> list[str]:
        """Names of what is unfinished, of a step or of all."""
        if not self._folder.exists():
            return []
        return sorted(
            path.name
            for path in self._folder.iterdir()
            if ocp.utils.is_tmp_checkpoint(path) and step in (None, _step_of(path.name))
        )

    def restore(self, abstract: Any, shardings: Any | None = None) -> Any:
        """Reads the newest checkpoint straight into its shardings.

        Args:
          abstract: a state of arrays or `jax.ShapeDtypeStruct`; the devices it was saved from
            need not be those it is restored to.
          shardings: tree of shardings, None for the default device.

        Raises:
          ValueError: there is none, it is damaged, or it does not fit the state; names the folder.
          OSError: its bucket cannot be reached, or a save in the background has failed.
        """
        self.wait()
        step = self._latest
        if step is None:
            raise ValueError(f"no checkpoint in {self._folder}")
        if shardings is None:
            shardings = jax.tree.map(
                lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract
            )
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        try:
            restored = type(abstract)(**self._read(step, target._asdict()))
            self._check_sums(step, restored)
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone; the checkpoint may be good
        except Exception as error:  # orbax raises all kinds, a bare Exception among them
            if is_of_bucket(error):
                kind = UnreachableError if may_pass(error) else OSError
                raise kind(
                    f"the checkpoint of step {step} in {self._folder} cannot be read now: "
                    f"{str(error)[:1000]}\nThe same command tries again."
                ) from error
            raise ValueError(
                f"the checkpoint of step {step} in {self._folder} cannot be restored: "
                f"{str(error)[:1000]}\n"
                "Delete that checkpoint to go on from an older one, or the folder to start anew."
            ) from error
        return restored

    def _read(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        """The arrays of a step; older versions had each parameter in a dict {"value": array}."""
        tree = self._manager.item_metadata(step)
        saved = {leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}

        def asked(path, leaf):
            older = f"{leaf_name(path)}.value" in saved
            return {"value": leaf} if older else leaf

        wrapped = jax.tree_util.tree_map_with_path(asked, target)
        found = self._manager.restore(step, args=ocp.args.StandardRestore(wrapped))
        places, treedef = jax.tree_util.tree_flatten(target)
        leaves = jax.tree.leaves(found)
        if len(leaves) != len(places):
            raise ValueError(f"{len(leaves)} arrays, where the state has {len(places)}")
        return jax.tree_util.tree_unflatten(treedef, leaves)

    def _check_sums(self, step: int, restored: Any) -> None:
        path = self._folder / str(step) / _METADATA
        if not path.exists():
            raise ValueError(f"its {_METADATA}, with the checksums, is missing")
        found = json.loads(path.read_text()).get("custom_metadata") or {}
        wanted = found.get(_SUMS, found.get(_OLDER_SUMS))
        if wanted is None:
            if is_first():
                print(
                    f"{path.parent}: a checkpoint without checksums, as older versions wrote them; "
                    "its values are taken as they are",
                    file=sys.stderr,
                )
            return
        # Older versions had each parameter in a dict {"value": array}.
        wanted = {name.removesuffix(".value"): total for name, total in wanted.items()}
        sums = checksums(restored, positions=_SUMS in found)
        changed = [name for name in wanted if sums.get(name) != wanted[name]]
        changed += sorted(sums.keys() - wanted.keys())
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(f"not what was saved: {', '.join(changed[:3])}{more}")

    def close(self) -> None:
        """Waits for what is being written, and ends.

        Raises:
          OSError: the state cannot be written; as `save`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()


def _step_of(name: str) -> int | None:
    """Of a checkpoint's folder, as N or, unfinished, as N.orbax-checkpoint-tmp-..."""
    step = name.partition(".")[0]
    return int(step) if step.isdecimal() else None


def _meet(*, key: str, timeout_ms: int) -> None:
    """Where processes wait for each other, also in the background: there no collective may run.

    One whose writing failed waits for none, for the others wait for it elsewhere, and nobody would
    hear of it.
    """
    in_background = threading.current_thread() is not threading.main_thread()
    if not (in_background and sys.exc_info()[1]):
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _give_back_memory() -> None:
    """Free memory goes back to the system; orbax' threads would each hold some more at each save.

    glibc keeps what was freed for the thread that had it: 4 to 5 MiB a save of digits' teacher, and
    what compilation left, a gigabyte.
    """
    trim = _malloc_trim()
    if trim:
        trim(0)


@functools.cache
def _malloc_trim() -> Any | None:
    """glibc's function; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
