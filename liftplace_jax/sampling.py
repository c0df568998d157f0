"""The config's sampler as one function of parameters and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from liftplace_jax.diffusion import GaussianDiffusion, get_sampler


def make_sampler(
    fields: ConfigDict,
    process: GaussianDiffusion,
    shape: tuple[int, int, int],
    apply: Callable[..., tuple[jax.Array, Any]],
    clip: float | None = None,
) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, keys (B,)) -> images (B, H, W, C), jit-able; each image depends on its key alone.

    Args:
      fields: config.evaluation: sampler, sample_steps, skip_type, eta.
      process: the diffusion process.
      shape: (H, W, C) of an image.
      apply: the network, as of `networks.make_apply`.
      clip: limits predicted data to [-clip, clip] at each step; None leaves the sampler's default
        (DDIM does not clip, ancestral sampling clips to 1, as published).
    """
    sampler = get_sampler(fields.sampler)
    options = {"eta": fields.eta} if fields.sampler == "ddim" else {}
    options |= {} if clip is None else {"clip": clip}
    random = fields.sampler != "ddim" or fields.eta > 0

    def start(key):
        return jax.random.normal(jax.random.fold_in(key, 0), shape)

    def noise(key):
        return jax.random.normal(jax.random.fold_in(key, 1), (fields.sample_steps, *shape))

    def sample(params, keys):
        return sampler(
            lambda x, t: apply(params, x, t, False, None)[0], jax.vmap(start)(keys), process,
            steps=fields.sample_steps, skip_type=fields.skip_type,
            noise=jax.vmap(noise, out_axes=1)(keys) if random else None, **options,
        )  # fmt: skip

    return sample
