"""The published pixel-space U-Nets, by data set."""

from liftplace_jax.families.unet.config import UNetConfig

_LSUN = UNetConfig(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4))

PUBLISHED_UNETS: dict[str, UNetConfig] = {
    "cifar10": UNetConfig(image_size=32, ch_mult=(1, 2, 2, 2), dropout=0.1),
    "celeba": UNetConfig(image_size=64, ch_mult=(1, 2, 2, 2, 4), dropout=0.1),
    "bedroom": _LSUN,
    "church": _LSUN,
}
"""Source: "Diff_Pruning configs/*.yml"."""
