"""The multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024), in NHWC.

Tokens of image and text have weights of their own and meet in each block's attention. Names and
function are those of diffusers 0.42 "models/transformers/transformer_sd3.py", whose files people
have.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.families.mmdit.config import MMDiTConfig
from liftplace_jax.nn import layers
from liftplace_jax.nn.attention import attention

FREQUENCIES = 256
"""Size of the timestep's sinusoidal embedding."""


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nnx.Module):
    """Each square of patch_size x patch_size pixels as a token, rows first, and its position."""

    def __init__(self, config: MMDiTConfig, *, rngs, dtype):
        size, self.side = config.patch_size, config.position_size
        self.proj = layers.conv(
            config.in_channels,
            config.hidden_size,
            size,
            strides=size,
            padding=(0, 0),
            rngs=rngs,
            dtype=dtype,
        )
        # A parameter by name, as in the published files; the forward pass keeps it as it is.
        table = layers.position_embedding(
            config.hidden_size, self.side, config.side / self.side, jnp
        )
        self.pos_embed = nnx.Param(table)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.proj(x)
        batch, height, width, features = tokens.shape
        table = jax.lax.stop_gradient(self.pos_embed[...]).reshape(self.side, self.side, features)
        top, left = (self.side - height) // 2, (self.side - width) // 2
        positions = table[top : top + height, left : left + width].astype(tokens.dtype)
        return (tokens + positions).reshape(batch, height * width, features)


class Embedder(nnx.Module):
    """Linear, SiLU, linear."""

    def __init__(self, inputs: int, width: int, *, rngs, dtype):
        self.linear_1 = layers.linear(inputs, width, rngs=rngs, dtype=dtype)
        self.linear_2 = layers.linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class TimeTextEmbed(nnx.Module):
    """Timestep and pooled text as one vector."""

    def __init__(self, config: MMDiTConfig, *, rngs, dtype):
        width = config.hidden_size
        self.timestep_embedder = Embedder(FREQUENCIES, width, rngs=rngs, dtype=dtype)
        self.text_embedder = Embedder(config.pooled_dim, width, rngs=rngs, dtype=dtype)
        self.dtype = dtype

    def __call__(self, t: jax.Array, pooled: jax.Array) -> jax.Array:
        waves = layers.sinusoidal_embedding(t, FREQUENCIES, frequency_shift=0, cosines_first=True)
        return self.timestep_embedder(waves.astype(self.dtype)) + self.text_embedder(
            pooled.astype(self.dtype)
        )


class Modulation(nnx.Module):
    """`parts` vectors out of the condition, by which tokens are shifted, scaled and gated."""

    def __init__(self, width: int, parts: int, *, rngs, dtype):
        self.linear = layers.linear(width, parts * width, rngs=rngs, dtype=dtype)
        self.parts = parts

    def __call__(self, c: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(nnx.silu(c)), self.parts, axis=-1)


class GELU(nnx.Module):
    """A linear layer and GELU (tanh approximation)."""

    def __init__(self, inputs: int, outputs: int, *, rngs, dtype):
        self.proj = layers.linear(inputs, outputs, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.gelu(self.proj(x), approximate=True)


class FeedForward(nnx.Module):
    """Linear, GELU, linear, four times as wide inside; token by token."""

    def __init__(self, width: int, *, rngs, dtype):
        gelu = GELU(width, 4 * width, rngs=rngs, dtype=dtype)
        last = layers.linear(4 * width, width, rngs=rngs, dtype=dtype)
        # The published files count a dropout between the two.
        self.net = layers.Sequential([gelu, lambda x: x, last])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


class Attention(nnx.Module):
    """Attention over the tokens of the image, and those of the text where there are any.

    Args:
      config: of the network.
      text: whether the text's tokens take part.
      text_out: whether they get an output too.
    """

    def __init__(self, config: MMDiTConfig, text: bool, text_out: bool, *, rngs, dtype):
        width = config.hidden_size
        linear = functools.partial(layers.linear, width, width, rngs=rngs, dtype=dtype)
        norm = functools.partial(
            nnx.RMSNorm,
            config.head_size,
            epsilon=1e-6,
            dtype=dtype,
            use_fast_variance=False,
            rngs=rngs,
        )
        normed = config.qk_norm is not None
        self.heads = (config.num_heads, config.head_size)
        self.text, self.text_out, self.normed = text, text_out, normed
        if normed:
            self.norm_q, self.norm_k = norm(), norm()
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            if normed:
                self.norm_added_q, self.norm_added_k = norm(), norm()
        if text_out:
            self.to_add_out = linear()

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(image (B, T, D), text (B, S, D) or None) -> the same of what was attended to."""
        q, k, v = (self._split(f(x)) for f in (self.to_q, self.to_k, self.to_v))
        if self.normed:
            q, k = self.norm_q(q), self.norm_k(k)
        if context is not None:
            projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            cq, ck, cv = (self._split(f(context)) for f in projections)
            if self.normed:
                cq, ck = self.norm_added_q(cq), self.norm_added_k(ck)
            pairs = ((q, cq), (k, ck), (v, cv))
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in pairs)
        h = attention(q, k, v)
        h = h.reshape(*h.shape[:2], -1)
        tokens = x.shape[1]
        text = self.to_add_out(h[:, tokens:]) if self.text_out else None
        return self.to_out[0](h[:, :tokens]), text

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], *self.heads)


class Block(nnx.Module):
    """Joint attention, then an MLP for each of image and text.

    Args:
      config: of the network.
      index: the block's number: the last one gives no text.
    """

    def __init__(self, config: MMDiTConfig, index: int, *, rngs, dtype):
        width, make = config.hidden_size, {"rngs": rngs, "dtype": dtype}
        self.last = index == config.depth - 1
        self.dual = index in config.dual_attention_layers
        # Without parameters.
        self._norm = layers.layer_norm(width, **make)
        self.norm1 = Modulation(width, 9 if self.dual else 6, **make)
        self.norm1_context = Modulation(width, 2 if self.last else 6, **make)
        self.attn = Attention(config, True, not self.last, **make)
        if self.dual:
            self.attn2 = Attention(config, False, False, **make)
        self.ff = FeedForward(width, **make)
        if not self.last:
            self.ff_context = FeedForward(width, **make)

    def __call__(
        self, x: jax.Array, context: jax.Array, c: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(image, text, condition) -> (image, text); the last block leaves the text as it is."""
        shift1, scale1, gate1, shift2, scale2, gate2, *second = self.norm1(c)
        normed = self._norm(x)
        if self.last:
            scale, shift = self.norm1_context(c)  # the other order, as published
        else:
            shift, scale, *others = self.norm1_context(c)
        attended, text = self.attn(
            _modulate(normed, shift1, scale1), _modulate(self._norm(context), shift, scale)
        )
        x = x + gate1[:, None] * attended
        if self.dual:
            shift, scale, gate = second
            x = x + gate[:, None] * self.attn2(_modulate(normed, shift, scale))[0]
        x = x + gate2[:, None] * self.ff(_modulate(self._norm(x), shift2, scale2))
        if self.last:
            return x, context
        assert text is not None, "of all blocks but the last"
        gate, shift, scale, mlp_gate = others
        context = context + gate[:, None] * text
        modulated = _modulate(self._norm(context), shift, scale)
        return x, context + mlp_gate[:, None] * self.ff_context(modulated)


class MMDiT(nnx.Module):
    """The text-conditional denoising network; its tree is named as diffusers' state dict.

    Args:
      config: the architecture.
      rngs: where the initial weights come from. Modulations and the last layer are zero, so every
        block is the identity and every prediction zero.
      dtype: dtype of the computation. Parameters, norm statistics, softmax and the prediction
        stay float32.
      remat: name of the policy of `layers.REMAT_POLICIES` by which each block's intermediate
        values are recomputed for the gradient; None keeps them all.
      scan_blocks: as of `building.create`; with a second attention of some blocks, and the last
        block by itself, they are three stacks.

    Raises:
      ValueError: unknown policy.
    """

    def __init__(
        self,
        config: MMDiTConfig,
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
        width, pixels = config.hidden_size, config.patch_size**2
        self.pos_embed = PatchEmbed(config, **make)
        self.time_text_embed = TimeTextEmbed(config, **make)
        self.context_embedder = layers.linear(config.context_dim, width, **make)
        blocks = [Block(config, index, **make) for index in range(config.depth)]
        self.transformer_blocks = nnx.List(blocks)
        self._norm = layers.layer_norm(width, **make)
        self.norm_out = Modulation(width, 2, **make)
        self.proj_out = layers.linear(width, pixels * config.out_channels, **make)
        self._reset_parameters(rngs.params())

    def _reset_parameters(self, key: jax.Array) -> None:
        """As the DiT's: Glorot's bounds, small embedders, zero modulations; in two draws."""
        embedders = []
        for embedder in (
            self.time_text_embed.timestep_embedder,
            self.time_text_embed.text_embedder,
        ):
            embedders += [embedder.linear_1.kernel, embedder.linear_2.kernel]
        drawn = [self.pos_embed.proj.kernel, self.context_embedder.kernel]
        for block in self.transformer_blocks:
            drawn += [
                module.kernel
                for path, module in nnx.iter_modules(block)
                if isinstance(module, nnx.Linear) and not str(path[0]).startswith("norm")
            ]
        keys = jax.random.split(key)
        layers.draw(keys[0], drawn, [layers.xavier_bound(v) for v in drawn])
        layers.draw(keys[1], embedders, [0.02] * len(embedders), "normal")

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array] | None = None,
        *,
        train: bool = False,
        rngs: jax.Array | None = None,
        return_features: bool = False,
        gates: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, OrderedDict[str, jax.Array]]:
        """Predicts from noisy latents and a text.

        Args:
          x: (B, H, W, in_channels) noisy latents; H and W are multiples of patch_size.
          t: (B,) timesteps, 0 (data) to 1000 (noise), integer or float.
          cond: {"context": (B, S, context_dim) the text's tokens, "pooled": (B, pooled_dim) the
            whole text's vector}.
          train: no matter, this model has no dropout (texts are dropped by the objective).
          rngs: no matter, as nothing is drawn.
          return_features: whether to return the features too.
          gates: (depth,) how far each block acts: block i adds gates[i] * (block(x) - x), to image
            and text. None: 1.

        Returns:
          (B, H, W, in_channels) float32; with features also a dict, in execution order (an
          OrderedDict: jit sorts others), from "transformer_blocks.<i>" to the image's (B, T, D)
          tokens after that block in the dtype of the computation.

        Raises:
          ValueError: wrong shapes, or no text.
        """
        self._check_inputs(x, t, cond, gates)
        h = self.embed(x)
        assert cond is not None, "as was checked"
        c = self.time_text_embed(t, cond["pooled"])
        context = self.context_embedder(cond["context"].astype(self.dtype))
        h, found = self._run_blocks(h, context, c, gates, return_features)
        outputs = OrderedDict((f"{self.config.STACK}.{i}", x) for i, x in enumerate(found))
        scale, shift = self.norm_out(c)
        patches = self.proj_out(_modulate(self._norm(h), shift, scale)).astype(jnp.float32)
        prediction = self._unpatchify(patches, x.shape)
        return (prediction, outputs) if return_features else prediction

    def _run_blocks(self, h, context, c, gates, return_features):
        """(the image's tokens after the last block, and after all blocks, if they are asked for).

        Blocks that are alike, one after another, are a loop where `scan_blocks` says so.
        """

        def run(block, tokens, gate):
            out = layers.remat(block, self.remat)(*tokens, c)
            if gate is None:
                return out
            gate = gate.astype(h.dtype)
            return tokens[0] + gate * (out[0] - tokens[0]), tokens[1] + gate * (out[1] - tokens[1])

        def gate_of(index):
            return None if gates is None else gates[index]

        def body(tokens, part):
            state, gate = part
            tokens = run(nnx.merge(graphdef, state), tokens, gate)
            return tokens, tokens[0] if return_features else None

        tokens, found = (h, context), []
        for alike in self._alike():
            blocks = [self.transformer_blocks[index] for index in alike]
            if len(alike) == 1:
                tokens = run(blocks[0], tokens, gate_of(alike[0]))
                found.append(tokens[0])
                continue
            graphdef, _ = nnx.split(blocks[0])
            states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            tokens, outputs = jax.lax.scan(body, tokens, (stacked, gate_of(np.asarray(alike))))
            found += [] if outputs is None else list(outputs)
        return tokens[0], found

    def _alike(self) -> list[list[int]]:
        """Numbers of blocks that are computed together."""
        kinds = [(block.last, block.dual) for block in self.transformer_blocks]
        found: list[list[int]] = []
        for index, kind in enumerate(kinds):
            if found and self.scan_blocks and kinds[index - 1] == kind:
                found[-1].append(index)
            else:
                found.append([index])
        return found

    def embed(self, x: jax.Array) -> jax.Array:
        """Latents (B, H, W, in_channels) as the (B, T, D) tokens that block 0 sees."""
        return self.pos_embed(x.astype(self.dtype))

    def _unpatchify(self, patches: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        size, channels = self.config.patch_size, self.config.out_channels
        _, height, width, _ = shape
        x = patches.reshape(-1, height // size, width // size, size, size, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)

    def _check_inputs(self, x, t, cond, gates):
        config, size = self.config, self.config.patch_size
        most = config.position_size * size
        if (
            x.ndim != 4
            or x.shape[3] != config.in_channels
            or any(n % size or not 0 < n <= most for n in x.shape[1:3])
        ):
            raise ValueError(
                f"x must have shape (B, H, W, {config.in_channels}), H and W multiples of {size} "
                f"up to {most}, not {x.shape}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape {x.shape[:1]}, one per sample, not {t.shape}")
        if not isinstance(cond, Mapping) or not {"context", "pooled"} <= cond.keys():
            raise ValueError(
                "cond must be {'context': the text's tokens, 'pooled': its vector}: this model is "
                "text-conditional"
            )
        context, pooled = cond["context"].shape, cond["pooled"].shape
        if len(context) != 3 or (context[0], context[2]) != (x.shape[0], config.context_dim):
            raise ValueError(
                f"cond['context'] must have shape ({x.shape[0]}, S, {config.context_dim}), not "
                f"{context}"
            )
        if pooled != (x.shape[0], config.pooled_dim):
            raise ValueError(
                f"cond['pooled'] must have shape ({x.shape[0]}, {config.pooled_dim}), not {pooled}"
            )
        if gates is not None and gates.shape != (config.depth,):
            raise ValueError(
                f"gates must have shape ({config.depth},), one per block, not {gates.shape}"
            )
