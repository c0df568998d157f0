"""T5's encoder, as transformers names and computes it."""

from liftplace_jax.encoders.t5.config import T5Config
from liftplace_jax.encoders.t5.folder import T5Encoder, load_t5, write_random_t5

__all__ = ["T5Config", "T5Encoder", "load_t5", "write_random_t5"]
