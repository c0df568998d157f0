"""Checkpoints of a training run: orbax behind one room."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """Saves and restores a `TrainState`; saving is atomic, and only the newest few are kept."""

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        """Opens (or makes) a folder of checkpoints; local, or a bucket such as gs://...

        Args:
          folder: where they are.
          keep: how many to keep, at least 1.
        """
        path = os.fspath(folder)
        if "://" not in path:
            path = os.path.abspath(path)  # orbax takes no relative paths
        self._folder = epath.Path(path)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(os.fspath(self._folder), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes the state unless that step is there already."""
        if self.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state._asdict()))

    def restore(self, abstract: Any, shardings: Any | None = None) -> Any:
        """Reads the newest checkpoint straight into its shardings.

        Args:
          abstract: a state of arrays or `jax.ShapeDtypeStruct`; the devices it was saved from
            need not be those it is restored to.
          shardings: tree of shardings, None for the default device.

        Raises:
          ValueError: there is none, or it does not fit the state; names the folder.
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
            restored = self._manager.restore(
                step, args=ocp.args.StandardRestore(target._asdict())
            )
        except (ValueError, KeyError, TypeError, FileNotFoundError, OSError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self._folder} cannot be restored: {error}\n"
                "Delete that checkpoint to go on from an older one, or the folder to start anew."
            ) from error
        return type(abstract)(**restored)

    def close(self) -> None:
        """Ends background work."""
        self._manager.close()
