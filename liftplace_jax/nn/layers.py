"""Layers shared by the models: PyTorch's defaults, on top of Flax NNX."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

_ZEROS: dict[str, Any] = {
    "kernel_init": nnx.initializers.zeros_init(),
    "bias_init": nnx.initializers.zeros_init(),
}


def linear(
    in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: Dtype, use_bias: bool = True
) -> nnx.Linear:
    """A dense layer, zero until `reset_parameters`; float32 parameters."""
    return nnx.Linear(
        in_features, out_features, use_bias=use_bias, dtype=dtype, rngs=rngs, **_ZEROS
    )


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


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm` whose statistics are sums over the pixels of each channel first.

    The same numbers but for rounding: mean, then centred squares, in float32. The pixels of a
    channel are summed as columns of a matrix, which CPUs do 4 to 5 times as fast as XLA's sums over
    pixels and channels of a group; what is left is one number a channel.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, ..., C) -> the same, in dtype."""
        groups, shape = self.num_groups, (x.shape[0], *(x.ndim - 2) * (1,), x.shape[-1])
        pixels = tuple(range(1, x.ndim - 1))
        count = math.prod(x.shape[1:]) // groups

        def mean_of_group(x):
            each = jnp.sum(x, axis=pixels).reshape(len(x), groups, -1)
            means = jnp.sum(each, axis=-1, keepdims=True) / count
            return jnp.broadcast_to(means, each.shape).reshape(shape)

        h = x.astype(jnp.float32)
        h = h - mean_of_group(h)
        assert self.scale is not None and self.bias is not None, "`group_norm` has both"
        scale, bias = (p[...].astype(self.dtype) for p in (self.scale, self.bias))
        factor = jax.lax.rsqrt(mean_of_group(jnp.square(h)) + self.epsilon) * scale
        return (h * factor + bias).astype(self.dtype)


def group_norm(
    features: int, groups: int, *, rngs: nnx.Rngs, dtype: Dtype, epsilon: float = 1e-6
) -> nnx.GroupNorm:
    """Affine group normalisation; statistics and parameters in float32."""
    return GroupNorm(
        features, groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


def layer_norm(
    features: int, *, rngs: nnx.Rngs, dtype: Dtype, epsilon: float = 1e-6, affine: bool = False
) -> nnx.LayerNorm:
    """Layer normalisation, with parameters if it is affine; statistics in float32."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        use_bias=affine,
        use_scale=affine,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def embedding(rows: int, features: int, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Embed:
    """A table of vectors, zero until it is drawn; float32 parameters."""
    zeros = nnx.initializers.zeros_init()
    return nnx.Embed(rows, features, dtype=dtype, embedding_init=zeros, rngs=rngs)


class Sequential(nnx.List):
    """Modules and functions, one after another; its modules are named by their place."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self:
            x = layer(x)
        return x


def reset_parameters(model: nnx.Module, key: jax.Array) -> None:
    """Gives every convolution and dense layer PyTorch's default initialisation, in place.

    Weights and biases are uniform within +-1/sqrt(fan_in) (Kaiming with a = sqrt(5)).
    """
    variables, bounds = [], []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv | nnx.Linear):
            found = [module.kernel, module.bias] if module.use_bias else [module.kernel]
            variables += found
            bounds += len(found) * [1 / math.sqrt(math.prod(module.kernel.shape[:-1]))]
    draw(key, variables, bounds)


def draw(
    key: jax.Array,
    variables: Sequence[nnx.Variable],
    scales: Sequence[float],
    distribution: str = "uniform",
) -> None:
    """Fills variables with random numbers, in place.

    All come from one draw: a draw for each of a U-Net's layers takes half a minute to compile.

    Args:
      key: a random key.
      variables: what to fill.
      scales: for each, the bound of its uniform or the deviation of its normal numbers.
      distribution: "uniform" or "normal".
    """
    shapes = tuple(variable.shape for variable in variables)
    for variable, value in zip(
        variables, _draw(key, shapes, tuple(scales), distribution), strict=True
    ):
        variable.set_value(value)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key, shapes, scales, distribution):
    sizes = [math.prod(shape) for shape in shapes]
    if distribution == "uniform":
        flat = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    else:
        flat = jax.random.normal(key, (sum(sizes),))
    parts = jnp.split(flat, np.cumsum(sizes)[:-1])
    return [b * p.reshape(s) for b, p, s in zip(scales, parts, shapes, strict=True)]


def xavier_bound(kernel: nnx.Variable) -> float:
    """Glorot's bound for the uniform weights of a kernel; a convolution's counts all its pixels."""
    fan_in = math.prod(kernel.shape[:-1])
    return math.sqrt(6 / (fan_in + kernel.shape[-1]))


def sinusoidal_embedding(
    t: jax.Array, dim: int, *, frequency_shift: int = 1, cosines_first: bool = False
) -> jax.Array:
    """Embeds timesteps in sines, then cosines (Ho et al. 2020, as in Fairseq's transformer).

    Args:
      t: (B,) timesteps, integer or float.
      dim: size of the embedding, at least 4; an odd one ends in a zero.
      frequency_shift: 1 as in DDPM, 0 as in DiT.
      cosines_first: cosines, then sines, as in DiT.

    Returns:
      (B, dim) float32: sin and cos of t * 10000 ** (-i / (dim // 2 - frequency_shift)).
    """
    half = dim // 2
    # NumPy's float32, so that the frequencies are constants: at t = 1000 their last bit is visible.
    step = np.float32(-math.log(10000) / (half - frequency_shift))
    angles = t.astype(jnp.float32)[:, None] * np.exp(np.arange(half, dtype=np.float32) * step)
    waves = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(waves[::-1] if cosines_first else waves, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def position_embedding(width: int, side: int, step: float = 1.0, xp: Any = np) -> Any:
    """Sines and cosines of the columns, then of the rows of a square grid of tokens.

    Source: "TinyFusion_EXP/models.py" get_2d_sincos_pos_embed.

    Args:
      width: of a token, a multiple of 4.
      side: tokens along a side.
      step: between neighbours.
      xp: `numpy`, in float64 until the end; or `jax.numpy`, which a traced program makes itself,
        where a large table would be a constant of it.

    Returns:
      (1, side * side, width) float32, rows first.
    """
    quarter = width // 4
    angles = step * xp.arange(side)[:, None] * 10000.0 ** (-xp.arange(quarter) / quarter)
    waves = xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=1)  # (side, width / 2)
    columns, rows = xp.tile(waves, (side, 1)), xp.repeat(waves, side, axis=0)
    return xp.concatenate([columns, rows], axis=1).astype(np.float32)[None]


REMAT_POLICIES = (
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)
"""Names of `jax.checkpoint_policies` that need no arguments."""


def check_remat(policy: str | None) -> None:
    """Raises a ValueError if there is no such policy."""
    if policy is not None and policy not in REMAT_POLICIES:
        raise ValueError(f"remat must be None or one of {list(REMAT_POLICIES)}, not {policy!r}")


_GATHER: contextvars.ContextVar[Callable[[Any], Any] | None] = contextvars.ContextVar(
    "gather", default=None
)
# Of a block that keeps its intermediate values these are computed again nonetheless: gathered
# parameters, and what is no more than a copy of them.
_COPIES = (
    "sharding_constraint", "convert_element_type", "transpose", "reshape", "broadcast_in_dim",
    "squeeze",
)  # fmt: skip


@contextlib.contextmanager
def gathering(gather: Callable[[Any], Any] | None) -> Iterator[None]:
    """Programs that are traced meanwhile gather parameters that devices share block by block.

    Each block that is called through `remat` gathers its own where it starts, in the forward pass
    and again for the gradient, so that no device holds all of them whole.

    Args:
      gather: a tree of a block's parameters -> the same, whole on every device; None: as always.
    """
    token = _GATHER.set(gather)
    try:
        yield
    finally:
        _GATHER.reset(token)


def remat(module: Any, policy: str | None) -> Callable[..., jax.Array]:
    """A module as a function whose intermediate values are recomputed for the gradient.

    Args:
      module: called with arrays alone (or None).
      policy: one of REMAT_POLICIES, what to keep nonetheless; None: the module as it is, but for
        parameters within `gathering`, which are gathered again.
    """
    gather = _GATHER.get()
    if policy is None and gather is None:
        return module
    graphdef, state = nnx.split(module)

    def call(state, *args):
        return nnx.merge(graphdef, gather(state) if gather else state)(*args)

    keeps = _keep_all_but_copies if policy is None else getattr(jax.checkpoint_policies, policy)
    return functools.partial(jax.checkpoint(call, policy=keeps), state)


def whole(module: Any) -> Any:
    """A module whose parameters are on every device, for what is computed outside of `remat`."""
    gather = _GATHER.get()
    if gather is None:
        return module
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, gather(state))


def _keep_all_but_copies(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _COPIES


def check_images(x: jax.Array, t: jax.Array, config: Any) -> None:
    """Raises a ValueError if images or timesteps are not what a model of this config takes."""
    expected = (config.image_size, config.image_size, config.in_channels)
    if x.ndim != 4 or x.shape[1:] != expected:
        raise ValueError(f"x must have shape (B, {str(expected)[1:]}, not {x.shape}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape {x.shape[:1]}, one per sample, not {t.shape}")


def nest(modules: Mapping[str, nnx.Module]) -> Any:
    """Nests modules by their dotted names; children numbered from 0 become a list."""
    children: dict[str, dict[str, nnx.Module]] = {}
    for name, module in modules.items():
        head, _, rest = name.partition(".")
        children.setdefault(head, {})[rest] = module
    nested = {head: sub[""] if "" in sub else nest(sub) for head, sub in children.items()}
    if all(head.isdigit() for head in nested):
        return nnx.List([nested[str(index)] for index in range(len(nested))])
    return nnx.Dict(nested)


def find(module: nnx.Module, name: str) -> Any:
    """The submodule of a dotted name, such as "down.0.block.1"."""

    def child(parent, key):
        return parent[int(key)] if key.isdigit() else getattr(parent, key)

    return functools.reduce(child, name.split("."), module)
