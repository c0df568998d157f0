"""What turns images into the vectors that are compared."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A feature extractor.

    Attributes:
      name: registry name.
      label: what a Frechet distance on these features is called; never Inception FID unless it is.
      dim: number of features D.
      image_shape: (H, W, C) of the images it takes; None stands for any.
      apply: jit-able function (params, images (B, H, W, C) in [-1, 1]) -> features (B, D) float32,
        or a dictionary of them as "features", and perhaps of "spatial" features (B, S), for sFID,
        and "logits" (B, classes), for the Inception Score.
      params: pytree of its weights.
      info: where it comes from, as strings (such as its test accuracy).
    """

    name: str
    label: str
    dim: int
    image_shape: tuple[int | None, int | None, int | None]
    apply: Callable[[Any, jax.Array], jax.Array | Mapping[str, jax.Array]]
    params: Any
    info: Mapping[str, str]

    def check_shape(self, shape):
        """Raises a ValueError if it does not take images of a shape (H, W, C)."""
        if len(shape) != 3 or not all(
            wanted in (None, size) for wanted, size in zip(self.image_shape, shape, strict=True)
        ):
            raise ValueError(
                f"images are {shape}, but the extractor {self.name!r} takes {self.image_shape}"
            )

    def __call__(self, images):
        """What `apply` finds in images (B, H, W, C) in [-1, 1]."""
        return self.apply(self.params, images)
