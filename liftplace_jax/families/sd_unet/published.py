"""The published U-Nets of Stable Diffusion and of its students, by name."""

from liftplace_jax.families.sd_unet.config import SDUNetConfig
from liftplace_jax.families.sd_unet.students import STUDENTS, kept_layers, student_config

_V2 = SDUNetConfig(image_size=64)
_V1 = _V2.replace(heads=(8, 8, 8, 8), context_dim=768, linear_projection=False)
_TEACHERS = {
    "sd-1.4": _V1,
    "sd-1.5": _V1,
    "sd-2.1-base": _V2,
    "sd-2.1": _V2.replace(image_size=96, upcast_attention=True),
}
# Of fewer channels, not blocks: the width of the first level.
_CHANNELS = {"base": 256, "small": 224, "tiny": 192, "micro": 160, "extreme": 128}

PUBLISHED_SD_UNETS: dict[str, SDUNetConfig] = (
    _TEACHERS
    | {
        f"bk-{version}-{name}": student_config(teacher, kept_layers(name, teacher))
        for version, teacher in (("v1", _V1), ("v2", _V2))
        for name in STUDENTS
    }
    | {
        f"bk-v1-channels-{name}": _V1.replace(widths=(width, 2 * width, 4 * width, 4 * width))
        for name, width in _CHANNELS.items()
    }
)
"""For latents of 512x512 images, 4x64x64 (768x768 and 4x96x96: "sd-2.1", which predicts v).

Source: the public configs of the teachers, and "BK_SDM_EXP/src/unet_config*". The published file of
bk-v1-extreme is that of bk-v1-tiny; here it is what the one of v2 is.
"""
