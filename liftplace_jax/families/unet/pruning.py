"""Students of fewer channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.compress.pruner import Student, Tools
from liftplace_jax.families.unet.channels import NORMALISATIONS, prune_unet, pruned_config
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.importance import IMPORTANCES
from liftplace_jax.host.ranges import COUNT, SHARE


class ChannelPruner:
    """Removes a share of the channels; see `Pruner`.

    Fields of config.compress:
      ratio: share of channels removed.
      importance: "magnitude", "random" or "taylor".
      normalisation: "published" (the teacher's groups stay) or "adapted" (at least two channels
        each).
      taylor_threshold: see `taylor_gradients`.
      taylor_batch_size: images on which gradients are taken.
    """

    name = "channels"
    ranges = {"ratio": SHARE, "taylor_threshold": SHARE, "taylor_batch_size": COUNT}

    def defaults(self, training: Callable[..., ConfigDict]) -> ConfigDict:
        del training
        return ConfigDict(
            dict(
                ratio=0.9,
                importance="magnitude",
                normalisation="published",
                taylor_threshold=0.05,
                taylor_batch_size=64,
            )
        )

    def trainings(self, fields: Any) -> tuple[str, ...]:
        del fields
        return ()

    def predict(self, fields: Any, teacher: UNetConfig) -> UNetConfig:
        for field, known in (("importance", IMPORTANCES), ("normalisation", NORMALISATIONS)):
            if fields[field] not in known:
                raise ValueError(f"{field} must be one of {sorted(known)}, got {fields[field]!r}")
        return pruned_config(teacher, fields.ratio, NORMALISATIONS[fields.normalisation])

    def prune(self, fields: Any, teacher: Any, tools: Tools) -> Student:
        gradients = None
        if fields.importance == "taylor":
            gradients = tools.gradients(teacher, fields.taylor_batch_size, fields.taylor_threshold)
        pruned = prune_unet(
            teacher.config,
            tools.tensors(teacher.params),
            fields.ratio,
            IMPORTANCES[fields.importance](tools.seed),
            gradients=gradients,
            min_channels_per_group=NORMALISATIONS[fields.normalisation],
        )
        return Student(pruned.config, pruned.tensors)
