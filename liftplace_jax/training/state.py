"""What a training run carries from step to step, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# In this order for good: a stream's place is part of its randomness.
STREAMS = ("timestep", "noise", "dropout", "label", "latent")


class TrainState(NamedTuple):
    """All of it is checkpointed; randomness needs no place here (see `random_key`).

    Attributes:
      step: int32, number of optimizer updates done.
      params: what is trained: {"student": network, ...}, with "adapters" (feature distillation)
        and "weight_logit" (learnable fine weight) where the method has them.
      ema: moving average of params["student"].
      opt_state: optax's.
    """

    step: jax.Array
    params: dict[str, Any]
    ema: Any
    opt_state: Any


def create_state(params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # Copies: the state is donated, and buffers shared with the caller or between params and ema
    # could not be.
    params = jax.tree.map(jnp.array, params)
    ema = jax.tree.map(jnp.array, params["student"])
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def random_key(seed: int, stream: str, step: jax.Array | int) -> jax.Array:
    """The key of a named stream at a step: a pure function, so nothing random is stored."""
    key = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    return jax.random.fold_in(key, step)
