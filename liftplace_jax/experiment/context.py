"""From a config to teacher, student, data, process, losses: the only place that wires.

An `Experiment` lives in a work directory. Each stage does what is missing there and can be run
alone; what it leaves is what the next one reads:

    config.json
    teacher/   checkpoints, metrics.jsonl, model.safetensors + config.json, evaluation.json
    pruned/    model.safetensors + config.json: where every student starts
    student/   as teacher/; with several methods or seeds student/<method>/seed<n>/
    report.json, report.md, *.png
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax import data, evaluation, weights
from liftplace_jax.experiment import compressing
from liftplace_jax.families import registry
from liftplace_jax.nn import building
from liftplace_jax.host import processes
from liftplace_jax.experiment import workdir as workdirs
from liftplace_jax.encoders.autoencoder_folder import AutoencoderNetwork, load_autoencoder
from liftplace_jax.host.buckets import as_path
from liftplace_jax.experiment.checks import (
    check_batches,
    check_config,
    check_neighbours,
    read_layer_map,
    under,
)
from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.training.distillation import loss_options, make_task, student_objective
from liftplace_jax.evaluation.samples import replicated
from liftplace_jax.nn.network import (
    Network,
    is_finished,
    load_checkpoint,
    load_network,
    make_apply,
    match_features,
)
from liftplace_jax.evaluation.sampling import Sampler, make_sampler
from liftplace_jax.experiment.sources import check_classes, open_images, open_latents
from liftplace_jax.training import profiling
from liftplace_jax.host import sharding
from liftplace_jax.training.loop import train
from liftplace_jax.training.metrics_io import progress
from liftplace_jax.training.objective import (
    BASIC_METHODS,
    METHODS,
    OUTPUT_LOSSES,
    make_objective,
)
from liftplace_jax.training.prepare import prepare
from liftplace_jax.training.state import TrainState
from liftplace_jax.training.step import LossFn


@dataclasses.dataclass(frozen=True)
class Run:
    """One student: a method and a seed, and the folder it lives in."""

    method: str
    seed: int
    folder: Path


class Experiment:
    """See the module's text.

    Args:
      config: as of `configuration.default_config`.
      workdir: the work directory, of this machine or a bucket (gs://...); made if missing.
      claim: whether it becomes (or must be) this config's; otherwise it is only read.

    Raises:
      ValueError: a field of the config is out of its range, or the work directory belongs to
        another config; nothing is written then.
    """

    def __init__(self, config: ConfigDict, workdir: Path, claim: bool = True):
        self.config, self.workdir = config, as_path(workdir)
        self._samplers: dict[Any, Sampler] = {}
        check_config(config)
        self.mesh = sharding.make_mesh(config.mesh)
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        for field in ("teacher.batch_size", "distill.batch_size", "evaluation.batch_size"):
            room, name = field.split(".")
            if config[room][name] % self.mesh.size:
                raise ValueError(
                    f"config.{field} {config[room][name]} is not a multiple of the "
                    f"{self.mesh.size} devices of the mesh"
                )
        with under("process: "):
            self.process = GaussianDiffusion(
                beta_schedule(
                    config.process.schedule, config.process.num_timesteps,
                    config.process.beta_start, config.process.beta_end,
                ),
                config.process.prediction, config.process.variance,
            )  # fmt: skip
        with under("model: "):
            self.model_config = registry.config_from_dict(config.model.to_dict(), partial=True)
            if type(self.model_config) not in compressing.FAMILIES:
                raise ValueError(f"{config.model.model!r} is no network that denoises")
        self._check_later_stages()
        if claim:
            workdirs.claim(self.workdir, config)

    def _check_later_stages(self):
        """Finds now, from shapes alone, what would fail after hours of training."""
        config, model = self.config, self.model_config
        parts = 2 if self.process.variance == "learned_range" else 1
        if model.out_channels != parts * model.in_channels:
            raise ValueError(
                f"config.model: the network predicts {model.out_channels} channels for an input of "
                f"{model.in_channels}; config.process.variance={self.process.variance} needs "
                f"{parts * model.in_channels}"
            )
        size = config.data.image_size
        if size is not None and size != self.image_shape[0]:
            raise ValueError(
                f"images of config.data.image_size {size} do not fit: config.model takes "
                f"{model.image_size}x{model.image_size}"
                + (f", latents of {self.image_shape[0]}" if self.autoencoder else
                   "; change one of them, or set config.latents (latent diffusion)")
            )  # fmt: skip
        shape = (model.image_size, model.image_size, model.in_channels)
        check_batches(config, shape)
        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        with under("evaluation: "):
            if self.extractor:
                self.extractor.check_shape(self.image_shape)
            if config.evaluation.reference:
                if not self.extractor:
                    raise ValueError("reference is set, but features are not: set both or neither")
                evaluation.check_reference(self.real, self.extractor)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
            sampler = make_sampler(
                config.evaluation, self.process, model,
                lambda params, x, *_: (jnp.concatenate(parts * [x], axis=-1), {}),
            )  # fmt: skip
            latents = jax.eval_shape(sampler, None, keys)
        if config.evaluation.reference and self.real.features is not None:
            check_neighbours(config, len(self.real.features))
        if self.autoencoder:
            jax.eval_shape(self.autoencoder.decode, self.autoencoder.params, latents)
        methods = [METHODS[run.method] for run in self.runs]
        for method in methods:
            if method.output in OUTPUT_LOSSES:
                options = loss_options(config.distill.loss, method)
                loss = functools.partial(OUTPUT_LOSSES[method.output], **options)
                with under("distill.loss."):
                    jax.eval_shape(loss, image, image)
        student_config = compressing.predicted_student(self)
        if student_config and any(method.feature for method in methods):
            student, teacher = (Network(c, *building.abstract(c)) for c in (student_config, model))
            match_features(
                student, teacher, read_layer_map(config.distill.layer_map),
                config.distill.feature.adapters,
            )  # fmt: skip

    @property
    def runs(self) -> list[Run]:
        """All students of the config."""
        config = self.config
        methods = BASIC_METHODS if config.method == "all" else config.method.split("+")
        methods = dict.fromkeys(methods)
        pairs = [(method, seed) for method in methods for seed in config.seeds]
        if len(pairs) == 1:
            return [Run(*pairs[0], self.workdir / "student")]
        return [Run(m, s, self.workdir / "student" / m / f"seed{s}") for m, s in pairs]

    @functools.cached_property
    def extractor(self) -> evaluation.Extractor | None:
        """What samples are compared by; None if config.evaluation.features names nothing."""
        fields = self.config.evaluation
        if not fields.features:
            return None
        return evaluation.feature_extractor(fields.features, fields.weights)

    @functools.cached_property
    def real(self) -> evaluation.Samples | evaluation.Reference | None:
        """What samples are compared with: config.evaluation.reference, or the training data."""
        if self.extractor is None:
            return None
        fields = self.config.evaluation
        if fields.reference:
            return evaluation.load_reference(fields.reference)
        bar = progress("reference", len(self.images["train"]), unit="image")
        try:
            return evaluation.reference(
                self.images["train"], self.extractor, batch_size=fields.batch_size,
                sharding=self.batch_sharding, progress=lambda done: bar.update(done - bar.n),
            )  # fmt: skip
        finally:
            bar.close()

    @functools.cached_property
    def autoencoder(self) -> AutoencoderNetwork | None:
        """Between images and what the network sees; None if those are the images."""
        fields = self.config.latents
        if not fields.autoencoder:
            return None
        autoencoder = load_autoencoder(fields.autoencoder)
        data.check_autoencoder(fields.path, autoencoder.identity)
        return autoencoder

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images: of the network's input, or of what it is decoded to."""
        model = self.model_config
        if not self.autoencoder:
            return model.image_size, model.image_size, model.in_channels
        size = model.image_size * self.autoencoder.config.downsampling
        return size, size, self.autoencoder.config.out_channels

    def sampler(self, graphdef: nnx.GraphDef, clip: float | None = None) -> Sampler:
        """The config's sampler of a network; see `make_sampler`, and `sampler_params`."""
        # One function, and so one compiled program, for all students of an architecture.
        if (graphdef, clip) not in self._samplers:
            self._samplers[graphdef, clip] = make_sampler(
                self.config.evaluation, self.process, self.model_config, make_apply(graphdef), clip,
                self.autoencoder and self.autoencoder.decode,
            )  # fmt: skip
        return self._samplers[graphdef, clip]

    def sampler_params(self, params: Any) -> Any:
        """What `sampler` takes as parameters: the network's, and the decoder's if there is one."""
        return (params, self.autoencoder.params) if self.autoencoder else params

    @functools.cached_property
    def sources(self) -> dict[str, data.Source]:
        """What networks are trained on and compared on, by use: "train" and "test".

        The images, or their latents.
        """
        if self.autoencoder:
            sources = open_latents(self.config, self.model_config)
            if self.extractor and not self.config.evaluation.reference:
                _ = self.images  # found wanting now, not at the evaluation
        else:
            sources = self.images
        check_classes(sources, self.model_config.num_classes)
        return sources

    @functools.cached_property
    def images(self) -> dict[str, data.Source]:
        """Images by use; prepared on first use."""
        sources = open_images(self.config, self.image_shape)
        fields, count = self.config.evaluation, len(sources["train"])
        if self.extractor and not fields.reference:
            check_neighbours(self.config, count)
        few = self.extractor and count < self.extractor.dim
        if few and not fields.reference and fields.num_samples > self.extractor.dim:
            raise ValueError(
                f"{sources['train'].name} has {count} images, too few for the "
                f"{self.extractor.dim} features of {self.extractor.name!r}: set "
                "config.evaluation.reference to a reference file, or leave "
                "config.evaluation.features out"
            )
        return sources

    # Teacher ------------------------------------------------------------------------------------

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher's files are."""
        return self.workdir / "teacher"

    def train_teacher(self) -> None:
        """Trains the teacher, or loads the one of config.teacher.checkpoint."""
        if is_finished(self.teacher_folder):
            return
        fields = self.config.teacher
        if fields.checkpoint:
            path = as_path(fields.checkpoint)
            try:
                network = load_checkpoint(path, self.model_config, fields.entry)
            except weights.EntryError as error:
                raise ValueError(f"{error} (config.teacher.entry)") from error
            self._save(self.teacher_folder, network.config, network.params)
            return
        graphdef, params = building.create(
            self.model_config, self.config.seed, jnp.dtype(fields.dtype), fields.remat,
            self._shardings("params.student."),
        )  # fmt: skip
        objective = make_objective(
            METHODS["no_kd"], make_apply(graphdef), self.process, self.config.seed,
            task=make_task(self.config, self.model_config),
        )  # fmt: skip
        state = self.run_training(
            fields, objective, {"student": params}, None, self.config.seed, self.teacher_folder,
            "teacher", graphdef,
        )  # fmt: skip
        self._save_trained(self.teacher_folder, self.model_config, state)

    def teacher(
        self, dtype: str = "float32", remat: str | None = None, placed: bool = False
    ) -> Network:
        """The finished teacher.

        Args:
          dtype: of the computation.
          remat: as of `building.create`.
          placed: whether its parameters are where training has them, read straight to there;
            otherwise they are on the default device.

        Raises:
          ValueError: there is none yet.
        """
        return load_network(
            self.teacher_folder, dtype, "run --mode=teacher first", remat=remat,
            shardings=self._shardings() if placed else None,
        )  # fmt: skip

    # Compress -----------------------------------------------------------------------------------

    def compress(self) -> None:
        """Makes what every student starts from: the pruned teacher, or a given network."""
        folder = self.workdir / "pruned"
        if not is_finished(folder):
            student = compressing.make_student(self)
            self._save(folder, student.config, student.params)

    # Distill ------------------------------------------------------------------------------------

    def distill(self) -> None:
        """Trains every student of the config."""
        for run in self.runs:
            if not is_finished(run.folder):
                self._distill_one(run)

    def _distill_one(self, run: Run) -> None:
        fields = self.config.distill
        teacher = self.teacher(fields.dtype, placed=True)
        start = load_network(
            self.workdir / "pruned", fields.dtype, "run --mode=compress first", remat=fields.remat,
            shardings=self._shardings("params.student."),
        )  # fmt: skip
        objective, params = student_objective(
            self.config, self.process, run.method, run.seed, start, teacher
        )
        teacher_params = teacher.params if METHODS[run.method].needs_teacher else None
        title = f"{run.method} seed {run.seed}"
        state = self.run_training(
            fields, objective, params, teacher_params, run.seed, run.folder, title, start.graphdef
        )
        self._save_trained(run.folder, start.config, state)

    # Both ---------------------------------------------------------------------------------------

    def run_training(
        self, fields: ConfigDict, objective: LossFn, params: dict[str, Any], teacher_params: Any,
        seed: int, folder: Path, title: str, graphdef: nnx.GraphDef | None,
    ) -> TrainState:  # fmt: skip
        """Trains on the data, or goes on.

        Args:
          fields: such as config.teacher.
          objective: what is minimised.
          params: what is trained, as of `TrainState.params`.
          teacher_params: handed to the objective, None without.
          seed: of the order of the data.
          folder: of checkpoints and metrics.
          title: of the progress line.
          graphdef: of params["student"], for config.evaluation.curve_every; None if that is no
            network.
        """
        source = self.sources["train"]
        run = prepare(
            fields, objective, params, teacher_params, self.mesh, self.config.sharding_rules
        )

        every = self.config.evaluation.curve_every
        curve = self._curve(graphdef) if every and graphdef else None

        def on_log(step: int, state: TrainState) -> dict[str, float]:
            values = {"learning_rate": float(run.schedule(step - 1))}
            if curve and step % every == 0:
                values["frechet_float32"] = curve(state.ema)
            return values

        def make_batches(first: int) -> Iterator[Any]:
            batches = data.train_batches(
                source, batch_size=fields.batch_size, seed=seed, start_step=first,
                flip=self.config.data.flip, prefetch=self.config.input_threads,
            )  # fmt: skip
            return sharding.global_batches(batches, self.mesh)

        print(profiling.memory_line(title, run.state, run.teacher_params), file=sys.stderr)
        with profiling.watched(run.step, self.config, folder) as step:
            return train(
                step, run.state, run.teacher_params, make_batches, total_steps=fields.steps,
                folder=folder, title=title, shardings=run.shardings, log_every=fields.log_every,
                checkpoint_every=fields.checkpoint_every, tensorboard=self.config.tensorboard,
                on_log=on_log,
            )  # fmt: skip

    def _shardings(self, prefix: str = "") -> Callable[[Any], Any]:
        """Parameters -> their shardings; prefix as of `tree_shardings`."""
        return functools.partial(
            sharding.tree_shardings, rules=self.config.sharding_rules, mesh=self.mesh, prefix=prefix
        )

    def _curve(self, graphdef) -> Callable[[Any], float]:
        """Parameters -> Frechet distance of few samples, in float32 and in-graph."""
        fields, sample = self.config.evaluation, self.sampler(graphdef)
        real = evaluation.moments_of(self.real)
        distance = jax.jit(evaluation.frechet_distance_in_graph)
        # Whole on each device: split parameters would send the samples around instead.
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(self.batch_sharding))

        def curve(params) -> float:
            samples = evaluation.collect(
                sample, whole(self.sampler_params(params)), fields.curve_samples,
                batch_size=fields.batch_size, extractor=self.extractor, seed=fields.seed,
                sharding=self.batch_sharding,
            )  # fmt: skip
            return float(distance(real, samples.moments))

        return curve

    def _save_trained(self, folder: Path, config: Any, state: TrainState) -> None:
        raw, ema = sharding.gathered((state.params["student"], state.ema))
        if processes.is_first():
            weights.save_raw(folder, raw)
        self._save(folder, config, ema)

    def _save(self, folder: Path, config: Any, params: Any) -> None:
        if processes.is_first():
            weights.save_model(folder, registry.config_to_dict(config), params)
        processes.wait_for(folder / "config.json")
