"""One live line on the terminal, with rate and ETA."""

from __future__ import annotations

import atexit
import sys
import threading
import time

import jax
import tqdm


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
            self.write(
                f"{self._title()}compiled, and did the first {unit}, in {seconds:.0f} s",
                file=self.fp,
            )
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
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        dynamic_ncols=live,
        mininterval=0.2 if live else 30,
        maxinterval=0.2 if live else 60,
        disable=jax.process_index() > 0,
    )
