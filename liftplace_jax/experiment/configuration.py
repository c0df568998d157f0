"""Configs: every field with its default, arguments after the colon, comparison and checks.

A config file is `get_config(arg)` over `default_config`; `main.py --config=FILE:method=lift,seed=1`
hands over the arg, and `--config.field=value` changes single fields.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from liftplace_jax.diffusion import PROCESSES
from liftplace_jax.families.family import Family
from liftplace_jax.families.registry import FAMILIES, family_named

SEPARATOR = ","
SETUP = (
    "mesh", "input_threads", "memory_cache_mb", "data_cache", "profile_steps", "compile_cache",
    "transfer_guard", "tensorboard", "distill.write_pipeline",
    *(f"{room}.{field}" for room in ("teacher", "distill", "compress.learned")
      for field in ("log_every", "checkpoint_every")),
)  # fmt: skip
"""Fields that say where and how a run runs, not what it computes: they may change under way.

evaluation.curve_every is a multiple of log_every, whichever that is: the curve has the same points.
"""

T5_TOKENS = 256
"""Of a text, as diffusers' pipeline of Stable Diffusion 3 gives them to its third encoder."""


PIPELINE_FIELDS = ("teacher.checkpoint", "latents.autoencoder", "text.folder")
"""Fields that config.pipeline stands for."""


def optimizer_config(**changes: Any) -> ConfigDict:
    """Adam with the published clipping; see `liftplace_jax.training.optimizer`."""
    return ConfigDict(
        dict(
            name="adam",
            learning_rate=2e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            grad_clip=1.0,
            schedule="constant",
            warmup_steps=0,
            final_scale=0.0,
        )
        | changes
    )


def training_config(**changes: Any) -> ConfigDict:
    """One training run: a teacher's, a student's, or a search of a pruner."""
    config = ConfigDict(
        dict(
            steps=1000,  # optimizer updates
            batch_size=64,  # global
            accumulation=1,  # parts of a batch, one after another, each with its adaptive weight
            ema_decay=0.9999,
            dtype="float32",  # of the computation: float32 or bfloat16
            # Of float32 products on TPUs and GPUs: one of `checks.PRECISIONS`; CPUs know but one.
            # The teacher's dtype and precision are those of importances (compress) too.
            precision="default",
            log_every=50,
            checkpoint_every=500,
            # A stack of equal blocks as a loop in the program: it compiles in less time, and copies
            # the blocks' parameters together at each step.
            scan_blocks=False,
        )
        | changes
    )
    # A policy of jax.checkpoint, such as "nothing_saveable", for less memory in more time.
    config.remat = config_dict.placeholder(str)
    config.optimizer = optimizer_config()
    return config


def compress_config(family: Family) -> ConfigDict:
    """How students are made: the fields of the family's usual pruner, and where to read one."""
    pruner = family.pruners[0]
    config = ConfigDict({"pruner": pruner.name})
    config.update(pruner.defaults(training_config))
    # Instead of the pruned teacher: a folder with model.safetensors and config.json, or a file of
    # published weights of the student that the fields above describe.
    config.checkpoint = config_dict.placeholder(str)
    config.entry = config_dict.placeholder(str)  # as teacher.entry
    return config


def default_config(family: str = next(iter(FAMILIES))) -> ConfigDict:
    """All fields of an experiment, pixel space, with their published or neutral defaults.

    Args:
      family: of the networks, a name of `FAMILIES`.

    Raises:
      ValueError: there is no such family.
    """
    networks = family_named(family)
    config = ConfigDict()
    config.name = "experiment"
    config.seed = 0  # of the teacher, and of pruning by random importance
    # A name of training.objective.METHODS, several of them joined by "+", or "all".
    config.method = "lift_place"
    config.seeds = (0,)  # one student for each method and seed

    config.data = ConfigDict(
        dict(
            name="digits",
            train_split="train",
            test_split="test",
            image_size=None,
            flip=False,
            resize="bilinear",
        )  # or "adm", as ImageNet is prepared by ADM and DiT
    )
    config.data.data_dir = config_dict.placeholder(str)  # default: TFDS's own
    config.data.path = config_dict.placeholder(str)  # of the images, with data.name=folder
    config.data.image_size = config_dict.placeholder(int)
    # (left, upper, right, lower) in pixels, cut out first; default: the data set's published crop.
    config.data.crop = config_dict.placeholder(tuple)

    config.model = ConfigDict({"model": family, **networks.default_model})
    config.process = ConfigDict(
        dict(
            kind="gaussian",
            schedule="linear",
            num_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            prediction="epsilon",
            variance="fixed",
            timesteps="antithetic",
            reduction="sum",
            # Of kind=flow: see diffusion.Flow; its num_timesteps is the network's t at pure noise.
            shift=1.0,
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=1.29,
        )
    )

    config.teacher = training_config()
    # Instead of training one: a folder of ours (model.safetensors and config.json) or of diffusers'
    # UNet2DModel, DiTTransformer2DModel or UNet2DConditionModel, or a file of published weights
    # (.safetensors, .pt, .pth, .ckpt, .bin, .npz). Whichever it is, it must be what config.model
    # says; only what is no property of weights (dropout, class_dropout) is always config.model's.
    config.teacher.checkpoint = config_dict.placeholder(str)
    # Where in a file of several state dicts: a key ("ema") or the number of an item ("-1").
    config.teacher.entry = config_dict.placeholder(str)

    config.compress = compress_config(networks)

    config.distill = training_config()
    config.distill.task_scale = 1.0  # of the diffusion loss
    config.distill.scale = 1.0  # lambda of the output loss
    config.distill.feature_scale = 1e-6  # of the feature loss, where the method has it
    # mask_sigma: values so many standard deviations off are left out; layers: "sum" or "mean" of
    # theirs; schedule: "linear" lets feature_scale fall to 0 until the end.
    config.distill.feature = ConfigDict(
        dict(reduction="sum", layers="sum", adapters=True, schedule="constant")
    )
    config.distill.feature.mask_sigma = config_dict.placeholder(float)
    # {student feature: teacher feature}, as JSON for the command line's sake. Default: all, by
    # name; of DiTs the published map for their depths, whichever blocks the student kept, and of
    # Stable Diffusion's U-Nets the outputs of blocks of equal resolution.
    config.distill.layer_map = config_dict.placeholder(str)
    # Whether each student is also written as a whole pipeline of diffusers, "pipeline" in its
    # folder: with the other parts of the teacher's pipeline, or of latents, text and process.
    config.distill.write_pipeline = False
    config.distill.loss = ConfigDict(
        dict(
            variant="pixel",
            norm=None,
            eps=None,
            terms="both",
            per="channel",
            group_size=16,
            grouping="error",
        )
    )
    config.distill.loss.norm = config_dict.placeholder(str)  # default: the variant's
    config.distill.loss.eps = config_dict.placeholder(float)
    config.distill.weight = ConfigDict(dict(name="adaptive", value=0.3, direction="increase"))

    # features: a name of evaluation.FEATURES, or None: samples are drawn, not scored.
    # curve_every: steps of training between Frechet distances of curve_samples samples, for a curve
    # (a multiple of log_every); 0: none.
    config.evaluation = ConfigDict(
        dict(
            features="digits",
            num_samples=1024,
            batch_size=256,
            sample_steps=50,
            skip_type="uniform",
            eta=0.0,
            steps_offset=0,
            set_alpha_to_one=True,
            seed=12345,
            neighbours=5,
            clip=None,
            curve_every=0,
            curve_samples=256,
            guidance=1.0,
            allow_few=False,
            dtype="float32",
            precision="highest",
            jpeg_before=0,
            jpeg=0,
            inception_rule="adm",
            repeat_prompts=False,
        )
    )
    # A name of the process' samplers; default: its usual one, "ddim" or "euler", also where
    # process.kind changes later.
    config.evaluation.sampler = config_dict.FieldReference(
        config.process.get_ref("kind"), str, _Operation(_usual_sampler)
    )
    # steps_offset, set_alpha_to_one: of Stable Diffusion's sampling, 1 and False with
    # skip_type=leading; see diffusion.spacing.
    # dtype, precision: as those of config.teacher, of all networks where they are judged.
    # allow_few: fewer samples than features have dimensions, whose Frechet distance compares with
    # nothing; the report says so.
    # Channels that classifier-free guidance acts on; default: all of the mean. DiT published 3.
    config.evaluation.guidance_channels = config_dict.placeholder(int)
    # What is done to samples before they are looked at (see `evaluation.handling`, whose BK_SDM are
    # these fields as published): saved as JPEG of a quality (0: not), squeezed to a size, saved
    # again. Real images of the training data are, too, but for jpeg_before.
    config.evaluation.resize = config_dict.placeholder(int)
    # inception_rule: how the Inception Score splits samples, a name of evaluation.INCEPTION_RULES.
    # Of networks that are told texts: a file of one prompt a line, or a table (.csv) with a column
    # "text"; or "captions": those of data.test_split. Sample i has prompt i, with repeat_prompts
    # prompt i mod their number; guidance leads away from negative_prompt.
    config.evaluation.prompts = config_dict.placeholder(str)
    config.evaluation.negative_prompt = ""
    # A folder of transformers' CLIPModel, or "emoji": samples and their prompts get a CLIP score.
    config.evaluation.clip_model = config_dict.placeholder(str)
    # File of the extractor's weights, where it does not ship with them (the Inception ones).
    config.evaluation.weights = config_dict.placeholder(str)
    # Reference statistics, of liftplace_jax.evaluate ref, pytorch-fid or ADM; default: the training
    # data are read.
    config.evaluation.reference = config_dict.placeholder(str)
    # Score a second time with predicted data limited to +-clip at each step; default: do not.
    config.evaluation.clip = config_dict.placeholder(float)
    # Latent diffusion: the autoencoder (a folder), and where liftplace_jax.encode puts the
    # encoded data. Both or neither.
    config.latents = ConfigDict()
    config.latents.autoencoder = config_dict.placeholder(str)
    config.latents.path = config_dict.placeholder(str)
    config.latents.decode_dtype = "float32"  # of the computation, where samples are decoded
    # Pixels along a side of the tiles in which larger images are decoded, for less memory in more
    # time; 0: none.
    config.latents.tile = 0
    # Networks that are told texts: a folder of a pipeline, with a tokenizer and a text encoder, or
    # with the files of both; entry: which of its text encoders, or which variant of the weights
    # ("fp16"). dropout: share of training captions that become the empty text, for teacher and
    # student alike. cached: the data carry the encoder's states, written by liftplace_jax.encode,
    # and not token ids, of which states are computed in every step. Of a pipeline with several text
    # encoders (Stable Diffusion 3) all are joined, unless entry names one; left_out: names of those
    # that zeros stand for, such as ("text_encoder_3",); t5_tokens: the tokens that T5 is given.
    config.text = ConfigDict(
        dict(dropout=0.0, cached=False, dtype="float32", left_out=(), t5_tokens=T5_TOKENS)
    )
    config.text.folder = config_dict.placeholder(str)
    config.text.entry = config_dict.placeholder(str)
    # A folder of a pipeline of diffusers: teacher.checkpoint, latents.autoencoder and text.folder,
    # where these are not set; for families that whole pipelines are known of.
    config.pipeline = config_dict.placeholder(str)
    for field in PIPELINE_FIELDS if networks.format.pipeline else ():
        room, name = field.split(".")
        config[room][name] = config.get_oneway_ref("pipeline")
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))
    # (regular expression, partition) pairs; default: replicated. ((r"kernel", ("fsdp",)),) splits
    # all kernels by their last dimension. Tables that are looked up (of labels) are best whole.
    config.sharding_rules = ()
    config.input_threads = 2  # that make training batches ahead, each process's own
    config.memory_cache_mb = 256  # MiB; splits that take less, decoded, stay in memory
    # Folder on each host for data that lie in a bucket; default: ~/.cache/liftplace_jax.
    config.data_cache = config_dict.placeholder(str)
    config.profile_steps = config_dict.placeholder(str)  # "100:105": a trace into the run's folder
    config.compile_cache = config_dict.placeholder(str)  # a folder, where programs are kept
    config.transfer_guard = config_dict.placeholder(str)  # "log" or "disallow", within a step
    config.tensorboard = True
    return config


class _Operation(NamedTuple):
    """What a `FieldReference` makes of the field that it follows."""

    fn: Callable[[Any], Any]
    args: tuple[Any, ...] = ()


def _usual_sampler(kind: str) -> str:
    process = PROCESSES.get(kind) or next(iter(PROCESSES.values()))
    return next(iter(process.samplers))


def experiment_config(
    arg: str | None,
    name: str,
    *,
    method: str,
    family: str = next(iter(FAMILIES)),
    others: Mapping[str, Any] | None = None,
    **compress: Any,
) -> tuple[ConfigDict, ConfigDict]:
    """The default config with the arguments of every experiment.

    Args:
      arg: what follows the colon: method, seed, seeds, runlocal and those below.
      name: of the experiment.
      method: the default one.
      family: of the networks, a name of `FAMILIES`.
      others: more arguments, with their defaults, that the caller understands.
      compress: fields of config.compress that are arguments too, with their defaults.

    Returns:
      (config, the arguments as read).

    Raises:
      ValueError: a bad argument; see `parse_arg`.
    """
    args = parse_arg(
        arg, method=method, seed=0, seeds=(-1,), runlocal=False, **compress, **(others or {})
    )
    config = default_config(family)
    config.name = name
    config.method = args.method
    config.seed = args.seed
    config.seeds = args.seeds if args.seeds != (-1,) else (args.seed,)
    for field in compress:
        value = args[field]
        # On the command line a comma separates arguments.
        config.compress[field] = value.replace("+", ",") if isinstance(value, str) else value
    return config, args


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Reads "key=value,flag" into the types of `defaults`.

    A boolean key may stand alone ("runlocal"). A tuple is written with "+": "seeds=0+1+2".

    Raises:
      ValueError: unknown key, or a value of another type; names it and lists the keys.
    """
    result = dict(defaults)
    for part in filter(None, (arg or "").split(SEPARATOR)):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown config argument {key!r}; known: {sorted(defaults)}")
        try:
            result[key] = _read(text, defaults[key]) if equals else _flag(defaults[key])
        except ValueError as error:
            kind = type(defaults[key]).__name__
            raise ValueError(f"config argument {part!r}: expected {key}=<{kind}>") from error
    return ConfigDict(result)


def _flag(default):
    if not isinstance(default, bool):
        raise ValueError
    return True


def _read(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        return (
            {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            if (text.lower() in ("true", "1", "false", "0"))
            else _flag(None)
        )
    if isinstance(default, tuple):
        return tuple(_read(item, default[0]) for item in text.split("+"))
    return type(default)(text)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types."""
    return json.loads(config.to_json_best_effort())


def filled(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict `old` with what only `new` has: fields that did not exist yet."""
    return {
        key: filled(old[key], new[key])
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping)
        else old.get(key, new.get(key))
        for key in old.keys() | new.keys()
    }


def completed(old: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with the fields that newer versions have added, as their defaults.

    Raises:
      ValueError: it is of a family that is not known.
    """
    model = old.get("model")
    family = model.get("model") if isinstance(model, Mapping) else None
    defaults = to_json(default_config(family) if family in FAMILIES else default_config())
    compress = old.get("compress")
    if isinstance(compress, Mapping) and "pruner" not in compress:
        # Once it had the fields of all families' pruners.
        kept = {name: compress[name] for name in compress if name in defaults["compress"]}
        old = {**old, "compress": kept}
    if isinstance(model, Mapping):
        del defaults["model"]  # which has other fields where another network is meant
    return filled(old, defaults)


def without_setup(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as a nested dict, without the fields of SETUP."""
    return {
        key: without_setup(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if prefix + key not in SETUP
    }


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Raises a ValueError naming the config field if `value` is not among `choices`."""
    if value not in choices:
        names = sorted(name for name in choices if name is not None)
        unset = " or None" if None in choices else ""
        raise ValueError(f"config.{field} must be one of {names}{unset}, got {value!r}")


@contextlib.contextmanager
def under(prefix: str) -> Iterator[None]:
    """Puts the config's part before the message of a ValueError, which starts with the field."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.{prefix}{error}") from error
