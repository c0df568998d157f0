"""Layers shared by the models: PyTorch's defaults, on top of Flax NNX."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

_ZEROS = {
    "kernel_init": nnx.initializers.zeros_init(),
    "bias_init": nnx.initializers.zeros_init(),
}


def linear(in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Linear:
    """A dense layer, zero until `reset_parameters`; float32 parameters."""
    return nnx.Linear(in_features, out_features, dtype=dtype, rngs=rngs, **_ZEROS)


def conv(
    in_features: int,
    out_features: int,
    size: int,
    *,
    rngs: nnx.Rngs,
    dtype: Dtype,
    strides: int = 1,
    padding: tuple[int, int] | None = None,
) -> nnx.Conv:
    """A size x size NHWC convolution, zero until `reset_parameters`; float32 parameters.

    Args:
      in_features: input channels.
      out_features: output channels.
      size: kernel height and width.
      rngs: as NNX wants it; draws nothing.
      dtype: dtype of the computation.
      strides: step along both axes.
      padding: zeros (before, after) along both axes; None keeps height and width at stride 1.
    """
    before_after = padding or (size // 2, size // 2)
    return nnx.Conv(
        in_features,
        out_features,
        (size, size),
        strides=strides,
        padding=(before_after, before_after),
        dtype=dtype,
        rngs=rngs,
        **_ZEROS,
    )


def group_norm(features: int, groups: int, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.GroupNorm:
    """Affine group normalisation, eps 1e-6; statistics and parameters in float32."""
    return nnx.GroupNorm(
        features, groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


def reset_parameters(model: nnx.Module, key: jax.Array) -> None:
    """Gives every convolution and dense layer PyTorch's default initialisation, in place.

    Weights and biases are uniform within +-1/sqrt(fan_in) (Kaiming with a = sqrt(5)). All come
    from one draw: a draw for each of a U-Net's layers takes half a minute to compile.
    """
    variables, bounds = [], []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv | nnx.Linear):
            variables += [module.kernel, module.bias]
            bounds += 2 * [1 / math.sqrt(math.prod(module.kernel.shape[:-1]))]
    values = _uniform(key, tuple(variable.shape for variable in variables), tuple(bounds))
    for variable, value in zip(variables, values, strict=True):
        variable.set_value(value)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(key, shapes, bounds):
    sizes = [math.prod(shape) for shape in shapes]
    flat = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    parts = jnp.split(flat, np.cumsum(sizes)[:-1])
    return [b * p.reshape(s) for b, p, s in zip(bounds, parts, shapes, strict=True)]


def sinusoidal_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Embeds timesteps in sines, then cosines (Ho et al. 2020, as in Fairseq's transformer).

    Args:
      t: (B,) timesteps, integer or float.
      dim: size of the embedding, at least 4; an odd one ends in a zero.

    Returns:
      (B, dim) float32: sin and cos of t * 10000 ** (-i / (dim // 2 - 1)).
    """
    half = dim // 2
    # NumPy's float32, so that the frequencies are constants: at t = 1000 their last bit is visible.
    step = np.float32(-math.log(10000) / (half - 1))
    angles = t.astype(jnp.float32)[:, None] * np.exp(np.arange(half, dtype=np.float32) * step)
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def nest(modules: Mapping[str, nnx.Module]) -> nnx.Dict | nnx.List:
    """Nests modules by their dotted names; children numbered from 0 become a list."""
    children: dict[str, dict[str, nnx.Module]] = {}
    for name, module in modules.items():
        head, _, rest = name.partition(".")
        children.setdefault(head, {})[rest] = module
    nested = {head: sub[""] if "" in sub else nest(sub) for head, sub in children.items()}
    if all(head.isdigit() for head in nested):
        return nnx.List([nested[str(index)] for index in range(len(nested))])
    return nnx.Dict(nested)


def find(module: nnx.Module, name: str) -> nnx.Module:
    """The submodule of a dotted name, such as "down.0.block.1"."""

    def child(parent, key):
        return parent[int(key)] if key.isdigit() else getattr(parent, key)

    return functools.reduce(child, name.split("."), module)
