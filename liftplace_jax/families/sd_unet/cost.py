"""Parameters and multiply-accumulates of a Stable Diffusion U-Net, from its config alone.

Counted as by thop, which made the published table: convolutions and linears without biases, and
four for each element of a layer normalisation; neither attention's products nor group
normalisations, activations and sums. Of one latent and 77 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from liftplace_jax.families.sd_unet.config import Block, SDUNetConfig
from liftplace_jax.nn import counting

TOKENS = 77
"""Of a caption."""


class _Layer(NamedTuple):
    """A layer with weights.

    Attributes:
      uses: pixels or tokens that it acts on.
      products: multiplications on each.
      parameters: of it.
    """

    uses: int
    products: int
    parameters: int


def macs(config: SDUNetConfig) -> int:
    """MACs of one forward pass on one latent."""
    return sum(layer.uses * layer.products for layer in _layers(config))


def parameters(config: SDUNetConfig) -> int:
    """Parameters."""
    return sum(layer.parameters for layer in _layers(config))


def _conv(size: int, inputs: int, outputs: int, pixels: int) -> _Layer:
    return _Layer(pixels, size * size * inputs * outputs, counting.conv(size, inputs, outputs))


def _linear(inputs: int, outputs: int, tokens: int, bias: bool = True) -> _Layer:
    return _Layer(tokens, inputs * outputs, inputs * outputs + bias * outputs)


def _group_norm(width: int) -> _Layer:
    return _Layer(0, 0, counting.norm(width))


def _layers(config: SDUNetConfig) -> Iterator[_Layer]:
    first, time, pixels = config.widths[0], config.time_width, config.image_size**2
    yield _conv(3, config.in_channels, first, pixels)
    yield _linear(first, time, 1)
    yield _linear(time, time, 1)
    for block in config.blocks():
        for into, skip in block.inputs:
            yield from _resnet(into + skip, block.width, time, block.resolution**2)
        for _ in range(block.attentions):
            yield from _transformer(block, config.context_dim)
        if block.resample:
            side = block.resolution * 2 if block.resample == "upsamplers" else block.resolution // 2
            yield _conv(3, block.width, block.width, side**2)
    yield _group_norm(first)
    yield _conv(3, first, config.out_channels, pixels)


def _resnet(into: int, out: int, time: int, pixels: int) -> Iterator[_Layer]:
    yield _group_norm(into)
    yield _conv(3, into, out, pixels)
    yield _linear(time, out, 1)
    yield _group_norm(out)
    yield _conv(3, out, out, pixels)
    if into != out:
        yield _conv(1, into, out, pixels)


def _transformer(block: Block, context_dim: int) -> Iterator[_Layer]:
    width, tokens = block.width, block.resolution**2
    yield _group_norm(width)
    for _ in range(2):  # linear or a 1x1 convolution: the same numbers
        yield _linear(width, width, tokens)
    for context, length in ((width, tokens), (context_dim, TOKENS)):
        yield _linear(width, width, tokens, bias=False)
        for _ in range(2):
            yield _linear(context, width, length, bias=False)
        yield _linear(width, width, tokens)
    for _ in range(3):
        yield _Layer(tokens, 4 * width, counting.norm(width))
    yield _linear(width, 8 * width, tokens)
    yield _linear(4 * width, width, tokens)
