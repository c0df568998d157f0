"""How far a student's outputs are from its teacher's, on held-out data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.evaluation.samples import check_batch, eval_inputs, replicated


@functools.partial(jax.jit, static_argnames="shape")
def _levels_and_noise(seed, indices, shape):
    """Level in [0, 1) and noise of each example; a quarter of them in each quarter of levels."""

    def one(index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        level = (index % 4 + jax.random.uniform(jax.random.fold_in(key, 0))) / 4
        # Rounding up must not reach the next quarter.
        level = jnp.minimum(level, jnp.nextafter((index % 4 + 1) / 4, 0.0))
        return level, jax.random.normal(jax.random.fold_in(key, 1), shape)

    return jax.vmap(one)(indices)


@functools.lru_cache(maxsize=8)
def _quarter_errors(sharding):
    """Jitted sums of the squared error per element in each quarter of levels, and counts."""
    return jax.jit(_sum_quarters, out_shardings=replicated(sharding))


def _sum_quarters(teacher, student, levels, mask):
    errors = jnp.square(teacher.astype(jnp.float32) - student.astype(jnp.float32))
    errors = jnp.where(mask, errors.reshape(len(errors), -1).mean(1), 0)
    members = (jnp.floor(levels * 4)[:, None] == jnp.arange(4)) & mask[:, None]
    return jnp.where(members, errors[:, None], 0).sum(0), members.sum(0)


def output_error(teacher, student, noising, source, *, batch_size, seed, limit=None, sharding=None):
    """Mean squared difference per element between two models' outputs on held-out data.

    Each example has its own fixed noise and noise level, decided by (seed, position): every model
    and every evaluation sees the same inputs.

    Args:
      teacher: (noisy, t, batch) -> prediction (B, ...); jitted by the caller.
      student: the same, of the same shape.
      noising: (images, levels, noise) -> (noisy, t), with `levels` (B,) in [0, 1) the fraction of
        the way from clean to noise, such as t = floor(levels * T) for T timesteps.
      source: a `liftplace_jax.data.Source` of held-out images.
      batch_size: global batch size.
      seed: int.
      limit: number of images, default all.
      sharding: optional `NamedSharding` of the batch axis; without one, every process reads all.

    Returns:
      {"output_error", "output_error_q1" (least noise) to "output_error_q4", "num_examples"};
      a quarter without examples (fewer than four) is NaN.

    Raises:
      ValueError: predictions of different shapes, or a non-finite error.
    """
    check_batch(batch_size, sharding)
    sums, counts = np.zeros(4), np.zeros(4)
    for batch in eval_inputs(source, batch_size, limit, sharding):
        levels, noise = _levels_and_noise(seed, batch["index"], source.image_shape)
        noisy, t = noising(batch["image"], levels, noise)
        outputs = [model(noisy, t, batch) for model in (teacher, student)]
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(
                f"teacher predicts {outputs[0].shape}, student {outputs[1].shape}; they must agree"
            )
        batch_sums, batch_counts = _quarter_errors(sharding)(*outputs, levels, batch["mask"])
        sums += np.asarray(batch_sums, np.float64)
        counts += np.asarray(batch_counts)
    if not np.isfinite(sums).all():
        raise ValueError("teacher or student predicted non-finite values")
    quarters = np.divide(sums, counts, out=np.full(4, np.nan), where=counts > 0)
    return {
        "output_error": float(sums.sum() / counts.sum()),
        **{f"output_error_q{i + 1}": float(value) for i, value in enumerate(quarters)},
        "num_examples": int(counts.sum()),
    }
