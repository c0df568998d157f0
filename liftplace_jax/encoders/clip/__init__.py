"""CLIP's towers of text and images, as transformers names and computes them."""

from liftplace_jax.encoders.clip.config import CLIPTextConfig, CLIPVisionConfig
from liftplace_jax.encoders.clip.folder import (
    ImageEncoder,
    TextEncoder,
    load_image_encoder,
    load_text_encoder,
    save_clip,
    save_text_encoder,
    write_random_text_encoder,
)

__all__ = [
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ImageEncoder",
    "TextEncoder",
    "load_image_encoder",
    "load_text_encoder",
    "save_clip",
    "save_text_encoder",
    "write_random_text_encoder",
]
