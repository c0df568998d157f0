"""Parameters and multiply-accumulates of an MMDiT, from its config alone.

Counted: linear layers and the convolution that makes tokens, without biases, and attention's
products; neither norms nor activations nor sums.
"""

from __future__ import annotations

from collections.abc import Iterator

from liftplace_jax.families.mmdit.config import MMDiTConfig
from liftplace_jax.families.mmdit.model import FREQUENCIES
from liftplace_jax.nn import counting


def macs(config: MMDiTConfig) -> int:
    """MACs of one forward pass on one image of image_size and a text of context_tokens."""
    linears = sum(uses * inputs * outputs for uses, inputs, outputs in _layers(config))
    return linears + attention_macs(config)


def attention_macs(config: MMDiTConfig) -> int:
    """Of these, the products of queries, keys and values."""
    image, width = config.side**2, config.hidden_size
    joint = config.depth * (image + config.context_tokens) ** 2
    return 2 * width * (joint + len(config.dual_attention_layers) * image**2)


def parameters(config: MMDiTConfig) -> int:
    """Parameters, the table of positions, which is never trained, too."""
    linears = sum(counting.dense(inputs, outputs) for _, inputs, outputs in _layers(config))
    scales = 0
    if config.qk_norm is not None:
        scales = config.head_size * (4 * config.depth + 2 * len(config.dual_attention_layers))
    return linears + scales + config.position_size**2 * config.hidden_size


def _layers(config: MMDiTConfig) -> Iterator[tuple[int, int, int]]:
    """(uses, inputs, outputs) of every linear layer, and of the convolution that makes tokens."""
    width, pixels, image = config.hidden_size, config.patch_size**2, config.side**2
    yield image, pixels * config.in_channels, width
    for inputs in (FREQUENCIES, config.pooled_dim):
        yield 1, inputs, width
        yield 1, width, width
    yield config.context_tokens, config.context_dim, width
    for index in range(config.depth):
        last, dual = index == config.depth - 1, index in config.dual_attention_layers
        yield 1, width, (9 if dual else 6) * width
        yield 1, width, (2 if last else 6) * width
        for tokens, outputs in (
            (image, 8 if dual else 4),
            (config.context_tokens, 3 if last else 4),
        ):
            for _ in range(outputs):
                yield tokens, width, width
        for tokens in (image,) if last else (image, config.context_tokens):
            yield tokens, width, 4 * width
            yield tokens, 4 * width, width
    yield 1, width, 2 * width
    yield image, width, pixels * config.out_channels
