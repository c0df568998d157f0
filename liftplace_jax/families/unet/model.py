"""The DDPM U-Net (Ho et al. 2020) with free channel widths.

Same function and same names as "Diff_Pruning models/diffusion.py" (the PyTorch port of DDPM), in
NHWC. `UNetConfig` says every width, so a channel-pruned student is an ordinary config.
"""

import functools
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.families.unet.config import Node, UNetConfig
from liftplace_jax.nn import layers
from liftplace_jax.nn.attention import attention


class ResnetBlock(nnx.Module):
    """norm, swish, conv1, + time embedding, norm, swish, dropout, conv2, + shortcut."""

    def __init__(self, node: Node, config: UNetConfig, temb_width: int, *, rngs, dtype):
        conv = functools.partial(layers.conv, rngs=rngs, dtype=dtype)
        norm = functools.partial(layers.group_norm, rngs=rngs, dtype=dtype)
        hidden = node.hidden_width
        self.norm1 = norm(node.in_width, config.norm_groups(node.in_width, node.name))
        self.conv1 = conv(node.in_width, hidden, 3)
        self.temb_proj = layers.linear(temb_width, hidden, rngs=rngs, dtype=dtype)
        self.norm2 = norm(hidden, config.norm_groups(hidden, node.name))
        self.conv2 = conv(hidden, node.out_width, 3)
        if node.shortcut:
            self.nin_shortcut = conv(node.in_width, node.out_width, 1)
        self.shortcut = node.shortcut
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, temb: jax.Array, key: jax.Array | None) -> jax.Array:
        h = self.conv1(nnx.swish(self.norm1(x)))
        h += self.temb_proj(nnx.swish(temb))[:, None, None, :]
        h = nnx.swish(self.norm2(h))
        if key is not None:
            h = nnx.Dropout(self.dropout)(h, deterministic=False, rngs=key)
        return (self.nin_shortcut(x) if self.shortcut else x) + self.conv2(h)


class AttnBlock(nnx.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    def __init__(self, node: Node, config: UNetConfig, *, rngs, dtype):
        conv = functools.partial(layers.conv, size=1, rngs=rngs, dtype=dtype)
        groups = config.norm_groups(node.in_width, node.name)
        self.norm = layers.group_norm(node.in_width, groups, rngs=rngs, dtype=dtype)
        self.q = conv(node.in_width, node.hidden_width)
        self.k = conv(node.in_width, node.hidden_width)
        self.v = conv(node.in_width, node.hidden_width)
        self.proj_out = conv(node.hidden_width, node.in_width)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, _ = x.shape
        h = self.norm(x)
        q, k, v = (
            layer(h).reshape(batch, height * width, 1, -1) for layer in (self.q, self.k, self.v)
        )
        h = attention(q, k, v)
        return x + self.proj_out(h.reshape(batch, height, width, -1))


class UNet(nnx.Module):
    """The denoising network; its tree of modules is named as the published state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from (PyTorch's defaults for every layer. The output
        layer is not zero: a student with a constant output has an exploding slope).
      dtype: dtype of the computation. Parameters, norm statistics, softmax and the prediction
        stay float32.
      remat: name of the policy of `layers.REMAT_POLICIES` by which the intermediate values of each
        block, attention and resampling are recomputed for the gradient; None keeps them all.

    Raises:
      ValueError: unknown policy.
    """

    temb: Any
    norm_out: Any
    conv_out: Any

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
        remat: str | None = None,
    ):
        layers.check_remat(remat)
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        widths, plan = dict(config.widths), config.block_plan()
        conv = functools.partial(layers.conv, rngs=rngs, dtype=dtype)
        linear = functools.partial(layers.linear, rngs=rngs, dtype=dtype)
        temb_widths = widths["temb.dense.0"], widths["temb.dense.1"]
        modules: dict[str, nnx.Module] = {
            "temb.dense.0": linear(config.ch, temb_widths[0]),
            "temb.dense.1": linear(*temb_widths),
        }
        for node in plan:
            if node.kind == "block":
                module = ResnetBlock(node, config, temb_widths[1], rngs=rngs, dtype=dtype)
            elif node.kind == "attention":
                module = AttnBlock(node, config, rngs=rngs, dtype=dtype)
            elif node.kind == "downsample" and config.resamp_with_conv:
                # The published code pads right and below only.
                module = conv(node.in_width, node.out_width, 3, strides=2, padding=(0, 1))
            elif node.kind == "conv_in" or config.resamp_with_conv:
                module = conv(node.in_width, node.out_width, 3)
            else:
                continue
            modules[node.name] = module
        width = plan[-1].out_width
        groups = config.norm_groups(width, "norm_out")
        modules["norm_out"] = layers.group_norm(width, groups, rngs=rngs, dtype=dtype)
        modules["conv_out"] = conv(width, config.out_channels, 3)
        for name, module in layers.nest(modules).items():
            setattr(self, name, module)
        layers.reset_parameters(self, rngs.params())

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: None = None,
        *,
        train: bool = False,
        rngs: jax.Array | None = None,
        return_features: bool = False,
    ) -> jax.Array | tuple[jax.Array, OrderedDict[str, jax.Array]]:
        """Predicts from noisy images.

        Args:
          x: (B, H, W, in_channels) noisy images.
          t: (B,) timesteps, integer or float.
          cond: must be None, this model is unconditional.
          train: whether dropout acts.
          rngs: random key of the dropout, needed if train and config.dropout > 0.
          return_features: whether to return the features too.

        Returns:
          (B, H, W, out_channels) float32; with features also a dict, in execution order (an
          OrderedDict: jit sorts others), from the name of a block, attention or resampling
          convolution to its (B, h, w, C) output in the dtype of the computation.

        Raises:
          ValueError: wrong shapes, a condition, or no key for dropout.
        """
        config = self.config
        self._check_inputs(x, t, cond)
        if train and config.dropout > 0 and rngs is None:
            raise ValueError("train=True with dropout needs rngs, a random key")
        temb = layers.sinusoidal_embedding(t, config.ch).astype(self.dtype)
        temb = self.temb.dense[1](nnx.swish(self.temb.dense[0](temb)))
        outputs = {}
        for index, node in enumerate(config.block_plan()):
            inputs = [outputs[name] for name in node.inputs] or [x.astype(self.dtype)]
            drops = train and config.dropout > 0
            key = jax.random.fold_in(rngs, index) if drops and rngs is not None else None
            h = self._run(node, jnp.concatenate(inputs, axis=-1), temb, key)
            outputs[node.name] = h
        prediction = self.conv_out(nnx.swish(self.norm_out(h))).astype(jnp.float32)
        if not return_features:
            return prediction
        silent = ("conv_in", ".downsample", ".upsample")
        named = ((name, h) for name, h in outputs.items() if not name.endswith(silent))
        return prediction, OrderedDict(named)

    def _run(self, node: Node, h: jax.Array, temb: jax.Array, key: jax.Array | None) -> jax.Array:
        if node.kind == "upsample":
            h = h.repeat(2, axis=1).repeat(2, axis=2)
        if node.kind.endswith("sample") and not self.config.resamp_with_conv:
            down = node.kind == "downsample"
            return nnx.avg_pool(h, (2, 2), strides=(2, 2)) if down else h
        module = layers.remat(layers.find(self, node.name), self.remat)
        return module(h, temb, key) if node.kind == "block" else module(h)

    def _check_inputs(self, x, t, cond):
        layers.check_images(x, t, self.config)
        if cond is not None:
            raise ValueError("cond must be None: this model is unconditional")
