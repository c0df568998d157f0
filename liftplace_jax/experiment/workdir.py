"""A work directory belongs to one config."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from liftplace_jax.experiment import configuration
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import listed, reaching
from liftplace_jax.host.files import write_json


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes a work directory that of a config, or checks that it is.

    Args:
      workdir: made if missing.
      config: the experiment's; the same in all processes.

    Raises:
      ValueError: it belongs to another config, or is none; nothing is written then.
      OSError: it cannot be written.
    """
    new, path = configuration.to_json(config), workdir / "config.json"
    with reaching(workdir):
        # Hidden files do not count: a run killed as it wrote config.json leaves one.
        found = [path.name for path in listed(workdir) if not path.name.startswith(".")]
    if path.exists():
        lines = _changes(path, new, alone=found == [path.name])
        if lines:
            raise ValueError(
                f"{workdir} was made with another config (old -> new):\n  "
                + "\n  ".join(lines)
                + "\nChoose another --workdir, or go on with the config it was made with."
            )
    elif found:
        raise ValueError(
            f"{workdir} is not empty and has no config.json: it is no work directory. "
            "Choose another --workdir."
        )
    processes.barrier("claim")  # all have looked
    if processes.is_first():
        try:
            write_json(path, new)
        except OSError as error:
            raise OSError(f"the work directory cannot be written: {error}") from error
    processes.wait_for(path)


def _changes(path: Path, new: dict, alone: bool) -> list[str]:
    try:
        old = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no config of a work directory: {error}") from error
    if alone and old.keys() == new.keys():
        return []  # of a run that was refused before it made anything
    # A run may go on on other hardware.
    old, new = map(configuration.without_setup, (configuration.completed(old), new))
    return configuration.differences(old, new)
