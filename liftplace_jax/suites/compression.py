"""Suite "compression": how small a teacher can get, what that saves, and what it costs in quality.

Time and memory are measured on networks with random weights on the device at hand; quality is read
from work directories in which students were trained.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from liftplace_jax.experiment.context import Context
from liftplace_jax.experiment.report import MEASURES
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.experiment.training import load_teacher, train_teacher
from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.host.progress import progress
from liftplace_jax.suites.compression_plots import cost_figure, pareto_figure
from liftplace_jax.suites.measuring import (
    QUICK_STEPS,
    Measured,
    measure_network,
    measure_training,
    random_network,
    timed_steps,
)
from liftplace_jax.suites.options import Options, Result
from liftplace_jax.suites.quality import quality_measure, read_quality
from liftplace_jax.training.objective import BASIC_METHODS

RATIOS, QUICK_RATIOS = (0.0, 0.3, 0.5, 0.7, 0.9), (0.0, 0.5, 0.9)
QUICK_METHODS = ("no_kd", "output_kd", "lift_place")
NETWORK_FORMATS = {
    "parameters": ",", "macs": ",", "compression": ".1f", "checkpoint_mb": ".3f",
    "images_per_s": ".4g", "evaluation_ms": ".2f", "image_ms": ".1f", "sampler_compile_s": ".1f",
    "tflops": ".3g", "of_peak": ".1%",
}  # fmt: skip
TRAINING_FORMATS = {
    "step_ms": ".2f", "examples_per_s": ".4g", "memory_mb": ".1f", "device_peak_mb": ".1f",
    "step_compile_s": ".1f", "tflops": ".3g", "of_peak": ".1%",
}  # fmt: skip


def run(options: Options) -> Result:
    """Measures teacher and students; quick: fewer ratios, methods and sampling steps.

    Raises:
      ValueError: the config, or a work directory of --workdirs, cannot be used.
    """
    config = options.need("compression", "compress.ratio").copy_and_resolve_references()
    # Nothing is compared here.
    config.evaluation.update(features=None, weights=None, reference=None, curve_every=0)
    if options.batch_size:
        for room in (config.teacher, config.distill, config.evaluation):
            room.batch_size = options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        context = open_experiment(config, Path(folder) / "run")
        teacher = _teacher(context)
        quality = []
        if options.workdirs:
            quality = read_quality(options.workdirs, teacher, config.compress)
        ratios = options.ratios or (QUICK_RATIOS if options.quick else RATIOS)
        # The smallest first: what it takes on the device is then seen before larger ones hide it.
        ratios = sorted({0.0, *ratios, *(row["ratio"] for row in quality)}, reverse=True)
        networks, training = _measure(context, teacher, ratios, options)
    return _result(context, networks, training, quality, options)


def _teacher(context: Context) -> Any:
    """The teacher's architecture: the checkpoint's, or that of config.model."""
    if context.config.teacher.checkpoint:
        train_teacher(context)
        return load_teacher(context).config
    return context.model


def _measure(context, teacher, ratios, options) -> tuple[list[Measured], list[Measured]]:
    """Rows of the networks and of the training steps, by ratio."""
    methods = QUICK_METHODS if options.quick else BASIC_METHODS
    # Of the teacher, its own training.
    jobs = [(ratio, methods if ratio else ("no_kd",)) for ratio in ratios]
    teacher_network = random_network(teacher, context.config.distill.dtype)
    total = sum(1 + len(names) for _, names in jobs)
    networks, training = [], []
    with progress("compression", total, unit="measurement") as bar:
        for ratio, names in jobs:
            bar.set_description(f"ratio {ratio:g}: network")
            config, row = _network_row(context, teacher, ratio, options)
            networks.append(row)
            bar.update()
            for name in names if config else ():
                bar.set_description(f"ratio {ratio:g}: {name}")
                work = functools.partial(
                    _training_row, context, name, config, teacher_network, options.repeats
                )
                measured, status = _attempt(work)
                training.append({"ratio": ratio, "method": name} | (measured or {}))
                training[-1]["status"] = status
                bar.update()
            if not config:
                bar.update(len(names))
    for rows in (networks, training):
        rows.sort(key=lambda row: row["ratio"])
    return networks, training


def _network_row(context, teacher, ratio, options) -> tuple[Any, Measured]:
    """A ratio's architecture, None if there is none, and its row."""
    fields = ConfigDict({**context.config.compress, "ratio": ratio})
    row = {"ratio": ratio}
    config, status = teacher, "ok"
    if ratio:
        config, status = _attempt(lambda: context.pruner.predict(fields, teacher))
    if config:
        row |= {"parameters": config_parameters(config), "macs": count_macs(config)}
        row["compression"] = config_parameters(teacher) / row["parameters"]
        measured, status = _attempt(
            lambda: measure_network(context, config, options.quick, options.repeats)
        )
        row |= measured or {}
    return config, row | {"status": status}


def _training_row(context, name, config, teacher, repeats) -> Measured:
    student = random_network(config, context.config.distill.dtype)
    return measure_training(context, name, student, teacher, repeats)


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "ok"), or (None, why it failed)."""
    try:
        return work(), "ok"
    except (ValueError, RuntimeError, MemoryError) as error:
        # XLA's errors are RuntimeErrors, and long.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        out = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        return None, f"out of memory: {reason}" if out else f"failed: {reason}"


def _result(context, networks, training, quality, options) -> Result:
    config = context.config
    name = f"compression_{config.name}"
    tables = {
        "training": {
            "title": "Training steps",
            "columns": ["ratio", "method", *TRAINING_FORMATS, "status"],
            "rows": training,
            "formats": TRAINING_FORMATS,
        }
    }
    figures = {"cost": cost_figure(networks, training)}
    if quality:
        measure = quality_measure(quality)
        rows = _joined(quality, networks)
        measures = [m for m in MEASURES if any(m in row for row in rows)]
        columns = ["ratio", "method", "seeds", "parameters", "macs", "evaluation_ms", "image_ms"]
        columns += [c for m in measures for c in (m, f"{m}_spread")]
        tables["quality"] = {
            "title": "Quality of trained students",
            "columns": columns,
            "rows": rows,
            "formats": NETWORK_FORMATS | {c: ".4g" for c in columns[7:]},
        }
        figures["pareto"] = pareto_figure(rows, measure)
    return {
        "name": name,
        "title": f"Compression of {config.name}: what students save, and what it costs",
        "columns": ["ratio", *NETWORK_FORMATS, "status"],
        "formats": NETWORK_FORMATS,
        "rows": networks,
        "tables": tables,
        "figures": {
            f"{name}_{kind}.{form}": figure
            for kind, figure in figures.items()
            for form in ("png", "svg")
        },
        "notes": _notes(context, options, bool(quality)),
    }


def _joined(quality: list[Measured], networks: list[Measured]) -> list[Measured]:
    costs = {row["ratio"]: row for row in networks}
    return [
        row | {k: costs[row["ratio"]].get(k) for k in ("evaluation_ms", "image_ms", "images_per_s")}
        for row in quality
    ]


def _notes(context: Context, options: Options, quality: bool) -> list[str]:
    config, fields = context.config, context.config.evaluation
    steps = timed_steps(context, options.quick)
    sampler = f"{fields.sampler} with {fields.sample_steps} steps, float32"
    if steps < fields.sample_steps:
        sampler += f", of which {steps} were run and the time scaled up"
    devices = context.mesh.size
    # An attribute that JAX makes when it is imported.
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return [
        "ratio: share of channels removed; 0 is the teacher, for which training is its own, "
        "without distillation. Weights are random. Times are medians, with quartiles in the JSON. "
        "MB: 10^6 bytes.",
        f"images_per_s: {sampler}, in batches of {fields.batch_size} on {devices} device(s). "
        "evaluation_ms, image_ms: one network evaluation, and one sampled image, at batch 1 on one "
        "device.",
        f"Training: {config.distill.batch_size} images a step on {devices} device(s), "
        f"{config.distill.dtype}. memory_mb: what the compiled step needs on each device, by the "
        "compiler's plan (arguments, results, temporaries). device_peak_mb: the most that a device "
        'has had in use, as the backend tells ("-": it does not, or the step did not exceed what '
        "was measured before).",
        "tflops: 2 x MACs of all network evaluations per second; a training step counts three "
        "evaluations of the student and one of a teacher, where it has one. of_peak: share of the "
        f'devices\' dense bfloat16 peak ("-": not known for {jax.devices()[0].device_kind}).',
        "Compilation may have been shortened by the persistent cache." if cache else "",
        "Quality: read from " + ", ".join(map(str, options.workdirs)) + "; spread: standard "
        "deviation over seeds."
        if quality
        else "",
        f"Quick: {len(QUICK_METHODS)} of {len(BASIC_METHODS)} methods and at most {QUICK_STEPS} "
        "sampling steps; the numbers are rough."
        if options.quick
        else "",
    ]
