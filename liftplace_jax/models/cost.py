"""Multiply-accumulates of a model, counted as in the published pixel-space tables."""

from __future__ import annotations

from liftplace_jax.models.unet_config import UNetConfig


def count_macs(config: UNetConfig) -> int:
    """MACs of one forward pass of a `UNet` on one image.

    Counted as the published tables are (Diff_Pruning_EXP/torch_pruning/utils/op_counter.py):
    convolutions and linears with their biases, two for each normalised element; neither attention's
    products nor activations, sums and resampling without weights.
    """
    widths = dict(config.widths)
    temb = widths["temb.dense.1"]
    total = linear(config.ch, widths["temb.dense.0"]) + linear(widths["temb.dense.0"], temb)
    for node in config.block_plan():
        pixels = node.resolution**2
        into, hidden, out = node.in_width, node.hidden_width, node.out_width
        if node.kind == "block":
            total += 2 * pixels * (into + hidden) + linear(temb, hidden)
            total += conv(pixels, 3, into, hidden) + conv(pixels, 3, hidden, out)
            total += conv(pixels, 1, into, out) if node.shortcut else 0
        elif node.kind == "attention":
            total += 2 * pixels * into + 3 * conv(pixels, 1, into, hidden)
            total += conv(pixels, 1, hidden, out)
        elif node.kind == "conv_in" or config.resamp_with_conv:
            total += conv(pixels, 3, into, out)
    pixels = config.image_size**2
    return total + 2 * pixels * out + conv(pixels, 3, out, config.out_channels)


def conv(pixels: int, kernel: int, inputs: int, outputs: int) -> int:
    """A convolution with bias over so many output pixels."""
    return pixels * outputs * (kernel * kernel * inputs + 1)


def linear(inputs: int, outputs: int) -> int:
    """A linear layer with bias on one vector."""
    return outputs * (inputs + 1)
