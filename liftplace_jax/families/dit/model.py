"""The diffusion transformer DiT (Peebles & Xie 2023): adaLN-zero blocks over patches.

Same function and same names as "TinyFusion_EXP/models.py" (the published PyTorch code), in NHWC.
"""

import functools
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.core import Tracer

from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.nn import layers
from liftplace_jax.nn.attention import attention

FREQUENCIES = 256
"""Size of the timestep's sinusoidal embedding."""


class PatchEmbed(nnx.Module):
    """Each square of patch_size x patch_size pixels as a token, rows first."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        size = config.patch_size
        self.proj = layers.conv(
            config.in_channels,
            config.hidden_size,
            size,
            strides=size,
            padding=(0, 0),
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(x).reshape(x.shape[0], -1, self.proj.out_features)


class TimestepEmbedder(nnx.Module):
    """An MLP over the cosines and sines of a timestep."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        linear = functools.partial(layers.linear, rngs=rngs, dtype=dtype)
        width = config.hidden_size
        self.mlp = layers.Sequential([linear(FREQUENCIES, width), nnx.silu, linear(width, width)])
        self.shift, self.dtype = config.frequency_shift, dtype

    def __call__(self, t: jax.Array) -> jax.Array:
        waves = layers.sinusoidal_embedding(
            t, FREQUENCIES, frequency_shift=self.shift, cosines_first=True
        )
        return self.mlp(waves.astype(self.dtype))


class LabelEmbedder(nnx.Module):
    """A vector for each label, the null label's last."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        self.embedding_table = layers.embedding(
            config.num_labels, config.hidden_size, rngs=rngs, dtype=dtype
        )

    def __call__(self, labels: jax.Array) -> jax.Array:
        return self.embedding_table(labels)


def _condition(module: Any, t: jax.Array, labels: jax.Array | None) -> jax.Array:
    """Timestep and label as one vector (B, D), by the embedders of the model or of a block."""
    return module.t_embedder(t) + module.y_embedder(labels)


class Attention(nnx.Module):
    """Multi-head self-attention over the tokens, queries, keys and values from one layer."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        width = config.hidden_size
        self.qkv = layers.linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.proj = layers.linear(width, width, rngs=rngs, dtype=dtype)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(h.reshape(batch, tokens, width))


class Mlp(nnx.Module):
    """Linear, GELU (tanh approximation), linear; token by token."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        linear = functools.partial(layers.linear, rngs=rngs, dtype=dtype)
        self.fc1 = linear(config.hidden_size, config.mlp_width)
        self.fc2 = linear(config.mlp_width, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))


def _modulation(config: DiTConfig, parts: int, *, rngs, dtype) -> layers.Sequential:
    width = config.hidden_size
    return layers.Sequential(
        [nnx.silu, layers.linear(width, parts * width, rngs=rngs, dtype=dtype)]
    )


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nnx.Module):
    """Attention, then MLP, each normalised, shifted, scaled and gated by the condition."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        if config.embedders == "per_block":
            self.t_embedder = TimestepEmbedder(config, rngs=rngs, dtype=dtype)
            self.y_embedder = LabelEmbedder(config, rngs=rngs, dtype=dtype)
        norm = functools.partial(layers.layer_norm, config.hidden_size, rngs=rngs, dtype=dtype)
        self.norm1 = norm()
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.norm2 = norm(epsilon=config.norm_epsilon)
        self.mlp = Mlp(config, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = _modulation(config, 6, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.adaLN_modulation(c), 6, -1)
        x += gate1[:, None] * self.attn(_modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nnx.Module):
    """Normalised, shifted and scaled tokens as patches of the prediction."""

    def __init__(self, config: DiTConfig, *, rngs, dtype):
        width, pixels = config.hidden_size, config.patch_size**2
        self.norm_final = layers.layer_norm(width, rngs=rngs, dtype=dtype)
        self.linear = layers.linear(width, pixels * config.out_channels, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = _modulation(config, 2, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.adaLN_modulation(c), 2, axis=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class DiT(nnx.Module):
    """The class-conditional denoising network; its tree is named as the published state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from. They are the published ones: the modulations and
        the final layer are zero, so every block is the identity and every prediction zero.
      dtype: dtype of the computation. Parameters, norm statistics, softmax and the prediction
        stay float32.
      remat: name of the policy of `layers.REMAT_POLICIES` by which each block's intermediate
        values are recomputed for the gradient; None keeps them all.
      scan_blocks: as of `building.create`.

    Raises:
      ValueError: unknown policy.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
        remat: str | None = None,
        scan_blocks: bool = False,
    ):
        layers.check_remat(remat)
        self.scan_blocks = scan_blocks
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        make = {"rngs": rngs, "dtype": dtype}
        self.x_embedder = PatchEmbed(config, **make)
        if config.embedders == "shared":
            self.t_embedder = TimestepEmbedder(config, **make)
            self.y_embedder = LabelEmbedder(config, **make)
        # A parameter by name, as in the published files; the forward pass keeps it as it is.
        side = config.image_size // config.patch_size
        self.pos_embed = nnx.Param(jnp.asarray(layers.position_embedding(config.hidden_size, side)))
        self.blocks = nnx.List([DiTBlock(config, **make) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config, **make)
        self._reset_parameters(rngs.params())

    def _reset_parameters(self, key: jax.Array) -> None:
        """The published initialisation, in two draws (see `layers.draw`)."""
        drawn = [self.x_embedder.proj.kernel]
        for block in self.blocks:
            drawn += [block.attn.qkv.kernel, block.attn.proj.kernel]
            drawn += [block.mlp.fc1.kernel, block.mlp.fc2.kernel]
        embedders = []
        for module in [self] if self.config.embedders == "shared" else self.blocks:
            mlp = module.t_embedder.mlp
            embedders += [mlp[0].kernel, mlp[2].kernel]
            embedders += [module.y_embedder.embedding_table.embedding]
        keys = jax.random.split(key)
        layers.draw(keys[0], drawn, [layers.xavier_bound(v) for v in drawn])
        layers.draw(keys[1], embedders, [0.02] * len(embedders), "normal")

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: jax.Array | None = None,
        *,
        train: bool = False,
        rngs: jax.Array | None = None,
        return_features: bool = False,
        gates: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, OrderedDict[str, jax.Array]]:
        """Predicts from noisy images or latents of a class.

        Args:
          x: (B, H, W, in_channels) noisy images or latents.
          t: (B,) timesteps, integer or float.
          cond: (B,) integer labels, 0..num_classes - 1, or `config.null_label`. Others are refused,
            but within jit, where none can be read, those beyond the last give NaN.
          train: no matter, this model has no dropout (labels are dropped by the objective).
          rngs: no matter, as nothing is drawn.
          return_features: whether to return the features too.
          gates: (depth,) how far each block acts: block i adds gates[i] * (block(x) - x). None: 1.

        Returns:
          (B, H, W, out_channels) float32; with features also a dict, in execution order (an
          OrderedDict: jit sorts others), from "blocks.<i>" to that block's (B, T, D) output in the
          dtype of the computation.

        Raises:
          ValueError: wrong shapes, or no labels, or labels out of range.
        """
        config = self.config
        self._check_inputs(x, t, cond, gates)
        h = self.embed(x)
        shared = _condition(self, t, cond) if config.embedders == "shared" else None

        def run(block, h, gate):
            c = _condition(layers.whole(block), t, cond) if shared is None else shared
            out = layers.remat(block, self.remat)(h, c)
            return out if gate is None else h + gate.astype(h.dtype) * (out - h)

        h, found = self._run_blocks(run, h, gates, return_features)
        outputs = OrderedDict((f"blocks.{index}", x) for index, x in enumerate(found))
        last = _condition(layers.whole(self.blocks[0]), t, cond) if shared is None else shared
        patches = self.final_layer(h, last).astype(jnp.float32)
        prediction = self._unpatchify(patches)
        return (prediction, outputs) if return_features else prediction

    def _run_blocks(self, run, h, gates, return_features):
        """(the last block's output, those of all blocks, if they are asked for)."""
        if not self.scan_blocks:
            outputs = []
            for index, block in enumerate(self.blocks):
                h = run(block, h, None if gates is None else gates[index])
                outputs.append(h)
            return h, outputs
        graphdef, _ = nnx.split(self.blocks[0])
        states = [nnx.to_pure_dict(nnx.state(block)) for block in self.blocks]

        def body(h, part):
            state, gate = part
            h = run(nnx.merge(graphdef, state), h, gate)
            return h, h if return_features else None

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        h, outputs = jax.lax.scan(body, h, (stacked, gates))
        return h, [] if outputs is None else list(outputs)

    def embed(self, x: jax.Array) -> jax.Array:
        """Images or latents (B, H, W, in_channels) as the (B, T, D) tokens that block 0 sees."""
        tokens = self.x_embedder(x.astype(self.dtype))
        return tokens + jax.lax.stop_gradient(self.pos_embed[...].astype(self.dtype))

    def _unpatchify(self, patches: jax.Array) -> jax.Array:
        config, size = self.config, self.config.patch_size
        side = config.image_size // size
        x = patches.reshape(-1, side, side, size, size, config.out_channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, config.image_size, config.image_size, config.out_channels)

    def _check_inputs(self, x, t, cond, gates):
        config = self.config
        layers.check_images(x, t, config)
        if cond is None or cond.shape != t.shape or not jnp.issubdtype(cond.dtype, jnp.integer):
            found = "None" if cond is None else f"{cond.dtype} of shape {cond.shape}"
            raise ValueError(
                f"cond must be integer labels of shape {t.shape}, one per sample, not {found}: "
                "this model is class-conditional"
            )
        if not isinstance(cond, Tracer):
            labels = np.asarray(cond)
            wrong = labels[(labels < 0) | (labels >= config.num_labels)]
            if wrong.size:
                null = config.null_label
                raise ValueError(
                    f"cond: labels must be in 0..{config.num_classes - 1}"
                    + ("" if null is None else f", or the null label {null}")
                    + f", got {wrong[0]}"
                )
        if gates is not None and gates.shape != (config.depth,):
            raise ValueError(
                f"gates must have shape ({config.depth},), one per block, not {gates.shape}"
            )
