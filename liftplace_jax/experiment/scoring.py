"""The evaluation stage: samples of teacher and students against real data, and against the teacher.

Without config.evaluation.features samples are drawn and timed, and compared with nothing.

Samples are drawn as published and, if config.evaluation.clip is set, a second time with the
predicted data clipped to the image range at each step: a safeguard that forgives a student's errors
in mean and variance.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from liftplace_jax import evaluation
from liftplace_jax.nn import building
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import local_copy
from liftplace_jax.evaluation.references import ReferenceError, read_npz
from liftplace_jax.evaluation.samples import replicated
from liftplace_jax.experiment.context import Experiment
from liftplace_jax.host.files import read_json, write_json, write_npz
from liftplace_jax.nn.network import Network, load_network, make_apply
from liftplace_jax.host import sharding
from liftplace_jax.training.metrics_io import progress

KEPT_IMAGES = 64
CLASS_ROWS, CLASS_COLUMNS = 4, 10
SCORES = (
    "frechet", "sfid", "inception_score", "inception_score_std", "kid", "kid_std", "precision",
    "recall", "density", "coverage",
)  # fmt: skip


def evaluate(experiment: Experiment) -> None:
    """Writes evaluation.json and samples.npz beside every model that has none yet.

    Raises:
      ValueError: a model is missing, or samples are not finite.
    """
    folders = model_folders(experiment)
    missing = {
        title: folder for title, folder in folders.items()
        if not processes.told_by_first((folder / "evaluation.json").exists)
    }  # fmt: skip
    if not missing:
        return
    teacher = experiment.teacher()
    for title, folder in missing.items():
        started = time.monotonic()
        network = load_network(folder, hint="run --mode=distill first")
        result, images = _sample_scores(experiment, title, network)
        if title != "teacher":
            result |= _output_error(experiment, teacher, network)
        result["parameters"] = building.count_parameters(network.params)
        result["protocol"] = protocol(experiment)
        result["seconds"] = time.monotonic() - started
        if processes.is_first():
            write_npz(folder / "samples.npz", images)
            write_json(folder / "evaluation.json", result)
        processes.wait_for(folder / "evaluation.json")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `evaluate` wrote beside a model.

    Raises:
      ValueError: it is missing or damaged; names it and says what to do.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        raise ValueError(f"no evaluation.json in {folder}: run --mode=evaluate first")
    advice = "Delete it and run --mode=evaluate again"
    found = read_json(path, advice)
    if type(found.get("parameters")) is not int:
        raise ValueError(f"{path} is damaged: it has no number of parameters. {advice}")
    return found


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """The images that `evaluate` kept beside a model.

    Raises:
      ValueError: they are damaged; names the file and says what to do.
    """
    with local_copy(folder / "samples.npz") as path:
        try:
            return read_npz(path)
        except ReferenceError as error:
            raise ValueError(
                f"{folder / 'samples.npz'} is damaged: {error}. Delete it and the evaluation.json "
                "beside it, and run --mode=evaluate again"
            ) from error


def model_folders(experiment: Experiment) -> dict[str, Path]:
    """Title -> folder of the teacher and of every student."""
    folders = {"teacher": experiment.teacher_folder}
    return folders | {f"{run.method} seed {run.seed}": run.folder for run in experiment.runs}


def protocol(experiment: Experiment, params: str = "ema") -> dict[str, Any]:
    """All that numbers of samples depend on, beside the model."""
    fields = experiment.config.evaluation
    found = fields.to_dict() | {"params": params, "precision": "float32"}
    found["weights"] = fields.weights and Path(fields.weights).name
    found["reference"] = f"{experiment.config.data.name} {experiment.config.data.train_split}"
    if isinstance(experiment.real, evaluation.Reference):
        file = {"file": Path(fields.reference).name, "sha256": experiment.real.digest}
        found["reference"] = dict(experiment.real.info) | file
    if experiment.autoencoder:
        found["autoencoder"] = experiment.autoencoder.identity
    if experiment.extractor:
        found["extractor"] = dict(experiment.extractor.info)
    return found


def _sample_scores(experiment, title, network) -> tuple[dict[str, Any], dict[str, Any]]:
    fields, real = experiment.config.evaluation, experiment.real
    variants = {"": None} | ({"_clipped": fields.clip} if fields.clip else {})
    bar = progress(f"samples, {title}", fields.num_samples * len(variants), unit="image")
    result, images = {}, {}
    for suffix, clip in variants.items():
        samples, rate = draw(experiment, network, bar, clip=clip, keep_images=KEPT_IMAGES)
        if not suffix:
            result["images_per_second"] = rate
        if real:
            # Few samples are for smoke runs, whose numbers mean nothing; the report says so.
            few = fields.num_samples <= experiment.extractor.dim  # the real side: see Experiment
            scores = evaluation.score(real, samples, k=fields.neighbours, allow_few=few)
            values = {name + suffix: scores[name] for name in SCORES if name in scores}
            result |= values if suffix else scores
        images[f"images{suffix}"] = samples.images
    bar.close()
    return result, images | _class_images(experiment, network)


def _class_images(experiment: Experiment, network: Network) -> dict[str, Any]:
    """Samples of every class, or of some of many, from the same noise for every model.

    Returns:
      "classes" (K,) and "images_by_class" (rows * K, H, W, C), row by row; nothing for an
      unconditional network.
    """
    fields, count = experiment.config.evaluation, experiment.model_config.num_classes
    if not count:
        return {}
    classes = np.unique(np.linspace(0, count - 1, CLASS_COLUMNS).round().astype(np.int32))
    labels = np.tile(classes, CLASS_ROWS)
    samples = evaluation.collect(
        experiment.sampler(network.graphdef), _placed_params(experiment, network),
        len(labels), batch_size=fields.batch_size, extractor=None, seed=fields.seed,
        sharding=experiment.batch_sharding, keep_images=len(labels), labels=labels,
    )  # fmt: skip
    return {"classes": classes, "images_by_class": samples.images}


def draw(
    experiment: Experiment,
    network: Network,
    bar: tqdm.tqdm,
    *,
    clip: float | None = None,
    keep_images: int = 0,
) -> tuple[evaluation.Samples, float | None]:
    """Samples of a network by config.evaluation, and how many a second.

    Args:
      experiment: whose process, extractor and mesh are used.
      network: the model.
      bar: moved on by the number of samples.
      clip: see `make_sampler`.
      keep_images: how many images to keep.
    """
    fields, ends, before = experiment.config.evaluation, [], bar.n

    def update(done):
        ends.append(time.monotonic())
        bar.update(before + done - bar.n)

    samples = evaluation.collect(
        experiment.sampler(network.graphdef, clip), _placed_params(experiment, network),
        fields.num_samples, batch_size=fields.batch_size, extractor=experiment.extractor,
        seed=fields.seed, sharding=experiment.batch_sharding, keep_images=keep_images,
        progress=update,
    )  # fmt: skip
    return samples, _rate(fields, ends)


def _placed_params(experiment: Experiment, network: Network) -> Any:
    """What the sampler takes as parameters, on every device once and not at every batch."""
    whole = replicated(experiment.batch_sharding)
    params = experiment.sampler_params(network.params)
    return sharding.place(params, jax.tree.map(lambda _: whole, params))


def _rate(fields, ends: list[float]) -> float | None:
    """Images drawn a second, from the ends of the batches; the first one compiles."""
    batches = len(ends) - 1
    return batches * fields.batch_size / (ends[-1] - ends[0]) if batches else None


def predictor(experiment: Experiment, network: Network) -> Callable[..., jax.Array]:
    """Jitted (x_t, t, labels) -> what a network predicts, without a learned variance."""
    apply, conditional = make_apply(network.graphdef), bool(experiment.model_config.num_classes)

    def prediction(params, x, t, labels):
        cond = labels if conditional else None
        return experiment.process.split(apply(params, x, t, False, None, cond)[0])[0]

    return functools.partial(jax.jit(prediction), network.params)


def _output_error(experiment: Experiment, teacher: Network, student: Network) -> dict[str, float]:
    fields, process = experiment.config.evaluation, experiment.process

    def noising(images, levels, noise):
        t = jnp.floor(levels * process.num_timesteps).astype(jnp.int32)
        return process.q_sample(images, t, noise), t

    return evaluation.output_error(
        predictor(experiment, teacher), predictor(experiment, student), noising,
        experiment.sources["test"], batch_size=fields.batch_size, seed=fields.seed,
        sharding=experiment.batch_sharding,
    )  # fmt: skip
