"""Classifier-free guidance: a conditional network as one that a sampler can call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from liftplace_jax.diffusion.process import Predict


def guided(
    predict: Callable[[jax.Array, jax.Array, Any], jax.Array],
    condition: Any,
    null: Any,
    scale: float,
    channels: int | None = None,
) -> Predict:
    """unconditional + scale * (conditional - unconditional) (Ho & Salimans 2022, equation 6).

    Both come from one call on the doubled batch. What is not guided, a learned variance among it,
    is that of the conditional prediction.

    Args:
      predict: (x_t (B, ..., C), t (B,), condition) -> prediction, of C or 2 C channels.
      condition: a pytree of (B, ...) arrays.
      null: what says nothing, of shapes that broadcast to those of the condition; not used, and
        None is enough, where the scale is 1.
      scale: 1 is the conditional prediction alone, without doubling the batch.
      channels: how many of the C predicted channels are guided, from the first; None: all. The
        published DiT code ("TinyFusion_EXP/models.py", forward_with_cfg) guides 3 of 4.

    Returns:
      (x_t, t) -> prediction, as samplers take it.

    Raises:
      ValueError: nothing says nothing, or channels is out of range (when called).
    """
    if scale == 1:
        return lambda x, t: predict(x, t, condition)
    if null is None:
        raise ValueError(f"guidance {scale} needs a null condition")

    def guided_predict(x, t):
        count = x.shape[-1] if channels is None else channels
        if not 1 <= count <= x.shape[-1]:
            raise ValueError(f"guided channels must be in 1..{x.shape[-1]}, not {channels}")
        # Side by side, not one half after the other: a sharded batch stays on its devices.
        pairs = jax.tree.map(
            lambda a, b: jnp.stack([a, jnp.broadcast_to(b, a.shape)], 1).reshape(-1, *a.shape[1:]),
            condition,
            null,
        )
        prediction = predict(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), pairs)
        conditional, unconditional = prediction[::2], prediction[1::2]
        mean = unconditional + scale * (conditional - unconditional)
        return jnp.concatenate([mean[..., :count], conditional[..., count:]], axis=-1)

    return guided_predict
