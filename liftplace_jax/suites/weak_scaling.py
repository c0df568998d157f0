"""A train step for suite "scaling" in a process of its own, which has simulated devices.

    python -m liftplace_jax.suites.weak_scaling DEVICES [quick]

Prints a line of JSON when it is ready, then runs a step for each line of its input and answers it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

EXAMPLES = 8  # of a device


class Worker:
    """Such a process, ended with the block.

    Args:
      devices: simulated ones.
      quick: a tiny network.

    Attributes:
      facts: {"devices", "batch", "reduced_mb": of all that devices send each other in a step, read
        from the compiled program, "parameters_mb": of the student}.

    Raises:
      RuntimeError: (also by `step`) the process failed; ends with what it said.
    """

    def __init__(self, devices: int, quick: bool):
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
        self._command = [sys.executable, "-m", "liftplace_jax.suites.weak_scaling", str(devices)]
        self._command += ["quick"] if quick else []
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def __enter__(self) -> Worker:
        try:
            self.facts: dict[str, Any] = json.loads(self._answer())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def step(self) -> None:
        """Runs one step, and waits for it."""
        print(file=self._process.stdin, flush=True)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None, "a pipe, as was asked for"
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip()[-2000:]
            raise RuntimeError(f"{' '.join(self._command)} failed: {said}")
        return line


def prepare_step(devices: int, quick: bool) -> tuple[dict[str, Any], Callable[[], None]]:
    """What a `Worker` tells of a LIFT + PLACE step on digits, and a call that runs one."""
    import jax
    import numpy as np

    from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
    from liftplace_jax.experiment.configuration import default_config
    from liftplace_jax.host import sharding
    from liftplace_jax.suites.communication import collectives, total_bytes
    from liftplace_jax.suites.measuring import random_network
    from liftplace_jax.suites.networks import pruned
    from liftplace_jax.suites.steps import DIGITS
    from liftplace_jax.training.distillation import student_objective
    from liftplace_jax.training.prepare import prepare

    config = default_config()
    batch = devices * EXAMPLES
    model = DIGITS.replace(ch=8, ch_mult=(1,), attn_resolutions=()) if quick else DIGITS
    teacher, student = random_network(model), random_network(pruned(model, ratio=0.5))
    process = GaussianDiffusion(beta_schedule("linear", 1000))
    objective, params = student_objective(config, process, "lift_place", 0, student, teacher)
    mesh = sharding.make_mesh({"data": devices})
    run = prepare(config.distill, objective, params, {"teacher": teacher.params}, mesh, ())
    shape = (batch, model.image_size, model.image_size, model.in_channels)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    examples = next(iter(sharding.global_batches([{"image": images}], mesh)))
    step = run.step.lower(run.state, run.frozen, examples).compile()
    state = run.state

    def call():
        nonlocal state
        state, metrics = step(state, run.frozen, examples)
        jax.block_until_ready((state, metrics))

    return {
        "devices": devices,
        "batch": batch,
        "reduced_mb": total_bytes(collectives(step)) / 1e6,
        "parameters_mb": sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6,
    }, call


def main() -> None:
    """The process."""
    facts, call = prepare_step(int(sys.argv[1]), "quick" in sys.argv[2:])
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        call()
        print("done", flush=True)


if __name__ == "__main__":
    main()
