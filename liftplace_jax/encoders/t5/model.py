"""T5's encoder (Raffel et al. 2020; v1.1: gated GELU), named as transformers names it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.encoders.t5.config import T5Config
from liftplace_jax.nn import layers


def _norm(config: T5Config, *, rngs, dtype) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.d_model,
        epsilon=config.layer_norm_epsilon,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """transformers' "SelfAttention": without biases, and without the factor 1 / sqrt(d_kv)."""

    def __init__(self, config: T5Config, has_distances: bool, *, rngs, dtype):
        self.heads, self.dtype = (config.num_heads, config.d_kv), dtype
        width, inside = config.d_model, config.num_heads * config.d_kv
        linear = functools.partial(layers.linear, rngs=rngs, dtype=dtype, use_bias=False)
        self.q, self.k, self.v = (linear(width, inside) for _ in range(3))
        self.o = linear(inside, width)
        if has_distances:
            self.relative_attention_bias = layers.embedding(
                config.relative_attention_num_buckets,
                config.num_heads,
                rngs=rngs,
                dtype=jnp.float32,
            )

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        split = (*x.shape[:2], *self.heads)
        q, k, v = (p(x).reshape(split) for p in (self.q, self.k, self.v))
        h = jax.nn.dot_product_attention(q, k, v, bias=bias.astype(q.dtype), scale=1.0)
        return self.o(h.reshape(*x.shape[:2], -1))


class DenseReluDense(nnx.Module):
    """gelu(x wi_0) * (x wi_1), times wo; the published name speaks of an earlier version."""

    def __init__(self, config: T5Config, *, rngs, dtype):
        linear = functools.partial(layers.linear, rngs=rngs, use_bias=False)
        self.wi_0 = linear(config.d_model, config.d_ff, dtype=dtype)
        self.wi_1 = linear(config.d_model, config.d_ff, dtype=dtype)
        # In float32 whatever the rest: its results are beyond float16, as transformers found.
        self.wo = linear(config.d_ff, config.d_model, dtype=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(nnx.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: T5Config, has_distances: bool, *, rngs, dtype):
        self.SelfAttention = Attention(config, has_distances, rngs=rngs, dtype=dtype)
        self.layer_norm = _norm(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MLPLayer(nnx.Module):
    """x + mlp(norm(x))."""

    def __init__(self, config: T5Config, *, rngs, dtype):
        self.DenseReluDense = DenseReluDense(config, rngs=rngs, dtype=dtype)
        self.layer_norm = _norm(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    """Attention, then MLP."""

    layer: Any

    def __init__(self, config: T5Config, index: int, *, rngs, dtype):
        make = {"rngs": rngs, "dtype": dtype}
        self.layer = nnx.List(
            [AttentionLayer(config, index == 0, **make), MLPLayer(config, **make)]
        )

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return self.layer[1](self.layer[0](x, bias))


class Stack(nnx.Module):
    """transformers' "encoder"."""

    def __init__(self, config: T5Config, *, rngs, dtype):
        blocks = [Block(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)]
        self.block = nnx.List(blocks)
        self.final_layer_norm = _norm(config, rngs=rngs, dtype=dtype)


class T5(nnx.Module):
    """The encoder; the tree of modules is named as the published state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from, as transformers draws them.
      dtype: dtype of the matrix products; float16 is none for it. Parameters, the sum that runs
        through the layers, norms, softmax, the last product of each MLP and results are float32.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.shared = layers.embedding(
            config.vocab_size, config.d_model, rngs=rngs, dtype=jnp.float32
        )
        self.encoder = Stack(config, rngs=rngs, dtype=dtype)
        self._draw_weights(rngs.params())

    def _draw_weights(self, key: jax.Array) -> None:
        config = self.config
        width = config.d_model**-0.5
        deviations = {
            "q": (config.d_model * config.d_kv) ** -0.5,
            "k": width,
            "v": width,
            "o": (config.num_heads * config.d_kv) ** -0.5,
            "wi_0": width,
            "wi_1": width,
            "wo": config.d_ff**-0.5,
            "shared": 1.0,
            "relative_attention_bias": width,
        }
        variables, scales = [], []
        for path, module in nnx.iter_modules(self):
            if isinstance(module, nnx.Linear | nnx.Embed):
                is_table = isinstance(module, nnx.Embed)
                variables.append(module.embedding if is_table else module.kernel)
                scales.append(deviations[str(path[-1])])
        layers.draw(key, variables, scales, "normal")

    def __call__(self, ids: jax.Array) -> jax.Array:
        """States of texts.

        Args:
          ids: (B, T) int32 tokens. Every token sees all others, padding among them: Stable
            Diffusion 3 has no mask.

        Returns:
          (B, T, d_model) float32, after the final normalisation.

        Raises:
          ValueError: another shape or kind of numbers.
        """
        if ids.ndim != 2 or not ids.shape[1]:
            raise ValueError(f"token ids must have shape (B, T), not {ids.shape}")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"token ids must be whole numbers, not {ids.dtype}")
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        # (1, heads, T, T): the first layer's, added to the scores of all layers.
        bias = jnp.moveaxis(table(distance_buckets(ids.shape[1], self.config)), -1, 0)[None]
        x = self.shared(ids)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x).astype(jnp.float32)


def distance_buckets(tokens: int, config: T5Config) -> np.ndarray:
    """The bucket of every query (row) and key (column): (T, T) int32.

    Half of the buckets are for keys before the query, half for those behind it. Of each, half are
    single distances, the others grow logarithmically up to relative_attention_max_distance.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    distance = np.abs(offset)
    # In float32, as PyTorch has it: at the edges of buckets the last bit decides.
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(config.relative_attention_max_distance / exact))
    far = exact + (far * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)
