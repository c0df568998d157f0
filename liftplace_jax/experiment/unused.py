"""Fields of a config that are set, and do nothing beside the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.experiment.fields import leaves
from liftplace_jax.families.registry import family_named
from liftplace_jax.training.objective import BASIC_METHODS, METHODS, OUTPUT_LOSSES, Method


def unused_fields(config: ConfigDict) -> Iterator[str]:
    """A line for each field that has neither its default nor the family's preset, and is not used.

    Args:
      config: the experiment's, checked.
    """
    found, usual = dict(leaves(config)), usual_values(config.model.model)
    for prefix, (uses, whose) in _USES.items():
        if uses(config):
            continue
        for field, value in found.items():
            if (field + ".").startswith(prefix + ".") and value not in usual[field]:
                yield f"config.{field}={value} does nothing here: it is of {whose}"


@functools.cache
def usual_values(family: str) -> dict[str, tuple[Any, ...]]:
    """Field -> what it is where nobody has set it."""
    plain, preset = default_config(family), default_config(family)
    family_named(family).preset(preset)
    published = dict(leaves(preset))
    return {field: (value, published.get(field, value)) for field, value in leaves(plain)}


def _methods(config: ConfigDict) -> list[Method]:
    names = BASIC_METHODS if config.method == "all" else config.method.split("+")
    return [METHODS[name] for name in names]


def _any(*outputs: str | None) -> Callable[[ConfigDict], bool]:
    return lambda config: any(method.output in outputs for method in _methods(config))


def _features(config: ConfigDict) -> bool:
    return any(method.feature for method in _methods(config))


def _weighs(config: ConfigDict) -> bool:
    return _any(*OUTPUT_LOSSES)(config) and config.distill.loss.terms == "both"


def _decays(room: str) -> Callable[[ConfigDict], bool]:
    return lambda config: config[room].optimizer.schedule != "constant"


_USES: dict[str, tuple[Callable[[ConfigDict], bool], str]] = {
    "distill.scale": (_any("output_kd", *OUTPUT_LOSSES), "methods with a loss on outputs"),
    "distill.feature_scale": (_features, "methods with a loss on features"),
    "distill.feature": (_features, "methods with a loss on features"),
    "distill.layer_map": (_features, "methods with a loss on features"),
    "distill.loss.variant": (_any(*OUTPUT_LOSSES), "methods with LIFT or PLACE"),
    "distill.loss.norm": (_any(*OUTPUT_LOSSES), "methods with LIFT or PLACE"),
    "distill.loss.eps": (_any(*OUTPUT_LOSSES), "methods with LIFT or PLACE"),
    "distill.loss.terms": (_any(*OUTPUT_LOSSES), "methods with LIFT or PLACE"),
    "distill.loss.per": (_any("lift"), "methods with LIFT alone"),
    "distill.loss.group_size": (_any("place"), "methods with PLACE"),
    "distill.loss.grouping": (_any("place"), "methods with PLACE"),
    "distill.weight.name": (_weighs, "methods with LIFT or PLACE, distill.loss.terms=both"),
    "distill.weight.value": (
        lambda c: _weighs(c) and c.distill.weight.name in ("constant", "learnable"),
        "distill.weight.name=constant and learnable",
    ),
    "distill.weight.direction": (
        lambda c: _weighs(c) and c.distill.weight.name in ("cosine", "linear"),
        "distill.weight.name=cosine and linear",
    ),
    "teacher.optimizer.final_scale": (_decays("teacher"), "optimizer.schedule=cosine and linear"),
    "distill.optimizer.final_scale": (_decays("distill"), "optimizer.schedule=cosine and linear"),
    "evaluation.eta": (lambda c: c.evaluation.sampler == "ddim", "evaluation.sampler=ddim"),
    "evaluation.guidance_channels": (
        lambda c: c.evaluation.guidance != 1,
        "an evaluation.guidance other than 1",
    ),
    "evaluation.curve_samples": (
        lambda c: c.evaluation.curve_every > 0,
        "an evaluation.curve_every above 0",
    ),
    "evaluation.weights": (lambda c: bool(c.evaluation.features), "evaluation.features"),
    "evaluation.inception_rule": (lambda c: bool(c.evaluation.features), "evaluation.features"),
    "evaluation.repeat_prompts": (
        lambda c: bool(c.evaluation.prompts),
        "evaluation.prompts",
    ),
}
"""Field, or room -> (whether a config uses it, of what it is)."""
