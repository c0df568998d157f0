"""CLIP's transformers (Radford et al. 2021): of text and of images.

Same function and same names as transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` and
`CLIPVisionModelWithProjection` ("models/clip/modeling_clip.py"), images in NHWC.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.encoders.clip.config import ACTIVATIONS, CLIPTextConfig, CLIPVisionConfig
from liftplace_jax.nn import layers
from liftplace_jax.nn.attention import attention

_LEGACY_END = 2  # see `CLIPTextConfig.eos_token_id`
_DEVIATION = 0.02  # of the initial embeddings


class Encoded(NamedTuple):
    """What a tower makes of B texts or images, all float32.

    Attributes:
      last: (B, T, D), the states after the last layer; a text's after the final normalisation.
      hidden: states before the first layer and after every one, (B, T, D) each, not normalised;
        hidden[-2] is the penultimate state.
      pooled: (B, D), normalised: of the end token, or of the token for the whole image.
      projected: (B, P), the projected pooled state; None without a projection.
    """

    last: jax.Array
    hidden: tuple[jax.Array, ...]
    pooled: jax.Array
    projected: jax.Array | None


def _norm(config, *, rngs, dtype) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Self-attention of several heads."""

    def __init__(self, config, causal: bool, *, rngs, dtype):
        width = config.hidden_size
        linear = functools.partial(layers.linear, width, width, rngs=rngs, dtype=dtype)
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (p(x).reshape(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=self.causal).reshape(x.shape))


class MLP(nnx.Module):
    """Two dense layers."""

    def __init__(self, config, *, rngs, dtype):
        width, inside = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.fc1 = layers.linear(width, inside, rngs=rngs, dtype=dtype)
        self.fc2 = layers.linear(inside, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, causal: bool, *, rngs, dtype):
        self.layer_norm1 = _norm(config, rngs=rngs, dtype=dtype)
        self.self_attn = Attention(config, causal, rngs=rngs, dtype=dtype)
        self.layer_norm2 = _norm(config, rngs=rngs, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """A stack of layers."""

    def __init__(self, config, causal: bool, *, rngs, dtype):
        self.layers = nnx.List(
            [Layer(config, causal, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """States before the first layer and after every one."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class TextEmbeddings(nnx.Module):
    """Vectors of tokens and of their places."""

    def __init__(self, config: CLIPTextConfig, *, rngs, dtype):
        table = functools.partial(layers.embedding, rngs=rngs, dtype=dtype)
        self.token_embedding = table(config.vocab_size, config.hidden_size)
        self.position_embedding = table(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class ImageEmbeddings(nnx.Module):
    """Vectors of patches, row by row, after one of no patch, and of their places."""

    def __init__(self, config: CLIPVisionConfig, *, rngs, dtype):
        zeros, size = nnx.initializers.zeros_init(), config.patch_size
        self.class_embedding = nnx.Param(jnp.zeros(config.hidden_size))
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            config.hidden_size,
            (size, size),
            strides=size,
            padding="VALID",
            use_bias=False,
            kernel_init=zeros,
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = layers.embedding(
            config.num_tokens, config.hidden_size, rngs=rngs, dtype=dtype
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patch_embedding(images)
        count, width = patches.shape[0], patches.shape[-1]
        whole = jnp.broadcast_to(self.class_embedding[...], (count, 1, width))
        tokens = [whole.astype(patches.dtype), patches.reshape(count, -1, width)]
        tokens = jnp.concatenate(tokens, axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class TextTower(nnx.Module):
    """transformers' "text_model"."""

    def __init__(self, config: CLIPTextConfig, *, rngs, dtype):
        self.embeddings = TextEmbeddings(config, rngs=rngs, dtype=dtype)
        self.encoder = Encoder(config, True, rngs=rngs, dtype=dtype)
        self.final_layer_norm = _norm(config, rngs=rngs, dtype=dtype)


class ImageTower(nnx.Module):
    """transformers' "vision_model"; the misspelt name is the published one."""

    def __init__(self, config: CLIPVisionConfig, *, rngs, dtype):
        self.embeddings = ImageEmbeddings(config, rngs=rngs, dtype=dtype)
        self.pre_layrnorm = _norm(config, rngs=rngs, dtype=dtype)
        self.encoder = Encoder(config, False, rngs=rngs, dtype=dtype)
        self.post_layernorm = _norm(config, rngs=rngs, dtype=dtype)


class CLIPText(nnx.Module):
    """The tower of texts; the tree of modules is named as the published state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from, as transformers draws them.
      dtype: dtype of the computation. Parameters, norm statistics, softmax and results stay
        float32.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.text_model = TextTower(config, rngs=rngs, dtype=dtype)
        if config.projection_dim is not None:
            self.text_projection = layers.linear(
                config.hidden_size, config.projection_dim, rngs=rngs, dtype=dtype, use_bias=False
            )
        _draw_weights(self, config, rngs.params())

    def __call__(self, ids: jax.Array) -> Encoded:
        """States of texts.

        Args:
          ids: (B, T) int32 tokens; T is at most config.max_position_embeddings. A token sees
            those before it, whichever they are: padding behind the text changes nothing in it.

        Raises:
          ValueError: another shape or kind of numbers.
        """
        config = self.config
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= config.max_position_embeddings:
            raise ValueError(
                f"token ids must have shape (B, T) with T in 1..{config.max_position_embeddings}, "
                f"not {ids.shape}"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"token ids must be whole numbers, not {ids.dtype}")
        tower = self.text_model
        hidden = tower.encoder(tower.embeddings(ids))
        last = tower.final_layer_norm(hidden[-1])
        if config.eos_token_id == _LEGACY_END:
            ends = jnp.argmax(ids, axis=1)
        else:
            ends = jnp.argmax(ids == config.eos_token_id, axis=1)  # the first of them
        pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
        projected = None if config.projection_dim is None else self.text_projection(pooled)
        return _float32(Encoded(last, hidden, pooled, projected))


class CLIPVision(nnx.Module):
    """The tower of images; arguments as of `CLIPText`."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.vision_model = ImageTower(config, rngs=rngs, dtype=dtype)
        if config.projection_dim is not None:
            self.visual_projection = layers.linear(
                config.hidden_size, config.projection_dim, rngs=rngs, dtype=dtype, use_bias=False
            )
        _draw_weights(self, config, rngs.params())

    def __call__(self, images: jax.Array) -> Encoded:
        """States of images.

        Args:
          images: (B, H, W, num_channels), both sides config.image_size, normalised by the mean
            and deviation that the tower was trained with.

        Raises:
          ValueError: another shape.
        """
        config = self.config
        shape = (config.image_size, config.image_size, config.num_channels)
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"images must have shape (B, {str(shape)[1:]}, not {images.shape}")
        tower = self.vision_model
        tokens = tower.pre_layrnorm(tower.embeddings(images.astype(self.dtype)))
        hidden = tower.encoder(tokens)
        pooled = tower.post_layernorm(hidden[-1][:, 0])
        projected = None if config.projection_dim is None else self.visual_projection(pooled)
        return _float32(Encoded(hidden[-1], hidden, pooled, projected))


def _float32(encoded: Encoded) -> Encoded:
    return jax.tree.map(lambda x: x.astype(jnp.float32), encoded)


def _draw_weights(model: nnx.Module, config, key: jax.Array) -> None:
    """Gives all weights but those of norms CLIP's initial values, in place; biases stay zero."""
    width = config.hidden_size**-0.5
    inner = width * (2 * config.num_hidden_layers) ** -0.5
    deviations = {
        "class_embedding": width,
        "q_proj": inner,
        "k_proj": inner,
        "v_proj": inner,
        "out_proj": width,
        "fc1": (2 * config.hidden_size) ** -0.5,
        "fc2": inner,
        "text_projection": width,
        "visual_projection": width,
    }
    variables, scales = [], []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, ImageEmbeddings):
            variables.append(module.class_embedding)
            scales.append(deviations["class_embedding"])
        elif isinstance(module, nnx.Linear | nnx.Conv | nnx.Embed):
            is_table = isinstance(module, nnx.Embed)
            variables.append(module.embedding if is_table else module.kernel)
            scales.append(deviations.get(str(path[-1]), _DEVIATION))
    layers.draw(key, variables, scales, "normal")
