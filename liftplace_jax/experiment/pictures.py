"""The pictures of a report: samples, curves, and where the errors are."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from liftplace_jax.data import eval_batches
from liftplace_jax.experiment.context import Context
from liftplace_jax.experiment.scoring import CLASS_COLUMNS, CLASS_ROWS, read_samples
from liftplace_jax.experiment.training import load_teacher
from liftplace_jax.families.loading import load_network
from liftplace_jax.host.files import replacing
from liftplace_jax.losses import error_groups
from liftplace_jax.training.metrics_io import read_metrics

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

# Drawn where a method has them; on a logarithmic axis but for the last three.
CURVES = (
    "loss", "diffusion", "vb", "output_kd", "vb_kd", "coarse", "fine", "feature_kd", "weight",
    "slope", "intercept",
)  # fmt: skip
MOST_COLUMNS = 4


def columns_for(count: int) -> int:
    """Of a figure of so many panels: 3 or 4, whichever leaves fewer places empty."""
    if count <= MOST_COLUMNS:
        return max(1, count)
    return min((MOST_COLUMNS, MOST_COLUMNS - 1), key=lambda columns: -count % columns)


def samples_figure(context: Context, rows: list[dict[str, Any]]) -> Figure:
    """Teacher and the first student of each method, drawn from the same noise.

    Samples as published, and below them, if there are any, those with clipping. The teacher comes
    first; what does not fit beside it goes on in the next line. Of networks that are told texts a
    row for each prompt, a column for each network.
    """
    shown = {row["method"]: row for row in reversed(rows)}
    names = list(dict.fromkeys(row["method"] for row in rows))
    if context.judge.prompts:
        return _prompts_figure(
            {name: (shown[name], context.workdir / shown[name]["folder"]) for name in names}
        )
    variants = {"": ""} | ({"_clipped": ", clipped"} if context.config.evaluation.clip else {})
    # Few of the large images, so that each can be seen.
    side, width = (8, 3) if context.image_shape[0] <= 32 else (4, 4)
    by_class = context.judge.shown(context.model, 1) is not None
    height = width * CLASS_ROWS / CLASS_COLUMNS + 0.4 if by_class else width
    columns = columns_for(len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines * len(variants),
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(width * columns, (height + 0.4) * lines * len(variants)),
    )
    blocks = axes.reshape(len(variants), lines * columns)
    for block, (suffix, note) in zip(blocks, variants.items(), strict=True):
        for axis in block[len(names) :]:
            axis.set_axis_off()
        for axis, name in zip(block, names, strict=False):
            _show_samples(axis, context.workdir / shown[name]["folder"], suffix, side)
            frechet = shown[name].get(f"frechet{suffix}")
            score = "" if frechet is None else f"\nFrechet {frechet:.1f}"
            axis.set_title(f"{name}{note}{score}", fontsize=10)
    return figure


def _show_samples(axis: Axes, folder: Path, suffix: str, side: int) -> None:
    """A square of samples; of a network with conditions a column for each that is shown."""
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


def _prompts_figure(models: Mapping[str, tuple[dict[str, Any], Path]]) -> Figure:
    """Rows of prompts, columns of models (title -> its row of the report, and its folder)."""
    samples = {title: read_samples(folder) for title, (_, folder) in models.items()}
    prompts = next(iter(samples.values()))["prompts"]
    side = 1.6
    figure, axes = plt.subplots(
        len(prompts),
        len(models),
        squeeze=False,
        layout="constrained",
        figsize=(2.2 + side * len(models), side * len(prompts) + 0.6),
    )
    for column, (title, found) in enumerate(samples.items()):
        frechet = models[title][0].get("frechet")
        score = "" if frechet is None else f"\nFrechet {frechet:.1f}"
        axes[0, column].set_title(f"{title}{score}", fontsize=9)
        for axis, image in zip(axes[:, column], found["images_by_prompt"], strict=True):
            show(axis, image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, prompt in zip(axes[:, 0], prompts, strict=True):
        # No formula, whatever signs it has.
        text = textwrap.shorten(str(prompt), 90, placeholder=" ...").replace("$", r"\$")
        axis.set_ylabel(textwrap.fill(text, 22), rotation=0, ha="right", va="center", fontsize=8)
    return figure


def curves_figure(context: Context) -> Figure:
    """Every logged term over steps, one line for each method (seed by seed)."""
    metrics = [(run, read_metrics(run.folder)) for run in context.runs]
    names = [name for name in CURVES if any(name in row for _, rows in metrics for row in rows)]
    columns = columns_for(len(names))
    lines = max(1, -(-len(names) // columns))
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(max(4, 3 * columns), 2.6 * lines + 0.5),
        layout="constrained",
        squeeze=False,
    )
    methods = list(dict.fromkeys(run.method for run in context.runs))
    colors = {method: plt.get_cmap("tab10")(i % 10) for i, method in enumerate(methods)}
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for run, rows in metrics:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colors[run.method],
                    lw=1.2,
                    alpha=0.8,
                    marker="." if len(points) == 1 else None,
                )
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
        if name in ("slope", "intercept"):
            axis.axhline(1 if name == "slope" else 0, color="black", lw=0.8, ls=":")
        elif name != "weight":
            axis.set_yscale("log")
    # Below the panels, where it hides no curve.
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)
    if not names:
        axes[0, 0].set_title("no metrics were logged", fontsize=10)
    return figure


def groups_figure(context: Context) -> Figure:
    """Error map and group map of the paper's PLACE figure, on held-out images.

    Where one group holds a whole channel there is nothing to map: that is said instead.
    """
    run = context.runs[-1]
    teacher, student = load_teacher(context), load_network(run.folder)
    source = context.sources["test"]
    count = min(4, len(source))
    batches = eval_batches(source, batch_size=count, process_index=0, process_count=1)
    with contextlib.closing(batches):
        batch = source.unpack(next(batches))
    images = batch["image"]
    t = jnp.full((count,), context.process.at(0.25))
    noise = jax.random.normal(jax.random.key(context.config.evaluation.seed), images.shape)
    x_t = context.process.add_noise(images, t, noise)
    outputs = [
        context.judge.predictor(n.config)(n.params, x_t, t, context.embed(batch))
        for n in (teacher, student)
    ]
    error = jnp.square(outputs[0] - outputs[1])
    # Errors are sorted within each channel, so one of them is shown.
    channel = {1: "", 3: " (red)"}.get(images.shape[-1], "\nfirst channel")
    name = "latent" if context.autoencoder else "image"
    columns = {
        name: images,
        f"noisy, t = {int(t[0])}": x_t,
        f"teacher{channel}": outputs[0],
        f"student{channel}\n{run.method}": outputs[1],
        f"squared error{channel}": error,
    }
    elements = int(np.prod(images.shape[1:3]))
    size = min(context.config.distill.loss.group_size, elements)
    total = -(-elements // size)
    if total > 1:
        groups = error_groups(outputs[1], outputs[0], size)
        columns[f"{total} groups of {size}{channel}"] = groups
    figure, axes = plt.subplots(
        count,
        len(columns),
        figsize=(1.85 * len(columns), 0.5 + 1.8 * count),
        squeeze=False,
        layout="constrained",
    )
    if total == 1:
        figure.suptitle(f"All {elements} elements of a channel are one group.", fontsize=10)
    limit = float(np.abs(outputs[0]).max())
    for column, (title, values) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10)
        for row in range(count):
            picture, axis = np.asarray(values[row]), axes[row, column]
            axis.set_axis_off()
            if column < 2 and context.autoencoder:
                axis.imshow(picture[..., 0], cmap="gray")
            elif column < 2:
                show(axis, np.clip((picture + 1) * 127.5, 0, 255).astype(np.uint8))
            elif column < 4:
                axis.imshow(picture[..., 0], cmap="RdBu", vmin=-limit, vmax=limit)
            elif column == 4:
                # A few large errors of a large image would leave the rest black.
                brightest = np.quantile(picture[..., 0], 0.995)
                axis.imshow(picture[..., 0], cmap="magma", vmin=0, vmax=brightest)
            else:  # a colour for each group, the same in every row
                colors = plt.get_cmap("viridis", total)
                axis.imshow(picture[..., 0], cmap=colors, vmin=-0.5, vmax=total - 0.5)
    return figure


def grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """(N, H, W, C) -> one picture, row by row; a thin gap between images."""
    images = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    rows = -(-len(images) // columns)
    empty = np.full((rows * columns - len(images), *images.shape[1:]), 128, images.dtype)
    tiles = np.concatenate([images, empty]).reshape(rows, columns, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles], axis=0)


def show(axis: Axes, image: np.ndarray) -> None:
    """Shows a uint8 picture (H, W, C), grey for one channel."""
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)


def save_figure(figure: Figure, path: Path) -> None:
    """Saves as PNG, whole or not at all, and closes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def keep_probabilities(rows: list[dict[str, float]]) -> np.ndarray:
    """(depth, lines) of a search's metrics, by number of the block: jit sorts them by name."""
    depth = sum(name.startswith("keep.") for name in rows[0])
    return np.array([[row[f"keep.{layer}"] for row in rows] for layer in range(depth)])


def draw_search(folder: Path, kept: Sequence[int]) -> None:
    """Writes search.png: the probability of each block to stay, over the steps."""
    rows = read_metrics(folder)
    probabilities = keep_probabilities(rows)
    figure = Figure(figsize=(6, 1.5 + 0.15 * len(probabilities)), layout="constrained")
    axis = figure.subplots()
    mesh = axis.pcolormesh(
        [row["step"] for row in rows],
        range(len(probabilities)),
        probabilities,
        vmin=0,
        vmax=1,
        shading="nearest",
    )
    axis.set(xlabel="step", ylabel="block (numbered: stays)", yticks=kept)
    axis.invert_yaxis()
    figure.colorbar(mesh, label="probability to stay")
    with replacing(folder / "search.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
