"""The variational bound: what trains a learned variance, from data or from a teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from liftplace_jax.diffusion.tables import take

if TYPE_CHECKING:
    from liftplace_jax.diffusion.gaussian import GaussianDiffusion

BIN = 1 / 255  # half the distance of two of the 256 grey levels in [-1, 1]


class Normal(NamedTuple):
    """A normal distribution of independent elements.

    Attributes:
      mean: (B, ..., C).
      log_variance: (B, ..., C), or (B, 1, ...), broadcastable to it.
    """

    mean: jax.Array
    log_variance: jax.Array


def interpolate_log_variance(values: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    """A network's values, -1 for the least and 1 for the most, as log variances.

    Nichol & Dhariwal (2021), equation 15; values beyond -1..1 extrapolate.
    """
    share = (values + 1) / 2
    return share * most + (1 - share) * least


def q_posterior(process: GaussianDiffusion, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> Normal:
    """q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 6).

    Args:
      process: the diffusion process.
      x0: (B, ..., C) data.
      x_t: (B, ..., C) noised data.
      t: (B,) integer timesteps.

    Returns:
      The distribution; at t = 0, where it has no variance, with that of t = 1.
    """
    steps = process.reverse
    mean = take(steps.of_x0, t, x_t) * x0 + take(steps.of_x, t, x_t) * x_t
    return Normal(mean, take(steps.log_range[0], t, x_t))


def p_mean_variance(
    process: GaussianDiffusion,
    prediction: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    clip: float | None = None,
) -> tuple[Normal, jax.Array]:
    """A network's p(x_{t-1} | x_t) with its learned variance.

    Args:
      process: with variance "learned_range".
      prediction: (B, ..., 2 C), the network's output at x_t and t.
      x_t: (B, ..., C) noised data.
      t: (B,) integer timesteps.
      clip: limits predicted data to [-clip, clip]; None does not.

    Returns:
      (the distribution, the data it predicts).

    Raises:
      ValueError: the process has no learned variance, or shapes do not fit.

    Source: "TinyFusion_EXP/diffusion/gaussian_diffusion.py".
    """
    predicted, values = _split(process, prediction)
    x0 = process.to_x0(predicted, x_t, t)
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
    least, most = (take(bound, t, x_t) for bound in process.reverse.log_range)
    mean = q_posterior(process, x0, x_t, t).mean
    return Normal(mean, interpolate_log_variance(values, least, most)), x0


def vb_loss(
    process: GaussianDiffusion,
    prediction: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """One term of the variational bound, as a loss of the learned variance alone.

    KL(q(x_{t-1} | x_t, x_0) || p), at t = 0 the negative log likelihood of the data, cut into 256
    bins over [-1, 1] (Nichol & Dhariwal 2021, section 3.1).

    Args:
      process: with variance "learned_range".
      prediction: (B, ..., 2 C); its first half, the mean, gets no gradient.
      x0: (B, ..., C) data.
      x_t: `process.add_noise` of it.
      t: (B,) integer timesteps.

    Returns:
      (B,) float32, bits per dimension.

    Raises:
      ValueError: as `p_mean_variance`.

    Source: "TinyFusion_EXP/diffusion/gaussian_diffusion.py", training_losses.
    """
    return _bound(process, q_posterior(process, x0, x_t, t), prediction, x0, x_t, t)


def vb_kd_loss(
    process: GaussianDiffusion,
    prediction: jax.Array,
    teacher: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """As `vb_loss`, with the teacher's p(x_{t-1} | x_t) in place of q's posterior.

    KL(teacher || student); at t = 0 it is the likelihood of the data, as in `vb_loss`.

    Args:
      process: with variance "learned_range".
      prediction: (B, ..., 2 C), the student's; its first half gets no gradient.
      teacher: (B, ..., 2 C), treated as a constant.
      x0: (B, ..., C) data.
      x_t: `process.add_noise` of it.
      t: (B,) integer timesteps.

    Returns:
      (B,) float32, bits per dimension.

    Raises:
      ValueError: as `p_mean_variance`.

    Source: "TinyFusion_EXP/diffusion/gaussian_diffusion.py", training_losses_kd_rep.
    """
    target, _ = p_mean_variance(process, jax.lax.stop_gradient(teacher), x_t, t)
    return _bound(process, target, prediction, x0, x_t, t)


def _split(process, prediction):
    if process.variance != "learned_range":
        raise ValueError("the process must have variance='learned_range'")
    mean, spread = process.split(prediction)
    assert spread is not None
    return mean, spread


def _bound(process, target, prediction, x0, x_t, t):
    mean, values = _split(process, prediction.astype(jnp.float32))
    frozen = jnp.concatenate([jax.lax.stop_gradient(mean), values], axis=-1)
    found, _ = p_mean_variance(process, frozen, x_t, t)
    axes = tuple(range(1, x0.ndim))
    divergence = jnp.mean(_kl(target, found), axis=axes)
    likelihood = jnp.mean(_log_likelihood(x0, found), axis=axes)
    return jnp.where(t == 0, -likelihood, divergence) / math.log(2)


def _kl(a: Normal, b: Normal) -> jax.Array:
    """KL(a || b) of each element, in nats."""
    difference = a.log_variance - b.log_variance
    return 0.5 * (
        jnp.exp(difference) - 1 - difference + (a.mean - b.mean) ** 2 * jnp.exp(-b.log_variance)
    )


def _log_likelihood(x: jax.Array, normal: Normal) -> jax.Array:
    """Log probability, in nats, of the grey level of each element; the outermost have no end."""
    scale = jnp.exp(-0.5 * normal.log_variance)
    below, above = (_cdf(scale * (x - normal.mean + side)) for side in (-BIN, BIN))
    below, above = jnp.where(x < -0.999, 0.0, below), jnp.where(x > 0.999, 1.0, above)
    return jnp.log(jnp.maximum(above - below, 1e-12))


def _cdf(x: jax.Array) -> jax.Array:
    """Of the standard normal distribution, by the published approximation."""
    return 0.5 * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@jax.custom_jvp
def _tanh(x):
    # To the last bit, as two tails differ by little else; XLA's own is not so exact.
    return jnp.sign(x) * (1 - 2 * jax.nn.sigmoid(-2 * jnp.abs(x)))


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    value = _tanh(*primals)
    return value, (1 - value**2) * tangents[0]
