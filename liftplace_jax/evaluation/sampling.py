"""The config's sampler as one function of parameters and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from liftplace_jax.conditioning import Conditioning
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
    texts: Conditioning | None = None,
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
      texts: what a network of texts is told, as of `Conditioning.bound`. `params` then have the
        frozen arrays that it embeds with as their last.

    Raises:
      ValueError: guidance of a network that has no condition, or none trained without.
    """
    conditioning, channels = texts or model.conditioning, fields.guidance_channels
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

    def unpacked(params):
        """(the network's, the decoder's, the frozen arrays), {} or None for what is not there."""
        network, *others = params if decode or texts else (params,)
        return network, others[0] if decode else None, others[-1] if texts else {}

    @jax.default_matmul_precision(fields.precision)  # while it is traced, decoder and all
    def sample(params, keys, condition=None):
        params, decoder, frozen = unpacked(params)
        if condition is None:
            condition = jax.vmap(draw)(keys)
        # Once, not at every step; what says nothing is the same for all.
        nothing = null(jax.tree.map(lambda x: x[:1], condition))
        condition, nothing = (conditioning.embed(frozen, c) for c in (condition, nothing))

        def predict(x, t, condition):
            return apply(params, x, t, False, None, condition)[0]

        samples = sampler(
            guided(predict, condition, nothing, fields.guidance, channels),
            jax.vmap(start)(keys),
            noise=lambda step: jax.vmap(noise, (0, None))(keys, step),
        )
        return decode(decoder, samples) if decode else samples

    return sample
