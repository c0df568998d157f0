"""The U-Net of Stable Diffusion (Rombach et al. 2022): residual blocks, and transformers that look
at a text.

Same function and same names as diffusers' `UNet2DConditionModel`, in NHWC. `SDUNetConfig` says
every width, so a student by blocks is an ordinary config.
"""

import functools
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.families.sd_unet.config import Block, SDUNetConfig
from liftplace_jax.nn import layers
from liftplace_jax.nn.attention import attention

_EPSILON = 1e-6
"""Of a transformer's first normalisation, in all published models."""


class TimestepEmbedding(nnx.Module):
    """An MLP over the cosines and sines of a timestep."""

    def __init__(self, config: SDUNetConfig, *, rngs, dtype):
        first, width = config.widths[0], config.time_width
        self.linear_1 = layers.linear(first, width, rngs=rngs, dtype=dtype)
        self.linear_2 = layers.linear(width, width, rngs=rngs, dtype=dtype)
        self.width, self.dtype = first, dtype

    def __call__(self, t: jax.Array) -> jax.Array:
        waves = layers.sinusoidal_embedding(t, self.width, frequency_shift=0, cosines_first=True)
        return self.linear_2(nnx.silu(self.linear_1(waves.astype(self.dtype))))


class ResnetBlock(nnx.Module):
    """norm, silu, conv1, + time embedding, norm, silu, conv2, + shortcut."""

    def __init__(self, into: int, out: int, config: SDUNetConfig, *, rngs, dtype):
        conv = functools.partial(layers.conv, rngs=rngs, dtype=dtype)
        norm = functools.partial(
            layers.group_norm,
            groups=config.num_groups,
            epsilon=config.norm_epsilon,
            rngs=rngs,
            dtype=dtype,
        )
        self.norm1 = norm(into)
        self.conv1 = conv(into, out, 3)
        self.time_emb_proj = layers.linear(config.time_width, out, rngs=rngs, dtype=dtype)
        self.norm2 = norm(out)
        self.conv2 = conv(out, out, 3)
        self.shortcut = into != out
        if self.shortcut:
            self.conv_shortcut = conv(into, out, 1)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h += self.time_emb_proj(nnx.silu(temb))[:, None, None, :]
        h = self.conv2(nnx.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.shortcut else x) + h


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves, or to a context."""

    def __init__(self, width: int, context: int, heads: int, *, rngs, dtype):
        linear = functools.partial(layers.linear, rngs=rngs, dtype=dtype)
        self.to_q = linear(width, width, use_bias=False)
        self.to_k = linear(context, width, use_bias=False)
        self.to_v = linear(context, width, use_bias=False)
        self.to_out = layers.Sequential([linear(width, width)])
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        q, k, v = (
            h.reshape(*h.shape[:2], self.heads, -1)
            for h in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attention(q, k, v).reshape(x.shape))


class GEGLU(nnx.Module):
    """A linear layer whose first half is multiplied by the GELU of its second."""

    def __init__(self, width: int, out: int, *, rngs, dtype):
        self.proj = layers.linear(width, 2 * out, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        h, gate = jnp.split(self.proj(x), 2, axis=-1)
        return h * nnx.gelu(gate, approximate=False)


def _no_dropout(x: jax.Array) -> jax.Array:
    """In the place of a dropout of rate 0, which has a number in the published names."""
    return x


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back; token by token."""

    def __init__(self, width: int, *, rngs, dtype):
        self.net = layers.Sequential(
            [
                GEGLU(width, 4 * width, rngs=rngs, dtype=dtype),
                _no_dropout,
                layers.linear(4 * width, width, rngs=rngs, dtype=dtype),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


class TransformerBlock(nnx.Module):
    """Attention to the tokens, attention to the text, feed-forward; each normalised and added."""

    def __init__(self, block: Block, config: SDUNetConfig, *, rngs, dtype):
        width, heads = block.width, block.heads
        make = {"rngs": rngs, "dtype": dtype}
        norm = functools.partial(layers.layer_norm, width, epsilon=1e-5, affine=True, **make)
        self.norm1 = norm()
        self.attn1 = Attention(width, width, heads, **make)
        self.norm2 = norm()
        self.attn2 = Attention(width, config.context_dim, heads, **make)
        self.norm3 = norm()
        self.ff = FeedForward(width, **make)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        h = self.norm1(x)
        x += self.attn1(h, h)
        x += self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Pixels as tokens through a transformer block, between two projections, and added."""

    def __init__(self, block: Block, config: SDUNetConfig, *, rngs, dtype):
        make = {"rngs": rngs, "dtype": dtype}
        if config.linear_projection:
            project = functools.partial(layers.linear, **make)
        else:
            project = functools.partial(layers.conv, size=1, **make)
        width = block.width
        self.norm = layers.group_norm(width, config.num_groups, epsilon=_EPSILON, **make)
        self.proj_in = project(width, width)
        self.transformer_blocks = nnx.List([TransformerBlock(block, config, **make)])
        self.proj_out = project(width, width)
        self.tokens = config.linear_projection

    def __call__(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the output, what proj_out gives: (B, T, C) if it is linear, else as the input)."""
        tokens = (x.shape[0], -1, x.shape[3])
        h = self.proj_in(self.norm(x)).reshape(tokens)
        for block in self.transformer_blocks:
            h = block(h, context)
        projected = self.proj_out(h if self.tokens else h.reshape(x.shape))
        return x + projected.reshape(x.shape), projected


class Resample(nnx.Module):
    """Half or twice the resolution, by a convolution."""

    def __init__(self, block: Block, *, rngs, dtype):
        self.up = block.resample == "upsamplers"
        strides = 1 if self.up else 2
        self.conv = layers.conv(
            block.width, block.width, 3, strides=strides, rngs=rngs, dtype=dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.up:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        return self.conv(x)


def _modules(block: Block, config: SDUNetConfig, *, rngs, dtype) -> dict[str, nnx.Module]:
    """The modules of a block, by the published names."""
    make = {"rngs": rngs, "dtype": dtype}
    found: dict[str, Any] = {
        f"{block.name}.resnets.{layer}": ResnetBlock(sum(inputs), block.width, config, **make)
        for layer, inputs in enumerate(block.inputs)
    }
    for layer in range(block.attentions):
        found[f"{block.name}.attentions.{layer}"] = Transformer(block, config, **make)
    if block.resample:
        found[f"{block.name}.{block.resample}.0"] = Resample(block, **make)
    return found


class SDUNet(nnx.Module):
    """The denoising network; its tree of modules is named as the published state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from (PyTorch's defaults for every layer).
      dtype: dtype of the computation. Parameters, norm statistics, softmax and the prediction
        stay float32.
      remat: name of the policy of `layers.REMAT_POLICIES` by which the intermediate values of each
        residual block, transformer and resampling are recomputed for the gradient; None keeps all.

    Raises:
      ValueError: unknown policy.
    """

    def __init__(
        self,
        config: SDUNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
        remat: str | None = None,
    ):
        layers.check_remat(remat)
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        make, first = {"rngs": rngs, "dtype": dtype}, config.widths[0]
        self.conv_in = layers.conv(config.in_channels, first, 3, **make)
        self.time_embedding = TimestepEmbedding(config, **make)
        modules = {}
        for block in config.blocks():
            modules |= _modules(block, config, **make)
        for name, module in layers.nest(modules).items():
            setattr(self, name, module)
        self.conv_norm_out = layers.group_norm(
            first, config.num_groups, epsilon=config.norm_epsilon, **make
        )
        self.conv_out = layers.conv(first, config.out_channels, 3, **make)
        layers.reset_parameters(self, rngs.params())

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: jax.Array | None = None,
        *,
        train: bool = False,
        rngs: jax.Array | None = None,
        return_features: bool = False,
    ) -> jax.Array | tuple[jax.Array, OrderedDict[str, jax.Array]]:
        """Predicts from noisy latents and the states of a text.

        Args:
          x: (B, H, W, in_channels) noisy latents.
          t: (B,) timesteps, integer or float.
          cond: (B, T, context_dim) states of a text's tokens.
          train: no matter, this model has no dropout.
          rngs: no matter, as nothing is drawn.
          return_features: whether to return the features too.

        Returns:
          (B, H, W, out_channels) float32; with features also a dict, in execution order (an
          OrderedDict: jit sorts others), in the dtype of the computation: "<block>", its output
          after the change of resolution, (B, h, w, C), such as "down_blocks.0", "mid_block"; and
          "<block>.attentions.<j>.proj_out", before it is added: (B, h * w, C) with
          linear_projection, else (B, h, w, C).

        Raises:
          ValueError: wrong shapes, or no text states.
        """
        self._check_inputs(x, t, cond)
        assert cond is not None, "as was checked"
        context = cond.astype(self.dtype)
        temb = self.time_embedding(t)
        h = self.conv_in(x.astype(self.dtype))
        skips, features = [h], OrderedDict()
        for block in self.config.blocks():
            h = self._run(block, h, temb, context, skips, features)
            features[block.name] = h
        h = self.conv_out(nnx.silu(self.conv_norm_out(h))).astype(jnp.float32)
        return (h, features) if return_features else h

    def _run(self, block, h, temb, context, skips, features):
        """A block's output; takes from `skips` or adds to them, and adds to `features`."""
        down = block.name.startswith("down")
        for layer, (_, skip) in enumerate(block.inputs):
            if skip:
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = self._module(f"{block.name}.resnets.{layer}")(h, temb)
            if layer < block.attentions:
                name = f"{block.name}.attentions.{layer}"
                h, features[f"{name}.proj_out"] = self._module(name)(h, context)
            if down:
                skips.append(h)
        if block.resample:
            h = self._module(f"{block.name}.{block.resample}.0")(h)
            if down:
                skips.append(h)
        return h

    def _module(self, name: str):
        return layers.remat(layers.find(self, name), self.remat)

    def _check_inputs(self, x, t, cond):
        layers.check_images(x, t, self.config)
        width = self.config.context_dim
        if cond is None or cond.ndim != 3 or (cond.shape[0], cond.shape[2]) != (len(x), width):
            found = "None" if cond is None else f"of shape {cond.shape}"
            raise ValueError(
                f"cond must be the states of a text, of shape ({len(x)}, T, {width}), not {found}"
            )
