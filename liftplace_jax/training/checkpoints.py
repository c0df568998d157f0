"""Checkpoints of a training run: orbax behind one room."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from liftplace_jax.host.buckets import (
    UnreachableError,
    as_path,
    is_in_bucket,
    is_of_bucket,
    may_pass,
)
from liftplace_jax.host.processes import is_first, told_by_first

_METADATA = "_CHECKPOINT_METADATA"  # orbax' file of what it was given beside the arrays


class Checkpoints:
    """Saves and restores a `TrainState`; saving is atomic, and only the newest few are kept.

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
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        try:
            self._manager = ocp.CheckpointManager(
                os.fspath(self._folder), options=options,
                item_handlers=ocp.StandardCheckpointHandler(),  # or it cannot tell what is saved
            )  # fmt: skip
        except (ValueError, TypeError, LookupError) as error:
            if is_of_bucket(error):
                raise
            raise ValueError(
                f"a checkpoint in {self._folder} cannot be read: {error}. Look at the "
                f"{_METADATA} in each, and delete the checkpoint whose is damaged"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes the state unless that step is there already.

        Raises:
          OSError: it cannot be written, the disk is full, or another process is writing it; the
            ones before, and what the other is writing, stay as they are.
        """
        latest = self.latest_step()
        if latest == step:
            return
        state, sums = state._asdict(), {"sums": _sums(state)}
        self._remove(self._leftovers)
        self._leftovers, others = [], self._find_unfinished() if is_first() else []
        steps = [name.partition(".")[0] for name in others]
        if told_by_first(lambda: str(step) in steps):  # orbax would remove that one
            raise OSError(
                f"the checkpoint of step {step} in {self._folder} is being written by another "
                "process: end one of the two"
            )
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=sums)
        except Exception as error:
            if not (isinstance(error, OSError | ValueError) or is_of_bucket(error)):
                raise
            # It would keep a full disk full; but never what another process is writing.
            if is_first():
                self._remove([name for name in self._find_unfinished() if name not in others])
            kept = "there is none before" if latest is None else f"that of step {latest} is whole"
            kind = UnreachableError if may_pass(error) else OSError
            raise kind(
                f"the checkpoint of step {step} cannot be written to {self._folder}: {error}\n"
                f"{kept.capitalize()}. Make room, or see to the folder's permissions; the same "
                "command goes on from there."
            ) from error
        _give_back_memory()

    def _remove(self, names: list[str]) -> None:
        for name in names if is_first() else []:
            with contextlib.suppress(OSError):
                (self._folder / name).rmtree()

    def _find_unfinished(self) -> list[str]:
        if not self._folder.exists():
            return []
        return sorted(
            path.name for path in self._folder.iterdir() if ocp.utils.is_tmp_checkpoint(path)
        )

    def restore(self, abstract: Any, shardings: Any | None = None) -> Any:
        """Reads the newest checkpoint straight into its shardings.

        Args:
          abstract: a state of arrays or `jax.ShapeDtypeStruct`; the devices it was saved from
            need not be those it is restored to.
          shardings: tree of shardings, None for the default device.

        Raises:
          ValueError: there is none, it is damaged, or it does not fit the state; names the folder.
          OSError: its bucket cannot be reached.
        """
        step = self.latest_step()
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
        saved = {_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}

        def asked(path, leaf):
            older = f"{_name(path)}.value" in saved
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
        wanted = (json.loads(path.read_text()).get("custom_metadata") or {}).get("sums")
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
        found = _sums(restored)
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        changed += sorted(found.keys() - wanted.keys())
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(f"not what was saved: {', '.join(changed[:3])}{more}")

    def close(self) -> None:
        """Ends background work."""
        self._manager.close()


def _sums(state: Any) -> dict[str, int]:
    """Sum of the bits of every array, of all processes: orbax' files have no checksum of values."""
    names, sums = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names.append(_name(path))
        parts = [jax.device_get(s.data) for s in leaf.addressable_shards if s.replica_id == 0]
        words = [part.reshape(-1).view(f"uint{8 * part.itemsize}") for part in parts]
        sums.append(sum(int(w.sum(dtype=np.uint64)) for w in words) % 2**32)
    everywhere = np.asarray(sums, np.uint32)[None]
    if jax.process_count() > 1:
        everywhere = multihost_utils.process_allgather(everywhere[0])
    totals = everywhere.sum(axis=0, dtype=np.uint64) % 2**32
    return dict(zip(names, totals.tolist(), strict=True))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


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
