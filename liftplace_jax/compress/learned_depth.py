"""Learned depth pruning: which blocks of each group stay is trained, with the weights.

Source: Fang et al. 2025, "TinyFusion: Diffusion Transformers Learned Shallow"; settings of its
prune_by_learning.py. The trained parameters are {"gates": (G, C), "lora": {...}}:

- Blocks stand in G groups of M consecutive ones, of which N stay (N:M). A group's C = M over N
  masks have a categorical distribution, softmax(scale * gates), drawn by straight-through
  Gumbel-softmax, one draw a step.
- A low-rank update of each block's linear layers stands for the fine-tuning that will follow, so
  that what is learnt is how well a choice recovers. It is thrown away with the search. (The
  published script updates the embedders and the final layer too, and trains the gates at ten times
  the others' learning rate, which is part of the gates' scale here.)
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liftplace_jax.compress.depth import check_depth

_LINEAR = re.compile(r"(\w*blocks\.\d+\..+)\.kernel")
_BARRED = -1e9


class BlockGroups(NamedTuple):
    """How the blocks are grouped.

    Attributes:
      keep: N, blocks of a group that stay.
      size: M, blocks of a group.
      depth: of the model; blocks left over after the last whole group always stay.
      always: numbers of more blocks that always stay.
    """

    keep: int
    size: int
    depth: int
    always: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """G."""
        return self.depth // self.size

    @property
    def kept(self) -> int:
        """Blocks that stay, in all."""
        return self.count * self.keep + self.depth % self.size

    @property
    def masks(self) -> np.ndarray:
        """(C, M) float32 of 0 (leave out) and 1 (keep), in the order of itertools.combinations."""
        chosen = itertools.combinations(range(self.size), self.keep)
        return np.stack([np.isin(range(self.size), c) for c in chosen]).astype(np.float32)

    def logits(self, gates: Any, scale: float) -> Any:
        """(G, C) of the masks, from the trained gates; those without a block of `always` are out.

        Args:
          gates: (G, C), of JAX or NumPy.
          scale: of the gates.
        """
        stays = np.isin(range(self.count * self.size), self.always).reshape(self.count, 1, -1)
        return scale * gates + _BARRED * np.any(stays > self.masks, axis=-1)


MOST_MASKS = 10_000
"""A draw is over all masks of a group."""


def make_groups(keep: int, size: int, depth: int, always: tuple[int, ...] = ()) -> BlockGroups:
    """The groups of a model of `depth` blocks; arguments as of `BlockGroups`.

    Raises:
      ValueError: not 1 <= keep < size <= depth, or a group has more than MOST_MASKS masks.
    """
    if not 0 < keep < size <= depth:
        raise ValueError(
            f"learned: keep {keep} and group {size} must have 1 <= keep < group <= the teacher's "
            f"depth {depth}"
        )
    if math.comb(size, keep) > MOST_MASKS:
        raise ValueError(
            f"learned: there are {math.comb(size, keep)} ways to keep {keep} of {size} blocks, too "
            f"many to learn (at most {MOST_MASKS}): choose smaller groups or another depth"
        )
    return BlockGroups(keep, size, depth, always)


def smallest_groups(kept: int, depth: int, always: tuple[int, ...] = ()) -> BlockGroups:
    """The groups of fewest blocks that leave `kept` of `depth`: 1:2 for 14 of 28, 2:3 for 19.

    Raises:
      ValueError: kept is not in 1..depth - 1, or see `make_groups`.
    """
    check_depth(kept, depth)
    for size in range(2, depth):
        keep, rest = divmod(kept - depth % size, depth // size)
        if not rest and 0 < keep < size:
            return make_groups(keep, size, depth, always)
    return make_groups(kept, depth, depth, always)


def sample_gates(
    key: jax.Array, logits: jax.Array, groups: BlockGroups, temperature: jax.Array | float
) -> jax.Array:
    """One draw of the blocks that stay.

    Args:
      key: random key.
      logits: (G, C) of the masks.
      groups: of the blocks.
      temperature: above 0.

    Returns:
      (depth,) of exactly 0 and 1; the gradient is that of the Gumbel-softmax of this temperature.
    """
    noisy = (logits + jax.random.gumbel(key, logits.shape)) / temperature
    soft = jax.nn.softmax(noisy, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(noisy, axis=-1), soft.shape[-1])
    return expected_gates(hard + (soft - jax.lax.stop_gradient(soft)), groups)


def expected_gates(probabilities: jax.Array, groups: BlockGroups) -> jax.Array:
    """(depth,) probability that each block stays, from those of the masks, (G, C)."""
    gates = jnp.dot(probabilities, groups.masks, precision="highest").reshape(-1)
    return jnp.concatenate([gates, jnp.ones(groups.depth - gates.size)])


def most_probable(gates: np.ndarray, groups: BlockGroups) -> tuple[int, ...]:
    """Numbers of the blocks that stay under each group's most probable mask, ascending."""
    whole = groups.masks[np.argmax(groups.logits(gates, 1.0), axis=-1)].reshape(-1)
    return (*np.flatnonzero(whole).tolist(), *range(whole.size, groups.depth))


@functools.partial(jax.jit, static_argnums=(2, 3))
def init_search(
    key: jax.Array, params: dict[str, Any], groups: BlockGroups, rank: int
) -> dict[str, Any]:
    """The trained parameters at the start: all masks equally likely, and an update of zero.

    Args:
      key: random key.
      params: the model's.
      groups: of its blocks.
      rank: of the update of each linear layer in a block.

    Returns:
      {"gates": (G, C), "lora": {layer: {"a": (in, rank), "b": (rank, out)}}}, float32.
    """
    lora = {}
    for path, kernel in jax.tree_util.tree_flatten_with_path(params)[0]:
        if layer := _linear(path):
            wide, out = kernel.shape
            bound = 1 / math.sqrt(wide)
            a = jax.random.uniform(
                jax.random.fold_in(key, len(lora)), (wide, rank), minval=-bound, maxval=bound
            )
            lora[layer] = {"a": a, "b": jnp.zeros((rank, out))}
    return {"gates": jnp.zeros((groups.count, len(groups.masks))), "lora": lora}


def merge_lora(
    params: dict[str, Any], lora: Mapping[str, Mapping[str, jax.Array]], scale: float
) -> dict[str, Any]:
    """Parameters with W + scale * a @ b in place of each W that `lora` has."""

    def merged(path, leaf):
        layer = _linear(path)
        if layer is None or layer not in lora:
            return leaf
        return leaf + scale * (lora[layer]["a"] @ lora[layer]["b"])

    return jax.tree_util.tree_map_with_path(merged, params)


def _linear(path: tuple[Any, ...]) -> str | None:
    """The layer whose kernel a leaf is, if it is a linear one in a block."""
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    match = _LINEAR.fullmatch(name)
    return match and match[1]


def searched_apply(
    graphdef: nnx.GraphDef,
    base: dict[str, Any],
    groups: BlockGroups,
    *,
    lora_scale: float,
    gate_scale: float,
    temperature: jax.Array | float,
) -> Callable[..., tuple[jax.Array, dict]]:
    """A network under search, as of `network.make_apply`.

    Args:
      graphdef: of the network, a stack of blocks with gates.
      base: its parameters, which get no gradient.
      groups: of its blocks.
      lora_scale: of the update (alpha / rank).
      gate_scale: of the gates, for the masks' logits.
      temperature: of the draw.

    Returns:
      ({"gates", "lora"}, x, t, return_features, dropout key, cond) -> (prediction, {}). The draw
      of the masks is a function of the dropout key; features are not given.
    """
    base = jax.lax.stop_gradient(base)

    def apply(params, x, t, return_features, dropout_key, cond=None):
        del return_features
        drop, draw = jax.random.split(dropout_key)
        gates = sample_gates(draw, groups.logits(params["gates"], gate_scale), groups, temperature)
        model = nnx.merge(graphdef, merge_lora(base, params["lora"], lora_scale))
        return model(x, t, cond, train=True, rngs=drop, gates=gates), {}

    return apply


def annealed(start: float, end: float, step: jax.Array, total_steps: int) -> jax.Array:
    """From start at step 0 to end at the last step, linearly."""
    return start + (end - start) * step / max(total_steps - 1, 1)
