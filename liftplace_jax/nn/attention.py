"""Attention of all networks: the fastest implementation that the platform, dtype and widths allow.

The choice is made where a program is lowered, from the platform it is lowered for: a program traced
on a machine with GPUs and lowered for CPUs has XLA's path. All of them have the softmax in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, every head for itself.

    On CUDA cuDNN's kernel, which never writes the scores to memory, where `cudnn_takes` says so.
    Everywhere else XLA's path, which writes them: also on TPUs, whose kernel (Pallas) JAX does not
    split over several devices by itself.

    Args:
      q: (B, T, N, H), queries: T tokens, N heads of width H.
      k: (B, S, N, H), keys.
      v: (B, S, N, H), values.
      causal: whether a query sees the keys up to its own place alone.

    Returns:
      (B, T, N, H), of q's dtype.
    """
    xla = functools.partial(_xla, is_causal=causal)
    if not cudnn_takes(q, k, v, causal=causal):
        return xla(q, k, v)
    cudnn = functools.partial(_cudnn, is_causal=causal)
    return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=xla)


def cudnn_takes(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> bool:
    """Whether cuDNN is here, on GPUs that its kernel runs on, and takes the arrays.

    These are of 16 bits, with heads of a width that is a multiple of 8 and at most 128: wider
    ones are taken by some GPUs only.
    """
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > 128:
        return False
    if jax.default_backend() == "gpu" and not _since_ampere():
        return False
    try:
        # Traced even where the program is for CPUs.
        jax.eval_shape(functools.partial(_cudnn, is_causal=causal), q, k, v)
    except (RuntimeError, NotImplementedError):  # a JAX without CUDA, or an old cuDNN
        return False
    return True


def _since_ampere() -> bool:
    # ROCm's devices say "gfx90a": no cuDNN there.
    found = [getattr(d, "compute_capability", "") for d in jax.local_devices(backend="gpu")]
    return all(c.replace(".", "", 1).isdigit() and float(c) >= 8 for c in found)
