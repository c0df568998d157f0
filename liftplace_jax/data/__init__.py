"""Data sets by name, and batches whose order is a function of (seed, step) alone."""

from liftplace_jax.data.columns import Column
from liftplace_jax.data.encoded import LatentSource, check_autoencoder, load_latents
from liftplace_jax.data.named import load_source
from liftplace_jax.data.pipeline import Source, eval_batches, train_batches
from liftplace_jax.data.unpacking import unpack_images

__all__ = [
    "Column",
    "LatentSource",
    "Source",
    "check_autoencoder",
    "eval_batches",
    "load_latents",
    "load_source",
    "train_batches",
    "unpack_images",
]
