"""Files of a bucket (gs://...) where a program wants those of this machine.

A path of a bucket is etils' `epath.Path`, one of this machine a `pathlib.Path`: both have the same
methods. An object of a bucket appears whole or not at all, and can be replaced but not appended to.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# Otherwise etils takes TensorFlow's file systems wherever TensorFlow is installed: seconds to
# import, and their errors are no OSErrors.
os.environ.setdefault("EPATH_USE_TF", "0")

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
        return Path(text).expanduser()
    if scheme != "gs":
        raise ValueError(f"{text}: paths are those of this machine or gs://, not {scheme}://")
    if find_spec("gcsfs") is None:
        raise ValueError(f"{text}: buckets need gcsfs: pip install 'liftplace_jax[gcs]'")
    import fsspec.config

    # Another host may have written since.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


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


def make_folder(path: Path) -> None:
    """Makes a folder if missing; in a bucket there are none (and gcsfs would make the bucket)."""
    if not is_in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong with a bucket in the block becomes an OSError that names the path.

    A ValueError, of what was found there, stays as it is.
    """
    try:
        yield
    except Exception as error:  # gcsfs and google.auth have errors of their own
        if isinstance(error, ValueError) or not is_in_bucket(path):
            raise
        bucket = os.fspath(path).split("/")[2]
        raise OSError(
            f"{os.fspath(path)} cannot be reached: {type(error).__name__}: {error}\nIs there a "
            f"bucket {bucket}, and may this account use it? Log in with: gcloud auth "
            "application-default login (a TPU VM has its service account)"
        ) from error


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
            path.copy(target)
        yield target


def upload(source: Path, target: Path) -> None:
    """Copies a file, or a folder with all in it, to a bucket; what is there is replaced.

    Raises:
      OSError: it cannot be written; names it.
    """
    files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
    with reaching(target):
        for file in sorted(files):
            epath.Path(file).copy(target / file.relative_to(source), overwrite=True)


def fetched(files: Iterable[Path], cache: str | os.PathLike | None = None) -> None:
    """Copies files of a bucket to this machine, but for those that are there already.

    For data that never change: a file of the same size is taken for the same. Processes of one
    host share the copies.

    Args:
      files: of a bucket.
      cache: see `cached`.

    Raises:
      OSError: they cannot be read, or there is too little room; names the path.
    """
    files = list(files)
    root = cached("", cache)
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others of this host wait, and find them there
        missing = []
        for file in files:
            with reaching(file):
                size = file.stat().length
            target = cached(file, cache)
            if not target.exists() or target.stat().st_size != size:
                missing.append((file, target, size))
        needed, free = sum(size for *_, size in missing), shutil.disk_usage(root).free
        if needed > free:
            raise OSError(
                f"{files[0].parent} takes {needed / 1e9:.3g} GB, {root} has {free / 1e9:.3g} GB "
                "left: name a folder with more room (config.data_cache), or mount the bucket"
            )
        for file, target, _ in missing:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                with reaching(file):
                    file.copy(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)


def cached(path: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """Where `fetched` puts a file of a bucket, or a folder's files.

    Args:
      path: of the bucket; "": the folder of all.
      cache: folder on this machine, default `CACHE`.
    """
    root = Path(cache or CACHE).expanduser() / "gs"
    return root / os.fspath(path).removeprefix("gs://")
