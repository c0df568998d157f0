"""Encodes a config's data set into latents, once; training reads them.

    python -m liftplace_jax.encode --config=configs/imagenet256_dit.py \\
        --config.latents.autoencoder=FOLDER --config.latents.path=FOLDER

The splits data.train_split and data.test_split of the config go through the autoencoder, every
image and its mirror image; mean and log variance are stored (not samples of them), so that each
epoch draws anew. With config.text.cached also the states of captions are stored: of Stable
Diffusion 3 1.0 to 2.4 MB each. How much there will be is said before it starts; states of more than
10 GB need --yes. The same command goes on where it was cut off. Where JAX runs as several
processes, each makes its share of the shards.
"""

from __future__ import annotations

from absl import flags

from liftplace_jax.experiment.config_flag import define_config_flag
from liftplace_jax.host.flags import (
    define_runtime_flags,
    quieten_libraries,
    refuse,
    running,
    start,
)

_CONFIG = define_config_flag()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "images encoded at a time by this process", lower_bound=1
)
_YES = flags.DEFINE_bool("yes", False, "write states of texts even if they take more than 10 GB")
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a refused input")
define_runtime_flags()


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        refuse(f"unexpected arguments: {argv[1:]}")
    quieten_libraries()
    with running(_DEBUG.value):
        print(encode())


def encode() -> str:
    """Does what the flags say; returns what was done, as a sentence."""
    # Late, so that JAX's processes are joined before anything else of it runs.
    import jax

    from liftplace_jax.experiment.encoding import encode_data
    from liftplace_jax.experiment.fields import check_fields
    from liftplace_jax.host import sharding

    check_fields(_CONFIG.value)
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    return encode_data(
        _CONFIG.value,
        sharding.batch_sharding(mesh),
        batch_size=_BATCH_SIZE.value,
        agreed=_YES.value,
    )


def entry_point() -> None:
    """For `python -m`."""
    start(main, required=["config"])


if __name__ == "__main__":
    entry_point()
