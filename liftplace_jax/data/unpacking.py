"""From what the host sends to what a network sees; part of jitted steps.

Batches carry what is small, images of one byte a value and float16 moments of latents; that they
are scaled, mirrored and drawn is work for the devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.diffusion.scaling import to_latents

Batch = Mapping[str, Any]
PIXELS = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
"""0..255 -> [-1, 1]."""


def unpack_images(batch: Batch, key: jax.Array | None = None) -> dict[str, jax.Array]:
    """Scales the images of a batch, and mirrors those that are to be.

    Args:
      batch: "image" (B, H, W, C) uint8 in 0..255, or floats in [-1, 1] already; perhaps "mirrored"
        (B,) bool; and any columns, which stay as they are.
      key: of no use: nothing is drawn.

    Returns:
      The batch, its "image" float32 in [-1, 1].
    """
    del key
    rest = {name: value for name, value in batch.items() if name != "mirrored"}
    images = jnp.asarray(batch["image"])
    if "mirrored" in batch:
        mirrored = jnp.asarray(batch["mirrored"])[:, None, None, None]
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if images.dtype == jnp.uint8:
        images = jax.lax.platform_dependent(images, cpu=_looked_up, default=_computed)
    return rest | {"image": images.astype(jnp.float32)}


def _looked_up(images: jax.Array) -> jax.Array:
    # XLA divides by a constant with an error of one bit, and may fuse what follows: what is read
    # from memory is the same in every program.
    return jnp.asarray(PIXELS).at[images].get(mode="promise_in_bounds")


def _computed(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1  # where looking up is slow


@dataclasses.dataclass(frozen=True)
class UnpackLatents:
    """Draws latents from the moments of a batch, and scales them as a network sees them.

    Attributes:
      shift: see `to_latents`.
      scale: likewise.
    """

    shift: float
    scale: float

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """As `unpack_images`.

        Args:
          batch: "moments" (B, 2, h, w, C), the mean and log variance of a Gaussian; and columns.
          key: of the draw; None: the means.

        Returns:
          The batch, with "image" (B, h, w, C) float32 in place of the moments.
        """
        rest = {name: value for name, value in batch.items() if name != "moments"}
        moments = jnp.asarray(batch["moments"]).astype(jnp.float32)
        latents, logvar = moments[:, 0], moments[:, 1]
        if key is not None:
            latents += jnp.exp(0.5 * logvar) * jax.random.normal(key, latents.shape)
        return rest | {"image": to_latents(latents, self.shift, self.scale)}
