"""The main job in one process of a pod, on a small function instead of networks.

python tests/pod_main.py MOMENT --config=tests/tiny_config.py --workdir=... [flags of the runtime]

Flags, work directory, data, mesh, step, loop, checkpoints and exit are those of main; only what is
trained compiles in a second. MOMENT: "1 SIGTERM metrics 7" (process 1 gets the signal at step 7),
"0 SIGKILL checkpoint 9" (as in interrupted_main.py) or "none". The state at the end is in
final.npz. Or "networks": nothing is replaced or sent.
"""

import signal
import sys

import interrupted_main
import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax import main
from liftplace_jax.experiment import stages
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.experiment.training import run_training
from liftplace_jax.host import files, processes, sharding
from liftplace_jax.host.locks import locked
from liftplace_jax.training.state import random_key


def loss_fn(params, frozen, batch, step):
    """How well two layers undo noise."""
    images = batch["image"].reshape(len(batch["image"]), -1)
    noisy = images + jax.random.normal(random_key(0, "noise", step), images.shape)
    student = params["student"]
    outputs = jnp.tanh(noisy @ student["inner"]) @ student["outer"]
    return jnp.square(outputs - images).mean(), {}


def run(config, workdir, mode):
    """20 steps of the teacher's fields."""
    config.teacher.update(steps=20, checkpoint_every=5)
    config.sharding_rules = (("inner", ("fsdp",)), ("outer", ("fsdp", None)))
    with locked(workdir):
        train(open_experiment(config, workdir), workdir)


def train(experiment, workdir):
    fields = experiment.config.teacher
    processes.log_to(workdir / "logs")
    keys = jax.random.split(jax.random.key(0))
    student = {
        "inner": jax.random.normal(keys[0], (64, 16)) / 8,
        "outer": jax.random.normal(keys[1], (16, 64)) / 8,
    }
    state = run_training(
        experiment,
        fields,
        loss_fn,
        {"student": student},
        {},
        0,
        workdir / "teacher",
        "teacher",
        None,
    )
    leaves = jax.tree_util.tree_flatten_with_path(sharding.gathered(state))[0]
    if processes.is_first():
        files.write_npz(
            workdir / "final.npz",
            {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
        )
    processes.wait_for(workdir / "final.npz")


if __name__ == "__main__":
    moment = sys.argv.pop(1).split(maxsplit=2)
    if len(moment) > 1 and f"--process_id={moment[0]}" in sys.argv:
        interrupted_main.send_signal_at(signal.Signals[moment[1]], f"teacher {moment[2]}")
    if moment != ["networks"]:
        stages.run = run
    main.entry_point()
