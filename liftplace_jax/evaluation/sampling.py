"""The config's sampler as one function of parameters and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from liftplace_jax.diffusion import Process, guided
from liftplace_jax.nn.model_config import DenoiserConfig

Sampler = Callable[..., jax.Array]


def make_sampler(
    fields: ConfigDict,
    process: Process,
    model: DenoiserConfig,
    apply: Callable[..., tuple[jax.Array, Any]],
    clip: float | None = None,
    decode: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> Sampler:
    """(params, keys (B,), condition or None) -> images (B, H, W, C), jit-able.

    Each image depends on its key (and condition) alone. Without a condition, that of a network
    which has one is drawn from each image's key.

    Args:
      fields: config.evaluation: the sampler's (`Process.sampler`), guidance and
        guidance_channels (see `diffusion.guided`), and precision (of the networks' products).
      process: the diffusion process.
      model: the network's config.
      apply: the network, as of `network.make_apply`.
      clip: limits predicted data to [-clip, clip] at each step; None leaves the sampler's default
        (DDIM does not clip, ancestral sampling clips to 1, as published). Latents have no range
        and are never clipped.
      decode: (its params, latents) -> images. `params` are then (the network's, the decoder's).

    Raises:
      ValueError: guidance of a network that has no condition, or none trained without.
    """
    conditioning, channels = model.conditioning, fields.guidance_channels
    guided_at_all = fields.guidance != 1
    sampler = process.sampler(fields, math.inf if decode else clip)
    if channels is not None and not 1 <= channels <= model.in_channels:
        raise ValueError(f"guidance_channels must be in 1..{model.in_channels}, not {channels}")

    def null(condition):
        if not guided_at_all:
            return condition  # not used
        try:
            return conditioning.null(condition)
        except ValueError as error:
            raise ValueError(f"guidance {fields.guidance} {error}") from error

    # Refused now, not when samples are drawn.
    jax.eval_shape(lambda key: null(jax.vmap(conditioning.draw)(key[None])), jax.random.key(0))

    def start(key):
        return jax.random.normal(jax.random.fold_in(key, 0), model.shape)

    def noise(key, step):
        key = jax.random.fold_in(jax.random.fold_in(key, 1), step)
        return jax.random.normal(key, model.shape)

    def draw(key):
        return conditioning.draw(jax.random.fold_in(key, 2))

    @jax.default_matmul_precision(fields.precision)  # while it is traced, decoder and all
    def sample(params, keys, condition=None):
        params, decoder = params if decode else (params, None)
        if condition is None:
            condition = jax.vmap(draw)(keys)

        def predict(x, t, condition):
            return apply(params, x, t, False, None, condition)[0]

        samples = sampler(
            guided(predict, condition, null(condition), fields.guidance, channels),
            jax.vmap(start)(keys), noise=lambda step: jax.vmap(noise, (0, None))(keys, step),
        )  # fmt: skip
        return decode(decoder, samples) if decode else samples

    return sample
