"""The published DiTs, by name."""

from liftplace_jax.families.dit.config import DiTConfig

# Letter -> (hidden_size, depth, num_heads).
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def _dit(hidden_size: int, depth: int, num_heads: int, patch_size: int) -> DiTConfig:
    return DiTConfig(32, hidden_size, depth, num_heads, patch_size)


PUBLISHED_DITS: dict[str, DiTConfig] = {
    f"DiT-{size}/{patch}": _dit(*numbers, patch)
    for size, numbers in _SIZES.items()
    for patch in (2, 4, 8)
} | {f"DiT-D{depth}/2": _dit(1152, depth, 16, 2) for depth in (19, 14, 7, 4)}
"""For latents of 256x256 images, 4x32x32, of ImageNet's 1000 classes; D is a depth-pruned XL.

Source: "TinyFusion_EXP/models.py".
"""
