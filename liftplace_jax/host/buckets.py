"""Files of a bucket (gs://...) where a program wants those of this machine.

A path of a bucket is etils' `epath.Path`, one of this machine a `pathlib.Path`: both have the same
methods. An object of a bucket appears whole or not at all, and can be replaced but not appended to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

# Otherwise etils takes TensorFlow's file systems wherever TensorFlow is installed: seconds to
# import, and with errors of their own.
os.environ.setdefault("EPATH_USE_TF", "0")
# Otherwise gcsfs asks another service of Google's what kind a bucket is, at each call if it may not
# know; all kinds but zonal ones are used in the same way.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

from etils import epath  # noqa: E402

CACHE = Path("~/.cache/liftplace_jax")
"""Where data of buckets are kept on each host, unless config.data_cache names a folder."""


def as_path(path: str | os.PathLike) -> Path:
    """A path as a user gives it: of this machine, with ~ expanded, or of a bucket.

    Raises:
      ValueError: it is of another kind, such as s3://, or gcsfs is not installed.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if not separator:
        if text.startswith("gs:"):
            raise ValueError(f"{text}: a bucket's paths begin with gs://, which pathlib spoils")
        return Path(text).expanduser()
    if scheme != "gs":
        raise ValueError(f"{text}: paths are those of this machine or gs://, not {scheme}://")
    if find_spec("gcsfs") is None:
        raise ValueError(f"{text}: buckets need gcsfs: pip install 'liftplace_jax[gcs]'")
    import fsspec.config

    # Another host may have written since.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return cast(Path, epath.Path(text))  # which has pathlib's methods


def is_in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is of a bucket."""
    return "://" in os.fspath(path)


def on_this_machine(path: str | os.PathLike, what: str) -> Path:
    """A path as a user gives it, where a bucket will not do.

    Args:
      path: the path.
      what: it is, for the error message.

    Raises:
      ValueError: it is of a bucket.
    """
    if is_in_bucket(path):
        raise ValueError(
            f"{os.fspath(path)}: {what} must be on this machine, or in a bucket that is mounted "
            "(for example by gcsfuse)"
        )
    return Path(path).expanduser()


class UnreachableError(OSError):
    """A bucket cannot be reached now; trying again may help."""


def make_folder(path: Path) -> None:
    """Makes a folder if missing; in a bucket there are none (and gcsfs would make the bucket)."""
    if not is_in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def listed(folder: Path) -> list[Path]:
    """What is in a folder, in order; nothing if there is none."""
    if not is_in_bucket(folder):
        return sorted(folder.iterdir()) if folder.exists() else []
    return sorted(folder / name for name in _facts(folder))


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    """What gcsfs knows of each entry of a bucket's folder, by name."""
    own = os.fspath(folder).removeprefix("gs://").rstrip("/")
    try:
        found = _store().ls(own, detail=True)
    except FileNotFoundError:
        return {}
    # The console and gcsfuse mark a folder by an object of its name.
    entries = {entry["name"].rstrip("/"): entry for entry in found}
    return {name.rpartition("/")[2]: entry for name, entry in entries.items() if name != own}


def _store() -> Any:
    import fsspec

    return fsspec.filesystem("gcs")


@contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong with a bucket in the block becomes an OSError that names the path.

    A ValueError, of what was found there, and what is wrong with this machine's disk stay.

    Raises:
      UnreachableError: trying again may help.
      OSError: it will not: no such bucket, no permission.
    """
    try:
        yield
    except Exception as error:
        local = isinstance(error, OSError) and error.errno in _OF_DISKS
        if local or isinstance(error, ValueError | UnreachableError) or not is_in_bucket(path):
            raise
        bucket = os.fspath(path).split("/")[2]
        kind = UnreachableError if may_pass(error) else OSError
        raise kind(
            f"{os.fspath(path)} cannot be reached: {type(error).__name__}: {error}\nIs there a "
            f"bucket {bucket}, and may this account use it? Log in with: gcloud auth "
            "application-default login (a TPU VM has its service account)"
        ) from error


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
# TensorStore, which reads and writes checkpoints, has ValueErrors for all that goes wrong.
_PASSING = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|HTTP response code: (429|5\d\d)")
_LASTING = re.compile(r"UNAUTHENTICATED|PERMISSION_DENIED|HTTP response code: 40[13]")


def is_of_bucket(error: BaseException) -> bool:
    """Whether an error says that a bucket could not be used, not what was found in it."""
    theirs = type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google")
    lasting = isinstance(error, ValueError) and bool(_LASTING.search(str(error)))
    return theirs or lasting or may_pass(error)


def may_pass(error: BaseException) -> bool:
    """Whether an error is of a bucket and may be gone when it is tried again."""
    if isinstance(error, UnreachableError | TimeoutError | ConnectionError):
        return True
    if isinstance(error, ValueError) and _PASSING.search(str(error)):
        return True
    if type(error).__module__.startswith("aiohttp"):
        return True
    retry = sys.modules.get("gcsfs.retry")  # or the error is not its
    return retry is not None and retry.is_retriable(error)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file of this machine with the content of `path`: itself, or a copy for the block's time.

    Raises:
      OSError: it cannot be read; names it.
    """
    if not is_in_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="liftplace-") as folder:
        target = Path(folder) / path.name
        with reaching(path):
            _store().get_file(os.fspath(path), os.fspath(target))
        yield target


def upload(source: Path, target: Path) -> None:
    """Copies a file, or a folder with all in it, to a bucket; what is there is replaced.

    Raises:
      OSError: it cannot be written; names it.
    """
    files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
    with reaching(target):
        for file in sorted(files):
            place = os.fspath(target / file.relative_to(source))
            # Not by writing to an open file: one that is cut off would be closed, and so be there.
            _store().put_file(os.fspath(file), place, consistency="md5")


def created(path: Path, text: str) -> bool:
    """Writes an object that is not there yet; False: it is, and stays as it is.

    Raises:
      OSError: the bucket cannot be reached.
    """
    with reaching(path):
        try:
            _store().pipe_file(os.fspath(path), text.encode(), mode="create")
        except FileExistsError:
            return False
    return True


def version(path: Path) -> tuple[str, str] | None:
    """Numbers of an object that change when it is replaced, and when it is touched; None: none."""
    with reaching(path):
        try:
            facts = _store().info(os.fspath(path))
        except FileNotFoundError:
            return None
    return str(facts["generation"]), str(facts.get("metageneration"))


def touched(path: Path, generation: str, beat: int) -> bool:
    """Changes the second number of `version`, unless the object is gone or another one."""
    body = {"metadata": {"beat": str(beat)}}
    return _unless_another(path, generation, "PATCH", json=body)


def removed(path: Path, generation: str) -> bool:
    """Removes an object, unless it is gone or another one."""
    return _unless_another(path, generation, "DELETE")


def _unless_another(path: Path, generation: str, method: str, **options: Any) -> bool:
    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    with reaching(path):
        try:
            _store().call(
                method, "b/{}/o/{}", bucket, name, ifGenerationMatch=generation, **options
            )
        except (FileExistsError, FileNotFoundError):  # as gcsfs calls a failed condition
            return False
    return True


def fetched(files: Iterable[Path], cache: str | os.PathLike | None = None) -> None:
    """Copies files of a bucket to this machine, but for those that are there already.

    Processes of one host share the copies. A file that has changed in the bucket, by its checksum,
    is copied anew.

    Args:
      files: of a bucket.
      cache: see `cached`.

    Raises:
      OSError: they cannot be read, or there is too little room; names the path.
    """
    folders: dict[Path, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file.name)
    root = cached("", cache)
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others of this host wait, and find them there
        for folder, names in folders.items():
            with reaching(folder):
                _fetch(folder, names, cached(folder, cache))


_TOGETHER = 16  # files that are copied at a time


def _fetch(folder: Path, names: list[str], target: Path) -> None:
    facts = _facts(folder)
    for name in names:
        if name not in facts:
            raise FileNotFoundError(f"{folder / name}: no such file")
    record = target / ".fetched.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    missing = [
        name
        for name in names
        if known.get(name) != facts[name]["crc32c"] or not (target / name).exists()
    ]
    target.mkdir(parents=True, exist_ok=True)
    needed, free = sum(facts[name]["size"] for name in missing), shutil.disk_usage(target).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e9:.3g} GB are needed, there are {free / 1e9:.3g} GB: name a folder with "
            "more room (config.data_cache), or mount the bucket",
            os.fspath(target),
        )
    for first in range(0, len(missing), _TOGETHER):
        now = missing[first : first + _TOGETHER]
        parts = [target / f".{name}.part" for name in now]
        _store().get([os.fspath(folder / name) for name in now], [os.fspath(p) for p in parts])
        for name, part in zip(now, parts, strict=True):
            if part.stat().st_size != facts[name]["size"]:
                raise UnreachableError(f"{folder / name} was cut off while it was copied")
            os.replace(part, target / name)
            known[name] = facts[name]["crc32c"]
        part = target / ".fetched.json.part"
        part.write_text(json.dumps(known))
        os.replace(part, record)


def cached(path: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """Where `fetched` puts a file of a bucket, or a folder's files.

    Args:
      path: of the bucket; "": the folder of all.
      cache: folder on this machine, default `CACHE`.
    """
    root = on_this_machine(cache or CACHE, "config.data_cache") / "gs"
    return root / os.fspath(path).removeprefix("gs://")
