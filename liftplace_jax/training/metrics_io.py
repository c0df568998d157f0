"""Metrics of a run: JSON lines always, TensorBoard on request, one live line on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import tqdm

from liftplace_jax.files import unwritable


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard event files in a folder; process 0 does."""

    def __init__(self, folder: str | os.PathLike, start_step: int, tensorboard: bool):
        """Opens the log; lines after `start_step` (of a run that was cut off) are dropped.

        Args:
          folder: where to write; made if missing.
          start_step: the step from which training goes on.
          tensorboard: whether to write event files too.
        """
        self.folder = Path(folder)
        self._file = self._board = None
        if jax.process_index() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= start_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = path.open("ab", buffering=0)  # a full disk is noticed at once
        self._step = start_step
        self._seconds = kept[-1]["seconds"] if kept else 0.0
        self._clock = time.monotonic()
        if tensorboard:
            # Late: TensorFlow takes seconds to import.
            import tensorflow as tf
            from clu import metric_writers

            tf.config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
            self._board = metric_writers.SummaryWriter(os.fspath(folder))

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
            self._board.write_scalars(step, values)

    def close(self) -> None:
        """Flushes and closes."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a folder's metrics.jsonl; a last line that was cut off is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def progress(title: str, total: int, done: int = 0, unit: str = "step") -> tqdm.tqdm:
    """One live line with rate and ETA; on a log file a line every half minute; of process 0."""
    live = sys.stderr.isatty()
    return tqdm.tqdm(
        total=total, initial=done, desc=title, unit=unit, dynamic_ncols=live,
        mininterval=0.2 if live else 30, maxinterval=0.2 if live else 60,
        disable=jax.process_index() > 0,
    )  # fmt: skip
