"""One run at a time in a work directory.

On this machine, and on a file system that hosts share, a file is locked by the operating system,
which frees it when the process dies. A bucket has no locks: there an object names the holder, who
touches it now and then; one that nobody touches is taken over. Whoever only reads locks nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liftplace_jax.host import buckets, processes
from liftplace_jax.host.buckets import UnreachableError, is_in_bucket

NAME = ".lock"
_BEAT, _SILENCE = 20, 65  # seconds between two touches; without any for so long, the holder is dead


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """No other run has a work directory within the block; process 0 of a pod locks for all.

    Args:
      folder: made if missing, and removed again if the block leaves nothing in it.

    Yields:
      Whether that is certain: not where the file system has no locks, which is said.

    Raises:
      ValueError: another run has it; says which. Nothing was written then.
      OSError: it cannot be written, or its bucket cannot be reached.
    """
    lock, error = None, None
    if processes.is_first():
        try:
            lock = (_ObjectLock if is_in_bucket(folder) else _FileLock)(folder)
        except (OSError, ValueError) as found:
            error = found
    if processes.told_by_first(lambda: error is not None):
        if processes.told_by_first(lambda: isinstance(error, UnreachableError)):
            raise error or UnreachableError(f"process 0 cannot reach {folder}, and says why")
        raise error or ValueError(f"process 0 cannot use {folder}, and says why")
    try:
        yield processes.told_by_first(lambda: lock is not None and lock.is_certain)
    finally:
        if lock:
            lock.release()


class _FileLock:
    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder: choose another --workdir")
        self._path, self.is_certain = folder / NAME, True
        # Those that are made here, the innermost first.
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            self._remove_made()
            raise OSError(f"the work directory cannot be written: {error}") from error
        try:
            self._write()
        except OSError as error:
            self.release()
            raise OSError(f"{self._path} cannot be written: {error}") from error
        except BaseException:
            os.close(self._file)
            raise

    def _open(self) -> int:
        """The file, locked, if nobody else has it."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise ValueError(f"{self._path} is no file: delete it")
                self._lock(file)
                if self._is_still(file):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its holder has just ended, and removed it

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(self._path.parent, os.pread(file, 10_000, 0)) from error
        except OSError as error:
            self.is_certain = False
            print(
                f"{self._path.parent} cannot be locked ({error.strerror}): make sure that no other "
                "run uses it",
                file=sys.stderr,
            )

    def _is_still(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _write(self) -> None:
        holder, left = _holder(), _read(os.pread(self._file, 10_000, 0))
        if left and left["host"] != holder["host"]:
            print(
                f"{self._path.parent}: taken over from {_described(left)}; if that still runs, "
                "this file system shares no locks between hosts: end one of the two",
                file=sys.stderr,
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # there is something in it
            for folder in self._made:
                folder.rmdir()


class _ObjectLock:
    is_certain = True

    def __init__(self, folder: Path):
        self._path, self._text = folder / NAME, json.dumps(_holder())
        while not buckets.created(self._path, self._text):
            if self._content() == self._text.encode():
                break  # the answer was lost, and gcsfs asked again
            self._wait_for_death()
        found = buckets.version(self._path)
        if found is None or self._content() != self._text.encode():
            raise _in_use(folder, self._content())
        self._generation, self._ended = found[0], threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def _content(self) -> bytes:
        with buckets.reaching(self._path):
            try:
                return self._path.read_bytes()
            except FileNotFoundError:
                return b""

    def _wait_for_death(self) -> None:
        """Removes the lock of a holder that is dead.

        Raises:
          ValueError: it is alive.
        """
        before, holder = buckets.version(self._path), _read(self._content())
        if before is None:
            return
        if not _has_died_here(holder):
            end = time.monotonic() + _SILENCE
            print(
                f"{self._path.parent} was taken by {_described(holder)}: waiting for a sign of "
                f"life, {_SILENCE} s at most",
                file=sys.stderr,
            )
            while time.monotonic() < end:
                time.sleep(min(1, _SILENCE / 10))
                now = buckets.version(self._path)
                if now is None:
                    return
                if now != before:
                    raise _in_use(self._path.parent, self._content())
        buckets.removed(self._path, before[0])

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(_BEAT):
            number += 1
            with contextlib.suppress(OSError):  # a bucket that is away for a while
                if not buckets.touched(self._path, self._generation, number):
                    print(
                        f"{self._path.parent}: another run has taken this one for dead, and its "
                        "place: end one of the two",
                        file=sys.stderr,
                    )
                    return

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then it is found untouched
            buckets.removed(self._path, self._generation)


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.orig_argv)[:500],
        "machine": _machine(),
        "id": os.urandom(4).hex(),
    }


def _machine() -> str:
    """Where a process number means something: the machine since its start, or its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_died_here(holder: dict[str, Any] | None) -> bool:
    """Whether a holder is a process of this machine that is gone."""
    if not holder or not _machine() or holder.get("machine") != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _read(content: bytes) -> dict[str, Any] | None:
    """A holder, or None if that is not what was written."""
    try:
        found = json.loads(content)
        if isinstance(found["pid"], int) and isinstance(found["host"], str):
            return found
    except (ValueError, LookupError, TypeError):
        pass
    return None


def _described(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "another run, which has not said who it is"
    return (
        f"process {holder['pid']} on {holder['host']}, since {holder.get('since')} "
        f"({holder.get('command')})"
    )


def _in_use(folder: Path, content: bytes) -> ValueError:
    return ValueError(
        f"{folder} is in use by {_described(_read(content))}: wait for its end, end it, or choose "
        "another --workdir"
    )
