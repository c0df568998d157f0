"""From a config to mesh, process, network, data and judge: the only place that wires.

A `Context` lives in a work directory. Stages are functions of it; each does what is missing there,
and what it leaves is what the next one reads:

    config.json, data.json
    teacher/   checkpoints, metrics.jsonl, model.safetensors + config.json, evaluation.json
    pruned/    model.safetensors + config.json: where every student starts
    student/   as teacher/, in <method>/seed<n>/
    report.json, report.md, *.png
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from liftplace_jax import data
from liftplace_jax.compress import Pruner
from liftplace_jax.conditioning import Conditioning, check_sources
from liftplace_jax.diffusion import Process, make_process
from liftplace_jax.encoders.autoencoder_folder import (
    AutoencoderNetwork,
    Decoder,
    load_autoencoder,
)
from liftplace_jax.experiment.checks import check_config, check_neighbours
from liftplace_jax.experiment.configuration import under
from liftplace_jax.experiment.judging import Judge
from liftplace_jax.experiment.sources import load_split, open_images, open_latents
from liftplace_jax.experiment.texts import AnyTexts, bind, open_prompts, open_texts, with_captions
from liftplace_jax.experiment.workdir import check_data
from liftplace_jax.families import registry
from liftplace_jax.families.family import Family
from liftplace_jax.host import processes, sharding
from liftplace_jax.host.buckets import as_path
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.training.objective import BASIC_METHODS


@dataclasses.dataclass(frozen=True)
class Run:
    """One student: a method and a seed, and the folder it lives in."""

    method: str
    seed: int
    folder: Path


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What the stages of an experiment share; see the module's text. Data are opened on first use.

    Attributes:
      config: as of `configuration.default_config`.
      workdir: the work directory, of this machine or a bucket.
      mesh: of all devices.
      process: the diffusion process.
      model: the teacher's config.
      writes: whether the work directory may learn of which data it is; otherwise it is only read.
    """

    config: ConfigDict
    workdir: Path
    mesh: jax.sharding.Mesh
    process: Process
    model: DenoiserConfig
    writes: bool = True

    @property
    def family(self) -> Family:
        """Of the teacher."""
        return registry.family_of(self.model)

    @property
    def pruner(self) -> Pruner:
        """How students are made."""
        with under("compress."):
            return self.family.pruner(self.config.compress.pruner)

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Of batches: every device has a part."""
        return sharding.batch_sharding(self.mesh)

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher's files are."""
        return self.workdir / "teacher"

    @property
    def pruned_folder(self) -> Path:
        """Where the student before training is."""
        return self.workdir / "pruned"

    @functools.cached_property
    def runs(self) -> list[Run]:
        """All students of the config; first asked for by all processes."""
        config, folder = self.config, self.workdir / "student"
        methods = BASIC_METHODS if config.method == "all" else config.method.split("+")
        methods = dict.fromkeys(methods)
        pairs = [(method, seed) for method in methods for seed in config.seeds]
        if len(pairs) == 1 and processes.told_by_first((folder / "metrics.jsonl").exists):
            return [Run(*pairs[0], folder)]  # of a version that gave a single student no folder
        return [Run(m, s, folder / m / f"seed{s}") for m, s in pairs]

    @functools.cached_property
    def autoencoder(self) -> AutoencoderNetwork | None:
        """Between images and what the network sees; None if those are the images."""
        fields = self.config.latents
        if not fields.autoencoder:
            return None
        autoencoder = load_autoencoder(fields.autoencoder)
        data.check_autoencoder(fields.path, autoencoder.identity)
        return autoencoder

    @functools.cached_property
    def decoder(self) -> Decoder | None:
        """Of latents, as the config says; None without an autoencoder."""
        fields = self.config.latents
        return self.autoencoder and self.autoencoder.decoder(fields.decode_dtype, fields.tile)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images: of the network's input, or of what it is decoded to."""
        if not self.autoencoder:
            return self.model.shape
        size = self.model.image_size * self.autoencoder.config.downsampling
        return size, size, self.autoencoder.config.out_channels

    @functools.cached_property
    def judge(self) -> Judge:
        """What samples are drawn, and compared, by."""
        return Judge(
            self.config.evaluation,
            self.process,
            self.decoder,
            self.batch_sharding,
            lambda: self.images["train"],
            lambda: open_prompts(self.config, self.model, self.texts, self._held_out),
        )

    def _held_out(self) -> data.Source:
        # Not `images`, which take the work directory.
        return load_split(self.config, self.config.data.test_split, self.image_shape[2])

    @functools.cached_property
    def texts(self) -> AnyTexts | None:
        """Tokenizer and text encoder; None if networks are told no texts."""
        return open_texts(self.config)

    def told(self, model: DenoiserConfig) -> Conditioning:
        """What a network is told of the data."""
        return bind(self.config, model, self.texts)

    @functools.cached_property
    def conditioning(self) -> Conditioning:
        """What the teacher is told of the data."""
        return self.told(self.model)

    @functools.cached_property
    def frozen(self) -> dict[str, Any]:
        """Arrays of frozen encoders by use, as `Conditioning.embed` takes them."""
        return {"text": self.texts.frozen("", self.conditioning.columns)} if self.texts else {}

    @functools.cached_property
    def embed(self) -> Callable[[Any], Any]:
        """A batch of data -> what networks that are judged are handed of it."""
        with_precision = jax.default_matmul_precision(self.config.evaluation.precision)
        embed = jax.jit(with_precision(self.conditioning.embed))
        return lambda batch: embed(self.frozen, self.conditioning.of(batch))

    @functools.cached_property
    def sources(self) -> Mapping[str, data.Source | data.LatentSource]:
        """What networks are trained on and compared on, by use: "train" and "test".

        The images, or their latents.
        """
        if not self.autoencoder:
            return self.images
        sources = open_latents(self.config, self.model)
        if self.judge.extractor and not self.config.evaluation.reference:
            _ = self.images  # found wanting now, not at the evaluation
        check_sources(self.conditioning, sources.values())
        check_data(self.workdir, "latents", sources, self.writes)
        return sources

    @functools.cached_property
    def images(self) -> dict[str, data.Source]:
        """Images by use; prepared on first use."""
        sources = open_images(self.config, self.image_shape)
        if not self.autoencoder:
            sources = {
                use: with_captions(source, self.texts, self.conditioning)
                for use, source in sources.items()
            }
            check_sources(self.conditioning, sources.values())
        fields, count = self.config.evaluation, len(sources["train"])
        extractor = self.judge.extractor
        if extractor and not fields.reference:
            check_neighbours(self.config, count)
        if extractor and count < extractor.dim and not (fields.allow_few or fields.reference):
            raise ValueError(
                f"{sources['train'].name} has {count} images, too few for the "
                f"{extractor.dim} features of {extractor.name!r}: set "
                "config.evaluation.reference to a reference file, or leave "
                "config.evaluation.features out"
            )
        check_data(self.workdir, "images", sources, self.writes)
        return sources


def make_context(config: ConfigDict, workdir: str | os.PathLike, writes: bool = True) -> Context:
    """Wires a config; reads no data, writes nothing.

    Args:
      config: as of `configuration.default_config`.
      workdir: the work directory, of this machine or a bucket (gs://...).
      writes: as of `Context`.

    Raises:
      ValueError: a field of the config is out of its range.
    """
    check_config(config)
    with under("process: "):
        process = make_process(config.process)
    with under("model: "):
        model = registry.config_from_dict(config.model.to_dict(), partial=True)
    mesh = sharding.make_mesh(config.mesh)
    return Context(config, as_path(workdir), mesh, process, model, writes)
