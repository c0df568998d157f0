"""What the configurations of all models share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from liftplace_jax.host.ranges import Range


class ModelConfig:
    """A frozen dataclass that defines a model; hashable and JSON friendly.

    Attributes:
      RANGES: of every field that is a number, or a sequence of numbers.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {}

    def check_numbers(self) -> None:
        """Raises a ValueError naming the first field that is out of its range."""
        for field, limits in self.RANGES.items():
            limits.check(field, getattr(self, field))

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
