"""A work directory belongs to one config and to the data that it was begun with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.experiment import configuration
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import as_path, is_in_bucket, listed, reaching
from liftplace_jax.host.differences import differences
from liftplace_jax.host.files import is_temporary, read_json, write_json

_CONFIG, _DATA = "config.json", "data.json"


def claim(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Makes a work directory that of a config, or checks that it is.

    Args:
      workdir: made if missing.
      config: the experiment's; the same in all processes.

    Raises:
      ValueError: it belongs to another config, or is none; nothing is written then.
      OSError: it cannot be written.
    """
    workdir = as_path(workdir)
    new, path = configuration.to_json(config), workdir / _CONFIG
    with reaching(workdir):
        # Hidden files do not count: a run killed as it wrote config.json leaves one.
        found = [path.name for path in listed(workdir) if not path.name.startswith(".")]
    alone = set(found) <= {_CONFIG, _DATA}
    if path.exists():
        lines = _changes(path, new, alone)
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
            if alone:
                (workdir / _DATA).unlink(missing_ok=True)  # nothing was made of these data
            write_json(path, new)
        except OSError as error:
            raise OSError(f"the work directory cannot be written: {error}") from error
    processes.wait_for(path)


def check_data(workdir: Path, kind: str, sources: Mapping[str, Any], write: bool) -> None:
    """Checks that data are those that a work directory was begun with.

    Args:
      workdir: the work directory; one that says nothing of such data, as of an older version,
        learns what they are.
      kind: "images" or "latents".
      sources: `data.Source` or `data.LatentSource` by use.
      write: whether it may learn.

    Raises:
      ValueError: they are others; says what differs.
      OSError: the work directory cannot be written.
    """
    path = workdir / _DATA
    advice = "Delete it if the data are still those that the run was begun with"
    with reaching(path):
        known = read_json(path, advice) if path.exists() else {}
    found = {kind: {use: source.fingerprint() for use, source in sources.items()}}
    lines = differences({kind: known.get(kind, found[kind])}, found)
    if lines:
        raise ValueError(
            f"the data are not those that {workdir} was begun with (old -> new): "
            + "; ".join(lines)
            + f". Bring them back, choose another --workdir, or delete {path} to go on with the "
            "new data all the same"
        )
    if write and kind not in known and processes.is_first():
        write_json(path, known | found)


def remove_leftovers(workdir: Path) -> None:
    """Removes what runs that died were writing; for the one run that has the work directory.

    Not within "evaluations", where another command writes; in a bucket there is nothing such.
    """
    if is_in_bucket(workdir):
        return
    for folder, folders, names in os.walk(workdir):
        for name in filter(is_temporary, folders):
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
        folders[:] = [name for name in folders if name not in ("checkpoints", "evaluations")]
        for name in names:
            if is_temporary(name) or name == "metrics.tmp":  # of older versions
                with contextlib.suppress(OSError):
                    (Path(folder) / name).unlink()


def _changes(path: Path, new: dict, alone: bool) -> list[str]:
    try:
        old = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no config of a work directory: {error}") from error
    if alone and old.keys() == new.keys():
        return []  # of a run that was refused before it made anything
    # A run may go on on other hardware.
    old, new = map(configuration.without_setup, (configuration.completed(old), new))
    return differences(old, new)
