"""The compress stage: what every student starts from, by the teacher's family.

A third family is one more entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax import compress, data, weights
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import as_path
from liftplace_jax.experiment.checks import NORMALISATIONS, under
from liftplace_jax.training.distillation import make_task
from liftplace_jax.host.files import replacing, write_json
from liftplace_jax.losses import output_kd_loss
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.nn.network import (
    Network,
    from_tensors,
    is_finished,
    load_checkpoint,
    load_network,
    make_apply,
)
from liftplace_jax.host import sharding
from liftplace_jax.training.metrics_io import progress, read_metrics
from liftplace_jax.training.objective import METHODS, draw_inputs, make_objective
from liftplace_jax.training.step import LossFn

if TYPE_CHECKING:
    from liftplace_jax.experiment.context import Experiment


class Family(NamedTuple):
    """How the students of one family of models are made.

    Attributes:
      predict: experiment -> the student's config, as far as it can be known from shapes alone.
      prune: (experiment, teacher) -> (the student's config, its tensors by published name).
    """

    predict: Callable[[Experiment], Any]
    prune: Callable[[Experiment, Network], tuple[Any, dict[str, np.ndarray]]]


def predicted_student(experiment: Experiment) -> Any | None:
    """The config of the student that `make_student` will make; None if it is a given one.

    Raises:
      ValueError: a field of config.compress does not fit; names it.
    """
    if experiment.config.compress.checkpoint:
        if is_finished(experiment.workdir / "pruned"):
            return None
        return _given_student(experiment).config
    with under("compress."):
        return _family(experiment).predict(experiment)


def make_student(experiment: Experiment) -> Network:
    """The pruned teacher, or the network of config.compress.checkpoint.

    Raises:
      ValueError: there is no teacher yet, or a given network does not fit.
    """
    if experiment.config.compress.checkpoint:
        return _given_student(experiment)
    config, tensors = _family(experiment).prune(experiment, experiment.teacher())
    return from_tensors(config, tensors, "the pruned teacher")


def _family(experiment: Experiment) -> Family:
    return FAMILIES[type(experiment.model_config)]


def _given_student(experiment: Experiment) -> Network:
    fields = experiment.config.compress
    path = as_path(fields.checkpoint)
    if path.is_file():
        with under("compress."):
            config = _family(experiment).predict(experiment)
        try:
            student = load_checkpoint(path, config, fields.entry, said_by="config.compress")
        except weights.EntryError as error:
            raise ValueError(f"{error} (config.compress.entry)") from error
    else:
        student = load_network(path)
    if type(student.config) not in FAMILIES:
        raise ValueError(
            f"config.compress.checkpoint {path} is no network that denoises: "
            f"{type(student.config).__name__}"
        )
    for field in ("image_size", "in_channels", "out_channels", "num_classes", "null_label"):
        found, wanted = getattr(student.config, field), getattr(experiment.model_config, field)
        if found != wanted:
            raise ValueError(
                f"config.compress.checkpoint {path} has {field} {found}, config.model.{field} "
                f"is {wanted}: change one of them"
            )
    return student


# U-Net: channels ----------------------------------------------------------------------------------


def _predict_unet(experiment: Experiment) -> UNetConfig:
    fields = experiment.config.compress
    if fields.depth is not None:
        raise ValueError(f"depth {fields.depth} is for a DiT; a U-Net is pruned by compress.ratio")
    return compress.pruned_config(
        experiment.model_config, fields.ratio, NORMALISATIONS[fields.normalisation]
    )


def _prune_unet(experiment: Experiment, teacher: Network):
    fields = experiment.config.compress
    gradients = None
    if fields.importance == "taylor":
        gradients = weights.to_torch(_taylor_gradients(experiment, teacher))
    pruned = compress.prune_unet(
        teacher.config, weights.to_torch(teacher.params), fields.ratio,
        compress.IMPORTANCES[fields.importance](experiment.config.seed), gradients=gradients,
        min_channels_per_group=NORMALISATIONS[fields.normalisation],
    )  # fmt: skip
    return pruned.config, pruned.tensors


def _taylor_gradients(experiment: Experiment, teacher: Network):
    """Gradients of the diffusion loss on one batch, timestep after timestep; by every process."""
    fields, seed, process = experiment.config.compress, experiment.config.seed, experiment.process
    batches = data.train_batches(
        experiment.sources["train"], batch_size=fields.taylor_batch_size, seed=seed,
        process_index=0, process_count=1,
    )  # fmt: skip
    images = next(batches)["image"]
    batches.close()
    noise = jax.random.normal(jax.random.key(seed), images.shape)
    apply = make_apply(teacher.graphdef)

    @jax.jit
    @jax.value_and_grad
    def loss(params, t):
        t = jnp.full(images.shape[:1], t)
        x_t = process.q_sample(images, t, noise)
        prediction, _ = process.split(apply(params, x_t, t, False, None)[0])
        return output_kd_loss(prediction, process.target(images, noise, t))

    bar = progress("taylor", process.num_timesteps)

    def loss_and_gradient(t):
        result = loss(teacher.params, jnp.int32(t))
        bar.update()
        return result

    try:
        timesteps = range(process.num_timesteps)
        return compress.taylor_gradients(loss_and_gradient, timesteps, fields.taylor_threshold)[0]
    finally:
        bar.close()


# DiT: depth ---------------------------------------------------------------------------------------

LAYERS = ("uniform", "learned", *compress.LAYER_IMPORTANCES)
"""Choices of config.compress.layers, beside a list of block numbers."""


def _predict_dit(experiment: Experiment) -> DiTConfig:
    """The student's config; kept_layers only if config.compress.layers says them."""
    fields, teacher = experiment.config.compress, experiment.model_config
    if fields.depth is None:
        raise ValueError(
            f"depth must be set for a DiT: how many of its {teacher.depth} blocks stay "
            "(compress.ratio and importance are for U-Nets)"
        )
    # The checks do not depend on which blocks stay.
    student = compress.pruned_depth_config(
        teacher, compress.uniform_layers(fields.depth, teacher.depth)
    )
    if fields.layers == "learned":
        _groups(experiment)
        finished = is_finished(experiment.workdir / "pruned")  # perhaps on other devices
        if fields.learned.batch_size % experiment.mesh.size and not finished:
            raise ValueError(
                f"learned.batch_size {fields.learned.batch_size} is not a multiple of the "
                f"{experiment.mesh.size} devices of the mesh"
            )
    if fields.layers in LAYERS:
        return student.replace(kept_layers=None)
    try:
        layers = compress.read_layers(fields.layers)
    except ValueError as error:
        raise ValueError(f"{error}; the choices are {sorted(LAYERS)}") from error
    if len(layers) != fields.depth:
        raise ValueError(f"layers names {len(layers)} blocks, compress.depth is {fields.depth}")
    return compress.pruned_depth_config(teacher, layers)


def _groups(experiment: Experiment) -> compress.Groups:
    fields, depth = experiment.config.compress, experiment.model_config.depth
    keep, size = fields.learned.keep, fields.learned.group
    if keep is None and size is None:
        return compress.smallest_groups(fields.depth, depth)
    if keep is None or size is None:
        raise ValueError(f"learned: set keep and group both or neither, got {keep} and {size}")
    groups = compress.make_groups(keep, size, depth)
    if groups.kept != fields.depth:
        raise ValueError(
            f"learned: to keep {groups.keep} of {groups.size} leaves {groups.kept} of the "
            f"teacher's {depth} blocks, compress.depth is {fields.depth}"
        )
    return groups


def _prune_dit(experiment: Experiment, teacher: Network):
    fields, depth = experiment.config.compress, teacher.config.depth
    record: dict[str, Any] = {}
    if fields.layers == "uniform":
        kept = compress.uniform_layers(fields.depth, depth)
    elif fields.layers == "learned":
        kept, record = _learned_layers(experiment)
    elif fields.layers in LAYERS:
        scores = compress.layer_scores(
            fields.layers, teacher.graphdef, teacher.params, _scored_batches(experiment)
        )
        kept, record = compress.most_important(scores, fields.depth), {"scores": scores.tolist()}
    else:
        kept = compress.read_layers(fields.layers)
    if processes.is_first():
        write_json(
            experiment.workdir / "pruned" / "layers.json",
            {"layers": fields.layers, "kept": kept, **record},
        )
    return compress.prune_depth(teacher.config, weights.to_torch(teacher.params), kept)


def _scored_batches(experiment: Experiment) -> Iterator[tuple[jax.Array, ...]]:
    """Noised training data, (x, t, labels, target), the same in every process."""
    fields, seed, process = experiment.config.compress, experiment.config.seed, experiment.process
    task = make_task(experiment.config, experiment.model_config)
    batches = data.train_batches(
        experiment.sources["train"], batch_size=fields.score_batch_size, seed=seed,
        flip=experiment.config.data.flip, process_index=0, process_count=1,
    )  # fmt: skip
    bar = progress("layers", fields.score_batches, unit="batch")
    try:
        for step in range(fields.score_batches):
            batch = jax.tree.map(jnp.asarray, next(batches))
            t, noise, labels = draw_inputs(process, task, seed, batch, step)
            x = process.q_sample(batch["image"], t, noise)
            yield x, t, labels, process.target(batch["image"], noise, t)
            bar.update()
    finally:
        bar.close()
        batches.close()


def _learned_layers(experiment: Experiment) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(blocks that stay, the learned distribution), from a search in pruned/search."""
    fields, seed = experiment.config.compress.learned, experiment.config.seed
    folder, groups = experiment.workdir / "pruned" / "search", _groups(experiment)
    teacher = experiment.teacher(fields.dtype, fields.remat, placed=True)
    start = compress.init_search(jax.random.key(seed), teacher.params, groups, fields.rank)
    state = experiment.run_training(
        fields, _search_objective(experiment, teacher, groups), {"student": start},
        teacher.params, seed, folder, "search", None,
    )  # fmt: skip
    # The averaged gates decide, as published.
    gates = np.asarray(sharding.gathered(state.ema["gates"]), np.float64)
    kept = compress.most_probable(gates, groups)
    probabilities = jax.nn.softmax(fields.gate_scale * gates)
    if processes.is_first():
        _draw_search(folder, kept)
    return kept, {
        "group": groups.size, "masks": groups.masks.astype(int).tolist(),
        "probabilities": np.asarray(probabilities).tolist(),
    }  # fmt: skip


def _search_objective(
    experiment: Experiment, teacher: Network, groups: compress.Groups
) -> LossFn:
    """The diffusion loss of the teacher under search; its metrics say which blocks stay."""
    config, fields = experiment.config, experiment.config.compress.learned
    task = make_task(config, teacher.config)
    # The parts of an accumulated batch are steps of their own for an objective.
    steps = fields.steps * fields.accumulation

    def loss_fn(params, base, batch, step):
        temperature = compress.annealed(
            fields.temperature_start, fields.temperature_end, step, steps
        )
        apply = compress.searched_apply(
            teacher.graphdef, base, groups, lora_scale=fields.alpha / fields.rank,
            gate_scale=fields.gate_scale, temperature=temperature,
        )  # fmt: skip
        objective = make_objective(
            METHODS["no_kd"], apply, experiment.process, config.seed, task=task
        )
        loss, metrics = objective(params, None, batch, step)
        masks = jax.nn.softmax(fields.gate_scale * params["student"]["gates"])
        stay = compress.expected_gates(masks, groups)
        metrics |= {f"keep.{layer}": stay[layer] for layer in range(groups.depth)}
        return loss, metrics | {"temperature": temperature}

    return loss_fn


def keep_probabilities(rows: list[dict[str, float]]) -> np.ndarray:
    """(depth, lines) of a search's metrics, by number of the block: jit sorts them by name."""
    depth = sum(name.startswith("keep.") for name in rows[0])
    return np.array([[row[f"keep.{layer}"] for row in rows] for layer in range(depth)])


def _draw_search(folder: Path, kept: tuple[int, ...]) -> None:
    """Writes search.png: the probability of each block to stay, over the steps."""
    from matplotlib.figure import Figure  # late: it takes a while to import

    rows = read_metrics(folder)
    probabilities = keep_probabilities(rows)
    figure = Figure(figsize=(6, 1.5 + 0.15 * len(probabilities)), layout="constrained")
    axis = figure.subplots()
    mesh = axis.pcolormesh(
        [row["step"] for row in rows], range(len(probabilities)), probabilities, vmin=0, vmax=1,
        shading="nearest",
    )  # fmt: skip
    axis.set(xlabel="step", ylabel="block (numbered: stays)", yticks=kept)
    axis.invert_yaxis()
    figure.colorbar(mesh, label="probability to stay")
    with replacing(folder / "search.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)


FAMILIES: dict[type, Family] = {
    UNetConfig: Family(_predict_unet, _prune_unet),
    DiTConfig: Family(_predict_dit, _prune_dit),
}
"""A model's config class -> how its students are made."""
