"""The autoencoder of Stable Diffusion (Rombach et al. 2022), between images and latents.

Same function and same names as diffusers' `AutoencoderKL` ("models/autoencoders"), in NHWC.
"""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.encoders.tiling import by_queries, doubled_in_tiles
from liftplace_jax.nn import layers
from liftplace_jax.nn.attention import attention

_LEAST_LOGVAR, _MOST_LOGVAR = -30.0, 20.0
_UPSAMPLER = ".upsamplers."


def _call(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return layer(x)


class ResnetBlock(nnx.Module):
    """norm, swish, conv1, norm, swish, conv2, + shortcut."""

    def __init__(self, in_width: int, out_width: int, groups: int, *, rngs, dtype):
        conv = functools.partial(layers.conv, rngs=rngs, dtype=dtype)
        norm = functools.partial(layers.group_norm, groups=groups, rngs=rngs, dtype=dtype)
        self.norm1 = norm(in_width)
        self.conv1 = conv(in_width, out_width, 3)
        self.norm2 = norm(out_width)
        self.conv2 = conv(out_width, out_width, 3)
        self.shortcut = in_width != out_width
        if self.shortcut:
            self.conv_shortcut = conv(in_width, out_width, 1)

    def __call__(self, x: jax.Array, conv=_call, norm=_call) -> jax.Array:
        h = conv(self.conv1, nnx.swish(norm(self.norm1, x)))
        h = conv(self.conv2, nnx.swish(norm(self.norm2, h)))
        return (conv(self.conv_shortcut, x) if self.shortcut else x) + h


class Attention(nnx.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, width: int, groups: int, *, rngs, dtype):
        linear = functools.partial(layers.linear, width, width, rngs=rngs, dtype=dtype)
        self.group_norm = layers.group_norm(width, groups, rngs=rngs, dtype=dtype)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])

    def __call__(self, x: jax.Array, attend=attention) -> jax.Array:
        h = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        h = attend(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).reshape(x.shape)


class Chain(nnx.Module):
    """Encoder or decoder: modules by their published names, run one after another."""

    def __init__(self, modules: Mapping[str, nnx.Module]):
        self.order = tuple(modules)
        for name, module in layers.nest(modules).items():
            setattr(self, name, module)

    def __call__(self, h: jax.Array) -> jax.Array:
        return self._run(self.order, h)

    def _run(
        self, names: Iterable[str], h: jax.Array, conv=_call, norm=_call, attend=attention
    ) -> jax.Array:
        """Some modules, with another way to call convolutions, normalisations and attention."""
        for name in names:
            module = layers.find(self, name)
            if _UPSAMPLER in name:
                h = h.repeat(2, axis=1).repeat(2, axis=2)
            if isinstance(module, ResnetBlock):
                h = module(h, conv, norm)
            elif isinstance(module, Attention):
                h = module(h, attend)
            elif isinstance(module, nnx.GroupNorm):
                h = norm(module, h)
            else:
                h = conv(module, nnx.swish(h) if name == "conv_out" else h)
        return h

    def in_tiles(self, h: jax.Array, tile: int) -> jax.Array:
        """The decoder; levels of more than `tile` pixels along a side run in tiles."""
        levels: list[list[str]] = [[]]
        for name in self.order:
            if _UPSAMPLER in name:
                levels.append([])
            levels[-1].append(name)
        if max(h.shape[1:3]) * 2 ** (len(levels) - 1) <= tile:
            return self(h)
        h = self._run(levels[0], h, attend=by_queries)
        for names in levels[1:]:
            run = functools.partial(self._run, names)
            h = run(h) if 2 * max(h.shape[1:3]) <= tile else doubled_in_tiles(run, h, tile)
        return h


def _chain(config: AutoencoderConfig, way: str, *, rngs, dtype) -> Chain:
    """The encoder, way "down", or the decoder, way "up"."""
    down, groups = way == "down", config.norm_num_groups
    conv = functools.partial(layers.conv, rngs=rngs, dtype=dtype)
    block = functools.partial(ResnetBlock, groups=groups, rngs=rngs, dtype=dtype)
    widths = config.block_out_channels[:: 1 if down else -1]
    middle = config.block_out_channels[-1]
    mid_block = {
        "mid_block.resnets.0": block(middle, middle),
        "mid_block.attentions.0": Attention(middle, groups, rngs=rngs, dtype=dtype),
        "mid_block.resnets.1": block(middle, middle),
    }
    levels, before = {}, widths[0]
    for level, width in enumerate(widths):
        for index in range(config.layers_per_block + (not down)):
            levels[f"{way}_blocks.{level}.resnets.{index}"] = block(before, width)
            before = width
        if level < len(widths) - 1:
            # Down pads right and below only, as published.
            options = {"strides": 2, "padding": (0, 1)} if down else {}
            name = f"{way}_blocks.{level}.{way}samplers.0.conv"
            levels[name] = conv(width, width, 3, **options)
    inside = levels | mid_block if down else mid_block | levels
    ends = (config.in_channels, 2 * config.latent_channels)
    first, last = ends if down else (config.latent_channels, config.out_channels)
    norm = layers.group_norm(widths[-1], groups, rngs=rngs, dtype=dtype)
    conv_in, conv_out = conv(first, widths[0], 3), conv(widths[-1], last, 3)
    return Chain({"conv_in": conv_in} | inside | {"conv_norm_out": norm, "conv_out": conv_out})


class Autoencoder(nnx.Module):
    """Encoder and decoder; the tree of modules is named as the published state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from (PyTorch's defaults for every layer).
      dtype: dtype of the computation. Parameters, norm statistics, softmax and results stay
        float32.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config, self.dtype = config, jnp.dtype(dtype)
        latent = config.latent_channels
        self.encoder = _chain(config, "down", rngs=rngs, dtype=dtype)
        self.decoder = _chain(config, "up", rngs=rngs, dtype=dtype)
        if config.use_quant_conv:
            self.quant_conv = layers.conv(2 * latent, 2 * latent, 1, rngs=rngs, dtype=dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = layers.conv(latent, latent, 1, rngs=rngs, dtype=dtype)
        layers.reset_parameters(self, rngs.params())

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The Gaussian of the latents of images.

        Args:
          x: (B, H, W, in_channels) images in [-1, 1]; H and W are multiples of
            config.downsampling.

        Returns:
          (mean, log variance, limited to [-30, 20]), both (B, h, w, latent_channels) float32 and
          not scaled.

        Raises:
          ValueError: another shape.
        """
        config, step = self.config, self.config.downsampling
        sides = x.shape[1:3]
        if x.ndim != 4 or x.shape[3] != config.in_channels or any(side % step for side in sides):
            raise ValueError(
                f"images must have shape (B, H, W, {config.in_channels}) with H and W multiples of "
                f"{step}, not {x.shape}"
            )
        h = self.encoder(x.astype(self.dtype))
        h = (self.quant_conv(h) if config.use_quant_conv else h).astype(jnp.float32)
        mean, logvar = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(logvar, _LEAST_LOGVAR, _MOST_LOGVAR)

    def decode(self, z: jax.Array, tile: int = 0) -> jax.Array:
        """Images of latents.

        Args:
          z: (B, h, w, latent_channels), not scaled.
          tile: pixels; levels of more along a side are computed in tiles of about this side.
            Results differ by rounding alone, up to so many pixels they are the same; see `tiling`.
            0: none.

        Returns:
          (B, H, W, out_channels) float32, about in [-1, 1] but not clipped.

        Raises:
          ValueError: another shape.
        """
        if z.ndim != 4 or z.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"latents must have shape (B, h, w, {self.config.latent_channels}), not {z.shape}"
            )
        h = z.astype(self.dtype)
        h = self.post_quant_conv(h) if self.config.use_post_quant_conv else h
        h = self.decoder.in_tiles(h, tile) if tile else self.decoder(h)
        return h.astype(jnp.float32)
