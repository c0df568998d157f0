"""What the configurations of all models share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.conditioning import UNCONDITIONAL, Conditioning
from liftplace_jax.host.outside import cut
from liftplace_jax.host.ranges import Range

_MOST_UNCHECKED = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A frozen dataclass that defines a model; hashable and JSON friendly.

    Attributes:
      model: the model's name, "model" of a config.json.
      RANGES: of every field that is a number, or a sequence of numbers.
      equal_blocks: whether the model is a stack of blocks, most of them alike, and `build` knows
        scan_blocks.
    """

    model: ClassVar[str]
    equal_blocks: ClassVar[bool] = False
    RANGES: ClassVar[Mapping[str, Range]] = {}

    def check_numbers(self) -> None:
        """Raises a ValueError naming the first field that is out of its range."""
        for field, limits in self.RANGES.items():
            limits.check(field, getattr(self, field))

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

    @property
    def num_blocks(self) -> int:
        """Parts of the network that are built one after another, each of two tensors or more."""
        raise NotImplementedError

    def check_blocks(self, count: int) -> None:
        """Refuses tensors that are far too few, before minutes go into building the model.

        Args:
          count: of the tensors that there are.

        Raises:
          ValueError: the model has more blocks, and more than published ones have.
        """
        if self.num_blocks > max(_MOST_UNCHECKED, count):
            raise ValueError(
                f"the config says {self.num_blocks:,} blocks, and there are {count:,} tensors in "
                "all: check the config against the file"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config of `to_dict`'s result.

        Raises:
          ValueError: a field is unknown, missing or out of range; names it.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(fields.keys() - known), sorted(known - fields.keys())
        if unknown or missing:
            raise ValueError(
                f"{cls.__name__}: unknown fields {cut(unknown)}, missing fields {missing}"
            )
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


class StackConfig(DenoiserConfig):
    """The config of a network that is a stack of blocks, of which some can be left out.

    Attributes:
      depth: number of blocks.
      kept_layers: the teacher's blocks that a depth-pruned student began with, a record alone;
        None: not pruned.
      STACK: what the blocks' parameters and features are called, before their numbers.
    """

    depth: int
    kept_layers: tuple[int, ...] | None
    STACK: ClassVar[str] = "blocks"

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig.num_blocks`."""
        return self.depth

    @property
    def always_kept(self) -> tuple[int, ...]:
        """Numbers of blocks that no student can be without."""
        return ()

    def keep(self, layers: tuple[int, ...]) -> Self:
        """The config of a student that keeps these blocks, ascending.

        Raises:
          ValueError: there can be none.
        """
        return self.replace(depth=len(layers), kept_layers=layers)

    def check_kept(self) -> None:
        """Raises a ValueError unless kept_layers are `depth` numbers in ascending order."""
        kept = self.kept_layers
        if kept is None:
            return
        if len(kept) != self.depth or list(kept) != sorted(set(kept)):
            raise ValueError(
                f"kept_layers must be depth {self.depth} different block numbers in order, "
                f"not {list(kept)}"
            )
        object.__setattr__(self, "kept_layers", tuple(kept))


MOST_BLOCKS, MOST_BLOCKS_OF_LEVEL = 1000, 100
"""Far above any network; a model of more would seem to hang while it is built."""
MOST_PIXELS = 2**14
"""Along a side."""
