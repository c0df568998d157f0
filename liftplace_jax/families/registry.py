"""The families, by name: a new one is one folder, and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from liftplace_jax.families.dit.family import DIT
from liftplace_jax.families.family import Family
from liftplace_jax.families.mmdit.family import MMDIT
from liftplace_jax.families.sd_unet.family import SD_UNET
from liftplace_jax.families.unet.family import UNET
from liftplace_jax.nn.model_config import DenoiserConfig

FAMILIES: dict[str, Family] = {family.name: family for family in (UNET, DIT, SD_UNET, MMDIT)}


def family_named(name: Any) -> Family:
    """The family of a name.

    Raises:
      ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model {name!r}; known: {sorted(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: DenoiserConfig) -> Family:
    """The family of a network's config.

    Raises:
      ValueError: it has none.
    """
    found = FAMILIES.get(getattr(config, "model", ""))
    if found is None:
        raise ValueError(f"{type(config).__name__} is of no family; known: {sorted(FAMILIES)}")
    return found


def config_from_dict(fields: Mapping[str, Any], partial: bool = False) -> DenoiserConfig:
    """The inverse of `ModelConfig.described`.

    Args:
      fields: the model's name under "model", and its config's fields.
      partial: whether missing fields get their defaults.

    Raises:
      ValueError: unknown model name, or unknown, missing or bad fields.
    """
    config_class = family_named(fields.get("model")).config
    given = {name: value for name, value in fields.items() if name != "model"}
    if partial:
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(config_class)
            if field.default is not dataclasses.MISSING
        }
        given = defaults | given
    return config_class.from_dict(given)


def count_macs(config: DenoiserConfig) -> int:
    """MACs of one forward pass of a network on one image, as its paper counts them.

    Raises:
      ValueError: the config belongs to no family.
    """
    return family_of(config).macs(config)


def config_parameters(config: DenoiserConfig) -> int:
    """Parameters of a network, without building it; those that are never trained count too.

    Raises:
      ValueError: the config belongs to no family.
    """
    return family_of(config).parameters(config)
