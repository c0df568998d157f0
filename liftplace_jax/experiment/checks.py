"""What can be known of a config before anything is computed: every field is in its range."""

from __future__ import annotations

import math
import os

import jax
from ml_collections import ConfigDict

from liftplace_jax import evaluation
from liftplace_jax.data.pipeline import RESIZES
from liftplace_jax.diffusion import PROCESSES
from liftplace_jax.experiment.configuration import (
    check_choice,
    under,
)
from liftplace_jax.experiment.fields import changed_from_default, check_fields, leaves
from liftplace_jax.experiment.unused import usual_values
from liftplace_jax.families.registry import family_named
from liftplace_jax.host.buckets import on_this_machine
from liftplace_jax.host.sharding import check_rules
from liftplace_jax.losses import PUBLISHED
from liftplace_jax.losses.weighting import DIRECTIONS
from liftplace_jax.nn.layers import REMAT_POLICIES
from liftplace_jax.training.features import read_layer_map
from liftplace_jax.training.objective import (
    BASIC_METHODS,
    FEATURE_SCHEDULES,
    METHODS,
    SUM_OR_MEAN,
    WEIGHTS,
)
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.profiling import TRANSFER_GUARDS, read_profile_steps

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "high", "highest")
"""Of `jax.default_matmul_precision`: bfloat16 or TF32 passes, three of them, or float32."""


def check_config(config: ConfigDict) -> None:
    """Checks every field that can be judged without a network.

    Raises:
      ValueError: names the first field that cannot be, and what it may be.
    """
    check_fields(config)
    for method in config.method.split("+") if config.method != "all" else ():
        if method not in METHODS:
            check_choice("method", config.method, [*METHODS, "all"])
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ValueError(f"config.seeds must be different numbers >= 0, got {config.seeds}")
    for room in ("teacher", "distill"):
        _check_training(config, room, config[room])
    _check_compress(config)
    _check_choices(config)
    _check_process(config)
    _check_distill(config)
    if config.data_cache:
        on_this_machine(config.data_cache, "config.data_cache")
    read_profile_steps(config.profile_steps)
    check_rules(config.sharding_rules)
    _check_evaluation(config)
    if config.data.name == "folder" and not config.data.path:
        raise ValueError("config.data.path must be the folder of images of config.data.name=folder")
    if bool(config.latents.autoencoder) != bool(config.latents.path):
        raise ValueError(
            "config.latents.autoencoder and config.latents.path belong together: set both (latent "
            "diffusion) or neither (images)"
        )
    _check_decoding(config.latents)
    if config.pipeline and family_named(config.model.model).format.pipeline is None:
        raise ValueError(
            f"config.pipeline is not for a {config.model.model!r}: set config.teacher.checkpoint "
            "and config.latents.autoencoder to it"
        )
    if config.data.path and config.data.name != "folder":
        raise ValueError(
            f"config.data.path is for config.data.name=folder only, which is {config.data.name!r}"
        )
    crop = config.data.crop
    if crop and not (len(crop) == 4 and crop[0] < crop[2] and crop[1] < crop[3]):
        raise ValueError(
            f"config.data.crop must be (left, upper, right, lower) in pixels, got {crop}"
        )


def _check_decoding(fields):
    for field, default in (("decode_dtype", "float32"), ("tile", 0)):
        if fields[field] != default and not fields.autoencoder:
            raise ValueError(
                f"config.latents.{field} {fields[field]}: without config.latents.autoencoder "
                "nothing is decoded"
            )


def _check_compress(config):
    """Fields and ranges are the pruner's."""
    with under("model: "):
        family = family_named(config.model.get("model"))
    with under("compress."):
        family.pruner(config.compress.pruner)
    for name, part in config.compress.items():
        if isinstance(part, ConfigDict):
            _check_training(config, f"compress.{name}", part)


def _check_choices(config):
    choices = {
        "transfer_guard": (None, *TRANSFER_GUARDS),
        "data.resize": RESIZES,
        "process.reduction": SUM_OR_MEAN,
        "distill.feature.reduction": SUM_OR_MEAN,
        "distill.feature.layers": SUM_OR_MEAN,
        "distill.feature.schedule": FEATURE_SCHEDULES,
        "distill.loss.variant": PUBLISHED,
        "distill.weight.name": WEIGHTS,
        "distill.weight.direction": DIRECTIONS,
        "evaluation.features": (None, *evaluation.FEATURES),
        "evaluation.inception_rule": evaluation.INCEPTION_RULES,
        "evaluation.dtype": DTYPES,
        "evaluation.precision": PRECISIONS,
        "latents.decode_dtype": DTYPES,
        "text.dtype": DTYPES,
    }
    found = dict(leaves(config))
    for field, names in choices.items():
        check_choice(field, found[field], names)


def _check_process(config):
    """No field is set that is another process' or sampler's; unknown ones are refused later."""
    if config.process.kind not in PROCESSES:
        return
    process, sampler = PROCESSES[config.process.kind], config.evaluation.sampler
    known = {name for other in PROCESSES.values() for name in other.fields}
    _refuse_set(config, "process", known - set(process.fields), f"process.kind={process.kind}")
    if sampler in process.samplers:
        lists = [names for other in PROCESSES.values() for names in other.samplers.values()]
        others = set().union(*lists) - set(process.samplers[sampler])
        _refuse_set(config, "evaluation", others, f"evaluation.sampler={sampler}")


def _refuse_set(config, room, names, choice):
    fields = [f"{room}.{name}" for name in sorted(names)]
    found, usual = dict(leaves(config)), usual_values(config.model.model)
    for field, default in changed_from_default(config, fields).items():
        if found[field] not in usual[field]:  # the family's preset is nobody's wish
            raise ValueError(
                f"config.{field} must be {default!r} with config.{choice}, which has none"
            )


def _check_training(config, room, fields):
    check_choice(f"{room}.dtype", fields.dtype, DTYPES)
    check_choice(f"{room}.precision", fields.precision, PRECISIONS)
    check_choice(f"{room}.remat", fields.remat, (None, *REMAT_POLICIES))
    if fields.scan_blocks and not family_named(config.model.model).config.equal_blocks:
        raise ValueError(
            f"config.{room}.scan_blocks: a {config.model.model!r} is no stack of equal blocks"
        )
    if fields.batch_size % fields.accumulation:
        raise ValueError(
            f"config.{room}.accumulation {fields.accumulation} does not divide "
            f"config.{room}.batch_size {fields.batch_size}"
        )
    with under(f"{room}."):
        make_optimizer(fields.optimizer, fields.steps)


def _check_distill(config):
    fields = config.distill
    if not 0 < fields.weight.value < 1 and fields.weight.name == "learnable":
        raise ValueError("config.distill.weight.value of a learnable weight must be in (0, 1)")
    read_layer_map(fields.layer_map)
    for name in BASIC_METHODS if config.method == "all" else config.method.split("+"):
        method = METHODS[name]
        scales = {"task_scale": True, "scale": method.output, "feature_scale": method.feature}
        scales = [scale for scale, used in scales.items() if used]
        if not any(fields[scale] for scale in scales):
            said = ", ".join(f"config.distill.{scale}" for scale in scales)
            raise ValueError(f"{said}: all that method {name} minimises is multiplied by 0")


def check_batches(config: ConfigDict, shape: tuple[int, ...]) -> None:
    """Refuses batches that cannot be: each is one float32 array in the processes' memory.

    Args:
      config: the experiment's.
      shape: of an example, (H, W, C).

    Raises:
      ValueError: names the field.
    """
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()
    for field, batch in leaves(config):
        needed = 4 * math.prod(shape) * batch if field.endswith("batch_size") else 0
        if needed > memory:
            raise ValueError(
                f"config.{field} {batch}: so many examples of {shape} take {needed / 2**30:,.0f} "
                f"GiB, there are {memory / 2**30:,.0f}"
            )


def check_neighbours(config: ConfigDict, count: int) -> None:
    """Raises a ValueError if real samples, so many, are too few for precision and recall."""
    if count <= config.evaluation.neighbours:
        raise ValueError(
            f"config.evaluation.neighbours {config.evaluation.neighbours} must be below the number "
            f"of real images, {count}"
        )


def _check_evaluation(config):
    every = config.evaluation.curve_every
    if every and not config.evaluation.features:
        raise ValueError(
            f"config.evaluation.curve_every must be 0 without config.evaluation.features, "
            f"got {every}"
        )
    for room in ("teacher", "distill") if every else ():
        if every % config[room].log_every:
            raise ValueError(
                f"config.evaluation.curve_every {every} is no multiple of config.{room}.log_every "
                f"{config[room].log_every}"
            )
    splits = evaluation.INCEPTION_RULES[config.evaluation.inception_rule].get("splits", 1)
    if config.evaluation.features and config.evaluation.num_samples < splits:
        raise ValueError(
            f"config.evaluation.num_samples {config.evaluation.num_samples} must be at least "
            f"{splits}, the splits of config.evaluation.inception_rule="
            f"{config.evaluation.inception_rule}"
        )
    if config.evaluation.clip is not None and config.latents.autoencoder:
        raise ValueError("config.evaluation.clip is for pixels: latents have no range, unset")
    if config.evaluation.neighbours >= config.evaluation.num_samples:
        raise ValueError(
            f"config.evaluation.neighbours {config.evaluation.neighbours} must be below "
            f"config.evaluation.num_samples {config.evaluation.num_samples}"
        )
