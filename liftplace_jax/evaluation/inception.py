"""InceptionV3 as FID needs it: the network of 2015-12-05, whose pooling differs from torchvision's.

Module names are those of the PyTorch port (pytorch_fid/inception.py, torch_fidelity), so that its
weights load by the one rule of `liftplace_jax.weights`. Source of the structure: the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

IMAGE_SIZE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, which sFID compares: 17 x 17 x 7 numbers
DIMS = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": CLASSES}


class Conv(NamedTuple):
    """Convolution, batch normalisation, ReLU; same padding unless it strides or is `valid`."""

    name: str
    width: int
    kernel: tuple[int, int]
    stride: int = 1
    valid: bool = False


def _convs(prefix: str, *layers: tuple) -> list[Conv]:
    return [Conv(prefix + name, *rest) for name, *rest in layers]


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
# A branch is a sequence of steps: a Conv, a pooling, or a list of Convs side by side.
Branch = Sequence[Conv | str | list[Conv]]


def _block_a(pool_width: int) -> list[Branch]:
    return [
        [Conv("branch1x1", 64, ONE)],
        _convs("branch5x5", ("_1", 48, ONE), ("_2", 64, FIVE)),
        _convs("branch3x3dbl", ("_1", 64, ONE), ("_2", 96, THREE), ("_3", 96, THREE)),
        ["average", Conv("branch_pool", pool_width, ONE)],
    ]


def _block_b() -> list[Branch]:
    return [
        [Conv("branch3x3", 384, THREE, 2)],
        _convs("branch3x3dbl", ("_1", 64, ONE), ("_2", 96, THREE), ("_3", 96, THREE, 2)),
        ["halve"],
    ]


def _block_c(width: int) -> list[Branch]:
    double = (("_1", width, ONE), ("_2", width, COLUMN), ("_3", width, ROW), ("_4", width, COLUMN))
    return [
        [Conv("branch1x1", 192, ONE)],
        _convs("branch7x7", ("_1", width, ONE), ("_2", width, ROW), ("_3", 192, COLUMN)),
        _convs("branch7x7dbl", *double, ("_5", 192, ROW)),
        ["average", Conv("branch_pool", 192, ONE)],
    ]


def _block_d() -> list[Branch]:
    long = (("_1", 192, ONE), ("_2", 192, ROW), ("_3", 192, COLUMN), ("_4", 192, THREE, 2))
    return [
        _convs("branch3x3", ("_1", 192, ONE), ("_2", 320, THREE, 2)),
        _convs("branch7x7x3", *long),
        ["halve"],
    ]


def _block_e(pooling: str) -> list[Branch]:
    def split(prefix):
        return _convs(prefix, ("a", 384, (1, 3)), ("b", 384, (3, 1)))

    return [
        [Conv("branch1x1", 320, ONE)],
        [Conv("branch3x3_1", 384, ONE), split("branch3x3_2")],
        [*_convs("branch3x3dbl", ("_1", 448, ONE), ("_2", 384, THREE)), split("branch3x3dbl_3")],
        [pooling, Conv("branch_pool", 192, ONE)],
    ]


STEM = (
    Conv("Conv2d_1a_3x3", 32, THREE, 2), Conv("Conv2d_2a_3x3", 32, THREE, valid=True),
    Conv("Conv2d_2b_3x3", 64, THREE), "halve", Conv("Conv2d_3b_1x1", 80, ONE),
    Conv("Conv2d_4a_3x3", 192, THREE, valid=True), "halve",
)  # fmt: skip
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    # The original network takes averages without the padding, and a maximum in the last block.
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


def _average(x):
    window = {"window_dimensions": (1, 3, 3, 1), "window_strides": (1, 1, 1, 1), "padding": "SAME"}
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, **window)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, **window)


POOLINGS = {
    "average": _average,
    "maximum": lambda x: nnx.max_pool(x, (3, 3), (1, 1), "SAME"),
    "halve": lambda x: nnx.max_pool(x, (3, 3), (2, 2), "VALID"),
}


class BatchNorm(nnx.Module):
    """Normalisation by stored statistics, eps 1e-3."""

    def __init__(self, width: int):
        zeros, ones = jnp.zeros(width), jnp.ones(width)
        self.scale, self.bias = nnx.Param(ones), nnx.Param(zeros)
        self.running_mean, self.running_var = nnx.Param(zeros), nnx.Param(ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        return x * factor + (self.bias[...] - self.running_mean[...] * factor)


class ConvUnit(nnx.Module):
    """What `Conv` describes."""

    def __init__(self, inputs: int, layer: Conv, rngs: nnx.Rngs):
        padding = "VALID" if layer.valid or layer.stride > 1 else "SAME"
        self.conv = nnx.Conv(
            inputs,
            layer.width,
            layer.kernel,
            strides=layer.stride,
            padding=padding,
            use_bias=False,
            rngs=rngs,
        )
        self.bn = BatchNorm(layer.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.bn(self.conv(x)))


class Mixed(nnx.Module):
    """Branches side by side, joined along channels."""

    def __init__(self, inputs: int, branches: list[Branch], rngs: nnx.Rngs):
        self.branches = nnx.static(_frozen(branches))
        self.width = 0
        for branch in branches:
            width = inputs
            for step in branch:
                if not isinstance(step, str):
                    for layer in _side_by_side(step):
                        setattr(self, layer.name, ConvUnit(width, layer, rngs))
                    width = sum(layer.width for layer in _side_by_side(step))
            self.width += width

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self._branch(x, branch) for branch in self.branches], axis=-1)

    def _branch(self, x, branch):
        for step in branch:
            if isinstance(step, str):
                x = POOLINGS[step](x)
            else:
                layers = _side_by_side(step)
                x = jnp.concatenate([getattr(self, layer.name)(x) for layer in layers], axis=-1)
        return x


def _side_by_side(step) -> tuple[Conv, ...]:
    return (step,) if isinstance(step, Conv) else tuple(step)


def _frozen(branches) -> tuple:
    return tuple(
        tuple(tuple(step) if isinstance(step, list) else step for step in branch)
        for branch in branches
    )


class Inception(nnx.Module):
    """The network; zero-cost to describe, 24 million parameters to hold.

    Args:
      rngs: for the weights, which only a file makes meaningful.
    """

    def __init__(self, rngs: nnx.Rngs):
        width = 3
        for step in STEM:
            if not isinstance(step, str):
                setattr(self, step.name, ConvUnit(width, step, rngs))
                width = step.width
        for name, branches in BLOCKS.items():
            block = Mixed(width, branches, rngs)
            setattr(self, name, block)
            width = block.width
        self.fc = nnx.Linear(width, CLASSES, rngs=rngs)

    def blocks(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """Yields (name, output) of every step, in order.

        Args:
          x: (B, 299, 299, 3) in [-1, 1].
        """
        for index, step in enumerate(STEM):
            name = f"pool_{index}" if isinstance(step, str) else step.name
            x = POOLINGS[step](x) if isinstance(step, str) else getattr(self, name)(x)
            yield name, x
        for name in BLOCKS:
            if name == "Mixed_6d":
                yield "spatial", getattr(self, name).branch1x1(x)[..., :SPATIAL_CHANNELS]
            x = getattr(self, name)(x)
            yield name, x

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Features of images.

        Args:
          x: (B, 299, 299, 3) in [-1, 1].

        Returns:
          "pool" (B, 2048) for FID, KID, precision and recall; "spatial" (B, 2023) for sFID, in the
          order (height, width, channel) of the ADM evaluator; "logits" (B, 1008) without bias, as
          the Inception Score takes them.
        """
        if x.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"Inception takes (B, 299, 299, 3), got {x.shape}: resize first")
        for name, output in self.blocks(x):
            if name == "spatial":
                spatial = output.reshape(len(output), -1)
        pool = jnp.mean(output, axis=(1, 2))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.kernel[...]}
