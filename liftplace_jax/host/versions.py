"""What numbers depend on beside the config: versions of libraries, and the device."""

from __future__ import annotations

from importlib import metadata

import jax

PACKAGES = ("liftplace_jax", "jax", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Name -> version of each of PACKAGES, and the kind of "device"."""
    return {name: _version(name) for name in PACKAGES} | {"device": jax.devices()[0].device_kind}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout
