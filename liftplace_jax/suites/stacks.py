"""What a device holds and moves where networks are stacks of blocks: compiled, and predicted.

    python -m liftplace_jax.suites.stacks [quick]

compiles steps for eight simulated devices, and prints what is in the programs as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from liftplace_jax.suites.peaks import PEAK_FLOPS
from liftplace_jax.suites.prediction import (
    DEVICES,
    PODS,
    UTILISATION,
    Pod,
    Row,
    example_flops,
    seconds_to_gather,
)

PODS_OF_STACKS = {
    "TPU v5e-16": PODS["TPU v5e-16"],
    "TPU v5e-64": Pod("TPU v5e", 64, wraps=False),  # 8x8
    "TPU v5p-16": Pod("TPU v5p", 8, wraps=False),  # the name counts cores; 2x2x2
    "8 H100": PODS["8 H100"],
}
MEMORY = {"TPU v5e": 16e9, "TPU v5p": 95e9, "H100": 80e9}
"""Bytes of a device, as its maker states."""
USABLE = 0.9
"""Share of a device's memory that a program gets: assumed."""
BATCH, STEPS = 128, 50_000
DEPTHS = (18, 12, 8, 6)
_HIDDEN, _SCORES = 24, 3  # see `_activations`


def rows_of_students() -> dict[str, Row]:
    """Students of SD3-medium as configs/sd3_mmdit.py has them, by name."""
    from liftplace_jax.suites.networks import pruned, published

    teacher = published("mmdit")["sd3-medium"]
    return {
        f"SD3 depth {depth}": Row(pruned(teacher, depth=depth), teacher, BATCH, STEPS, 0)
        for depth in DEPTHS
    }


class _Size:
    """Bytes of a network's parameters on a device.

    Attributes:
      held: of what every device keeps of it, with kernels split among `devices`.
      whole: of all.
      block: of its largest block, whole.
      rest: of what belongs to no block, whole.
    """

    def __init__(self, config: Any, params: Any, devices: int):
        import jax

        from liftplace_jax.host.sharding import parameter_name

        self.held = self.whole = 0.0
        blocks: dict[str, float] = {}
        for path, leaf in jax.tree.leaves_with_path(params):
            name, nbytes = parameter_name(path), leaf.size * leaf.dtype.itemsize
            is_split = "kernel" in name and leaf.shape[-1] % devices == 0
            self.held += nbytes / devices if is_split else nbytes
            self.whole += nbytes
            stack, number, *_ = [*name.split("."), ""]
            key = number if stack == config.STACK else ""
            blocks[key] = blocks.get(key, 0) + nbytes
        self.rest = blocks.pop("", 0)
        self.block = max(blocks.values())


def _activations(row: Row, examples: float) -> float:
    """Bytes of a step's activations in bfloat16, with blocks computed again: an estimate.

    Kept are what each student's block starts from and all features of both; of the block that is
    computed again _HIDDEN arrays of its width, and _SCORES of attention's scores in float32.
    """
    student, teacher = row.student.to_dict(), row.teacher.to_dict()
    width = teacher["num_heads"] * teacher["head_size"]
    image = (teacher["image_size"] // teacher["patch_size"]) ** 2
    tokens = image + teacher["context_tokens"]
    kept = student["depth"] * tokens + (student["depth"] + teacher["depth"]) * image
    scores = _SCORES * 4 * teacher["num_heads"] * tokens**2
    return examples * (2 * width * (kept + _HIDDEN * tokens) + scores)


def predict_memory(row: Row, pod: Pod, way: str) -> dict[str, Any]:
    """What a device of a pod holds and moves in a step of `BATCH` examples.

    Args:
      row: a student.
      pod: the devices.
      way: "whole": every device has all parameters; "split": kernels are split among all, and all
        of a network is gathered at once; "by block": one block is gathered at a time.

    Returns:
      Gigabytes of each kind, their sum, the device's memory, whether it fits at all; and the
      compute and the sending in milliseconds.
    """
    from liftplace_jax.nn import building
    from liftplace_jax.nn.network import kept_params

    device, count = DEVICES[pod.device], pod.count
    devices = 1 if way == "whole" else count
    student = _Size(row.student, building.abstract(row.student)[1], devices)
    teacher = _Size(row.teacher, kept_params(row.teacher, "bfloat16"), devices)
    # Parameters, their average and two moments; then gradients, and what the optimizer adds.
    held = {"state_gb": 4 * student.held, "teacher_gb": teacher.held}
    held["gradients_gb"] = 2 * student.held
    if way == "whole":
        gathered, moved = 0.0, 2 * student.whole
    elif way == "split":
        # Parameters and gradients of the student, and the teacher, whole.
        gathered, moved = 2 * student.whole + teacher.whole, 2 * student.whole + teacher.whole
    else:
        # Two blocks on their way, a gradient; the loops have copies of what they run over.
        gathered = max(3 * student.block, 2 * teacher.block) + 2 * student.rest + teacher.rest
        gathered += student.held + teacher.held
        moved = 3 * student.whole + teacher.whole
    held["gathered_gb"] = gathered
    examples = BATCH / count
    held["activations_gb"] = _activations(row, examples)
    total, memory = sum(held.values()), MEMORY[pod.device]
    compute = examples * (example_flops(row) + 2 * _macs(row.student))  # blocks computed again
    return {
        "way": way,
        "per_device": examples,
        **{k: v / 1e9 for k, v in held.items()},
        "total_gb": total / 1e9,
        "memory_gb": memory / 1e9,
        "fits": total < USABLE * memory,
        "moved_gb": moved * (1 - 1 / count) / 1e9,
        "moving_ms": 1e3 * seconds_to_gather(pod, moved),
        "compute_ms": 1e3 * compute / (PEAK_FLOPS[device.kind] * UTILISATION),
    }


def _macs(config: Any) -> int:
    from liftplace_jax.families.registry import count_macs

    return count_macs(config)


def predicted_rows() -> list[dict[str, Any]]:
    """`predict_memory` for every student, pod and way."""
    return [
        {"student": name, "pod": where} | predict_memory(row, pod, way)
        for name, row in rows_of_students().items()
        for where, pod in PODS_OF_STACKS.items()
        for way in ("whole", "split", "by block")
    ]


# Compiled -----------------------------------------------------------------------------------------


def measured_rows(quick: bool) -> list[dict[str, Any]]:
    """`compiled_rows` of a process that has eight simulated devices.

    Raises:
      RuntimeError: it failed; ends with what it said.
    """
    command = [sys.executable, "-m", "liftplace_jax.suites.stacks", *(["quick"] if quick else [])]
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compiled_rows(quick: bool) -> list[dict[str, Any]]:
    """Of steps compiled for the devices that there are: networks of SD3's depths, narrow ones."""
    return [{"way": way} | _compiled(way, quick) for way in ("split", "by block")]


def _compiled(way: str, quick: bool) -> dict[str, Any]:
    import jax
    import numpy as np

    from liftplace_jax.conditioning import Encoding
    from liftplace_jax.diffusion import make_process
    from liftplace_jax.experiment.configuration import default_config
    from liftplace_jax.families.registry import family_named
    from liftplace_jax.host import sharding
    from liftplace_jax.nn import building
    from liftplace_jax.nn.model_config import StackConfig
    from liftplace_jax.nn.network import Network
    from liftplace_jax.suites.communication import executed, total_bytes
    from liftplace_jax.suites.networks import pruned, published
    from liftplace_jax.training.distillation import student_objective
    from liftplace_jax.training.prepare import prepare

    sizes = {"depth": 4, "num_heads": 2} if quick else {"num_heads": 8}
    model = published("mmdit")["sd3-medium"].replace(
        image_size=8,
        head_size=32,
        context_dim=64,
        pooled_dim=64,
        position_size=4,
        context_tokens=8,
        **sizes,
    )
    assert isinstance(model, StackConfig), "an MMDiT is one"
    student = pruned(model, depth=model.depth // 2)
    config = default_config("mmdit")
    family_named("mmdit").preset(config)
    config.distill.batch_size = 8

    def network(config: Any) -> Network:
        return Network(
            config, *building.create(config, 0, np.float32, "nothing_saveable", None, True)
        )

    specs = (("context", (8, 64), "float32"), ("pooled", (64,), "float32"))
    texts = Encoding(specs, lambda params, columns: columns, 8, 64, 64)
    teacher, small = network(model), network(student)
    objective, params = student_objective(
        config,
        make_process(config.process),
        "lift_place_feature_kd",
        0,
        small,
        teacher,
        model.conditioning.bound(lambda pooled: texts),
    )
    null = {name: np.zeros(shape, np.float32) for name, shape, _ in specs}
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
    run = prepare(
        config.distill,
        objective,
        params,
        {"teacher": teacher.params, "text": {"null": null}},
        mesh,
        (("kernel", ("fsdp",)),),
        stack=model.STACK if way == "by block" else None,
    )
    batch = {"image": np.zeros((8, *model.shape), np.float32)}
    batch |= {name: np.zeros((8, *shape), np.float32) for name, shape, _ in specs}
    placed = next(iter(sharding.global_batches([batch], mesh)))
    compiled = run.step.lower(run.state, run.frozen, placed).compile()
    found, sent = compiled.memory_analysis(), executed(compiled)
    trees = {"student_mb": run.state.params, "teacher_mb": run.frozen["teacher"]}
    return {
        **{use: sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6 for use, tree in trees.items()},
        "arguments_mb": found.argument_size_in_bytes / 1e6,
        "temporary_mb": found.temp_size_in_bytes / 1e6,
        "gathered_mb": total_bytes(sent, lambda s: s.kind == "all-gather") / 1e6,
        "reduced_mb": total_bytes(sent, lambda s: s.kind != "all-gather") / 1e6,
    }


if __name__ == "__main__":
    print(json.dumps(compiled_rows("quick" in sys.argv[1:])))
