"""The networks that suites measure, asked of their families."""

from __future__ import annotations

from typing import Any

from liftplace_jax.experiment.configuration import compress_config
from liftplace_jax.families.registry import config_from_dict, family_named, family_of
from liftplace_jax.nn.model_config import DenoiserConfig


def published(family: str) -> dict[str, DenoiserConfig]:
    """Name -> config of a family's published networks.

    Raises:
      ValueError: there is no such family.
    """
    return dict(family_named(family).published)


def small(family: str) -> DenoiserConfig:
    """The network of an experiment that sets no field of config.model.

    Raises:
      ValueError: there is no such family.
    """
    return config_from_dict({"model": family, **family_named(family).default_model}, partial=True)


def pruned(teacher: DenoiserConfig, **fields: Any) -> DenoiserConfig:
    """A teacher's student, by its family's usual pruner.

    Args:
      teacher: its config.
      fields: of config.compress, in place of the defaults.

    Raises:
      ValueError: a field does not fit.
    """
    family = family_of(teacher)
    compress = compress_config(family)
    compress.update(fields)
    return family.pruner(compress.pruner).predict(compress, teacher)
