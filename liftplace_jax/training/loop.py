"""The one training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from liftplace_jax.host.processes import Agreement
from liftplace_jax.host.progress import progress
from liftplace_jax.training.checkpoints import Checkpoints
from liftplace_jax.training.metrics_io import MetricsLog
from liftplace_jax.training.state import TrainState
from liftplace_jax.training.step import FINITE


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: a checkpoint was saved, the same command goes on from there."""


class NonFiniteLossError(ValueError):
    """A loss term is NaN or infinite; the message names the step and the term."""


def train(
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, Mapping[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    make_batches: Callable[[int], Generator[Any]],
    *,
    total_steps: int,
    folder: Path,
    title: str,
    shardings: TrainState | None = None,
    log_every: int = 50,
    checkpoint_every: int = 500,
    tensorboard: bool = False,
    on_log: Callable[[int, TrainState], Mapping[str, float]] | None = None,
) -> TrainState:
    """Trains to `total_steps`, from the newest checkpoint in `folder` if there is one.

    Args:
      step_fn: of `make_train_step`.
      state: at step 0; given up to the loop.
      frozen: handed to every step, never saved.
      make_batches: first step -> endless batches from there.
      total_steps: number of optimizer updates in all.
      folder: of checkpoints and metrics.
      title: of the progress line.
      shardings: of the state, for restoring.
      log_every: steps between lines of metrics.
      checkpoint_every: steps between checkpoints, which are written in the background; the last
        step is always saved, and however the loop ends, it waits for what is being written.
      tensorboard: see `MetricsLog`.
      on_log: (step, state) -> more metrics, called at the steps whose metrics are written.

    Returns:
      The state after `total_steps`.

    Raises:
      Interrupted: a signal came; the state is saved.
      NonFiniteLossError: a term is not finite; the last checkpoint is from before that.
      OSError: a checkpoint cannot be written; one that was written in the background says so when
        the next is due, or at the end.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    first = checkpoints.latest_step() or 0
    if first:
        abstract = jax.eval_shape(lambda: state)
        jax.tree.map(lambda x: x.delete(), state)  # two states at once may not fit
        state = checkpoints.restore(abstract, shardings)
    _say_where(title, first, checkpoints.unfinished)
    log = MetricsLog(folder, first, tensorboard)
    batches = make_batches(first)
    agreed = Agreement()  # several processes save the same step, whoever got the signal
    bar = progress(title, total_steps, first)
    try:
        with _Signals() as signals, checkpoints:
            # The order matters for exact resume: batch, step, check, log, save.
            last = _LastStep(log, bar)
            for step in range(first + 1, total_steps + 1):
                with last.said_first():
                    batch = next(batches)
                state, metrics = step_fn(state, frozen, batch)
                bar.update()
                # The step before: by now it is done, so looking at it does not stall devices.
                last.settle()
                last.hold(step, metrics)
                if step % log_every == 0 or step in (1, total_steps):
                    with last.said_first():
                        last.more = dict(on_log(step, state) if on_log else {})
                stop = agreed(signals.received)  # one that comes later waits for the next step
                at_end = stop or step == total_steps
                if at_end or step % checkpoint_every == 0:
                    last.settle()
                    log.flush()
                    checkpoints.save(step, state, background=not at_end)
                if stop:
                    raise Interrupted(f"{title}: {signal.Signals(stop).name} at step {step}")
            agreed(signals.received)
            if stop := agreed(signals.received):
                raise Interrupted(f"{title}: {signal.Signals(stop).name} after the last step")
    finally:
        bar.close()
        log.close()
        batches.close()
    return state


def _say_where(title: str, first: int, unfinished: list[str]) -> None:
    """On stderr, from where a run that was cut off goes on."""
    if jax.process_index() == 0 and (first or unfinished):
        line = f"{title}: goes on " + (f"from step {first}" if first else "from the start")
        if unfinished:
            steps = ", ".join(name.partition(".")[0] for name in unfinished)
            line += f"; the checkpoint of step {steps} was not finished and is ignored"
        print(line, file=sys.stderr)


class _LastStep:
    """The step that devices may still be at: it is looked at, and logged, when the next is sent.

    Attributes:
      more: metrics that the log gets beside those of the step; None: it is not logged.
    """

    def __init__(self, log: MetricsLog, bar: Any):
        self._log, self._bar = log, bar
        self._held: tuple[int, Mapping[str, jax.Array]] | None = None
        self.more: dict[str, float] | None = None

    def hold(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._held, self.more = (step, metrics), None

    def settle(self) -> None:
        """Waits for the step, if none has yet.

        Raises:
          NonFiniteLossError: a term is not finite.
        """
        if self._held is None:
            return
        (step, metrics), more = self._held, self.more
        self._held = None
        if more is None and jax.device_get(metrics[FINITE]):
            return  # one flag is all that was fetched
        values = _checked(step, metrics)
        if more is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4g}", refresh=False)
            self._log.write(step, values | more)

    @contextlib.contextmanager
    def said_first(self) -> Iterator[None]:
        """If the block fails, what the step had to say is said before."""
        try:
            yield
        except Exception:
            self.settle()
            raise


def _checked(step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    fetched = jax.device_get({name: x for name, x in metrics.items() if name != FINITE})
    values = {name: float(value) for name, value in fetched.items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        shown = ", ".join(f"{name}={values[name]}" for name in bad)
        raise NonFiniteLossError(
            f"step {step}: {shown}. The last checkpoint is from before; look at the data, or "
            "lower the learning rate."
        )
    return values


class _Signals:
    """Within the block, Ctrl-C and SIGTERM are noted instead of acted upon; twice is at once."""

    def __init__(self):
        self.received = 0  # its number
        self._old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        del frame
