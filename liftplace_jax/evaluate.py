"""Scores that can be compared: reference statistics, samples of a work directory, images.

    python -m liftplace_jax.evaluate ref  --data=celeb_a --image_size=64 --weights=W --out=ref.npz
    python -m liftplace_jax.evaluate gen  --workdir=runs/x --ref=ref.npz --weights=W
    python -m liftplace_jax.evaluate calc --images=FOLDER --ref=ref.npz --weights=W

W is the file of the FID network's weights (see the README). `ref` reads a TFDS data set, a folder
of images, or an .npz with uint8 images as `arr_0`; `gen` samples the models of a work directory;
`calc` compares any two of: a folder of images, an .npz of images, a file of `ref`, of pytorch-fid
or of the ADM evaluator. Results are JSON files that name everything the numbers depend on; one of
other numbers is replaced with --overwrite alone.

--protocol=bk_sdm sets what the flags from --jpeg_before to --inception_rule do not (see
`evaluation.handling`); --clip_model and --prompts add the CLIP score of `gen` and `calc`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from liftplace_jax.evaluation.handling import BK_SDM, Handling, Look, handling_of, said_of_reference
from liftplace_jax.evaluation.metrics import INCEPTION_RULES
from liftplace_jax.experiment.fields import EVALUATION
from liftplace_jax.host.buckets import as_path, is_in_bucket, make_folder, on_this_machine
from liftplace_jax.host.differences import refuse_other, refuse_other_json
from liftplace_jax.host.flags import (
    define_runtime_flags,
    quieten_libraries,
    refuse,
    running,
    start,
)
from liftplace_jax.host.ranges import INT32, SIDE

# Verb -> flags that it needs, and others that it knows beside COMMON.
HANDLING = ("protocol", "resize", "jpeg")
SCORED = ("clip_model", "prompts", "repeat_prompts", "jpeg_before", "inception_rule")
VERBS = {
    "ref": (("data", "out"), ("split", "image_size", "num_images", "data_dir", "overwrite",
                              "squeeze", *HANDLING)),
    "gen": (("workdir", "ref"), ("model", "num_samples", "params", "seed", "guidance", "save_npz",
                                 "out", "allow_few", "overwrite", *HANDLING, *SCORED)),
    "calc": (("images", "ref"), ("image_size", "out", "allow_few", "overwrite", "squeeze",
                                 *HANDLING, *SCORED)),
}  # fmt: skip
COMMON = ("features", "weights", "batch_size")
PROTOCOL = ("features", "jpeg_before", "resize", "jpeg", "inception_rule")
NEIGHBOURS = 5  # of precision and recall, as of `evaluation.score`

_FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "ref: a TFDS data set, a folder of images, or an .npz")
flags.DEFINE_string("data_dir", None, "ref: where TFDS keeps its data")
flags.DEFINE_string("split", "train", "ref: of the data")
flags.DEFINE_integer(
    "image_size",
    None,
    "ref, calc: resize and crop to squares of this side",
    lower_bound=1,
    upper_bound=SIDE,
)
flags.DEFINE_integer(
    "num_images", None, "ref: the first so many (default: all)", lower_bound=2, upper_bound=INT32
)
flags.DEFINE_string("workdir", None, "gen: a finished work directory")
flags.DEFINE_string("model", None, "gen: teacher, or a method and seed such as 'lift seed 0'")
flags.DEFINE_integer("num_samples", 50_000, "gen: how many", lower_bound=2, upper_bound=INT32)
flags.DEFINE_enum("params", "ema", ("ema", "raw"), "gen: averaged parameters, or the last ones")
flags.DEFINE_integer(
    "seed", None, "gen: of the samples (default: the config's)", lower_bound=0, upper_bound=INT32
)
flags.DEFINE_float("guidance", None, "gen: scale of the guidance (default: the config's)")
flags.DEFINE_bool("save_npz", False, "gen: also write the images, for the ADM evaluator")
flags.DEFINE_string("images", None, "calc: a folder of images, or an .npz")
flags.DEFINE_string("ref", None, "gen, calc: a reference file; calc: or as --images")
flags.DEFINE_bool("overwrite", False, "replace another result at --out")
flags.DEFINE_bool("allow_few", False, "gen, calc: accept fewer images than features")
flags.DEFINE_enum("protocol", None, ("bk_sdm",), "what --features and the next flags do not say")
flags.DEFINE_integer(
    "jpeg_before",
    0,
    "gen, calc: save samples (--images) as JPEG of this quality first; 0: do not",
    lower_bound=0,
    upper_bound=100,
)
flags.DEFINE_integer(
    "resize",
    0,
    "then squeeze all images to this side, bicubic; 0: do not",
    lower_bound=0,
    upper_bound=SIDE,
)
flags.DEFINE_integer(
    "jpeg", 0, "then save them as JPEG of this quality; 0: do not", lower_bound=0, upper_bound=100
)
flags.DEFINE_bool(
    "squeeze",
    None,
    "ref, calc: real images may be of any sizes, which --resize "
    "squeezes (default: with --protocol)",
)
flags.DEFINE_enum(
    "inception_rule", "adm", INCEPTION_RULES, "gen, calc: how the Inception Score splits"
)
flags.DEFINE_string("clip_model", None, "gen, calc: a folder of a CLIPModel, for the CLIP score")
flags.DEFINE_string(
    "prompts",
    None,
    "gen: a file of prompts (default: the config's); calc: a "
    "table of --images and their prompts (default: the folder's)",
)
flags.DEFINE_bool("repeat_prompts", False, "gen, calc: begin again where images outnumber prompts")
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
    if verb == "calc" and _FLAGS.prompts and not _FLAGS.clip_model:
        raise ValueError("--prompts are for a CLIP score: name its --clip_model")
    if _FLAGS["guidance"].present:
        EVALUATION["guidance"].check("--guidance", _FLAGS.guidance)


def protocol_fields() -> dict[str, Any]:
    """What --protocol and its flags say of fields of config.evaluation."""
    found = dict(BK_SDM) if _FLAGS.protocol else {}
    found |= {name: _FLAGS[name].value for name in PROTOCOL if _FLAGS[name].present}
    return found | ({"resize": found["resize"] or None} if "resize" in found else {})


def opened() -> tuple[Any, Any, Handling, bool]:
    """(extractor, rule of the Inception Score, handling, whether real images are squeezed)."""
    from liftplace_jax import evaluation

    fields = {name: _FLAGS[name].value for name in PROTOCOL} | {"resize": None}
    fields |= protocol_fields()
    usual = bool(_FLAGS.protocol and fields["resize"])
    squeeze = usual if _FLAGS.squeeze is None else _FLAGS.squeeze
    extractor = evaluation.feature_extractor(fields["features"], _FLAGS.weights)
    return extractor, fields["inception_rule"], handling_of(fields), squeeze


def make_reference() -> str:
    """The verb ref."""
    from liftplace_jax import data, evaluation
    from liftplace_jax.evaluation.sides import open_images, sizes_of
    from liftplace_jax.host import processes
    from liftplace_jax.host.files import check_writable
    from liftplace_jax.host.versions import versions

    out = as_path(_FLAGS.out)
    if out.suffix != ".npz" or not (is_in_bucket(out) or out.parent.is_dir()):
        raise ValueError(f"--out must be an .npz file in a folder that exists, got {out}")
    check_writable(out)
    extractor, _, handling, squeeze = opened()
    handling = handling.of_real
    sizes = sizes_of(_FLAGS.image_size, handling, squeeze)
    path = on_this_machine(_FLAGS.data, "a folder of images")
    if path.is_dir():
        source = data.load_source(
            "folder", _FLAGS.split, path=path, channels=extractor.image_shape[2] or 3, **sizes
        )
    elif path.is_file():
        source = open_images(path, extractor, _FLAGS.image_size, handling, squeeze)
    else:
        if _FLAGS.data.startswith(("/", ".", "~")):
            raise ValueError(f"there is no folder {path}")
        source = data.load_source(_FLAGS.data, _FLAGS.split, data_dir=_FLAGS.data_dir, **sizes)
    count = min(_FLAGS.num_images or len(source), len(source))
    check_count(count, extractor)
    info = {
        "extractor": extractor.name,
        **extractor.info,
        "label": extractor.label,
        "data": path.name,
        "split": _FLAGS.split,
        "image_shape": list(handling.shape(source.image_shape)),
        "count": count,
    }
    info |= {"handling": handling.identity, "squeeze": squeeze} if handling else {}
    if not _FLAGS.overwrite:
        refuse_other(out, info, lambda: evaluation.load_reference(out).info)
    info["versions"] = versions()
    samples = features_of(source, extractor, count, Look(handling))
    statistics = evaluation.statistics_of(samples)
    if processes.is_first():
        evaluation.save_reference(out, statistics, samples.features, info)
    processes.wait_for(out)
    return f"{out}: {info['count']:,} images of {source.name}, {info['extractor']} features"


def generate() -> str:
    """The verb gen: one JSON file for each model."""
    from liftplace_jax import evaluation
    from liftplace_jax.experiment.scoring import compared, draw, model_folders, protocol
    from liftplace_jax.experiment.stages import open_experiment
    from liftplace_jax.families.loading import load_network
    from liftplace_jax.host import processes
    from liftplace_jax.host.files import check_writable, write_json, write_npz
    from liftplace_jax.host.progress import progress
    from liftplace_jax.host.versions import versions

    workdir = as_path(_FLAGS.workdir)
    config = read_config(workdir)
    features = config.evaluation.features
    check_count(_FLAGS.num_samples, evaluation.feature_extractor(features, _FLAGS.weights))
    context = open_experiment(config, workdir, claim=False)
    folders = model_folders(context)
    if _FLAGS.model is not None:
        if _FLAGS.model not in folders:
            raise ValueError(f"--model={_FLAGS.model}: {workdir} has {list(folders)}")
        folders = {_FLAGS.model: folders[_FLAGS.model]}
    out = as_path(_FLAGS.out) if _FLAGS.out else workdir / "evaluations"
    stems = {t: f"{t.replace(' ', '_')}-{_FLAGS.params}-{_FLAGS.num_samples}" for t in folders}
    wanted = json.loads(json.dumps(protocol(context, _FLAGS.params)))
    for title, stem in stems.items():
        for suffix in (".json", ".npz") if _FLAGS.save_npz else (".json",):
            check_writable(out / (stem + suffix))
        if not _FLAGS.overwrite:
            refuse_other_json(out / f"{stem}.json", {"model": title, "protocol": wanted})
    networks = {
        title: load_network(folder, hint="finish the run first", params=_FLAGS.params)
        for title, folder in folders.items()
    }
    make_folder(out)
    fields, lines = context.config.evaluation, []
    for title, network in networks.items():
        keep = fields.num_samples if _FLAGS.save_npz else 0
        with progress(title, fields.num_samples, unit="image") as bar:
            samples, rate = draw(context, network, bar, clip=fields.clip, keep_images=keep)
        scores = compared(context, samples)
        result = scores | {
            "model": title,
            "images_per_second": rate,
            "versions": versions(),
            "protocol": wanted,
        }
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
        "features": _FLAGS.features,
        "weights": _FLAGS.weights,
        "reference": _FLAGS.ref,
        "num_samples": _FLAGS.num_samples,
        "batch_size": _FLAGS.batch_size,
        "curve_every": 0,
        "clip": None,
        "allow_few": _FLAGS.allow_few,
    }
    given = ("seed", "guidance", "clip_model", "prompts", "repeat_prompts")
    changes |= {name: _FLAGS[name].value for name in given if _FLAGS[name].present}
    changes |= protocol_fields()
    found["evaluation"] |= changes
    # Nothing is trained: any devices will do.
    found["mesh"] = {"data": -1, "fsdp": 1}
    return ConfigDict(found)


def calculate() -> str:
    """The verb calc."""
    from liftplace_jax import evaluation
    from liftplace_jax.evaluation.sides import open_side
    from liftplace_jax.host import processes
    from liftplace_jax.host.files import check_writable, write_json
    from liftplace_jax.host.versions import versions

    extractor, rule, handling, squeeze = opened()
    if _FLAGS.out:
        check_writable(_FLAGS.out)
    size = _FLAGS.image_size
    # What is saved as JPEG first is so before it is squeezed.
    squeezed = squeeze and not handling.jpeg_before
    images = open_side(_FLAGS.images, extractor, size, handling, squeezed)
    reference = open_side(_FLAGS.ref, extractor, size, handling.of_real, squeeze)
    wanted = {
        "images": Path(_FLAGS.images).name,
        "image_size": size,
        "images_of": images.name,
        "protocol": {
            "extractor": extractor.name,
            **extractor.info,
            "reference": reference.name,
            "precision": "float32",
            "inception_rule": rule,
        },
    }
    if handling:
        wanted["protocol"] |= {"handling": handling.identity, "squeeze": squeeze}
    look = look_at(images, handling)
    if look.clip:
        wanted["protocol"] |= {"clip_model": look.clip.identity, "prompts": look.identity}
    if _FLAGS.out and not _FLAGS.overwrite:
        refuse_other_json(as_path(_FLAGS.out), wanted)
    for side in (images, reference):
        check_side(side, extractor, handling.of_real)
    generated = side_features(images, extractor, look, generated=True)
    real = side_features(reference, extractor, Look(handling.of_real))
    scores = evaluation.score(
        real, generated, allow_few=_FLAGS.allow_few, extractor=extractor, inception_rule=rule
    )
    notes = [side.source.note for side in (images, reference) if side.source and side.source.note]
    result = scores | wanted | {"notes": notes, "versions": versions()}
    if _FLAGS.out and processes.is_first():
        write_json(_FLAGS.out, result)
    return summary(scores)


def look_at(side, handling: Handling) -> Look:
    """How a side's images are looked at: handled, and with --clip_model beside their prompts."""
    from liftplace_jax import evaluation
    from liftplace_jax.evaluation.sides import prompts_of
    from liftplace_jax.experiment.texts import read_prompts

    if not _FLAGS.clip_model:
        return Look(handling)
    if side.source is None:
        raise ValueError(f"{_FLAGS.images} has statistics alone: a CLIP score needs images")
    clip = evaluation.load_clip(_FLAGS.clip_model)
    prompts = prompts_of(
        side.source, _FLAGS.images, _FLAGS.prompts, read_prompts, _FLAGS.repeat_prompts
    )
    return Look.of(handling, clip, prompts)


def check_side(side, extractor, handling: Handling) -> None:
    """Raises a ValueError for a side that cannot be compared; says what it will be taken for."""
    from liftplace_jax import evaluation
    from liftplace_jax.host import processes

    if side.statistics is None:
        check_count(len(side.source), extractor, f"{side.source.name}: ")
        return
    file = side.name["file"]
    evaluation.check_reference(side.statistics, extractor, NEIGHBOURS)
    if said := said_of_reference(handling, side.statistics.info):
        processes.say_once(f"{file}: {said}")
    if side.source:
        if len(side.source) <= NEIGHBOURS:
            raise ValueError(f"{file}: arr_0 has {len(side.source)} images, want {NEIGHBOURS + 1}")
        processes.say_once(f"{file}: its statistics are taken, and its images for all else")
    elif side.statistics.features is None:
        processes.say_once(f"{file}: statistics alone, so there is no precision, recall or KID")


def side_features(side, extractor, look: Look, generated: bool = False):
    """`Samples` of a side, or a `Reference`."""
    from liftplace_jax.evaluation.sides import with_rows

    if side.source is None:
        return side.statistics
    samples = features_of(side.source, extractor, len(side.source), look, generated)
    return with_rows(side.statistics, samples) if side.statistics else samples


def features_of(source, extractor, limit: int, look: Look, generated: bool = False):
    """`Samples` of the images of a `Source`, over all devices, with progress."""
    from liftplace_jax import evaluation
    from liftplace_jax.host import sharding
    from liftplace_jax.host.progress import progress

    extractor.check_shape(look.handling.shape(source.image_shape))
    bar = progress(source.name, limit, unit="image")
    try:
        return evaluation.reference(
            source,
            extractor,
            batch_size=_FLAGS.batch_size,
            limit=limit,
            sharding=sharding.batch_sharding(sharding.make_mesh({"data": -1})),
            progress=lambda done: bar.update(done - bar.n),
            generated=generated,
            look=look,
        )
    finally:
        bar.close()


def check_count(count: int, extractor, where: str = "") -> None:
    """Raises a ValueError before any work if there are fewer images than features."""
    if count < extractor.dim and not _FLAGS.allow_few:
        raise ValueError(
            f"{where}{count} images for {extractor.dim} features of {extractor.name!r}: take more, "
            "or --allow_few (gen, calc), which makes numbers that compare with nothing"
        )


def summary(scores: dict[str, Any]) -> str:
    """A line of the scores."""
    from liftplace_jax.experiment.scoring import SCORES

    named = {"frechet": scores["label"], "sfid": "sFID", "kid": "KID", "clip_score": "CLIP score"}
    shown = [name for name in SCORES if name in scores and not name.endswith(("_std", "_error"))]
    values = ", ".join(f"{named.get(name, name)} {scores[name]:.4g}" for name in shown)
    count = scores["num_samples"]
    return f"{values} ({'statistics of a file' if count is None else f'{count:,} images'})"


def entry_point() -> None:
    """For `python -m`."""
    start(main)


if __name__ == "__main__":
    entry_point()
