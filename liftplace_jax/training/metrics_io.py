"""Metrics of a run: JSON lines always, TensorBoard on request, one live line on the terminal."""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import tqdm

from liftplace_jax.host.buckets import as_path, is_in_bucket, upload
from liftplace_jax.host.files import unwritable

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
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = path.open("ab", buffering=0)  # a full disk is noticed at once
        self._step = start_step
        self._seconds = kept[-1]["seconds"] if kept else 0.0
        self._clock = self._uploaded = time.monotonic()
        if tensorboard:
            # Late: TensorFlow takes seconds to import.
            import tensorflow as tf
            from clu import metric_writers

            tf.config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
            self._board = metric_writers.SummaryWriter(os.fspath(local))

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
            self._board.close()
            self._board = None
        if self._scratch is not None:
            self._try_to_flush()
            self._scratch.cleanup()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a folder's metrics.jsonl; a last line that was cut off is left out."""
    path = as_path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Progress(tqdm.tqdm):
    """A live line that says when a program compiles, and for how long; see `progress`.

    The time of such an item is part of neither rate nor ETA.
    """

    _since: float | None = None  # when what compiles began; tqdm shows the line in its __init__

    def __init__(self, **options):
        self._since, self._over = time.time(), threading.Event()
        super().__init__(**options)
        self._show_seconds()

    def compiles(self) -> None:
        """The next item does, as the first one always does."""
        if self._since is None and not self.disable:
            self._since, self._over = time.time(), threading.Event()
            self.refresh()
            self._show_seconds()

    def update(self, n: float = 1) -> bool | None:
        """Moves on by n items."""
        if self._since is None or self.disable:
            return super().update(n)
        seconds, self._since = time.time() - self._since, None
        self._stop()
        self.n += n
        self.initial += n
        self.start_t = min(self.start_t + seconds, time.time())
        self.last_print_n, self.last_print_t = self.n, time.time()
        if seconds >= 1:
            unit = self.unit if n == 1 else f"{n} {self.unit}s"
            self.write(f"{self._title()}compiled, and did the first {unit}, in {seconds:.0f} s",
                       file=self.fp)  # fmt: skip
        return self.refresh()

    def close(self) -> None:
        """Ends the line."""
        self._stop()
        super().close()

    def __str__(self) -> str:
        if self._since is None:
            return super().__str__()
        return f"{self._title()}compiling ... {time.time() - self._since:.0f} s"

    def _title(self) -> str:
        return f"{self.desc.removesuffix(': ')}: "  # set_description adds the colon, __init__ not

    def _show_seconds(self) -> None:
        if self.disable:
            return
        every = max(1, self.mininterval)

        def show(over):
            while not over.wait(every):
                self.refresh()

        self._thread = threading.Thread(target=show, args=(self._over,), daemon=True)
        self._thread.start()
        # A thread that prints must not outlive the interpreter.
        atexit.register(self._stop)

    def _stop(self) -> None:
        self._over.set()
        if thread := self.__dict__.pop("_thread", None):
            thread.join()
            atexit.unregister(self._stop)


def progress(title: str, total: int, done: int = 0, unit: str = "step") -> Progress:
    """One live line with rate and ETA; on a log file a line every half minute; of process 0.

    Args:
      title: before it.
      total: of all items.
      done: of these, before.
      unit: what an item is called.
    """
    live = sys.stderr.isatty()
    return Progress(
        total=total, initial=done, desc=title, unit=unit, dynamic_ncols=live,
        mininterval=0.2 if live else 30, maxinterval=0.2 if live else 60,
        disable=jax.process_index() > 0,
    )  # fmt: skip
