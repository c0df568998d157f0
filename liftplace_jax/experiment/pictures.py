"""The picture of a search for blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from liftplace_jax.host.files import replacing
from liftplace_jax.training.metrics_io import read_metrics


def keep_probabilities(rows: list[dict[str, float]]) -> np.ndarray:
    """(depth, lines) of a search's metrics, by number of the block: jit sorts them by name."""
    depth = sum(name.startswith("keep.") for name in rows[0])
    return np.array([[row[f"keep.{layer}"] for row in rows] for layer in range(depth)])


def draw_search(folder: Path, kept: Sequence[int]) -> None:
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
