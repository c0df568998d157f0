"""Encodes a config's data set into latents, once; training reads them.

    python -m liftplace_jax.data.latents --config=configs/imagenet256_dit.py \\
        --config.latents.autoencoder=FOLDER --config.latents.path=FOLDER

The splits data.train_split and data.test_split of the config go through the autoencoder, every
image and its mirror image; mean and log variance are stored (not samples of them), so that each
epoch draws anew. The same command goes on where it was cut off. Where JAX runs as several
processes, each makes its share of the shards, without waiting for the others.
"""

from __future__ import annotations

import signal
import sys

from absl import app, flags
from ml_collections import config_flags

from liftplace_jax.command_line import (
    EXIT_INTERRUPTED,
    parse_flags,
    quieten_libraries,
    refuse,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file, FILE.py[:key=value,...]")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "images encoded at a time by this process", lower_bound=1
)
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a refused input")


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    quieten_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(encode())
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from what is saved.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, RuntimeError, OSError) as error:
        if _DEBUG.value:
            raise
        refuse(str(error))


def encode() -> str:
    """Does what the flags say; returns what was done, as a sentence."""
    # Late, so that --help and a misspelt flag answer at once.
    import jax

    from liftplace_jax.encoding import encode_data
    from liftplace_jax.training import sharding

    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    return encode_data(
        _CONFIG.value, sharding.batch_sharding(mesh), batch_size=_BATCH_SIZE.value
    )


def entry_point() -> None:
    """For `python -m`."""
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    entry_point()
