"""Students of fewer blocks, for models that are a stack of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from liftplace_jax.compress import depth as depths
from liftplace_jax.compress import learned_depth
from liftplace_jax.compress.pruner import Search, Student, TeacherNetwork, Tools
from liftplace_jax.host.ranges import COUNT, SIDE, positive, whole

LAYERS = ("uniform", "learned", *depths.LAYER_IMPORTANCES)
"""Choices of `layers`, beside a list of block numbers."""


class DepthPruner:
    """Keeps `depth` blocks of the teacher; see `Pruner`.

    Fields of config.compress:
      depth: how many blocks stay.
      layers: which: "uniform"; those of most influence by "similarity" or "loss", on
        score_batches batches of score_batch_size; "learned"; or numbers, "0,2,5".
      learned: the training of "learned", as TinyFusion: keep of each group of consecutive blocks;
        default: of the smallest groups that leave depth. gate_scale is the published 100, times
        10 for the published learning rate of the gates, ten times the rest's.
    """

    name = "depth"
    ranges = {
        "depth": whole(1, SIDE, optional=True),
        "score_batches": COUNT,
        "score_batch_size": COUNT,
        "learned.rank": whole(1, SIDE),
        "learned.alpha": positive(),
        "learned.gate_scale": positive(),
        "learned.temperature_start": positive(),
        "learned.temperature_end": positive(),
        "learned.keep": whole(1, SIDE, optional=True),
        "learned.group": whole(1, SIDE, optional=True),
    }

    def defaults(self, training: Callable[..., ConfigDict]) -> ConfigDict:
        learned = training(
            ema_decay=0.999,
            rank=8,
            alpha=16.0,
            gate_scale=1000.0,
            temperature_start=4.0,
            temperature_end=0.1,
        )
        learned.optimizer.update(name="adamw", learning_rate=1e-4)
        learned.keep = config_dict.placeholder(int)
        learned.group = config_dict.placeholder(int)
        config = ConfigDict(
            dict(layers="uniform", score_batches=16, score_batch_size=64, learned=learned)
        )
        config.depth = config_dict.placeholder(int)
        return config

    def trainings(self, fields: Any) -> tuple[str, ...]:
        return ("learned",) if fields.layers == "learned" else ()

    def predict(self, fields: Any, teacher: Any) -> Any:
        """The student's config; kept_layers only if `layers` says them."""
        if fields.depth is None:
            raise ValueError(f"depth must be set: how many of {teacher.depth} blocks stay")
        # The checks do not depend on which blocks stay.
        student = depths.pruned_depth_config(
            teacher, depths.uniform_layers(fields.depth, teacher.depth)
        )
        if fields.layers == "learned":
            _groups(fields, teacher)
        if fields.layers in LAYERS:
            return student.replace(kept_layers=None)
        try:
            layers = depths.read_layers(fields.layers)
        except ValueError as error:
            raise ValueError(f"{error}; the choices are {sorted(LAYERS)}") from error
        if len(layers) != fields.depth:
            raise ValueError(f"layers names {len(layers)} blocks, compress.depth is {fields.depth}")
        return depths.pruned_depth_config(teacher, layers)

    def prune(self, fields: Any, teacher: TeacherNetwork, tools: Tools) -> Student:
        config, why = teacher.config, {}
        if fields.layers == "uniform":
            kept = depths.uniform_layers(fields.depth, config.depth)
        elif fields.layers == "learned":
            kept, why = _learned(fields, config, tools)
        elif fields.layers in LAYERS:
            scores = depths.layer_scores(
                fields.layers,
                teacher.graphdef,
                teacher.params,
                tools.noised(fields.score_batches, fields.score_batch_size),
            )
            kept = depths.most_important(scores, fields.depth, config.always_kept)
            why = {"scores": scores.tolist()}
        else:
            kept = depths.read_layers(fields.layers)
        student, tensors = depths.prune_depth(config, tools.tensors(teacher.params), kept)
        return Student(student, tensors, {"layers": fields.layers, "kept": kept, **why})


def _groups(fields: Any, teacher: Any) -> learned_depth.BlockGroups:
    depth, always = teacher.depth, teacher.always_kept
    keep, size = fields.learned.keep, fields.learned.group
    if keep is None and size is None:
        return learned_depth.smallest_groups(fields.depth, depth, always)
    if keep is None or size is None:
        raise ValueError(f"learned: set keep and group both or neither, got {keep} and {size}")
    groups = learned_depth.make_groups(keep, size, depth, always)
    if groups.kept != fields.depth:
        raise ValueError(
            f"learned: to keep {groups.keep} of {groups.size} leaves {groups.kept} of the "
            f"teacher's {depth} blocks, compress.depth is {fields.depth}"
        )
    return groups


def _learned(fields: Any, teacher: Any, tools: Tools) -> tuple[tuple[int, ...], Mapping[str, Any]]:
    """(blocks that stay, the learned distribution)."""
    groups, learned = _groups(fields, teacher), fields.learned

    def temperature(step, steps):
        return learned_depth.annealed(
            learned.temperature_start, learned.temperature_end, step, steps
        )

    def apply(graphdef, base, step, steps):
        return learned_depth.searched_apply(
            graphdef,
            base,
            groups,
            lora_scale=learned.alpha / learned.rank,
            gate_scale=learned.gate_scale,
            temperature=temperature(step, steps),
        )

    def metrics(params, step, steps):
        masks = jax.nn.softmax(groups.logits(params["gates"], learned.gate_scale))
        stay = learned_depth.expected_gates(masks, groups)
        found = {f"keep.{layer}": stay[layer] for layer in range(groups.depth)}
        return found | {"temperature": temperature(step, steps)}

    def init(key, base):
        return learned_depth.init_search(key, base, groups, learned.rank)

    # The averaged gates decide, as published.
    gates = np.asarray(tools.search(Search(learned, init, apply, metrics))["gates"], np.float64)
    probabilities = jax.nn.softmax(groups.logits(gates, learned.gate_scale))
    return learned_depth.most_probable(gates, groups), {
        "group": groups.size,
        "masks": groups.masks.astype(int).tolist(),
        "probabilities": np.asarray(probabilities).tolist(),
    }
