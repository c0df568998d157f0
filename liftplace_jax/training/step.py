"""The one train step, for teachers and for every distillation method."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from liftplace_jax.host import sharding
from liftplace_jax.nn import layers
from liftplace_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
FINITE = "finite"  # the metric that says whether all others are
LossFn = Callable[[dict[str, Any], Any, Any, jax.Array], tuple[jax.Array, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulation: int = 1,
    shardings: Any = None,
    precision: str = "default",
    stack: str | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """Compiles `step(state, frozen, batch) -> (state, metrics)`; the state is donated.

    Params are plain nested dicts: at each call an `nnx.State` costs milliseconds to take apart.
    Beside the loss, its terms and "grad_norm", the metrics have a bool FINITE: whether all of
    them are, so that a loop that only wants to know this fetches one scalar.

    Args:
      loss_fn: (params, frozen, batch, step) -> (loss, metrics), a pure function; `step` is what its
        randomness is folded from. `frozen` has the arrays that are not trained, by use.
      optimizer: optax transformation.
      ema_decay: in [0, 1); warmed up as min(decay, (1 + n) / (10 + n)) after n updates.
      accumulation: over how many parts of the batch gradients are averaged before the update. On
        accelerators the parts are a loop in the program, on CPUs copies one after another: there
        the weight gradient of a convolution is slow in a loop.
      shardings: of the state (a tree of shardings), None on one device. Devices split the batch,
        whatever splits the parameters: these are gathered, the images stay where they are.
      stack: name of the stack of blocks that networks are, as of `StackConfig.STACK`: a block's
        parameters are gathered where it starts. None: all are gathered before the step starts. In
        a loop of blocks (scan_blocks) no device ever holds more than one block whole; otherwise
        the compiler may gather ahead.
      precision: of matrix products and convolutions, as of `jax.default_matmul_precision`.

    Raises:
      ValueError: accumulation does not divide the batch (at the first call).
    """

    def gradients(params, frozen, batch, step):
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, frozen, batch, step
        )
        # Block by block, what is split is not added up whole.
        return grads if block is None else split(grads), {"loss": loss} | terms

    @jax.default_matmul_precision(precision)  # while it is traced: a property of the program
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        # Said here, or the compiler may send activations to where it finds a part of a kernel.
        params, frozen = whole(state.params), whole(frozen)
        with layers.gathering(block):
            if accumulation == 1:
                grads, metrics = gradients(params, frozen, batch, state.step)
            else:
                grads, metrics = _mean(gradients, accumulation, params, frozen, batch, state.step)
        grads = split(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params["student"], state.ema, 1.0 - decay)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics[FINITE] = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in metrics.values()]))
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    block = None
    if shardings is None:
        whole = split = _as_it_is
        return jax.jit(step, donate_argnums=0)
    replicated = NamedSharding(shardings.step.mesh, PartitionSpec())
    whole = functools.partial(_constrained, shardings=replicated)
    if stack is not None:
        block, whole = whole, functools.partial(_but_blocks, gather=whole, stack=stack)
    split = functools.partial(_constrained, shardings=shardings.params)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _as_it_is(tree):
    return tree


def _constrained(tree, shardings):
    return jax.lax.with_sharding_constraint(tree, shardings)


def _but_blocks(tree, gather, stack):
    """Gathers what belongs to no block of the networks in a tree of them by their use."""
    inside = re.compile(rf"(student|teacher)\.{re.escape(stack)}\.\d+\.")

    def place(path, leaf):
        return leaf if inside.match(sharding.parameter_name(path)) else gather(leaf)

    return jax.tree_util.tree_map_with_path(place, tree)


def _mean(gradients, parts, params, frozen, batch, step):
    """The mean of `gradients`' results over the parts of a batch, whose steps number the parts.

    So every part has its own randomness.
    """
    batches = _parts(batch, parts)
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(gradients, params, frozen, first, step)
    # What changes nothing that is added to it, not the sign of a zero either.
    start = jax.tree.map(lambda x: jnp.full(x.shape, -0.0, x.dtype), shapes)

    def add(total, part):
        number, batch = part
        new = gradients(params, frozen, batch, step * parts + number)
        return jax.tree.map(jnp.add, total, new), None

    def total(start, batches, unroll):
        return jax.lax.scan(add, start, (jnp.arange(parts), batches), unroll=unroll)[0]

    # By the platform that the program is lowered for.
    sums = jax.lax.platform_dependent(
        start,
        batches,
        cpu=functools.partial(total, unroll=parts),
        default=functools.partial(total, unroll=1),
    )
    return jax.tree.map(lambda x: x / parts, sums)


def _parts(batch, parts):
    """One more axis in front, of the parts; a part is every `parts`-th example from its first on,
    so devices keep their share of a sharded batch."""

    def cut(x):
        if x.shape[0] % parts:
            raise ValueError(f"accumulation {parts} does not divide the batch of {x.shape[0]}")
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)
