"""Depth pruning: which blocks of a stack stay, and the student made of them.

Of a model's config it asks for its stack alone: depth, kept_layers, STACK, always_kept, keep().
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Layered(Protocol):
    """What is asked of a model's config."""

    @property
    def depth(self) -> int: ...

    @property
    def kept_layers(self) -> Sequence[int] | None: ...

    @property
    def always_kept(self) -> Sequence[int]: ...

    @property
    def STACK(self) -> str: ...

    def keep(self, layers: tuple[int, ...]) -> Self: ...


Config = TypeVar("Config", bound=Layered)


def read_layers(text: str) -> tuple[int, ...]:
    """Block numbers written as "0,2,5", or "0+2+5" where a comma would end an argument.

    Raises:
      ValueError: it is no such list.
    """
    if not re.fullmatch(r"\d+([,+]\d+)*", text):
        raise ValueError(f'layers must be a choice or block numbers such as "0,2,5", got {text!r}')
    return tuple(int(number) for number in re.split("[,+]", text))


def check_depth(depth: int, teacher_depth: int) -> None:
    """Raises a ValueError unless 1 <= depth < teacher_depth."""
    if not 0 < depth < teacher_depth:
        raise ValueError(
            f"depth must be in 1..{teacher_depth - 1}, below the teacher's {teacher_depth} blocks, "
            f"got {depth}"
        )


def uniform_layers(depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The last block of each of `depth` equal shares: 1, 3, ..., 27 for 14 of 28.

    Raises:
      ValueError: depth is not below the teacher's.
    """
    check_depth(depth, teacher_depth)
    return tuple((i + 1) * teacher_depth // depth - 1 for i in range(depth))


def most_important(scores: np.ndarray, depth: int, always: Sequence[int] = ()) -> tuple[int, ...]:
    """The `depth` blocks of highest score, in order; of equal ones the later stay.

    Args:
      scores: one for each block.
      depth: how many stay.
      always: numbers of blocks that stay whatever their score.

    Raises:
      ValueError: depth is not below the number of scores.
    """
    check_depth(depth, len(scores))
    scores = np.array(scores, np.float64)
    scores[list(always)] = np.inf
    order = np.argsort(scores, kind="stable")
    return tuple(int(layer) for layer in np.sort(order[len(scores) - depth :]))


def pruned_depth_config(config: Config, kept: Sequence[int]) -> Config:
    """The student's architecture: the teacher's with the blocks `kept` alone.

    A student of a student keeps its record in the numbers of its own teacher.

    Raises:
      ValueError: kept is empty or not ascending numbers of the teacher's blocks, or keeps all of
        them; or the model's config does not allow it.
    """
    kept = tuple(kept)
    check_depth(len(kept), config.depth)
    if list(kept) != sorted(set(kept)) or not all(0 <= layer < config.depth for layer in kept):
        raise ValueError(
            f"layers must be different block numbers in 0..{config.depth - 1} in ascending order, "
            f"got {list(kept)}"
        )
    missing = sorted(set(config.always_kept) - set(kept))
    if missing:
        raise ValueError(
            f"layers must keep block {missing[0]}, without which this network cannot be, got "
            f"{list(kept)}"
        )
    return config.keep(kept)


def prune_depth(
    config: Config, tensors: Mapping[str, np.ndarray], kept: Sequence[int]
) -> tuple[Config, dict[str, np.ndarray]]:
    """Removes blocks.

    Args:
      config: the teacher's architecture.
      tensors: its weights under published names.
      kept: numbers of the blocks that stay, ascending.

    Returns:
      (the student's config, its weights under published names: the teacher's arrays themselves,
      blocks renumbered).

    Raises:
      ValueError: see `pruned_depth_config`.
    """
    student = pruned_depth_config(config, kept)
    new = {str(layer): number for number, layer in enumerate(kept)}
    result = {}
    for name, tensor in tensors.items():
        block = re.match(rf"{config.STACK}\.(\d+)\.", name)
        if not block:
            result[name] = tensor
        elif block[1] in new:
            result[f"{config.STACK}.{new[block[1]]}.{name[block.end() :]}"] = tensor
    return student, result


def block_influence(model: Any, x: jax.Array, t: jax.Array, cond: jax.Array, target=None):
    """1 - cosine similarity of each block's input and output tokens, averaged: (depth,) float32.

    Source: block influence of Men et al. 2024, "ShortGPT", equation 1. Arguments as of
    `drop_loss_change`; the target is not used.
    """
    del target
    _, features = model(x, t, cond, return_features=True)
    tokens = jnp.stack([model.embed(x), *features.values()]).astype(jnp.float32)
    lengths = jnp.linalg.norm(tokens, axis=-1)
    dots = jnp.sum(tokens[:-1] * tokens[1:], axis=-1)
    cosines = dots / jnp.maximum(lengths[:-1] * lengths[1:], 1e-12)
    return 1 - jnp.mean(cosines, axis=(1, 2))


def drop_loss_change(
    model: Any, x: jax.Array, t: jax.Array, cond: jax.Array, target: jax.Array
) -> jax.Array:
    """How much the diffusion loss grows when each block alone is skipped: (depth,) float32.

    Args:
      model: a stack of blocks.
      x: (B, H, W, C) noised data.
      t: (B,) timesteps.
      cond: (B,) labels.
      target: (B, H, W, C) what the mean half of the prediction should be.
    """
    depth = model.config.depth

    def loss(gates):
        mean = model(x, t, cond, gates=gates)[..., : target.shape[-1]]
        return jnp.mean(jnp.square(mean - target))

    # One after another: all at once would hold `depth` batches of activations.
    return jax.lax.map(loss, 1 - jnp.eye(depth)) - loss(jnp.ones(depth))


LAYER_IMPORTANCES: dict[str, Callable[..., jax.Array]] = {
    "similarity": block_influence,
    "loss": drop_loss_change,
}
"""Name -> (model, x, t, cond, target) -> a score for each block; those of low score are removed."""


def layer_scores(
    name: str,
    graphdef: nnx.GraphDef,
    params: dict[str, Any],
    batches: Iterator[tuple[jax.Array, ...]],
) -> np.ndarray:
    """An importance, averaged over batches.

    Args:
      name: of LAYER_IMPORTANCES.
      graphdef: of the model.
      params: its parameters.
      batches: at least one (x, t, cond, target), as of `drop_loss_change`, all of one shape.

    Returns:
      (depth,) float64.

    Raises:
      ValueError: no batches, or a score that is not finite.
    """
    scores = [np.asarray(_score(name, graphdef, params, *b), np.float64) for b in batches]
    if not scores:
        raise ValueError("layer_scores needs at least one batch")
    result = np.mean(scores, axis=0)
    if not np.isfinite(result).all():
        raise ValueError(f"importance {name!r} of the blocks is not finite: {result.tolist()}")
    return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(name, graphdef, params, *batch):
    return LAYER_IMPORTANCES[name](nnx.merge(graphdef, params), *batch)
