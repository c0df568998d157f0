"""The feature extractors, by name, and those among them that ship with this package."""

import functools
import importlib.resources
import json

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import safe_open

from liftplace_jax.encoders.clip import load_image_encoder
from liftplace_jax.encoders.shipped import find_shipped, read_record
from liftplace_jax.evaluation.extractor import Extractor
from liftplace_jax.evaluation.inception_features import BOTH, PROTOCOLS, inception_extractor

DIGIT_WEIGHTS = "digit_features.safetensors"


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
    resource = importlib.resources.files("liftplace_jax.evaluation") / DIGIT_WEIGHTS
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


@functools.cache
def _emoji():
    folder = find_shipped("emoji")
    network = load_image_encoder(folder)
    size, made = network.config.image_size, read_record(folder)["image_encoder"]
    return Extractor(
        name="emoji",
        label="emoji-feature Frechet distance",
        dim=network.config.hidden_size,
        image_shape=(size, size, network.config.num_channels),
        apply=functools.partial(_pooled, network.graphdef),
        params=network.params,
        info={name: str(value) for name, value in made.items() if name != "files"},
    )


def _pooled(graphdef, params, images):
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graphdef, params)(images).pooled


def _without_weights(make):
    """An entry of FEATURES for an extractor that ships with this package."""

    def extractor(name, weights):
        if weights is not None:
            raise ValueError(f"features {name!r} come with their weights, leave {weights} out")
        return make()

    return extractor


# Name -> function (name, file of weights or None) -> Extractor.
_SHIPPED = {"digits": _without_weights(_digits), "emoji": _without_weights(_emoji)}
FEATURES = _SHIPPED | dict.fromkeys([*PROTOCOLS, *BOTH], inception_extractor)


def feature_extractor(name, weights=None):
    """Loads the extractor `name`.

    Args:
      name: a key of `FEATURES`.
      weights: file of its weights, where it does not ship with them.

    Returns:
      An `Extractor`; the same one for the same arguments.

    Raises:
      ValueError: an unknown name (the message lists those known), or weights that are lacking, do
        not fit or are not wanted.
    """
    if name not in FEATURES:
        raise ValueError(f"unknown feature extractor {name!r}, known: {sorted(FEATURES)}")
    return FEATURES[name](name, weights)
