"""A training run about to start, from its config: step and arrays, placed on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from liftplace_jax.host import sharding
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.state import TrainState, create_state
from liftplace_jax.training.step import LossFn, Metrics, make_train_step


class Training(NamedTuple):
    """See `prepare`.

    Attributes:
      step: (state, frozen, batch) -> (state, metrics), jitted; it donates the state.
      state: before the first step.
      frozen: on the mesh.
      shardings: of the state.
      schedule: step -> learning rate.
    """

    step: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
    state: TrainState
    frozen: dict[str, Any]
    shardings: TrainState
    schedule: optax.Schedule


def prepare(
    fields: ConfigDict,
    objective: LossFn,
    params: dict[str, Any],
    frozen: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
    untrained: Collection[str] = (),
    stack: str | None = None,
) -> Training:
    """Places a run on a mesh.

    Args:
      fields: config.teacher or config.distill.
      objective: as of `make_objective`.
      params: what is trained, as of `TrainState.params`; given up: the state takes their memory.
      frozen: arrays that are not trained, by use: "teacher", "text". The rules see the names
        without the use, as a network has them.
      mesh: of `sharding.make_mesh`.
      rules: config.sharding_rules.
      untrained: as of `make_optimizer`, its `frozen`.
      stack: as of `make_train_step`.
    """
    optimizer, schedule = make_optimizer(fields.optimizer, fields.steps, untrained)
    abstract = jax.eval_shape(functools.partial(create_state, optimizer=optimizer), params)
    shardings = sharding.tree_shardings(abstract, rules, mesh)
    # Straight into its sharding: no device ever holds all of a state that does not fit on one.
    make = functools.partial(create_state, optimizer=optimizer)
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(
        sharding.place(params, shardings.params)
    )
    for leaf in jax.tree.leaves(params):  # what was placed elsewhere: one copy is enough
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
    frozen = {
        use: sharding.place(tree, sharding.tree_shardings(tree, rules, mesh))
        for use, tree in frozen.items()
    }
    step = make_train_step(
        objective,
        optimizer,
        ema_decay=fields.ema_decay,
        accumulation=fields.accumulation,
        shardings=shardings,
        precision=fields.precision,
        stack=stack,
    )
    return Training(step, state, frozen, shardings, schedule)
