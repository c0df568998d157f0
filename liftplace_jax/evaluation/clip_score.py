"""CLIP score: how well images fit their prompts, as the plain cosine of CLIP's features.

As BK-SDM reports it: no factor of 100 or 2.5, and nothing below 0 is cut off.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from liftplace_jax.encoders.clip import ImageEncoder, load_image_encoder
from liftplace_jax.encoders.clip.preparing import Preparation, load_preparation
from liftplace_jax.encoders.texts import Texts, load_texts

_AT_ONCE = 64  # prompts


@dataclasses.dataclass(frozen=True, eq=False)
class ClipScorer:
    """CLIP's towers of texts and images; made by `load_clip`.

    Attributes:
      texts: tokenizer and tower of texts.
      image: the tower of images.
      preparation: of the images.
    """

    texts: Texts
    image: ImageEncoder
    preparation: Preparation

    @property
    def identity(self) -> dict[str, Any]:
        """What scores depend on, as JSON types."""
        return {
            "score": "mean cosine of projected features",
            "text": self.texts.identity,
            "image": self.image.identity,
            "preparation": self.preparation.identity,
        }

    def text_features(self, prompts: Sequence[str]) -> np.ndarray:
        """Projected features of prompts, of length one.

        Args:
          prompts: N texts; a longer one than the tower takes is cut.

        Returns:
          (N, P) float32.

        Raises:
          ValueError: one is no text, or its features are not finite.
        """
        ids, parts = self.texts.tokenizer.encode(prompts), []
        run, encoder = _text_program(self.texts.encoder.graphdef), self.texts.encoder
        for first in range(0, len(ids), _AT_ONCE):
            part = ids[first : first + _AT_ONCE]
            # To a whole number of them, so that there is one program.
            padded = np.pad(part, ((0, _AT_ONCE - len(part)), (0, 0)), mode="edge")
            parts.append(np.asarray(run(encoder.params, padded))[: len(part)])
        found = np.concatenate(parts)
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            raise ValueError(f"prompt {np.argmin(finite)} has features that are not finite")
        return found

    def cosines(
        self, pictures: jax.Array, texts: jax.Array, sharding: NamedSharding | None = None
    ) -> jax.Array:
        """Cosines of images and their texts, in one compiled program.

        Args:
          pictures: (B, S, S, C) uint8, as of `preparation.picture`.
          texts: (B, P), as of `text_features`.
          sharding: of the batch axis; the result is whole on every device.

        Returns:
          (B,) float32 in [-1, 1].
        """
        program = _cosine_program(self.image.graphdef, self.preparation, sharding)
        return program(self._placed(sharding), pictures, texts)

    @functools.cached_property
    def _placed(self):
        @functools.cache
        def placed(sharding):
            return jax.device_put(self.image.params, _whole(sharding))

        return placed


def _whole(sharding):
    return sharding and NamedSharding(sharding.mesh, PartitionSpec())


def _unit(features):
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


@functools.lru_cache(maxsize=2)
def _text_program(graphdef):
    @jax.jit
    @jax.default_matmul_precision("highest")
    def run(params, ids):
        return _unit(nnx.merge(graphdef, params)(ids).projected)

    return run


@functools.lru_cache(maxsize=4)
def _cosine_program(graphdef, preparation, sharding):
    @jax.default_matmul_precision("highest")
    def run(params, pictures, texts):
        found = nnx.merge(graphdef, params)(preparation.scaled(pictures)).projected
        return jnp.sum(_unit(found) * texts, axis=-1)

    return jax.jit(run, out_shardings=_whole(sharding))


@functools.lru_cache(maxsize=1)
def load_clip(path: str | os.PathLike) -> ClipScorer:
    """CLIP's towers, tokenizer and preparation of images.

    Args:
      path: a folder of transformers' `CLIPModel` with its tokenizer, or with "text_encoder",
        "image_encoder" and "tokenizer" in it; or a name of SHIPPED.

    Raises:
      ValueError: a part is missing, damaged, has no projection, or does not fit the others; names
        it.
    """
    texts, image = load_texts(path), load_image_encoder(path)
    widths = {"text": texts.encoder.config.projection_dim, "image": image.config.projection_dim}
    for name, width in widths.items():
        if width is None:
            raise ValueError(
                f"{path}: the tower of {name}s has no projection, so there is no cosine: take a "
                "CLIPModel, or towers WithProjection"
            )
    if widths["text"] != widths["image"]:
        raise ValueError(f"{path}: the towers do not belong together: projections are {widths}")
    preparation = load_preparation(path, image.config)
    return ClipScorer(texts, image, preparation)


def clip_score(cosines: np.ndarray) -> dict[str, Any]:
    """The score of pairs.

    Args:
      cosines: (N,) of each image and its prompt.

    Returns:
      {"clip_score": their mean, "clip_score_error": standard error of it (None of one pair),
      "clip_pairs": N}.

    Raises:
      ValueError: none, or one that is not finite; names it.
    """
    cosines = np.asarray(cosines, np.float64)
    if cosines.ndim != 1 or not len(cosines):
        raise ValueError(f"want (N,) cosines, got {cosines.shape}")
    if not np.isfinite(cosines).all():
        raise ValueError(f"the cosine of image {np.argmin(np.isfinite(cosines))} is not finite")
    count = len(cosines)
    error = float(cosines.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return {"clip_score": float(cosines.mean()), "clip_score_error": error, "clip_pairs": count}
