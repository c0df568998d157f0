"""From a picture to what CLIP's tower of images sees: resized, cropped, scaled.

As `CLIPImageProcessor` of transformers (its Pillow backend) and open_clip's own transform do it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from liftplace_jax.encoders.clip.config import CLIPVisionConfig
from liftplace_jax.encoders.shipped import find_shipped
from liftplace_jax.host.outside import lies, read_json, shown
from liftplace_jax.host.ranges import SIDE, Range, positive, whole

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MODES = {1: "L", 3: "RGB"}
_FILE, _WHOLE = "preprocessor_config.json", "processor_config.json"
_PARTS = ("", "image_encoder", "feature_extractor")  # folders of it
_SIDE = whole(1, SIDE)
_FACTOR = positive(1e6)
_NUMBERS = Range(float, -1e6, 1e6, many=True)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How pictures are made ready; the defaults are OpenAI's.

    Attributes:
      resize: the shorter side that they are resized to, (height, width), or None: they are not.
      resample: one of Pillow's ways, such as BICUBIC; with antialiasing.
      crop: side of the square that is cut out of the centre, or None.
      factor: of the pixels 0..255.
      mean: of the channels, taken off; one for each.
      std: of the channels, divided by.
    """

    resize: int | tuple[int, int] | None = 224
    resample: int = Image.Resampling.BICUBIC
    crop: int | None = 224
    factor: float = 1 / 255
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def picture(self, image: np.ndarray) -> np.ndarray:
        """Converts, resizes and crops.

        Args:
          image: (H, W, C) uint8, C = 1 or 3.

        Returns:
          (H', W', len(mean)) uint8.

        Raises:
          ValueError: it is smaller than the crop.
        """
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture = picture.convert(_MODES[len(self.mean)])
        if self.resize:
            size = _size(picture, self.resize)
            picture = picture.resize(size, Image.Resampling(self.resample))
        if self.crop:
            left, top = ((side - self.crop) // 2 for side in picture.size)
            if min(left, top) < 0:
                raise ValueError(f"a picture of {picture.size} has no crop of {self.crop}")
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        return np.asarray(picture).reshape(picture.height, picture.width, len(self.mean))

    def scaled(self, pictures: jax.Array) -> jax.Array:
        """What the tower takes of pictures (B, H', W', C) uint8: float32. In-graph."""
        values = pictures.astype(jnp.float32) * jnp.float32(self.factor)
        return (values - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    @property
    def identity(self) -> dict[str, Any]:
        """What it does, as JSON types."""
        found = dataclasses.asdict(self) | {"resample": Image.Resampling(self.resample).name}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def _size(picture: Image.Image, resize: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture after resizing."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    short = min(picture.size)
    width, height = (int(resize * side / short) for side in picture.size)
    return width, height


def load_preparation(path: str | os.PathLike, vision: CLIPVisionConfig) -> Preparation:
    """How a folder's pictures are made ready.

    Args:
      path: a folder of transformers with preprocessor_config.json (or processor_config.json), in it
        or in "image_encoder" or "feature_extractor"; or a name of SHIPPED. Without such a file
        pictures are prepared as OpenAI's, to the tower's size.
      vision: of the tower that sees them.

    Raises:
      ValueError: a field is none of these, or what comes out is no picture for the tower; names the
        file and the field.
    """
    folder, size = find_shipped(path), vision.image_size
    if vision.num_channels not in _MODES:
        raise ValueError(f"{path}: its tower sees {vision.num_channels} channels, no picture has")
    places = [folder / part / name for part in _PARTS for name in (_FILE, _WHOLE)]
    file = next((place for place in places if lies(place)), None)
    if file is None:
        if vision.num_channels != len(_MEAN):
            raise ValueError(f"{path}: has no {_FILE}, which says mean and deviation of pixels")
        return Preparation(size, crop=size)
    fields = read_json(file)
    if file.name == _WHOLE:
        fields = fields.get("image_processor", {})
    try:
        found = _read(fields)
        _check(found, vision)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
    return found


def _read(fields: Mapping[str, Any]) -> Preparation:
    """Of the fields of a CLIPImageProcessor; absent ones have its defaults."""
    usual = Preparation()
    if not isinstance(fields, Mapping):
        raise ValueError(f"image_processor {shown(fields)} is no object")
    size = fields.get("size", usual.resize)
    if isinstance(size, Mapping) and "shortest_edge" in size:
        size = size["shortest_edge"]
    resize = _sides("size", size)
    crop = _sides("crop_size", fields.get("crop_size", usual.crop))
    if not isinstance(crop, int):
        if crop[0] != crop[1]:
            raise ValueError(f"crop_size {crop} is no square")
        crop = crop[0]
    resample = fields.get("resample", int(usual.resample))
    if resample not in [int(way) for way in Image.Resampling]:
        raise ValueError(f"resample {shown(resample)} is none of Pillow's ways")
    factor = fields.get("rescale_factor", usual.factor)
    _FACTOR.check("rescale_factor", factor)
    mean, std = (fields.get(f"image_{name}", getattr(usual, name)) for name in ("mean", "std"))
    _NUMBERS.check("image_mean", mean)
    _NUMBERS.check("image_std", std)
    if min(std, default=0) <= 0:
        raise ValueError(f"image_std {std} must be above 0")
    if not _does(fields, "normalize"):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    return Preparation(
        resize if _does(fields, "resize") else None,
        resample,
        crop if _does(fields, "center_crop") else None,
        factor if _does(fields, "rescale") else 1.0,
        tuple(mean),
        tuple(std),
    )


def _does(fields: Mapping[str, Any], what: str) -> bool:
    return fields.get(f"do_{what}", True) is not False


def _sides(name: str, value: Any) -> int | tuple[int, int]:
    if not isinstance(value, Mapping):
        _SIDE.check(name, value)
        return value
    if value.keys() != {"height", "width"}:
        raise ValueError(f"{name} {shown(value)} must have height and width, or be a number")
    for side in value.values():
        _SIDE.check(name, side)
    return value["height"], value["width"]


def _check(found: Preparation, vision: CLIPVisionConfig) -> None:
    """That what comes out of a square picture is what the tower takes."""
    size, channels = vision.image_size, vision.num_channels
    if len(found.mean) != channels or len(found.std) != channels:
        raise ValueError(f"image_mean and image_std must be {channels} numbers, as of the tower")
    made = found.crop or found.resize
    if made not in (size, (size, size)):
        raise ValueError(f"pictures become {made}, the tower takes {size}")
    least = found.resize if isinstance(found.resize, int) else min(found.resize or (size,))
    if least < size:
        raise ValueError(f"crop_size {size} is larger than size {found.resize}")
