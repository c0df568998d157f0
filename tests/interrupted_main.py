"""The main job, which sends itself a signal at a chosen moment.

python tests/interrupted_main.py SIGNAL MOMENT --config=... --workdir=...

MOMENT: "teacher metrics 5" (its line 5 was just written), "student checkpoint 6" (all written, but
not yet in its place or, in a bucket, not yet marked as whole), or "scored 3" (the student's first
score, after two of the teacher; nothing saved). Or, with the signal "none", modes: "teacher
compress" runs these, one after the other, in one process.
"""

import os
import signal
import sys

from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath

from liftplace_jax import evaluation, main
from liftplace_jax.experiment import stages
from liftplace_jax.training.metrics_io import MetricsLog


def send_signal_at(number, moment):
    """Patches what happens at the moment."""
    where, kind, count = (["", *moment.split()])[-3:]

    def hit():
        os.kill(os.getpid(), number)

    write, rename, score, scored = MetricsLog.write, os.rename, evaluation.score, []
    mark = CommitFileTemporaryPath.finalize

    def write_then(self, step, values):
        write(self, step, values)
        if kind == "metrics" and self.folder.name == where and step == int(count):
            hit()

    def hit_then_rename(source, target, **options):
        if kind == "checkpoint" and str(target).endswith(f"{where}/checkpoints/{count}"):
            hit()
        rename(source, target, **options)

    async def hit_then_mark(self, **options):
        if kind == "checkpoint" and str(self.get_final()).endswith(f"{where}/checkpoints/{count}"):
            hit()
        await mark(self, **options)

    def score_then(*args, **options):
        scored.append(score(*args, **options))
        if kind == "scored" and len(scored) == int(count):
            hit()
        return scored[-1]

    MetricsLog.write, os.rename, evaluation.score = write_then, hit_then_rename, score_then
    CommitFileTemporaryPath.finalize = hit_then_mark


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
