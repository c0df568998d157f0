"""Parameters and multiply-accumulates of a model, from its config alone, as its paper counts them.

U-Nets are counted as in the published pixel-space tables (Diff_Pruning_EXP/torch_pruning/utils/
op_counter.py): convolutions and linears with their biases, two for each normalised element;
neither attention's products nor activations, sums and resampling without weights. So every
parameter is used once for each pixel of its layer's output.

DiTs are counted as by fvcore, which made the published latent-space table: convolutions and
linears without biases, attention's products, four for each normalised element, and one for every
two elements that leave the patches; neither activations nor sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from liftplace_jax.families.dit.model import FREQUENCIES
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.unet.config import UNetConfig


@functools.singledispatch
def count_macs(config: Any) -> int:
    """MACs of one forward pass of a model on one image.

    Raises:
      ValueError: how models of this type are counted is not known.
    """
    raise ValueError(f"how to count a model of {type(config).__name__} is not known")


@functools.singledispatch
def config_parameters(config: Any) -> int:
    """Parameters of a model, without building it; those that are never trained count too.

    Raises:
      ValueError: how models of this type are counted is not known.
    """
    raise ValueError(f"how to count a model of {type(config).__name__} is not known")


@count_macs.register
def _unet_macs(config: UNetConfig) -> int:
    return sum(pixels * parameters for pixels, parameters in _unet_layers(config))


@config_parameters.register
def _unet_parameters(config: UNetConfig) -> int:
    return sum(parameters for _, parameters in _unet_layers(config))


@count_macs.register
def _dit_macs(config: DiTConfig) -> int:
    elements = config.num_tokens * config.hidden_size
    linears = sum(uses * inputs * outputs for uses, inputs, outputs in _dit_layers(config))
    products = 2 * config.depth * elements * config.num_tokens
    norms = 4 * elements * (2 * config.depth + 1)
    return linears + products + norms + config.image_size**2 * config.out_channels // 2


@config_parameters.register
def _dit_parameters(config: DiTConfig) -> int:
    tables = config.depth if config.embedders == "per_block" else 1
    rows = tables * config.num_labels + config.num_tokens
    linears = sum(_dense(inputs, outputs) for _, inputs, outputs in _dit_layers(config))
    return linears + rows * config.hidden_size


def _dit_layers(config: DiTConfig) -> Iterator[tuple[int, int, int]]:
    """(uses, inputs, outputs) of every linear layer, and of the convolution that makes tokens."""
    width, tokens, pixels = config.hidden_size, config.num_tokens, config.patch_size**2
    yield tokens, pixels * config.in_channels, width
    for _ in range(config.depth if config.embedders == "per_block" else 1):
        yield 1, FREQUENCIES, width
        yield 1, width, width
    for _ in range(config.depth):
        yield 1, width, 6 * width
        yield tokens, width, 3 * width
        yield tokens, width, width
        yield tokens, width, config.mlp_width
        yield tokens, config.mlp_width, width
    yield 1, width, 2 * width
    yield tokens, width, pixels * config.out_channels


def _unet_layers(config: UNetConfig) -> Iterator[tuple[int, int]]:
    """(output pixels, parameters) of every layer with weights."""
    widths = dict(config.widths)
    temb = widths["temb.dense.1"]
    yield 1, _dense(config.ch, widths["temb.dense.0"])
    yield 1, _dense(widths["temb.dense.0"], temb)
    for node in config.block_plan():
        pixels = node.resolution**2
        into, hidden, out = node.in_width, node.hidden_width, node.out_width
        if node.kind == "block":
            yield 1, _dense(temb, hidden)
            yield pixels, _norm(into) + _conv(3, into, hidden)
            yield pixels, _norm(hidden) + _conv(3, hidden, out)
            yield pixels, _conv(1, into, out) if node.shortcut else 0
        elif node.kind == "attention":
            yield pixels, _norm(into) + 3 * _conv(1, into, hidden) + _conv(1, hidden, out)
        elif node.kind == "conv_in" or config.resamp_with_conv:
            yield pixels, _conv(3, into, out)
    yield config.image_size**2, _norm(out) + _conv(3, out, config.out_channels)


def _conv(kernel: int, inputs: int, outputs: int) -> int:
    return outputs * (kernel * kernel * inputs + 1)


def _dense(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


def _norm(channels: int) -> int:
    return 2 * channels
