"""Feature extractors, by name: what turns images into the vectors that are compared."""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import safe_open

DIGIT_WEIGHTS = "digit_features.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A feature extractor.

    Attributes:
      name: registry name.
      label: what a Frechet distance on these features is called; never Inception FID unless it is.
      dim: number of features D.
      image_shape: (H, W, C) of the images it takes.
      apply: jit-able function (params, images (B, H, W, C) in [-1, 1]) -> (B, D) float32.
      params: pytree of its weights.
      info: where it comes from, as strings (such as its test accuracy).
    """

    name: str
    label: str
    dim: int
    image_shape: tuple[int, int, int]
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    info: Mapping[str, str]

    def __call__(self, images):
        """Features (B, dim) of images (B, H, W, C) in [-1, 1]."""
        return self.apply(self.params, images)


def digit_features(params, images):
    """The digit classifier up to its last hidden layer: (B, 8, 8, 1) in [-1, 1] -> (B, 64)."""
    with jax.default_matmul_precision("highest"):
        x = images.astype(jnp.float32)
        for name in ("conv1", "conv2"):
            kernel = params[f"{name}.kernel"]
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.gelu(x + params[f"{name}.bias"])
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        x = x.reshape(batch, -1) @ params["hidden.kernel"] + params["hidden.bias"]
        return jax.nn.gelu(x)


def digit_logits(params, images):
    """The digit classifier: (B, 8, 8, 1) in [-1, 1] -> (B, 10) logits."""
    with jax.default_matmul_precision("highest"):
        features = digit_features(params, images)
        return features @ params["classes.kernel"] + params["classes.bias"]


@functools.cache
def _digits():
    resource = importlib.resources.files(__package__) / DIGIT_WEIGHTS
    with importlib.resources.as_file(resource) as path, safe_open(path, "numpy") as file:
        params = {name: file.get_tensor(name) for name in file.keys()}
        info = json.loads(file.metadata()["info"])
    return Extractor(
        name="digits",
        label="digit-feature Frechet distance",
        dim=params["hidden.bias"].shape[0],
        image_shape=(8, 8, 1),
        apply=digit_features,
        params=params,
        info=info,
    )


FEATURES = {"digits": _digits}


def feature_extractor(name):
    """Loads the extractor `name`.

    Args:
      name: a key of `FEATURES`, which maps names to functions without arguments.

    Returns:
      An `Extractor`.

    Raises:
      ValueError: an unknown name; the message lists those known.
    """
    if name not in FEATURES:
        raise ValueError(f"unknown feature extractor {name!r}, known: {sorted(FEATURES)}")
    return FEATURES[name]()
