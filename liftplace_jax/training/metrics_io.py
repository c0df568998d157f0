"""Metrics of a run: JSON lines always, TensorBoard on request, one live line on the terminal."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from liftplace_jax.host.buckets import as_path, is_in_bucket, upload
from liftplace_jax.host.files import replacing, unwritable

_UPLOAD_SECONDS = 60


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard event files in a folder; process 0 does.

    Files of a bucket cannot grow: they are written on this machine, and uploaded now and then and
    by `flush`.
    """

    def __init__(self, folder: str | os.PathLike, start_step: int, tensorboard: bool):
        """Opens the log; lines after `start_step` (of a run that was cut off) are dropped.

        Args:
          folder: where to write; made if missing.
          start_step: the step from which training goes on.
          tensorboard: whether to write event files too.

        Raises:
          ValueError: a line that is there already is damaged, see `read_metrics`.
          OSError: the folder cannot be written.
        """
        self.folder = as_path(folder)
        self._file = self._board = self._scratch = None
        self._new = True  # since the last upload
        if jax.process_index() > 0:
            return
        local = self.folder
        if is_in_bucket(self.folder):
            self._scratch = tempfile.TemporaryDirectory(prefix="liftplace-")
            local = Path(self._scratch.name)
        local.mkdir(parents=True, exist_ok=True)
        path = local / "metrics.jsonl"
        kept = [row for row in read_metrics(self.folder) if row["step"] <= start_step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("ab", buffering=0)  # a full disk is noticed at once
        self._step = start_step
        self._seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        self._clock = self._uploaded = time.monotonic()
        if tensorboard:
            # Late: for those who want none, TensorBoard need not be installed.
            from liftplace_jax.training.event_files import EventFile, forget_later

            forget_later(self.folder, start_step)
            self._board = EventFile(local, start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {"step": ..., name: value, ...}, with the run's seconds and its rate.

        Raises:
          OSError: it cannot be written; names the file.
        """
        if self._file is None:
            return
        now = time.monotonic()
        self._seconds += now - self._clock
        values = dict(values) | {
            "seconds": self._seconds,
            "steps_per_second": (step - self._step) / (now - self._clock),
        }
        self._clock, self._step = now, step
        try:
            line = (json.dumps({"step": step} | values) + "\n").encode()
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise unwritable(self._file.name, error) from error
        if self._board is not None:
            self._board.write(step, values)
        self._new = True
        if now - self._uploaded > _UPLOAD_SECONDS:
            self._try_to_flush()

    def flush(self) -> None:
        """Everything written so far is in the folder, as a checkpoint after it relies on.

        Raises:
          OSError: a bucket cannot be reached.
        """
        if self._board is not None:
            self._board.flush()
        if self._scratch is not None and self._new:
            self._uploaded = time.monotonic()
            upload(Path(self._scratch.name), self.folder)
            self._new = False

    def _try_to_flush(self) -> None:
        try:
            self.flush()
        except OSError as error:  # no reason to end a run before the next checkpoint
            print(f"metrics were not uploaded: {error}", file=sys.stderr)

    def close(self) -> None:
        """Flushes, if it can, and closes."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:  # the run's own error, or its end, counts more
                print(error, file=sys.stderr)
            self._board = None
        if self._scratch is not None:
            self._try_to_flush()
            self._scratch.cleanup()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a folder's metrics.jsonl; a last line that was cut off is left out.

    Raises:
      ValueError: another line is not {"step": ..., name: number, ...}; names it.
    """
    path = as_path(folder) / "metrics.jsonl"
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    *lines, last = text.split("\n")
    rows = []
    for number, line in enumerate([*lines, last] if _is_row(last) else lines, 1):
        if not _is_row(line):
            raise ValueError(
                f"{path}, line {number} is no line of metrics: {line[:80]!r}. Delete that line, or "
                "the file"
            )
        rows.append(json.loads(line))
    return rows


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) for value in row.values())
    )
