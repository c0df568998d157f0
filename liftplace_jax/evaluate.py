"""Scores that can be compared: reference statistics, samples of a work directory, images.

    python -m liftplace_jax.evaluate ref  --data=celeb_a --image_size=64 --weights=W --out=ref.npz
    python -m liftplace_jax.evaluate gen  --workdir=runs/x --ref=ref.npz --weights=W
    python -m liftplace_jax.evaluate calc --images=FOLDER --ref=ref.npz --weights=W

W is the file of the FID network's weights (see the README). `ref` reads a TFDS data set or a
folder of images; `gen` samples the models of a work directory; `calc` compares images: a folder,
or an .npz with uint8 images as `arr_0`. References of pytorch-fid and the ADM evaluator are read
too. Results are JSON files that name everything the numbers depend on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from liftplace_jax.host.buckets import as_path, is_in_bucket, make_folder, on_this_machine
from liftplace_jax.host.flags import (
    define_runtime_flags,
    quieten_libraries,
    refuse,
    running,
    start,
)
from liftplace_jax.experiment.fields import EVALUATION
from liftplace_jax.host.ranges import INT32, SIDE

# Verb -> flags that it needs, and others that it knows beside COMMON.
VERBS = {
    "ref": (("data", "out"), ("split", "image_size", "num_images", "data_dir")),
    "gen": (("workdir", "ref"), ("model", "num_samples", "params", "seed", "guidance", "save_npz",
                                 "out", "allow_few")),
    "calc": (("images", "ref"), ("image_size", "out", "allow_few")),
}  # fmt: skip
COMMON = ("features", "weights", "batch_size")

_FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "ref: a TFDS data set, or a folder of images")
flags.DEFINE_string("data_dir", None, "ref: where TFDS keeps its data")
flags.DEFINE_string("split", "train", "ref: of the data")
flags.DEFINE_integer("image_size", None, "ref, calc: resize and crop to squares of this side",
                     lower_bound=1, upper_bound=SIDE)  # fmt: skip
flags.DEFINE_integer("num_images", None, "ref: the first so many (default: all)", lower_bound=2,
                     upper_bound=INT32)  # fmt: skip
flags.DEFINE_string("workdir", None, "gen: a finished work directory")
flags.DEFINE_string("model", None, "gen: teacher, or a method and seed such as 'lift seed 0'")
flags.DEFINE_integer("num_samples", 50_000, "gen: how many", lower_bound=2,
                     upper_bound=INT32)  # fmt: skip
flags.DEFINE_enum("params", "ema", ("ema", "raw"), "gen: averaged parameters, or the last ones")
flags.DEFINE_integer("seed", None, "gen: of the samples (default: the config's)", lower_bound=0,
                     upper_bound=INT32)  # fmt: skip
flags.DEFINE_float("guidance", None, "gen: scale of the guidance (default: the config's)")
flags.DEFINE_bool("save_npz", False, "gen: also write the images, for the ADM evaluator")
flags.DEFINE_string("images", None, "calc: a folder of images, or an .npz")
flags.DEFINE_string("ref", None, "gen, calc: a reference file; calc: or a folder of images")
flags.DEFINE_bool("allow_few", False, "gen, calc: accept fewer images than features")
flags.DEFINE_string("out", None, "ref: the .npz; gen: folder of results; calc: file of the result")
flags.DEFINE_string("features", "inception", "feature extractor")
flags.DEFINE_string("weights", None, "file of the extractor's weights")
flags.DEFINE_integer("batch_size", 64, "global batch", lower_bound=1, upper_bound=INT32)
flags.DEFINE_bool("debug", False, "show the traceback of a refused input")
define_runtime_flags()


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) != 2 or argv[1] not in VERBS:
        refuse(f"want one of the verbs {', '.join(VERBS)}, got {argv[1:]}")
    quieten_libraries()
    with running(_FLAGS.debug):
        check_flags(argv[1])
        print({"ref": make_reference, "gen": generate, "calc": calculate}[argv[1]]())


def check_flags(verb: str) -> None:
    """Raises a ValueError for a flag that the verb lacks or does not know."""
    needed, known = VERBS[verb]
    for name in needed:
        if not _FLAGS[name].present:
            raise ValueError(f"{verb} needs --{name}")
    every = {name for names in VERBS.values() for part in names for name in part}
    for name in sorted(every - {*needed, *known}):
        if _FLAGS[name].present:
            raise ValueError(f"--{name} is not for {verb}")
    if _FLAGS["guidance"].present:
        EVALUATION["guidance"].check("--guidance", _FLAGS.guidance)


def make_reference() -> str:
    """The verb ref."""
    from liftplace_jax import data, evaluation
    from liftplace_jax.host import processes

    out = as_path(_FLAGS.out)
    if out.suffix != ".npz" or not (is_in_bucket(out) or out.parent.is_dir()):
        raise ValueError(f"--out must be an .npz file in a folder that exists, got {out}")
    path = on_this_machine(_FLAGS.data, "a folder of images")
    if path.is_dir():
        source = data.load_source(
            "folder", _FLAGS.split, path=path, image_size=_FLAGS.image_size
        )
    else:
        if _FLAGS.data.startswith(("/", ".", "~")):
            raise ValueError(f"there is no folder {path}")
        source = data.load_source(
            _FLAGS.data, _FLAGS.split, data_dir=_FLAGS.data_dir, image_size=_FLAGS.image_size
        )
    samples = features_of(source, _FLAGS.num_images)
    info = {
        "extractor": samples.extractor.name, **samples.extractor.info, "label":
        samples.extractor.label, "data": path.name, "split": _FLAGS.split, "image_shape":
        list(source.image_shape), "count": int(samples.moments.count), "versions": versions(),
    }  # fmt: skip
    statistics = evaluation.statistics_of(samples)
    if processes.is_first():
        evaluation.save_reference(out, statistics, samples.features, info)
    processes.wait_for(out)
    return f"{out}: {info['count']:,} images of {source.name}, {info['extractor']} features"


def generate() -> str:
    """The verb gen: one JSON file for each model."""
    from liftplace_jax import evaluation
    from liftplace_jax.host import processes
    from liftplace_jax.experiment.context import Experiment
    from liftplace_jax.host.files import write_json, write_npz
    from liftplace_jax.nn.network import load_network
    from liftplace_jax.experiment.scoring import draw, model_folders, protocol
    from liftplace_jax.training.metrics_io import progress

    workdir = as_path(_FLAGS.workdir)
    experiment = Experiment(read_config(workdir), workdir, claim=False)
    folders = model_folders(experiment)
    if _FLAGS.model is not None:
        if _FLAGS.model not in folders:
            raise ValueError(f"--model={_FLAGS.model}: {workdir} has {list(folders)}")
        folders = {_FLAGS.model: folders[_FLAGS.model]}
    check_count(_FLAGS.num_samples, experiment.extractor)
    networks = {
        title: load_network(folder, hint="finish the run first", params=_FLAGS.params)
        for title, folder in folders.items()
    }
    out = as_path(_FLAGS.out) if _FLAGS.out else workdir / "evaluations"
    make_folder(out)
    fields, lines = experiment.config.evaluation, []
    stems = {t: f"{t.replace(' ', '_')}-{_FLAGS.params}-{fields.num_samples}" for t in networks}
    wanted = json.loads(json.dumps(protocol(experiment, _FLAGS.params)))
    for stem in stems.values():
        refuse_other(out / f"{stem}.json", wanted)
    for title, network in networks.items():
        bar = progress(title, fields.num_samples, unit="image")
        keep = fields.num_samples if _FLAGS.save_npz else 0
        samples, rate = draw(experiment, network, bar, clip=fields.clip, keep_images=keep)
        bar.close()
        scores = evaluation.score(
            experiment.real, samples, k=fields.neighbours, allow_few=_FLAGS.allow_few
        )
        result = scores | {
            "model": title, "images_per_second": rate, "versions": versions(), "protocol": wanted,
        }  # fmt: skip
        stem = stems[title]
        if _FLAGS.save_npz and processes.is_first():
            write_npz(out / f"{stem}.npz", {"arr_0": samples.images})
        if processes.is_first():
            write_json(out / f"{stem}.json", result)
        processes.wait_for(out / f"{stem}.json")
        lines.append(f"{title} ({_FLAGS.params}): {summary(scores)} -> {out / stem}.json")
    return "\n".join(lines)


def read_config(workdir: Path):
    """A work directory's config, with the flags in place of its evaluation's fields."""
    from ml_collections import ConfigDict

    from liftplace_jax.experiment.configuration import completed

    path = workdir / "config.json"
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{workdir} is no work directory: {path}: {error}") from error
    found = completed(found)
    changes = {
        "features": _FLAGS.features, "weights": _FLAGS.weights, "reference": _FLAGS.ref,
        "num_samples": _FLAGS.num_samples, "batch_size": _FLAGS.batch_size, "curve_every": 0,
        "clip": None,
    }  # fmt: skip
    changes |= {name: _FLAGS[name].value for name in ("seed", "guidance") if _FLAGS[name].present}
    found["evaluation"] |= changes
    # Nothing is trained: any devices will do.
    found["mesh"] = {"data": -1, "fsdp": 1}
    for room in ("teacher", "distill"):
        found[room] |= {"batch_size": _FLAGS.batch_size, "accumulation": 1}
    return ConfigDict(found)


def calculate() -> str:
    """The verb calc."""
    from liftplace_jax import evaluation
    from liftplace_jax.host import processes
    from liftplace_jax.host.files import write_json

    generated = features_of(open_images(_FLAGS.images), generated=True)
    reference = as_path(_FLAGS.ref)
    if reference.is_dir():
        real = features_of(open_images(_FLAGS.ref))
        name = {"folder": reference.name, "count": int(real.moments.count)}
    else:
        real = evaluation.load_reference(reference)
        name = dict(real.info) | {"file": reference.name, "sha256": real.digest}
    scores = evaluation.score(real, generated, allow_few=_FLAGS.allow_few)
    protocol = {"extractor": generated.extractor.name, **generated.extractor.info}
    result = scores | {
        "images": Path(_FLAGS.images).name, "image_size": _FLAGS.image_size,
        "protocol": protocol | {"reference": name, "precision": "float32"}, "versions": versions(),
    }  # fmt: skip
    if _FLAGS.out and processes.is_first():
        write_json(_FLAGS.out, result)
    return summary(scores)


def open_images(path: str | os.PathLike):
    """A `Source` of a folder of images, or of the uint8 `arr_0` of an .npz."""
    from liftplace_jax import data
    from liftplace_jax.evaluation.references import read_npz

    path = on_this_machine(path, "images")
    if path.suffix != ".npz":
        return data.load_source("folder", "all", path=path, image_size=_FLAGS.image_size)
    images = read_npz(path, ("arr_0",)).get("arr_0")
    if images is None or images.ndim != 4 or images.dtype != "uint8":
        found = "no arr_0" if images is None else f"arr_0 of {images.shape}, {images.dtype}"
        raise ValueError(f"{path}: want uint8 images (N, H, W, C) as arr_0, found {found}")
    records = [{"image": image} for image in images]
    return data.Source(
        path.name, records, image_shape=images.shape[1:], image_size=_FLAGS.image_size
    )


def features_of(source, limit: int | None = None, generated: bool = False):
    """`Samples` of the images of a `Source`, over all devices, with progress."""
    from liftplace_jax import evaluation
    from liftplace_jax.host import sharding
    from liftplace_jax.training.metrics_io import progress

    extractor = evaluation.feature_extractor(_FLAGS.features, _FLAGS.weights)
    extractor.check_shape(source.image_shape)
    limit = min(limit or len(source), len(source))
    check_count(limit, extractor)
    bar = progress(source.name, limit, unit="image")
    try:
        return evaluation.reference(
            source, extractor, batch_size=_FLAGS.batch_size, limit=limit,
            sharding=sharding.batch_sharding(sharding.make_mesh({"data": -1})),
            progress=lambda done: bar.update(done - bar.n), generated=generated,
        )  # fmt: skip
    finally:
        bar.close()


def check_count(count: int, extractor) -> None:
    """Raises a ValueError before any work if there are fewer images than features."""
    if count < extractor.dim and not _FLAGS.allow_few:
        raise ValueError(
            f"{count} images for {extractor.dim} features of {extractor.name!r}: take more, or "
            "--allow_few (gen, calc), which makes numbers that compare with nothing"
        )


def refuse_other(path: Path, protocol: dict[str, Any]) -> None:
    """Raises a ValueError if a result is there that was made in another way."""
    from liftplace_jax.experiment.configuration import differences

    if path.exists():
        lines = differences(json.loads(path.read_text())["protocol"], protocol)
        if lines:
            raise ValueError(
                f"{path} holds a result of another protocol ({'; '.join(lines)}): choose another "
                "--out, or delete it"
            )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    from liftplace_jax.experiment import report

    return report.versions()


def summary(scores: dict[str, Any]) -> str:
    """A line of the scores."""
    from liftplace_jax.experiment.scoring import SCORES

    named = {"frechet": scores["label"], "sfid": "sFID", "kid": "KID"}
    shown = [name for name in SCORES if name in scores and not name.endswith("_std")]
    values = ", ".join(f"{named.get(name, name)} {scores[name]:.4g}" for name in shown)
    return f"{values} ({scores['num_samples']:,} images)"


def entry_point() -> None:
    """For `python -m`."""
    start(main)


if __name__ == "__main__":
    entry_point()
