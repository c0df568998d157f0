"""The evaluation stage: samples of teacher and students against real data, and against the teacher.

Without config.evaluation.features samples are drawn and timed, and compared with nothing.

Samples are drawn as published and, if config.evaluation.clip is set, a second time with the
predicted data clipped to the image range at each step: a safeguard that forgives a student's errors
in mean and variance.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax import evaluation, models
from liftplace_jax.experiment import Experiment
from liftplace_jax.files import replacing, write_json
from liftplace_jax.networks import Network, load_network, make_apply
from liftplace_jax.sampling import make_sampler
from liftplace_jax.training.metrics_io import progress

KEPT_IMAGES = 64


def evaluate(experiment: Experiment) -> None:
    """Writes evaluation.json and samples.npz beside every model that has none yet.

    Raises:
      ValueError: a model is missing, or samples are not finite.
    """
    folders = {"teacher": experiment.teacher_folder}
    folders |= {f"{run.method} seed {run.seed}": run.folder for run in experiment.runs}
    missing = {k: f for k, f in folders.items() if not (f / "evaluation.json").exists()}
    if not missing:
        return
    fields = experiment.config.evaluation
    real = experiment.extractor and evaluation.reference(
        experiment.sources["train"], experiment.extractor, batch_size=fields.batch_size,
        sharding=experiment.batch_sharding,
    )  # fmt: skip
    teacher = experiment.teacher()
    for title, folder in missing.items():
        started = time.monotonic()
        network = load_network(folder, hint="run --mode=distill first")
        result, images = _sample_scores(experiment, title, network, real)
        if title != "teacher":
            result |= _output_error(experiment, teacher, network)
        result["parameters"] = models.count_parameters(network.params)
        reference = f"{experiment.config.data.name} {experiment.config.data.train_split}"
        result["protocol"] = fields.to_dict() | {"weights": "EMA", "reference": reference}
        result["seconds"] = time.monotonic() - started
        if jax.process_index() == 0:
            _save_images(folder / "samples.npz", images)
            write_json(folder / "evaluation.json", result)


def _sample_scores(experiment, title, network, real) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = experiment.config.evaluation
    variants = {"": None} | ({"_clipped": fields.clip} if fields.clip else {})
    bar = progress(f"samples, {title}", fields.num_samples * len(variants), unit="image")
    result, images = {}, {}
    for suffix, clip in variants.items():
        ends, before = [], bar.n

        def update(done, ends=ends, before=before):
            ends.append(time.monotonic())
            bar.update(before + done - bar.n)

        samples = evaluation.collect(
            _sampler(experiment, network.graphdef, clip), network.params, fields.num_samples,
            batch_size=fields.batch_size, extractor=experiment.extractor, seed=fields.seed,
            sharding=experiment.batch_sharding, keep_images=KEPT_IMAGES, progress=update,
        )  # fmt: skip
        if not suffix:
            result["images_per_second"] = _rate(fields, ends)
        if real:
            # Few samples are for smoke runs, whose numbers mean nothing; the report says so.
            few = fields.num_samples <= real.extractor.dim
            scores = evaluation.score(real, samples, k=fields.neighbours, allow_few=few)
            names = ("frechet", "precision", "recall", "density", "coverage")
            result |= {name + suffix: scores[name] for name in names} if suffix else scores
        images[f"images{suffix}"] = samples.images
    bar.close()
    return result, images


def _rate(fields, ends: list[float]) -> float | None:
    """Images drawn a second, from the ends of the batches; the first one compiles."""
    batches = len(ends) - 1
    return batches * fields.batch_size / (ends[-1] - ends[0]) if batches else None


@functools.lru_cache(maxsize=8)
def _sampler(experiment: Experiment, graphdef: nnx.GraphDef, clip: float | None):
    """One function, and so one compiled program, for all students of an architecture."""
    size = experiment.model_config.image_size
    return make_sampler(
        experiment.config.evaluation, experiment.process,
        (size, size, experiment.model_config.in_channels), make_apply(graphdef), clip,
    )  # fmt: skip


def _output_error(experiment: Experiment, teacher: Network, student: Network) -> dict[str, float]:
    fields, process = experiment.config.evaluation, experiment.process

    def noising(images, levels, noise):
        t = jnp.floor(levels * process.num_timesteps).astype(jnp.int32)
        return process.q_sample(images, t, noise), t

    def prediction(apply, params, x, t, labels):
        del labels
        return apply(params, x, t, False, None)[0]

    predict = [
        jax.jit(functools.partial(prediction, make_apply(network.graphdef), network.params))
        for network in (teacher, student)
    ]
    return evaluation.output_error(
        *predict, noising, experiment.sources["test"], batch_size=fields.batch_size,
        seed=fields.seed, sharding=experiment.batch_sharding,
    )  # fmt: skip


def _save_images(path: Path, images: dict[str, np.ndarray]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **images)
