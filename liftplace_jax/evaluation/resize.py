"""The two bilinear resizings that published FID numbers rest on, as matrix products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

STYLES = ("tensorflow1", "half_pixel")


@functools.cache
def _weights(size: int, result: int, style: str) -> np.ndarray:
    """(result, size): what each pixel of a row or column weighs in each resized one."""
    if style == "tensorflow1":
        source = np.arange(result) * (size / result)
    else:
        source = np.maximum((np.arange(result) + 0.5) * (size / result) - 0.5, 0)
    low = np.minimum(np.floor(source).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    share = source - low
    weights = np.zeros((result, size))
    np.add.at(weights, (np.arange(result), low), 1 - share)
    np.add.at(weights, (np.arange(result), high), share)
    return weights.astype(np.float32)


def resize_bilinear(images: jax.Array, shape: tuple[int, int], style: str) -> jax.Array:
    """Bilinear resizing without antialiasing.

    Args:
      images: (B, H, W, C), any range.
      shape: height and width of the result.
      style: "tensorflow1", whose grid starts at pixel 0 (the original graph of FID, torch-fidelity,
        the ADM evaluator), or "half_pixel" (pytorch-fid: PyTorch's align_corners=False).

    Returns:
      float32 (B, *shape, C); the same numbers if the shape is that of the images.

    Raises:
      ValueError: images of another rank, or an unknown style.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, H, W, C), got {images.shape}")
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    images = images.astype(jnp.float32)
    rows, columns = (_weights(n, m, style) for n, m in zip(images.shape[1:3], shape, strict=True))
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return product("ih,jw,bhwc->bijc", rows, columns, images)
