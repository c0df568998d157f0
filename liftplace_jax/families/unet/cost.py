"""Parameters and multiply-accumulates of a U-Net, from its config alone.

Counted as in the published pixel-space tables (Diff_Pruning_EXP/torch_pruning/utils/
op_counter.py): convolutions and linears with their biases, two for each normalised element;
neither attention's products nor activations, sums and resampling without weights. So every
parameter is used once for each pixel of its layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator

from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.nn.counting import conv, dense, norm


def macs(config: UNetConfig) -> int:
    """MACs of one forward pass on one image."""
    return sum(pixels * parameters for pixels, parameters in _layers(config))


def parameters(config: UNetConfig) -> int:
    """Parameters."""
    return sum(parameters for _, parameters in _layers(config))


def _layers(config: UNetConfig) -> Iterator[tuple[int, int]]:
    """(output pixels, parameters) of every layer with weights."""
    widths = dict(config.widths)
    temb = widths["temb.dense.1"]
    yield 1, dense(config.ch, widths["temb.dense.0"])
    yield 1, dense(widths["temb.dense.0"], temb)
    for node in config.block_plan():
        pixels = node.resolution**2
        into, hidden, out = node.in_width, node.hidden_width, node.out_width
        if node.kind == "block":
            yield 1, dense(temb, hidden)
            yield pixels, norm(into) + conv(3, into, hidden)
            yield pixels, norm(hidden) + conv(3, hidden, out)
            yield pixels, conv(1, into, out) if node.shortcut else 0
        elif node.kind == "attention":
            yield pixels, norm(into) + 3 * conv(1, into, hidden) + conv(1, hidden, out)
        elif node.kind == "conv_in" or config.resamp_with_conv:
            yield pixels, conv(3, into, out)
    yield config.image_size**2, norm(out) + conv(3, out, config.out_channels)
