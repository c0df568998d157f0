"""The families of networks: where they are read from, and what they cost."""

from liftplace_jax.families.family import Family
from liftplace_jax.families.loading import load_checkpoint, load_network
from liftplace_jax.families.registry import (
    FAMILIES,
    config_from_dict,
    config_parameters,
    count_macs,
    family_of,
)

__all__ = [
    "FAMILIES",
    "Family",
    "config_from_dict",
    "config_parameters",
    "count_macs",
    "family_of",
    "load_checkpoint",
    "load_network",
]
