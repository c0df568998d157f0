"""Students of fewer blocks, as a pruner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.compress.pruner import Student, TeacherNetwork, Tools
from liftplace_jax.families.sd_unet.config import SDUNetConfig
from liftplace_jax.families.sd_unet.students import kept_layers, prune_blocks, student_config
from liftplace_jax.host.ranges import Range


class BlockPruner:
    """Keeps some of the teacher's blocks, with its weights; see `Pruner`.

    Fields of config.compress:
      student: "base", "small", "tiny" or "extreme" as published, or the layers that stay, as of
        `kept_layers`.
    """

    name = "blocks"
    ranges: Mapping[str, Range] = {}

    def defaults(self, training: Callable[..., ConfigDict]) -> ConfigDict:
        del training
        return ConfigDict({"student": "base"})

    def trainings(self, fields: Any) -> tuple[str, ...]:
        del fields
        return ()

    def predict(self, fields: Any, teacher: SDUNetConfig) -> SDUNetConfig:
        return student_config(teacher, kept_layers(fields.student, teacher))

    def prune(self, fields: Any, teacher: TeacherNetwork, tools: Tools) -> Student:
        kept = kept_layers(fields.student, teacher.config)
        config, tensors, cuts = prune_blocks(teacher.config, tools.tensors(teacher.params), kept)
        return Student(
            config, tensors, {"student": fields.student, "kept": list(kept), "cut": cuts}
        )
