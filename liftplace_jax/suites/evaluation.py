"""Suite "evaluation": Inception features and the Frechet distance against the tools in use."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.evaluation import (
    Extractor,
    feature_extractor,
    frechet_distance,
    moments_update,
    moments_zero,
)
from liftplace_jax.evaluation.inception import DIMS, Inception
from liftplace_jax.suites import torch_inception
from liftplace_jax.suites.options import Options, Result
from liftplace_jax.suites.timing import Timing, milliseconds, time_side_by_side

IMAGE_SIZE = 64  # CelebA's, in the paper
SOLVE_REPEATS = 5  # a call of the peer takes some ten seconds


def run(options: Options) -> Result:
    """Measures both; quick: a batch of two images, and moments of 64 features."""
    peer = torch_inception.available()
    batch = 2 if options.quick else 8 if jax.default_backend() == "cpu" else 32
    dim, count = (64, 200) if options.quick else (DIMS["pool"], 4000)
    solve = _measure_solve(dim, count, min(options.repeats, SOLVE_REPEATS))
    return {
        "title": "Evaluation: Inception features per second, and the Frechet distance",
        "columns": [
            "images",
            "ours_ms",
            "torch_ms",
            "ours_per_second",
            "torch_per_second",
            "ratio",
            "difference",
        ],
        "formats": {
            "ours_per_second": ".1f",
            "torch_per_second": ".1f",
            "ratio": ".2f",
            "difference": ".1e",
        },
        "rows": [_measure_features(batch, options.repeats, peer)],
        "tables": {
            "solve": {
                "title": "Frechet distance of given moments, in float64 on the host",
                "columns": [
                    "dimensions",
                    "samples",
                    "condition",
                    "ours_ms",
                    "sqrtm_ms",
                    "ratio",
                    "difference",
                ],
                "formats": {"condition": ".1e", "ratio": ".1f", "difference": ".1e"},
                "rows": [solve],
            }
        },
        "notes": [
            "ours_ms, torch_ms, sqrtm_ms: median and quartiles of one call; ratio: peer / ours, of "
            "the medians.",
            "Features: ours are uint8 images to moments, the peer's uint8 images to features "
            "(pytorch-fid's network and resizing); both float32, TF32 off, the same generated "
            "weights. difference: the largest of the features, in shares of the largest feature.",
            "Distance: ours checks and adds up as reported; the peer is scipy.linalg.sqrtm of the "
            "product alone, with as many threads as it takes. difference: relative.",
            ""
            if peer
            else "torch, torchvision, pytorch-fid: not all installed, so no ratio of features.",
        ],
    }


def _measure_features(batch: int, repeats: int, peer: bool) -> dict[str, Any]:
    tensors = generated_weights()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.safetensors"
        weights.write_safetensors(path, tensors)
        extractor = feature_extractor("inception_pytorch_fid", weights=path)
    shape = (batch, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    features, ours = _our_call(extractor, images)
    calls: dict[str, Any] = {"ours": ours}
    row: dict[str, Any] = {"images": "x".join(map(str, shape))}
    if peer:
        theirs, calls["torch"] = _torch_call(tensors, images)
        row["difference"] = float(np.abs(features - theirs).max() / np.abs(theirs).max())
    times = time_side_by_side(calls, repeats, rounds=3)
    for name, timing in times.items():
        row[f"{name}_ms"], row[f"{name}_per_second"] = milliseconds(timing), batch / timing.median
    return row | {"ratio": _ratio(times, "torch"), "seconds": _seconds(times)}


def generated_weights() -> dict[str, np.ndarray]:
    """Random weights of the network by published name, under which activations keep their size."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:  # ones everywhere make a normalisation that does nothing
            return np.ones(leaf.shape, np.float32)
        scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return scale.astype("f4") * rng.standard_normal(leaf.shape, np.float32)

    abstract = nnx.state(nnx.eval_shape(lambda: Inception(nnx.Rngs(0))))
    return weights.to_torch(jax.tree.map(draw, abstract))


def _our_call(extractor: Extractor, images: np.ndarray) -> tuple[np.ndarray, Callable[[], None]]:
    """Features of the images, and a call that adds them to moments."""

    @jax.jit
    def step(params, moments, pixels):
        found = extractor.apply(params, pixels.astype(jnp.float32) / 127.5 - 1)["features"]
        return moments_update(moments, found, jnp.ones(len(pixels), bool)), found

    params, moments = jax.device_put((extractor.params, moments_zero(extractor.dim)))
    call = functools.partial(step, params, moments, images)
    return np.asarray(call()[1]), lambda: jax.block_until_ready(call())


def _torch_call(tensors, images: np.ndarray) -> tuple[np.ndarray, Callable[[], None]]:
    """Features of the images by pytorch-fid's network, and a call that makes them."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    network = torch_inception.pytorch_fid_network(tensors).to(device)
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())

    @torch.inference_mode()
    def call():
        return network(pixels.to(device).float() / 255)[0][..., 0, 0].cpu().numpy()

    return call(), call


def generated_moments(dim: int, count: int) -> list[np.ndarray]:
    """mu1, sigma1, mu2, sigma2 of two sets of correlated features that a ReLU has cut."""
    rng = np.random.default_rng(0)
    # Factors of falling strength, and something of each feature's own.
    factors = rng.normal(size=(dim // 4, dim)) / np.sqrt(np.arange(1, dim // 4 + 1))[:, None]
    bias, size = rng.normal(size=dim), np.exp(rng.normal(size=dim))
    result = []
    for scale in (1.0, 1.2):
        rows = rng.normal(size=(count, dim // 4)) @ factors * scale
        rows += 0.02 * rng.normal(size=(count, dim)) + bias
        rows = np.maximum(rows, 0) * size
        result += [rows.mean(0), np.cov(rows, rowvar=False)]
    return result


def _measure_solve(dim: int, count: int, repeats: int) -> dict[str, Any]:
    mu1, sigma1, mu2, sigma2 = moments = generated_moments(dim, count)
    found = {}

    def ours():
        found["ours"] = frechet_distance(*moments)

    def sqrtm():
        root: Any = scipy.linalg.sqrtm(sigma1 @ sigma2)
        trace = np.trace(sigma1 + sigma2 - 2 * root.real)
        found["sqrtm"] = np.sum((mu1 - mu2) ** 2) + trace

    times = time_side_by_side({"ours": ours, "sqrtm": sqrtm}, repeats)
    return {
        "dimensions": dim,
        "samples": count,
        "condition": float(np.linalg.cond(sigma1)),
        "ours_ms": milliseconds(times["ours"]),
        "sqrtm_ms": milliseconds(times["sqrtm"]),
        "ratio": _ratio(times, "sqrtm"),
        "difference": float(abs(found["ours"] / found["sqrtm"] - 1)),
        "seconds": _seconds(times),
    }


def _ratio(times: dict[str, Timing], peer: str) -> float | None:
    return times[peer].median / times["ours"].median if peer in times else None


def _seconds(times: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: timing._asdict() for name, timing in times.items()}
