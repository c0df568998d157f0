"""The config's sampler as one function of parameters and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from liftplace_jax.diffusion import GaussianDiffusion, get_sampler, guided

Sampler = Callable[..., jax.Array]


def make_sampler(
    fields: ConfigDict,
    process: GaussianDiffusion,
    model: Any,
    apply: Callable[..., tuple[jax.Array, Any]],
    clip: float | None = None,
    decode: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> Sampler:
    """(params, keys (B,), labels (B,) or None) -> images (B, H, W, C), jit-able.

    Each image depends on its key (and label) alone. Without labels, a class-conditional network
    draws each image's class from its key, uniformly.

    Args:
      fields: config.evaluation: sampler, sample_steps, skip_type, eta, guidance and
        guidance_channels (see `diffusion.guided`).
      process: the diffusion process.
      model: the network's config.
      apply: the network, as of `networks.make_apply`.
      clip: limits predicted data to [-clip, clip] at each step; None leaves the sampler's default
        (DDIM does not clip, ancestral sampling clips to 1, as published). Latents have no range
        and are never clipped.
      decode: (its params, latents) -> images. `params` are then (the network's, the decoder's).

    Raises:
      ValueError: guidance of a network that has no classes, or none trained without labels.
    """
    sampler = get_sampler(fields.sampler)
    options = {"eta": fields.eta} if fields.sampler == "ddim" else {}
    if decode or clip is not None:
        options["clip"] = None if decode else clip
    random = fields.sampler != "ddim" or fields.eta > 0
    shape = (model.image_size, model.image_size, model.in_channels)
    if fields.guidance != 1 and not model.num_classes:
        raise ValueError(
            f"guidance {fields.guidance} needs a class-conditional network: set it to 1"
        )

    channels = fields.guidance_channels
    if channels is not None and not 1 <= channels <= model.in_channels:
        raise ValueError(f"guidance_channels must be in 1..{model.in_channels}, not {channels}")

    def start(key):
        return jax.random.normal(jax.random.fold_in(key, 0), shape)

    def noise(key):
        return jax.random.normal(jax.random.fold_in(key, 1), (fields.sample_steps, *shape))

    def some_class(key):
        return jax.random.randint(jax.random.fold_in(key, 2), (), 0, model.num_classes)

    def predictor(params, labels):
        def predict(x, t, labels=None):
            return apply(params, x, t, False, None, labels)[0]

        if labels is None:
            return predict
        return guided(
            predict, labels, model.null_label, fields.guidance, fields.guidance_channels
        )

    def sample(params, keys, labels=None):
        params, decoder = params if decode else (params, None)
        if model.num_classes and labels is None:
            labels = jax.vmap(some_class)(keys)
        samples = sampler(
            predictor(params, labels), jax.vmap(start)(keys), process,
            steps=fields.sample_steps, skip_type=fields.skip_type,
            noise=jax.vmap(noise, out_axes=1)(keys) if random else None, **options,
        )  # fmt: skip
        return decode(decoder, samples) if decode else samples

    return sample
