"""The contract of families: a kind of network, in all that the house asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from liftplace_jax.compress import Pruner
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.weights.diffusers import Format


class Family(NamedTuple):
    """A family of networks; a folder of this room holds one.

    Attributes:
      config: class of its configs; `config.model` is the family's name.
      macs: config -> multiply-accumulates of one forward pass on one image.
      parameters: config -> parameters, without building the network.
      pruners: how its students are made; the first is the usual one.
      format: how diffusers' folders are read and written.
      published: name -> config of its published networks.
      default_model: fields of config.model of a small network, for 8x8 grey images.
      preset: sets what the family's published experiments share, in a config.
      miniature: makes network and data of a config small: 16x16 images.
      frozen: full names of the parameters that are never trained and must not decay.
    """

    config: type[DenoiserConfig]
    macs: Callable[[Any], int]
    parameters: Callable[[Any], int]
    pruners: tuple[Pruner, ...]
    format: Format
    published: Mapping[str, DenoiserConfig]
    default_model: Mapping[str, Any]
    preset: Callable[[ConfigDict], None]
    miniature: Callable[[ConfigDict], None]
    frozen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """config.model.model."""
        return self.config.model

    def pruner(self, name: str) -> Pruner:
        """The pruner of a name.

        Raises:
          ValueError: the family has no such pruner.
        """
        for pruner in self.pruners:
            if pruner.name == name:
                return pruner
        known = [pruner.name for pruner in self.pruners]
        raise ValueError(f"pruner must be one of {known} for a {self.name!r}, got {name!r}")
