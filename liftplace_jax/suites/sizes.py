"""Suite "sizes": parameters and MACs of the published teachers and students, from shapes alone."""

from __future__ import annotations

from typing import Any

from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.suites.networks import pruned, published
from liftplace_jax.suites.options import Options, Result

RATIOS = (0.0, 0.3, 0.5, 0.7, 0.9)
PAPER = {
    ("celeba", 0.0): ("78.7M", "23.9G"), ("celeba", 0.5): ("19.7M", "6.0G"),
    ("celeba", 0.7): ("9.2M", "4.2G"), ("celeba", 0.9): ("1.3M", "0.8G"),
    ("bedroom", 0.0): ("113.7M", "248.7G"), ("bedroom", 0.3): ("63.2M", "138.8G"),
    ("bedroom", 0.5): ("28.5M", "62.4G"), ("bedroom", 0.7): ("12.6M", "52.4G"),
}  # fmt: skip
"""The rows of the paper's pixel-space table: parameters and MACs as printed there."""
PAPER_DITS = {
    "DiT-XL/2": ("675.1M", "118.7G"), "DiT-D14/2": ("340.5M", "59.4G"),
    "DiT-D7/2": ("173.1M", "29.7G"), "DiT-D4/2": ("101.4M", "17.0G"),
}  # fmt: skip
"""Those of its latent-space table."""
PAPER_SD_UNETS = {
    "sd-2.1-base": ("865.9M", "339.2G"), "bk-v2-base": ("583.5M", "224.1G"),
    "bk-v2-small": ("485.8M", "218.0G"), "bk-v2-tiny": ("326.8M", "205.3G"),
}  # fmt: skip
"""Those of its text-to-image table."""


def run(options: Options) -> Result:
    """Counts every model; quick: CIFAR-10's, two DiTs and SD 2.1-base with one student alone."""
    names = ("cifar10",) if options.quick else tuple(published("unet"))
    dits = ("DiT-XL/2", "DiT-D14/2") if options.quick else tuple(published("dit"))
    sd = ("sd-2.1-base", "bk-v2-base") if options.quick else tuple(published("sd_unet"))
    return {
        "title": "Exact sizes of the published U-Nets, DiTs and Stable Diffusion's U-Nets",
        "columns": [
            "data",
            "ratio",
            "parameters",
            "macs",
            "compression",
            "paper_parameters",
            "paper_macs",
        ],
        "formats": {"parameters": ",", "macs": ",", "compression": ".1f"},
        "rows": [_row(name, ratio) for name in names for ratio in RATIOS],
        "tables": {
            "dit": {
                "title": "Of the published DiTs",
                "columns": [
                    "model",
                    "depth",
                    "width",
                    "patch",
                    "parameters",
                    "macs",
                    "compression",
                    "paper_parameters",
                    "paper_macs",
                ],
                "formats": {"parameters": ",", "macs": ",", "compression": ".1f"},
                "rows": [_dit_row(name) for name in dits],
            },
            "sd_unet": {
                "title": "Of Stable Diffusion's U-Nets and BK-SDM's students",
                "columns": [
                    "model",
                    "widths",
                    "layers",
                    "parameters",
                    "macs",
                    "compression",
                    "paper_parameters",
                    "paper_macs",
                ],
                "formats": {"parameters": ",", "macs": ",", "compression": ".1f"},
                "rows": [_sd_row(name) for name in sd],
            },
        },
        "notes": [
            "ratio: share of channels removed by the published rule; 0 is the teacher. "
            "compression: the teacher's parameters / the model's.",
            "macs: of one forward pass on one image, counted as the published tables are, which "
            "differ: the U-Nets' without attention's products, the DiTs' with them.",
            "Stable Diffusion: 4x64x64 latents (sd-2.1: 4x96x96), 77 tokens. bk: fewer blocks; "
            "channels: all blocks, of fewer channels. compression: its teacher's parameters over "
            "the model's. The published file of v1's extreme student is that of tiny.",
            "DiTs: 4x32x32 latents of 256x256 images, 1000 classes; parameters with the positions, "
            "which are not trained. compression: of a depth-pruned DiT-XL/2, over its parameters.",
            "The paper's 9.2M (CelebA, 0.7) and 138.8G (Bedroom, 0.3) are cut off, not rounded.",
        ],
    }


def _row(name: str, ratio: float) -> dict[str, Any]:
    teacher = published("unet")[name]
    config = pruned(teacher, ratio=ratio)
    parameters = config_parameters(config)
    printed = PAPER.get((name, ratio), (None, None))
    return {
        "data": name,
        "ratio": ratio,
        "parameters": parameters,
        "macs": count_macs(config),
        "compression": config_parameters(teacher) / parameters,
        "paper_parameters": printed[0],
        "paper_macs": printed[1],
    }


def _dit_row(name: str) -> dict[str, Any]:
    dits = published("dit")
    config = dits[name]
    fields = config.to_dict()
    parameters = config_parameters(config)
    pruned = name.startswith("DiT-D") or name == "DiT-XL/2"
    teacher = config_parameters(dits["DiT-XL/2"])
    printed = PAPER_DITS.get(name, (None, None))
    return {
        "model": name,
        "depth": fields["depth"],
        "width": fields["hidden_size"],
        "patch": fields["patch_size"],
        "parameters": parameters,
        "macs": count_macs(config),
        "compression": teacher / parameters if pruned else None,
        "paper_parameters": printed[0],
        "paper_macs": printed[1],
    }


def _sd_row(name: str) -> dict[str, Any]:
    networks = published("sd_unet")
    config, parameters = networks[name], config_parameters(networks[name])
    fields = config.to_dict()
    teacher = "sd-1.4" if name.startswith("bk-v1") else "sd-2.1-base"
    printed = PAPER_SD_UNETS.get(name, (None, None))
    return {
        "model": name,
        "widths": "+".join(map(str, fields["widths"])),
        "layers": "+".join(map(str, fields["layers"])),
        "parameters": parameters,
        "macs": count_macs(config),
        "compression": (
            config_parameters(networks[teacher]) / parameters if name.startswith("bk-") else None
        ),
        "paper_parameters": printed[0],
        "paper_macs": printed[1],
    }
