"""Suite "scaling": weak scaling over simulated devices, and what is expected of pods."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import tqdm

from liftplace_jax.suites import prediction, stacks, weak_scaling
from liftplace_jax.suites.options import Options, Result
from liftplace_jax.suites.timing import Timing, milliseconds, time_side_by_side

COUNTS, QUICK_COUNTS = (1, 2, 4, 8), (2,)
PREDICTED_FORMATS = {
    "global_batch": ",", "compute_ms": ".1f", "dp_mb": ".1f", "dp_ms": ".2f",
    "dp_efficiency": ".1%", "dp_overlapped": ".1%", "fsdp_mb": ".1f", "fsdp_ms": ".2f",
    "fsdp_efficiency": ".1%", "fsdp_overlapped": ".1%", "images_per_s_host": ",.0f",
    "batch_for_90": ".2f",
}  # fmt: skip
COST_FORMATS = {"batch": ",", "steps": ",", "flops": ".2e"} | {
    f"{kind} hours": ",.0f" for kind in prediction.DEVICES
}
STACK_FORMATS = {
    "per_device": ",.0f", "state_gb": ".1f", "teacher_gb": ".1f", "gradients_gb": ".1f",
    "gathered_gb": ".1f", "activations_gb": ".1f", "total_gb": ".1f", "memory_gb": ".0f",
    "moved_gb": ".1f", "moving_ms": ".0f", "compute_ms": ".0f",
}  # fmt: skip
COMPILED = ("student_mb", "teacher_mb", "arguments_mb", "temporary_mb", "gathered_mb", "reduced_mb")


def run(options: Options) -> Result:
    """Measures a step on 1, 2, 4 and 8 simulated devices; quick: on 2, of a tiny net."""
    counts = QUICK_COUNTS if options.quick else COUNTS
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(weak_scaling.Worker(count, options.quick))
            for count in tqdm.tqdm(counts, desc="scaling", unit="mesh")
        ]
        calls = {str(worker.facts["devices"]): worker.step for worker in workers}
        times = time_side_by_side(calls, options.repeats)
    costs = prediction.run_costs()
    return {
        "title": "Scaling: measured on simulated devices, predicted for pods",
        "columns": [
            "devices",
            "batch",
            "step_ms",
            "images_per_s",
            "shared_cores_efficiency",
            "reduced_mb",
            "parameters_mb",
        ],
        "formats": {
            "images_per_s": ".4g",
            "shared_cores_efficiency": ".1%",
            "reduced_mb": ".3f",
            "parameters_mb": ".3f",
        },
        "rows": _rows([worker.facts for worker in workers], list(times.values())),
        "tables": {
            "predicted": {
                "title": "Predicted steps on pods",
                "rows": prediction.predicted_rows(),
                "columns": ["student", "pod", *PREDICTED_FORMATS],
                "formats": PREDICTED_FORMATS,
            },
            "stacks": {
                "title": "Predicted memory of a device, SD3-medium's students",
                "rows": stacks.predicted_rows(),
                "formats": STACK_FORMATS,
                "columns": ["student", "pod", "way", *STACK_FORMATS, "fits"],
            },
            "stacks_compiled": {
                "title": "Steps of narrow MMDiTs compiled for 8 simulated devices",
                "rows": stacks.measured_rows(options.quick),
                "columns": ["way", *COMPILED],
                "formats": dict.fromkeys(COMPILED, ".2f"),
            },
            "costs": {
                "title": "Device-hours of the published trainings of students",
                "rows": costs,
                "columns": list(costs[0]),
                "formats": COST_FORMATS,
            },
            "assumptions": {
                "title": "What the predictions assume",
                "rows": prediction.assumptions(),
                "columns": ["assumption", "value", "source"],
            },
        },
        "notes": [
            f"Measured: the simulated devices share {os.cpu_count()} cores, so that n devices with "
            "n times the work can at best take n times as long: this shows what splitting a step "
            "adds, not how accelerators scale. shared_cores_efficiency: images per second over "
            "those of one device; it may exceed 100 % because one device leaves cores idle.",
            "reduced_mb: all that devices send each other in a step, read from the compiled "
            "program; parameters_mb: the student's. No other operation sends anything "
            "(tests/test_communication.py).",
            "Predicted: dp splits the batch, fsdp parameters and optimizer state too. _mb: what "
            "one device sends in a step; _efficiency: compute / (compute + sending); _overlapped: "
            "if sending happens during computing. images_per_s_host: what a host must read. "
            "batch_for_90: examples a device for which dp's efficiency is 90 % without overlap.",
            "global_batch: " + ", ".join(_batches()) + " examples a device. Published are 96 "
            "(CelebA), 8 (Bedroom) and 256 (DiT) in all: larger ones need a learning rate of "
            "their own, and smaller ones a device lower the efficiency.",
            "Device-hours: the student's training alone, at the share of peak below, without "
            "teacher's training, sending, input and sampling; times the price of an hour.",
            f"Stacks: a batch of {stacks.BATCH} at 512x512 with features, bfloat16, blocks "
            "computed again and as loops (remat, scan_blocks). way: whole, every device has all "
            "parameters; split, kernels among all devices, and gathered together; by block, "
            "gathered one block at a time, as is done. state: parameters, average and moments; "
            "activations are an estimate (suites/stacks.py); fits: in "
            f"{stacks.USABLE:.0%} of the memory. No autoencoder or text encoder is in a step.",
            "Compiled: SD3-medium's depth and its student of half of it, 256 wide (quick: 4 blocks "
            "64 wide), a batch of 8, in float32. arguments and temporary: bytes that the program "
            "of one device holds; gathered and reduced: arrays that operations yield, as often as "
            "loops run.",
            "A prediction is arithmetic on stated numbers: latencies of small messages, stragglers "
            "and input are not in it, and none of it was measured on a pod.",
        ],
    }


def _rows(facts: list[dict[str, Any]], times: list[Timing]) -> list[dict[str, Any]]:
    rates = [fact["batch"] / time.median for fact, time in zip(facts, times, strict=True)]
    return [
        fact
        | {
            "step_ms": milliseconds(time),
            "images_per_s": rate,
            "shared_cores_efficiency": rate / rates[0],
            "seconds": time._asdict(),
        }
        for fact, time, rate in zip(facts, times, rates, strict=True)
    ]


def _batches() -> list[str]:
    found = {
        name.split()[0].split("-")[0]: row.per_device
        for name, row in prediction.paper_rows().items()
    }
    return [f"{name} {count}" for name, count in found.items()]
