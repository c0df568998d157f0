"""The published MMDiTs, by name."""

from liftplace_jax.families.mmdit.config import MMDiTConfig

PUBLISHED_MMDITS: dict[str, MMDiTConfig] = {
    "sd3-medium": MMDiTConfig(64, 24, 24),
    "sd3.5-medium": MMDiTConfig(
        64, 24, 24, position_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "sd3.5-large": MMDiTConfig(64, 38, 38, qk_norm="rms_norm"),
}
"""For latents of 512x512 images, 16x64x64.

Source: config.json of their folders; Stability-AI/sd3.5 "mmditx.py".
"""
