"""The main job, which sends itself a signal at a chosen moment.

python tests/interrupted_main.py SIGNAL MOMENT --config=... --workdir=...

MOMENT: "teacher metrics 5" (its line 5 was just written), "scored 3" (the student's first score,
after two of the teacher; nothing saved), or a checkpoint that is being written in the background
while training has come to the next line of the metrics: "seed0 writing 3" (some of its arrays are
there), "teacher checkpoint 6" (all are, but it is not yet in its place or, in a bucket, not yet
marked as whole). Or, with the signal "none", modes: "teacher compress" runs these, one after the
other, in one process.
"""

import asyncio
import os
import signal
import sys
import threading

from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath
from orbax.checkpoint._src.serialization import serialization

from liftplace_jax import evaluation, main
from liftplace_jax.experiment import stages
from liftplace_jax.training.metrics_io import MetricsLog


def send_signal_at(number, moment):
    """Patches what happens at the moment."""
    where, kind, count = (["", *moment.split()])[-3:]

    def hit():
        os.kill(os.getpid(), number)

    write, rename, score, scored = MetricsLog.write, os.rename, evaluation.score, []
    mark, store = CommitFileTemporaryPath.finalize, serialization.async_serialize_from_host
    halted, never, stored = threading.Event(), threading.Event(), []

    def write_then(self, step, values):
        write(self, step, values)
        if self.folder.name != where:
            return
        if kind == "metrics" and step == int(count):
            hit()
        if kind in ("writing", "checkpoint") and step == int(count) + 1:
            halted.wait()
            hit()

    def halt_at(path):
        if kind == "checkpoint" and str(path).endswith(f"{where}/checkpoints/{count}"):
            halted.set()
            never.wait()

    def halt_then_rename(source, target, **options):
        halt_at(target)
        rename(source, target, **options)

    async def halt_then_mark(self, **options):
        halt_at(self.get_final())
        await mark(self, **options)

    async def store_some(slices, spec, **options):
        if kind == "writing" and f"{where}/checkpoints/{count}." in str(spec):
            stored.append(spec)
            if len(stored) > 9:
                halted.set()
                await asyncio.Event().wait()
        await store(slices, spec, **options)

    def score_then(*args, **options):
        scored.append(score(*args, **options))
        if kind == "scored" and len(scored) == int(count):
            hit()
        return scored[-1]

    MetricsLog.write, os.rename, evaluation.score = write_then, halt_then_rename, score_then
    CommitFileTemporaryPath.finalize = halt_then_mark
    serialization.async_serialize_from_host = store_some


def run_modes(modes):
    """Runs modes one after the other, as so many commands would."""
    run = stages.run

    def each(config, workdir, mode):
        for mode in modes:
            run(config, workdir, mode)

    stages.run = each


if __name__ == "__main__":
    name, moment = sys.argv[1:3]
    del sys.argv[1:3]
    if name == "none":
        run_modes(moment.split())
    else:
        send_signal_at(signal.Signals[name], moment)
    main.entry_point()
