"""What published experiments of a family share, and their runs in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.experiment.configuration import experiment_config
from liftplace_jax.families.registry import family_named


def family_config(
    arg: str | None, name: str, family: str, network: str | None = None, **arguments: Any
) -> tuple[ConfigDict, ConfigDict]:
    """An experiment with the settings that a family's published ones share (`Family.preset`).

    Args:
      arg: as of `experiment_config`.
      name: of the experiment.
      family: a name of `FAMILIES`.
      network: a name of the family's published networks; None: the model is to be set.
      arguments: as of `experiment_config`.

    Returns:
      (config, the arguments as read).
    """
    networks = family_named(family)
    config, args = experiment_config(
        arg, name, method="lift_place_feature_kd", family=family, **arguments
    )
    if network:
        fields = networks.published[network].described()
        # What is None, or follows from the others, is left to the network's own defaults.
        given = {k: v for k, v in fields.items() if v is not None and not isinstance(v, Mapping)}
        config.model = ConfigDict(
            {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        )
    networks.preset(config)
    return config, args


def steps_for(ratio: float, steps: Mapping[float, int]) -> int:
    """Training steps of a student by ratio: of one between two, those of the larger; beyond the
    last, those of the last."""
    return steps[min((r for r in steps if r >= ratio), default=max(steps))]


def runlocal(config: ConfigDict) -> ConfigDict:
    """The same experiment with a small network, few steps, timesteps and samples."""
    family_named(config.model.model).miniature(config)
    config.process.num_timesteps = 20
    searches = [part for part in config.compress.values() if isinstance(part, ConfigDict)]
    for run in (config.teacher, config.distill, *searches):
        run.steps = 30
        run.batch_size = 16
        run.ema_decay = 0.9
        run.optimizer.learning_rate = 2e-3
        run.log_every = 10
        run.checkpoint_every = 20
    config.evaluation.update(num_samples=64, batch_size=32, sample_steps=10)
    config.tensorboard = False
    return config
