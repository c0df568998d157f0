"""Carries a network's weights between this repository's folders, published names and diffusers.

    python -m liftplace_jax.convert --model=runs/digits/teacher --to=diffusers --out=unet
    python -m liftplace_jax.convert --model=ema.ckpt --config=configs/digits.py --to=published \\
        --out=teacher

    python -m liftplace_jax.convert --model=runs/sd/student/lift_place/seed0 --to=diffusers \\
        --pipeline=stable-diffusion-2-1-base --out=small-sd

--to=published writes model.safetensors (names of the published checkpoints) and config.json;
--to=diffusers a folder for diffusers' `from_pretrained`: of the network alone, or with --pipeline a
whole pipeline, whose other parts are copied from that one.
"""

from __future__ import annotations

from absl import flags

from liftplace_jax.experiment.config_flag import define_config_flag
from liftplace_jax.host.flags import REFUSED, given, quieten_libraries, refuse, start

FORMATS = ("published", "diffusers")

_MODEL = flags.DEFINE_string(
    "model", None, "a folder of this repository or of diffusers, or a file of weights"
)
_CONFIG = define_config_flag(
    "for a file of weights: a config whose `model` it is, FILE.py[:key=value,...]"
)
_ENTRY = flags.DEFINE_string(
    "entry",
    None,
    "where in a file: a key or the number of an item (ema.shadow, -1), or how names "
    "begin; in a folder: a folder in it or a variant (unet_ema, fp16)",
)
_TO = flags.DEFINE_enum("to", None, FORMATS, "what to write")
_PIPELINE = flags.DEFINE_string(
    "pipeline", None, "for --to=diffusers: a pipeline's folder, whose other parts are copied"
)
_OUT = flags.DEFINE_string("out", None, "a new folder")
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a refused input")


def main(argv: list[str]) -> None:
    """Entry point under absl."""
    if len(argv) > 1:
        refuse(f"unexpected arguments: {argv[1:]}")
    quieten_libraries()
    try:
        print(convert())
    except REFUSED as error:
        if _DEBUG.value:
            raise
        refuse(str(error))


def convert() -> str:
    """Does what the flags say; returns what was done, as a sentence."""
    # Late, so that --help and a misspelt flag answer at once.
    from liftplace_jax import weights
    from liftplace_jax.experiment.configuration import under
    from liftplace_jax.experiment.fields import check_fields
    from liftplace_jax.families import registry
    from liftplace_jax.families.loading import load_checkpoint, write_diffusers
    from liftplace_jax.families.pipelines import write_pipeline
    from liftplace_jax.host.buckets import as_path, on_this_machine
    from liftplace_jax.host.files import replacing_folder
    from liftplace_jax.nn import building

    if _PIPELINE.value is not None and _TO.value != "diffusers":
        raise ValueError(f"--pipeline is for --to=diffusers, not --to={_TO.value}")
    path, out = as_path(given(_MODEL)), on_this_machine(given(_OUT), "--out")
    config = None
    if _CONFIG.value is not None:
        check_fields(_CONFIG.value)
        with under("model: "):
            config = registry.config_from_dict(_CONFIG.value.model.to_dict(), partial=True)
    try:
        network = load_checkpoint(path, config, _ENTRY.value)
    except weights.EntryError as error:
        raise ValueError(f"{error} (--entry)") from error
    more = ""
    if _PIPELINE.value is not None:
        written = write_pipeline(out, network.config, network.params, _PIPELINE.value)
        more = f"; {', '.join(written.parts)} of {_PIPELINE.value}"
        if written.left_out:
            more += f" but for what nothing reads there: {', '.join(written.left_out)}"
    elif _TO.value == "diffusers":
        write_diffusers(out, network.config, network.params)
    else:
        with replacing_folder(out) as folder:
            fields = network.config.described()
            weights.save_model(folder, fields, network.params)
    count = building.count_parameters(network.params)
    return f"{out}: {count:,} parameters of {path}, for {_TO.value}{more}"


def entry_point() -> None:
    """For `python -m`."""
    start(main, required=["model", "to", "out"])


if __name__ == "__main__":
    entry_point()
