"""Published weight files, and the one rule that carries them into any model and back."""

from liftplace_jax.weights.convert import (
    WeightMismatchError,
    find_misfits,
    find_prefix,
    from_torch,
    open_model,
    published_shapes,
    save_model,
    save_raw,
    to_torch,
)
from liftplace_jax.weights.entries import EntryError, WeightFileError
from liftplace_jax.weights.torch_files import read_tensors, write_safetensors

__all__ = [
    "EntryError",
    "WeightFileError",
    "WeightMismatchError",
    "find_misfits",
    "find_prefix",
    "from_torch",
    "open_model",
    "published_shapes",
    "read_tensors",
    "save_model",
    "save_raw",
    "to_torch",
    "write_safetensors",
]
