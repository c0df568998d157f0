"""An experiment's pipelines of diffusers: where its networks come from, and what students become.

A finished student is written as student/<method>/seed<n>/pipeline, which diffusers'
`from_pretrained` loads: its averaged weights, and the other parts of the teacher's pipeline, but
for an autoencoder or texts that are not its own; or those of the config and a scheduler of its
process, where the teacher is of no pipeline.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.encoders.autoencoder_folder import save_as_diffusers
from liftplace_jax.encoders.clip import save_text_encoder
from liftplace_jax.encoders.shipped import find_shipped
from liftplace_jax.encoders.texts import Texts, tokenizer_entry
from liftplace_jax.encoders.tokenizer import copy_tokenizer
from liftplace_jax.experiment.configuration import under
from liftplace_jax.experiment.context import Context
from liftplace_jax.families.loading import load_network
from liftplace_jax.families.pipelines import (
    INDEX,
    SCHEDULER,
    SCHEDULER_FILE,
    find_pipeline,
    join_pipeline,
    parts_of,
    read_index,
    read_scheduler,
    write_pipeline,
)
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import is_in_bucket, upload

FOLDER = "pipeline"
_FIELDS = ("pipeline", "teacher.checkpoint", "compress.checkpoint")
"""Of the config, that may name a pipeline or a network in one."""


def check_pipelines(context: Context, trains: bool) -> None:
    """Checks what pipelines say of the process, and that students' can be written.

    Args:
      context: the experiment's.
      trains: whether anything will be trained.

    Raises:
      ValueError: a network was made for another process, or a pipeline cannot be written; names the
        field of the config.
    """
    named = context.config.pipeline
    if named and find_pipeline(named) is None:
        raise ValueError(f"config.pipeline: {named}: no {INDEX} there: it is no pipeline's folder")
    for field in _FIELDS:
        value = _value(context.config, field)
        if value and (folder := find_pipeline(value)):
            scheduler = read_scheduler(folder)
            if scheduler and (misfits := context.process.misfits(scheduler)):
                path = folder / SCHEDULER / SCHEDULER_FILE
                raise ValueError(f"config.{field}: {path}: " + "; ".join(misfits))
    fields = context.config.distill
    if trains and fields.write_pipeline:
        try:
            _check_parts(context)
        except ValueError as error:
            raise ValueError(
                f"config.distill.write_pipeline: {error}; or let it be False: then students are "
                "written without"
            ) from error


def _source(config: ConfigDict) -> Path | None:
    """The pipeline whose other parts students get."""
    named = config.pipeline or config.teacher.checkpoint
    return find_pipeline(named) if named else None


_PARTS = {"latents.autoencoder": ("vae",), "text.folder": ("text_encoder", "tokenizer")}
"""Field -> the parts of a pipeline that are of it."""


def _replaced(config: ConfigDict, source: Path) -> dict[str, tuple[str, ...]]:
    """Those of _PARTS that are not the source's."""
    found = {}
    for field, parts in _PARTS.items():
        value = _value(config, field)
        places = [source, *(source / part for part in parts)]
        if value and find_shipped(value).resolve() not in [place.resolve() for place in places]:
            found[field] = parts
    return found


def _value(config: ConfigDict, field: str) -> Any:
    return functools.reduce(lambda room, name: room[name], field.split("."), config)


def _check_parts(context: Context) -> None:
    config = context.config
    if source := _source(config):
        read_index(source, context.model)
        replaced = _replaced(config, source)
        if replaced and context.family.format.pipeline is None:
            raise ValueError(
                f"config.{next(iter(replaced))} is not of the pipeline {source}, whose parts are "
                f"copied, and parts of a {context.family.name!r} cannot be replaced"
            )
        if "latents.autoencoder" in replaced:
            _check_shift(context)
        return
    parts_of(context.model)
    for field in _PARTS:
        if not _value(config, field):
            raise ValueError(
                f"a pipeline needs config.{field}: set it, or config.pipeline to a folder that "
                "stands for it"
            )
    _check_shift(context)
    with under("evaluation."):
        context.process.scheduler(config.evaluation)


def _check_shift(context: Context) -> None:
    assert context.autoencoder is not None, "its field is set"
    if shift := context.autoencoder.config.shift_factor:
        raise ValueError(
            f"{context.config.latents.autoencoder} shifts latents by {shift}, which such a "
            "pipeline of diffusers does not"
        )


def write_student(context: Context, folder: Path) -> None:
    """Writes a finished student's pipeline if it is wanted and not there yet.

    Args:
      context: the experiment's.
      folder: the student's.
    """
    out = folder / FOLDER
    if not context.config.distill.write_pipeline or not processes.is_first():
        return  # nothing is made of it, so nobody waits for it
    if (out / INDEX).exists():
        return
    student = load_network(folder)
    if not is_in_bucket(out):
        _write(context, out, student.config, student.params)
        return
    with tempfile.TemporaryDirectory(prefix="liftplace-") as scratch:
        whole = Path(scratch) / FOLDER
        _write(context, whole, student.config, student.params)
        index = (whole / INDEX).rename(Path(scratch) / INDEX)
        upload(whole, out)
        upload(index, out / INDEX)  # last: what has it is whole


def _write(context: Context, out: Path, model: Any, params: Any) -> None:
    config, entry = context.config, tokenizer_entry(context.config.text.entry)

    def save_autoencoder(folder: Path) -> None:
        assert context.autoencoder is not None, "`_check_parts` saw it"
        save_as_diffusers(folder, context.autoencoder)

    def save_texts(folder: Path) -> None:
        assert isinstance(context.texts, Texts), "`_check_parts` saw them"
        save_text_encoder(folder, context.texts.encoder)

    parts: dict[str, Callable[[Path], None]] = {
        "vae": save_autoencoder,
        "text_encoder": save_texts,
        "tokenizer": lambda folder: copy_tokenizer(config.text.folder, folder, entry),
    }
    if source := _source(config):
        names = sum(_replaced(config, source).values(), ())
        write_pipeline(out, model, params, source, {name: parts[name] for name in names})
        return
    scheduler = context.process.scheduler(config.evaluation)
    join_pipeline(out, model, params, parts, scheduler)
