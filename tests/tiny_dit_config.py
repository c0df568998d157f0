"""The job of tiny_config.py with a diffusion transformer, which loses a block by learning which."""

import tiny_config
from ml_collections import ConfigDict

from liftplace_jax.experiment.configuration import compress_config
from liftplace_jax.families.registry import family_named


def get_config():
    """The config."""
    config = tiny_config.get_config()
    config.model = ConfigDict(
        dict(
            model="dit",
            image_size=8,
            in_channels=1,
            hidden_size=16,
            depth=2,
            num_heads=2,
            num_classes=10,
            learn_sigma=False,
        )
    )
    config.compress = compress_config(family_named("dit"))
    config.compress.update(depth=1, layers="learned")
    config.compress.learned.update(steps=2, batch_size=16, log_every=1)
    config.teacher.steps, config.distill.steps = 4, 2
    config.evaluation.update(num_samples=100, batch_size=480, clip=None)
    return config
