"""What published experiments of a family share, and their runs in miniature."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.diffusion import make_process
from liftplace_jax.encoders.autoencoder_folder import (
    load_autoencoder,
    save_as_diffusers,
    write_random_autoencoder,
)
from liftplace_jax.encoders.clip import write_random_text_encoder
from liftplace_jax.encoders.tokenizer import train_tokenizer
from liftplace_jax.experiment.configuration import experiment_config
from liftplace_jax.families.pipelines import join_pipeline
from liftplace_jax.families.registry import config_from_dict, family_named
from liftplace_jax.nn import building


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
    config.process.num_timesteps = 20
    family_named(config.model.model).miniature(config)
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


def write_random_pipeline(folder: str | os.PathLike, config: ConfigDict, seed: int = 0) -> None:
    """Writes a pipeline of diffusers of random weights, for runs in miniature and tests.

    Args:
      folder: a new one; config.pipeline may be it.
      config: the experiment's, in miniature (`runlocal`): the network is its config.model, the
        scheduler its process and sampler.
      seed: of the weights.
    """
    model = config_from_dict(config.model.to_dict(), partial=True)
    tokens = 16
    with tempfile.TemporaryDirectory() as scratch:
        words = ("a", "photo", "of", "the", "digit", "cat", "dog")
        tokenizer = train_tokenizer(Path(scratch) / "tokenizer", words, 520, tokens)
        levels = (config.data.image_size // model.image_size).bit_length()
        write_random_autoencoder(
            Path(scratch) / "vae", image_size=config.data.image_size, levels=levels, seed=seed
        )
        parts = {
            "vae": functools.partial(save_as_diffusers, network=load_autoencoder(scratch)),
            "text_encoder": functools.partial(
                write_random_text_encoder,
                vocab_size=tokenizer.vocab_size,
                width=config.model.context_dim,
                length=tokens,
                seed=seed,
            ),
            "tokenizer": functools.partial(
                train_tokenizer, texts=words, vocab_size=520, length=tokens
            ),
        }
        scheduler = make_process(config.process).scheduler(config.evaluation)
        join_pipeline(folder, model, building.create(model, seed)[1], parts, scheduler)
