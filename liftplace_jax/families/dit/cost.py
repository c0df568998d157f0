"""Parameters and multiply-accumulates of a DiT, from its config alone.

Counted as by fvcore, which made the published latent-space table: convolutions and linears without
biases, attention's products, four for each normalised element, and one for every two elements that
leave the patches; neither activations nor sums.
"""

from __future__ import annotations

from collections.abc import Iterator

from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.dit.model import FREQUENCIES
from liftplace_jax.nn import counting


def macs(config: DiTConfig) -> int:
    """MACs of one forward pass on one image."""
    elements = config.num_tokens * config.hidden_size
    linears = sum(uses * inputs * outputs for uses, inputs, outputs in _layers(config))
    products = 2 * config.depth * elements * config.num_tokens
    norms = 4 * elements * (2 * config.depth + 1)
    return linears + products + norms + config.image_size**2 * config.out_channels // 2


def parameters(config: DiTConfig) -> int:
    """Parameters, those that are never trained too."""
    tables = config.depth if config.embedders == "per_block" else 1
    rows = tables * config.num_labels + config.num_tokens
    linears = sum(counting.dense(inputs, outputs) for _, inputs, outputs in _layers(config))
    return linears + rows * config.hidden_size


def _layers(config: DiTConfig) -> Iterator[tuple[int, int, int]]:
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
