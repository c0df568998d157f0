"""What the configurations of all models share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.conditioning import UNCONDITIONAL, Conditioning


class ModelConfig:
    """A frozen dataclass that defines a model; hashable and JSON friendly.

    Attributes:
      model: the model's name, "model" of a config.json.
    """

    model: ClassVar[str]

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype, remat: str | None = None) -> nnx.Module:
        """The model, initialised; `building.create` is the way to call it.

        Args:
          rngs: where its initial weights come from.
          dtype: of the computation.
          remat: as of `building.create`.
        """
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """The content of a config.json: `to_dict`, and the model's name under "model"."""
        return {"model": self.model} | self.to_dict()

    def replace(self, **changes: Any) -> Self:
        """A copy with changes."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; the inverse of `from_dict`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def architecture(self) -> list[dict[str, Any]]:
        """What weights tell of a config, as dictionaries of JSON types.

        Two configs have the same parameters and function if they agree in all of them. One
        dictionary says something only of configs that agree in those before it.
        """
        return [self.to_dict()]

    def visible_in(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The fields that can be read off published tensors, where they tell; see `architecture`.

        Args:
          tensors: arrays by published name.
        """
        del tensors
        return {}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config of `to_dict`'s result.

        Raises:
          ValueError: a field is unknown, missing or out of range; names it.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(fields.keys() - known), sorted(known - fields.keys())
        if unknown or missing:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}, missing fields {missing}")
        return cls(**fields)


class DenoiserConfig(ModelConfig):
    """The config of a network that denoises: (x, t, condition) -> prediction.

    Attributes:
      image_size: height and width of the images or latents, in pixels.
      in_channels: of the images or latents.
      out_channels: of the prediction.
    """

    image_size: int
    in_channels: int
    out_channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the network sees."""
        return self.image_size, self.image_size, self.in_channels

    @property
    def conditioning(self) -> Conditioning:
        """What the network is told beside the noisy image and the timestep."""
        return UNCONDITIONAL

    def layer_map(self, teacher: "DenoiserConfig") -> dict[str, str] | None:
        """Which feature of a teacher each of this model's is compared with; None: of its name."""
        del teacher
        return None


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raises a ValueError naming a field that is no integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")
