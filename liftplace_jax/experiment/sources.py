"""An experiment's data, by use ("train", "test"): images, and the latents of images."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from liftplace_jax import data

USES = ("train", "test")


def load_split(config: ConfigDict, split: str, channels: int) -> data.Source:
    """The images of a split of config.data."""
    fields = config.data
    return data.load_source(
        fields.name,
        split,
        data_dir=fields.data_dir,
        image_size=fields.image_size,
        path=fields.path,
        crop=fields.crop,
        channels=channels,
        resize=fields.resize,
        cache_dir=config.data_cache,
        memory_mb=config.memory_cache_mb,
    )


def open_images(config: ConfigDict, shape: tuple[int, int, int]) -> dict[str, data.Source]:
    """The images of config.data, by use.

    Args:
      config: the experiment's.
      shape: (H, W, C) that they must have.

    Raises:
      ValueError: they have another.
    """
    fields = config.data
    sources = {use: load_split(config, fields[f"{use}_split"], shape[-1]) for use in USES}
    if sources["train"].image_shape != shape:
        raise ValueError(
            f"data set {fields.name} has images {sources['train'].image_shape}, the model "
            f"takes {shape}: set config.data.image_size or config.model"
        )
    return sources


def open_latents(config: ConfigDict, model: Any) -> dict[str, data.LatentSource]:
    """The latents of config.latents.path, by use.

    Args:
      config: the experiment's.
      model: the network's config, whose input they must be.

    Raises:
      ValueError: they are not encoded yet, or of another shape.
    """
    path, cache = config.latents.path, config.data_cache
    sources = {use: data.load_latents(path, config.data[f"{use}_split"], cache) for use in USES}
    expected = (model.image_size, model.image_size, model.in_channels)
    if sources["train"].image_shape != expected:
        raise ValueError(
            f"the latents of {path} are {sources['train'].image_shape}, the model takes "
            f"{expected}: change config.model, or encode the data anew"
        )
    return sources
