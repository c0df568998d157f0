"""The report of a work directory: table, samples, curves, and where the errors are."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from liftplace_jax.families import registry
from liftplace_jax.host import processes
from liftplace_jax.data import eval_batches
from liftplace_jax.experiment.context import Experiment
from liftplace_jax.host.files import read_json, replacing, write_json
from liftplace_jax.losses import error_groups
from liftplace_jax.families.cost import count_macs
from liftplace_jax.nn.network import load_network
from liftplace_jax.experiment.scoring import (
    CLASS_COLUMNS,
    CLASS_ROWS,
    predictor,
    read_evaluation,
    read_samples,
)
from liftplace_jax.training.metrics_io import read_metrics

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

FILES = ("report.json", "report.md", "samples.png", "curves.png", "groups.png")
MEASURES = (
    "frechet", "precision", "recall", "frechet_clipped", "precision_clipped", "recall_clipped",
    "output_error", "images_per_second", "train_seconds",
)  # fmt: skip
# Drawn where a method has them; on a logarithmic axis but for the last three.
CURVES = (
    "loss", "diffusion", "vb", "output_kd", "vb_kd", "coarse", "fine", "feature_kd", "weight",
    "slope", "intercept",
)  # fmt: skip


def is_reported(experiment: Experiment) -> bool:
    """Whether all files of the report are there."""
    workdir = experiment.workdir
    return processes.told_by_first(lambda: all((workdir / name).exists() for name in FILES))


def write_report(experiment: Experiment) -> None:
    """Writes report.json, report.md, samples.png, curves.png and groups.png; process 0 does.

    Raises:
      ValueError: teacher or a student is not evaluated yet.
    """
    rows = collect_rows(experiment)
    if processes.is_first():
        _write_files(experiment, rows)
    processes.wait_for(experiment.workdir / "report.json")


def _write_files(experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    summary, workdir = summarise(rows), experiment.workdir
    save_figure(samples_figure(experiment, rows), workdir / "samples.png")
    save_figure(curves_figure(experiment), workdir / "curves.png")
    save_figure(groups_figure(experiment), workdir / "groups.png")
    with replacing(workdir / "report.md") as temporary:
        temporary.write_text(markdown(experiment, summary))
    write_json(workdir / "report.json", {
        "name": experiment.config.name, "rows": rows, "summary": summary, "versions": versions(),
    })  # fmt: skip


def collect_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """One row for the teacher and for each student."""
    rows, teacher_macs = [], None
    entries = [("teacher", experiment.config.seed, experiment.teacher_folder)]
    entries += [(run.method, run.seed, run.folder) for run in experiment.runs]
    for method, seed, folder in entries:
        result = read_evaluation(folder)
        fields = read_json(folder / "config.json", "Bring back a whole one")
        config = registry.config_from_dict(fields)
        metrics = read_metrics(folder)
        macs = count_macs(config)
        teacher_macs = teacher_macs or macs
        rows.append({
            "method": method, "seed": seed, "macs": macs, "folder": str(
                folder.relative_to(experiment.workdir)),
            "steps": int(metrics[-1]["step"]) if metrics else None,
            "train_seconds": metrics[-1]["seconds"] if metrics else None,
            "final_loss_terms": metrics[-1] if metrics else None,
            **result,
        })  # fmt: skip
    for row in rows:
        row["compression"] = rows[0]["parameters"] / row["parameters"]
        row["macs_ratio"] = teacher_macs / row["macs"]
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and, over several seeds, the standard deviation of each method."""
    summary = []
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        entry = {"method": method, "seeds": [row["seed"] for row in members]}
        for key in ("parameters", "macs", "compression", "steps"):
            entry[key] = members[0][key]
        for key in MEASURES:
            values = [row[key] for row in members if row.get(key) is not None]
            entry[key] = statistics.fmean(values) if values else None
            entry[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        summary.append(entry)
    return summary


def markdown(experiment: Experiment, summary: list[dict[str, Any]]) -> str:
    """The report as text."""
    config, evaluation = experiment.config, experiment.config.evaluation
    lines = [f"# {config.name}", "", *_table(summary), ""]
    if experiment.extractor:
        real = f"all of {config.data.name} {config.data.train_split}"
        if evaluation.reference:
            real = f"the reference {Path(evaluation.reference).name}"
        lines.append(
            f"Frechet: {experiment.extractor.label}, {evaluation.num_samples} samples against "
            f"{real}; lower is better."
        )
        if any(row["precision"] is not None for row in summary):
            lines[-1] += f" Precision, recall: k = {evaluation.neighbours}."
    else:
        lines.append(
            "No feature extractor was named (config.evaluation.features): "
            f"{evaluation.num_samples} samples were drawn from each model and compared with "
            "nothing, so there is no Frechet distance, precision or recall."
        )
    if evaluation.clip:
        lines.append(
            "Clipped: predicted data limited to the image range at each sampling step, which "
            "forgives errors in mean and variance."
        )
    lines += [
        f"Sampler: {evaluation.sampler}, {evaluation.sample_steps} {evaluation.skip_type} steps, "
        f"eta {evaluation.eta}, EMA weights, seed {evaluation.seed}{_guidance(evaluation)}.",
        "Output error: mean squared difference to the teacher's prediction on "
        f"{config.data.name} {config.data.test_split}.",
    ]
    if any(row["images_per_second"] is not None for row in summary):
        lines.append(
            f"Images/s: drawn at batch {evaluation.batch_size}"
            f"{', features included' if experiment.extractor else ''}, without the first batch."
        )
    if any(row["frechet_spread"] is not None for row in summary):
        lines.append("After +-: standard deviation over seeds.")
    if evaluation.num_samples < 500:
        lines.append("So few samples are for a smoke run: the numbers mean little.")
    lines += ["", "Teacher and students from the same noise:", "", "![samples](samples.png)", "",
              "Loss terms, slope, intercept and weight over steps:", "", "![curves](curves.png)",
              "", "Where the student errs, and the groups that PLACE makes of it:", "",
              "![groups](groups.png)", ""]  # fmt: skip
    return "\n".join(lines)


def _table(summary: list[dict[str, Any]]) -> list[str]:
    """Lines of the table; a measure that no row has is no column."""
    columns = {
        "method": lambda row: row["method"]
        + (f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""),
        "params": lambda row: f"{row['parameters']:,}",
        "MACs": lambda row: _si(row["macs"]),
        "compression": lambda row: f"{row['compression']:.1f}x",
        "Frechet": lambda row: _spread(row, "frechet", ".1f"),
        "precision": lambda row: _spread(row, "precision", ".3f"),
        "recall": lambda row: _spread(row, "recall", ".3f"),
        "Frechet, clipped": lambda row: _spread(row, "frechet_clipped", ".1f"),
        "output error": lambda row: _spread(row, "output_error", ".4f"),
        "images/s": lambda row: _spread(row, "images_per_second", ".3g"),
        "steps": lambda row: "-" if row["steps"] is None else str(row["steps"]),
        "time": lambda row: _spread(row, "train_seconds", ".0f", " s"),
    }
    cells = {name: [cell(row) for row in summary] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    header, *rows = (
        "| " + " | ".join(row) + " |" for row in (cells, *zip(*cells.values(), strict=True))
    )
    return [header, "|" + "---|" * len(cells), *rows]


def samples_figure(experiment: Experiment, rows: list[dict[str, Any]]) -> plt.Figure:
    """Teacher and the first student of each method, drawn from the same noise.

    A line of samples as published, and one with clipping if there is one.
    """
    shown = {row["method"]: row for row in reversed(rows)}
    names = list(dict.fromkeys(row["method"] for row in rows))
    variants = {"": ""} | ({"_clipped": ", clipped"} if experiment.config.evaluation.clip else {})
    # Few of the large images, so that each can be seen.
    side, width = (8, 3) if experiment.image_shape[0] <= 32 else (4, 4)
    by_class = bool(experiment.model_config.num_classes)
    height = width * CLASS_ROWS / CLASS_COLUMNS + 0.4 if by_class else width
    figure, axes = plt.subplots(
        len(variants), len(names), squeeze=False, layout="constrained",
        figsize=(width * len(names), (height + 0.4) * len(variants)),
    )  # fmt: skip
    for line, (suffix, note) in zip(axes, variants.items(), strict=True):
        for axis, name in zip(line, names, strict=True):
            _show_samples(axis, experiment.workdir / shown[name]["folder"], suffix, side)
            frechet = shown[name].get(f"frechet{suffix}")
            score = "" if frechet is None else f"\nFrechet {frechet:.1f}"
            axis.set_title(f"{name}{note}{score}", fontsize=10)
    return figure


def _show_samples(axis: plt.Axes, folder: Path, suffix: str, side: int) -> None:
    """A square of samples; of a class-conditional network a column for each class."""
    samples = read_samples(folder)
    classes = None if suffix else samples.get("classes")
    if classes is None:
        show(axis, grid(samples[f"images{suffix}"][: side**2], side))
    else:
        images = samples["images_by_class"]
        show(axis, grid(images, len(classes)))
    if classes is None:
        axis.set_axis_off()
        return
    pitch = images.shape[2] + 1
    axis.set_xticks(pitch * np.arange(len(classes)) + pitch / 2 - 1, classes, fontsize=8)
    axis.set_yticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def curves_figure(experiment: Experiment) -> plt.Figure:
    """Every logged term over steps, one line for each method (seed by seed)."""
    metrics = [(run, read_metrics(run.folder)) for run in experiment.runs]
    names = [name for name in CURVES if any(name in row for _, rows in metrics for row in rows)]
    columns = -(-len(names) // 2)
    figure, axes = plt.subplots(
        2, columns, figsize=(3.5 * columns, 6), layout="constrained", squeeze=False
    )
    methods = list(dict.fromkeys(run.method for run in experiment.runs))
    colors = dict(zip(methods, plt.get_cmap("tab10").colors, strict=False))
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for run, rows in metrics:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                first = run.seed == experiment.config.seeds[0]
                axis.plot(*zip(*points, strict=True), color=colors[run.method], lw=1.2, alpha=0.8,
                          label=run.method if first else None)  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
        if name in ("slope", "intercept"):
            axis.axhline(1 if name == "slope" else 0, color="black", lw=0.8, ls=":")
        elif name != "weight":
            axis.set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    return figure


def groups_figure(experiment: Experiment) -> plt.Figure:
    """Error map and group map of the paper's PLACE figure, on held-out images."""
    run = experiment.runs[-1]
    teacher, student = experiment.teacher(), load_network(run.folder)
    source = experiment.sources["test"]
    count = min(4, len(source))
    batches = eval_batches(source, batch_size=count, process_index=0, process_count=1)
    with contextlib.closing(batches):
        batch = next(batches)
    images = batch["image"]
    t = jnp.full((count,), experiment.process.num_timesteps // 4)
    noise = jax.random.normal(jax.random.key(experiment.config.evaluation.seed), images.shape)
    x_t = experiment.process.q_sample(jnp.asarray(images), t, noise)
    outputs = [
        predictor(experiment, network)(x_t, t, batch["label"]) for network in (teacher, student)
    ]
    error = jnp.square(outputs[0] - outputs[1])
    size = min(experiment.config.distill.loss.group_size, int(np.prod(images.shape[1:3])))
    groups = error_groups(outputs[1], outputs[0], size)
    # Errors are sorted within each channel, so one of them is shown.
    channel = {1: "", 3: " (red)"}.get(images.shape[-1], "\nfirst channel")
    name = "latent" if experiment.autoencoder else "image"
    columns = {
        name: images, f"noisy, t = {int(t[0])}": x_t, f"teacher{channel}": outputs[0],
        f"student{channel}\n{run.method}": outputs[1], f"squared error{channel}": error,
        f"groups of {size}{channel}": groups,
    }  # fmt: skip
    figure, axes = plt.subplots(
        count, 6, figsize=(11, 0.4 + 1.8 * count), squeeze=False, layout="constrained"
    )
    limit = float(np.abs(outputs[0]).max())
    for column, (title, values) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10)
        for row in range(count):
            picture, axis = np.asarray(values[row]), axes[row, column]
            axis.set_axis_off()
            if column < 2 and experiment.autoencoder:
                axis.imshow(picture[..., 0], cmap="gray")
            elif column < 2:
                show(axis, np.clip((picture + 1) * 127.5, 0, 255).astype(np.uint8))
            elif column < 4:
                axis.imshow(picture[..., 0], cmap="RdBu", vmin=-limit, vmax=limit)
            elif column == 4:
                # A few large errors of a large image would leave the rest black.
                brightest = np.quantile(picture[..., 0], 0.995)
                axis.imshow(picture[..., 0], cmap="magma", vmin=0, vmax=brightest)
            else:
                axis.imshow(picture[..., 0], cmap="viridis")
    return figure


def grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """(N, H, W, C) -> one picture, row by row; a thin gap between images."""
    images = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    rows = -(-len(images) // columns)
    empty = np.full((rows * columns - len(images), *images.shape[1:]), 128, images.dtype)
    tiles = np.concatenate([images, empty]).reshape(rows, columns, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles], axis=0)


def show(axis: plt.Axes, image: np.ndarray) -> None:
    """Shows a uint8 picture (H, W, C), grey for one channel."""
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Saves as PNG, whole or not at all, and closes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def versions() -> dict[str, str]:
    """Of the libraries that numbers depend on, and of the device."""
    import flax
    import optax

    import liftplace_jax

    modules = {m.__name__: m.__version__ for m in (liftplace_jax, jax, flax, optax, np)}
    return modules | {"device": jax.devices()[0].device_kind}


def _guidance(evaluation: Any) -> str:
    if evaluation.guidance == 1:
        return ""
    channels = evaluation.guidance_channels
    where = "" if channels is None else f" on the first {channels} channels"
    return f", guidance {evaluation.guidance:g}{where}"


def _spread(row: dict[str, Any], key: str, form: str, unit: str = "") -> str:
    if row[key] is None:
        return "-"
    spread = row[f"{key}_spread"]
    return f"{row[key]:{form}}" + (f" +- {spread:{form}}" if spread is not None else "") + unit


def _si(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{suffix}"
    return str(value)
