"""The evaluation stage: samples of teacher and students against real data, and against the teacher.

Without config.evaluation.features samples are drawn and timed, and compared with nothing.

Samples are drawn as published and, if config.evaluation.clip is set, a second time with the
predicted data clipped to the image range at each step: a safeguard that forgives a student's errors
in mean and variance.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from liftplace_jax import evaluation
from liftplace_jax.evaluation.references import ReferenceFileError, read_npz
from liftplace_jax.experiment.context import Context
from liftplace_jax.experiment.training import load_teacher
from liftplace_jax.families.loading import load_network
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import local_copy
from liftplace_jax.host.files import read_json, write_json, write_npz
from liftplace_jax.host.progress import Progress, progress
from liftplace_jax.host.versions import versions
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network

KEPT_IMAGES = 64
CLASS_ROWS, CLASS_COLUMNS = 4, 10
SCORES = (
    "frechet", "sfid", "inception_score", "inception_score_std", "kid", "kid_std", "precision",
    "recall", "density", "coverage", "clip_score", "clip_score_error",
)  # fmt: skip


def evaluate(context: Context) -> None:
    """Writes evaluation.json and samples.npz beside every model that has none yet.

    Raises:
      ValueError: a model is missing, or samples are not finite.
    """
    folders = model_folders(context)
    missing = {
        title: folder
        for title, folder in folders.items()
        if not processes.told_by_first((folder / "evaluation.json").exists)
    }
    if not missing:
        return
    teacher = load_teacher(context)
    for title, folder in missing.items():
        started = time.monotonic()
        network = load_network(folder, hint="run --mode=distill first")
        result, images = _sample_scores(context, title, network)
        if title != "teacher":
            result |= _output_error(context, teacher, network)
        result["parameters"] = building.count_parameters(network.params)
        result["protocol"] = protocol(context)
        result["versions"] = versions()
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
        except ReferenceFileError as error:
            raise ValueError(
                f"{folder / 'samples.npz'} is damaged: {error}. Delete it and the evaluation.json "
                "beside it, and run --mode=evaluate again"
            ) from error


def model_folders(context: Context) -> dict[str, Path]:
    """Title -> folder of the teacher and of every student."""
    folders = {"teacher": context.teacher_folder}
    return folders | {f"{run.method} seed {run.seed}": run.folder for run in context.runs}


def protocol(context: Context, params: str = "ema") -> dict[str, Any]:
    """All that numbers of samples depend on, beside the model."""
    fields = context.config.evaluation
    found = fields.to_dict() | {"params": params} | context.process.sampling(fields)
    found["weights"] = fields.weights and Path(fields.weights).name
    found["reference"] = f"{context.config.data.name} {context.config.data.train_split}"
    if isinstance(context.judge.real, evaluation.Reference):
        file = {"file": Path(fields.reference).name, "sha256": context.judge.real.digest}
        found["reference"] = dict(context.judge.real.info) | file
    if context.autoencoder:
        found["autoencoder"] = context.autoencoder.identity
        found |= {name: context.config.latents[name] for name in ("decode_dtype", "tile")}
    if context.judge.prompts:
        found["prompts"] = dict(context.judge.prompts.identity)
    else:  # as results say that were made before there were texts
        unset = {"jpeg_before": 0, "resize": None, "jpeg": 0, "inception_rule": "adm"}
        of_texts = ("prompts", "negative_prompt", "clip_model", "repeat_prompts")
        gone = [*of_texts, *(name for name, value in unset.items() if found[name] == value)]
        found = {name: value for name, value in found.items() if name not in gone}
    if context.judge.extractor:
        found["extractor"] = dict(context.judge.extractor.info)
    if context.judge.clip:
        found["clip_model"] = context.judge.clip.identity
    return found


def _sample_scores(context, title, network) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = context.config.evaluation
    variants = {"": None} | ({"_clipped": fields.clip} if fields.clip else {})
    total = fields.num_samples * len(variants)
    result, images = {}, {}
    with progress(f"samples, {title}", total, unit="image") as bar:
        for suffix, clip in variants.items():
            samples, rate = draw(context, network, bar, clip=clip, keep_images=KEPT_IMAGES)
            if not suffix:
                result["images_per_second"] = rate
            scores = compared(context, samples)
            values = {name + suffix: scores[name] for name in SCORES if name in scores}
            result |= values if suffix else scores
            images[f"images{suffix}"] = samples.images
    return result, images | _shown_images(context, network)


def compared(context: Context, samples: evaluation.Samples) -> dict[str, Any]:
    """Samples against what is real, and against their prompts, as far as the config says how."""
    fields, real = context.config.evaluation, context.judge.real
    if real is not None:
        return evaluation.score(
            real,
            samples,
            k=fields.neighbours,
            allow_few=fields.allow_few,
            inception_rule=fields.inception_rule,
        )
    return {} if samples.cosines is None else evaluation.clip_score(samples.cosines)


def _shown_images(context: Context, network: Network) -> dict[str, Any]:
    """Samples of the conditions that a report shows, from the same noise for every model.

    Returns:
      "classes" (K,), their titles, and "images_by_class" (rows * K, H, W, C), row by row; of
      prompts "prompts" (K,) and "images_by_prompt" (K, H, W, C); nothing where there is no
      condition.
    """
    fields, shown = context.config.evaluation, context.judge.shown(context.model, CLASS_COLUMNS)
    if shown is None:
        return {}
    rows = 1 if shown.by_row else CLASS_ROWS
    condition = jax.tree.map(lambda x: np.tile(x, (rows, *(1,) * (x.ndim - 1))), shown.condition)
    count = rows * len(shown.titles)
    samples = evaluation.collect(
        context.judge.sampler(network),
        context.judge.placed_params(network),
        count,
        batch_size=fields.batch_size,
        extractor=None,
        seed=fields.seed,
        sharding=context.batch_sharding,
        keep_images=count,
        condition=condition,
    )
    if shown.by_row:
        return {"prompts": shown.titles, "images_by_prompt": samples.images}
    return {"classes": shown.titles, "images_by_class": samples.images}


def draw(
    context: Context,
    network: Network,
    bar: Progress,
    *,
    clip: float | None = None,
    keep_images: int = 0,
) -> tuple[evaluation.Samples, float | None]:
    """Samples of a network by config.evaluation, and how many a second.

    Args:
      context: the experiment's.
      network: the model.
      bar: of `progress`; moved on by the number of samples.
      clip: see `make_sampler`.
      keep_images: how many images to keep.
    """
    fields, ends, before = context.config.evaluation, [], bar.n
    bar.compiles()

    def update(done):
        ends.append(time.monotonic())
        bar.update(before + done - bar.n)

    samples = evaluation.collect(
        context.judge.sampler(network, clip),
        context.judge.placed_params(network),
        fields.num_samples,
        batch_size=fields.batch_size,
        extractor=context.judge.extractor,
        seed=fields.seed,
        sharding=context.batch_sharding,
        keep_images=keep_images,
        condition=context.judge.condition(fields.num_samples),
        progress=update,
        look=context.judge.look,
    )
    return samples, _rate(fields, ends)


def _rate(fields, ends: list[float]) -> float | None:
    """Images drawn a second, from the ends of the batches; the first one compiles."""
    batches = len(ends) - 1
    return batches * fields.batch_size / (ends[-1] - ends[0]) if batches else None


def _output_error(context: Context, teacher: Network, student: Network) -> dict[str, float]:
    fields, process, judge = context.config.evaluation, context.process, context.judge

    def noising(images, levels, noise):
        t = process.at(levels)
        return process.add_noise(images, t, noise), t

    def predictor(network):
        params = judge.placed(network)

        def predict(x, t, batch):
            return judge.predictor(network.config)(params, x, t, context.embed(batch))

        return predict

    return evaluation.output_error(
        predictor(teacher),
        predictor(student),
        noising,
        context.sources["test"],
        batch_size=fields.batch_size,
        seed=fields.seed,
        sharding=context.batch_sharding,
    )
