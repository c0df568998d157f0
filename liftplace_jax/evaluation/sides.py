"""What is compared: a folder of images, an .npz of images, or one of statistics, or of both.

Files are those of the ADM evaluator (`arr_0` uint8 images, perhaps with `mu`, `sigma` and `mu_s`,
`sigma_s`), of pytorch-fid (`mu`, `sigma`) and of this package; each can be on either side.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from liftplace_jax.data import Source, load_source
from liftplace_jax.data.captions import METADATA
from liftplace_jax.data.pictures import MODES, mode_name
from liftplace_jax.evaluation.handling import AS_THEY_ARE
from liftplace_jax.evaluation.references import (
    Reference,
    contents,
    digest,
    load_reference,
    read_npz,
    shapes,
)
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import as_path, is_in_bucket, on_this_machine

IMAGES = "uint8 images (N, H, W, C) as arr_0"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two sets to be compared; it has images, statistics, or both.

    Attributes:
      source: a `Source` of its images, or None.
      statistics: a `Reference` of its file's statistics, or None.
      name: what identifies it, as JSON types.
    """

    source: Source | None
    statistics: Reference | None
    name: dict


def open_side(path, extractor, image_size=None, handling=AS_THEY_ARE, squeeze=False):
    """The `Side` of a folder or an .npz file.

    Args:
      path: the folder, or the file.
      extractor: the `Extractor` that will see the images, or has made the statistics.
      image_size: as of `Source`.
      handling: of the images, before the extractor sees them.
      squeeze: as of `open_images`.

    Raises:
      ValueError: neither, or images that the extractor does not take; an .npz whose arrays are
        neither images nor statistics (the message lists them).
    """
    local = as_path(path)
    if local.suffix != ".npz":
        source = open_images(path, extractor, image_size, handling, squeeze)
        return Side(source, None, {"folder": local.name, "count": len(source)})
    if is_in_bucket(local) or not local.is_file() or {"mu", "sigma"} & shapes(local).keys():
        statistics = load_reference(local)
        name = {"file": local.name, **statistics.info, "sha256": statistics.digest}
        if is_in_bucket(local) or "arr_0" not in shapes(local):
            return Side(None, statistics, name)
    else:
        statistics, name = None, {"file": local.name, "sha256": digest(local)}
    source = open_images(
        path, extractor, image_size, handling, squeeze, ", nor statistics as mu and sigma"
    )
    return Side(source, statistics, name | {"images": len(source)})


def open_images(path, extractor, image_size=None, handling=AS_THEY_ARE, squeeze=False, others=""):
    """A `Source` of a folder of images, or of the uint8 `arr_0` of an .npz.

    They get the channels that the extractor takes; where that changes them, a line says so.

    Args:
      path: the folder or file.
      extractor: an `Extractor`.
      image_size: as of `Source`.
      handling: of the images, before the extractor sees them.
      squeeze: whether they are squeezed to its size as they are read, and may be of any sizes.
      others: what else was not found in an .npz, for the message.

    Raises:
      ValueError: it is neither, or the extractor does not take such images.
    """
    path = on_this_machine(path, "images")
    channels = extractor.image_shape[2] or 3
    sizes = sizes_of(image_size, handling, squeeze)
    if path.suffix != ".npz":
        if path.is_file():
            raise ValueError(f"{path} is a file: want a folder of images, or an .npz with {IMAGES}")
        source = load_source("folder", "all", path=path, channels=channels, **sizes)
    else:
        source = _npz_images(path, channels, sizes, others)
    extractor.check_shape(handling.shape(source.image_shape))
    return source


def sizes_of(image_size, handling, squeeze) -> dict[str, Any]:
    """What a `Source` takes as "image_size" and "resize"; arguments as of `open_images`.

    Raises:
      ValueError: images cannot be both cropped and squeezed, nor squeezed to no size.
    """
    if not squeeze:
        return {"image_size": image_size}
    if image_size or not handling.resize:
        raise ValueError(
            "images are squeezed to --resize, and --image_size would crop them: give --squeeze "
            "with --resize alone, or --nosqueeze"
        )
    return {"image_size": handling.resize, "resize": "squeeze"}


def prompts_of(source, path, table, read_prompts, repeat=False):
    """The prompt of each image of a side.

    Args:
      source: its `Source`.
      path: the folder, or the .npz file.
      table: of a folder, a table (.csv, .jsonl) that names its pictures, or None: its own captions;
        of an .npz, whose images have no names, a file for `read_prompts`, in their order.
      read_prompts: path -> list of str.
      repeat: whether image i of an .npz has prompt i mod their number.

    Raises:
      ValueError: there are none, or they are not those of these images; names the first that is
        not.
    """
    if as_path(path).suffix == ".npz":
        if table is None:
            raise ValueError(
                f"{path}: its images have no names, so --prompts must be a file of "
                "their prompts, in order"
            )
        prompts = read_prompts(table)
        fits = len(prompts) == len(source) or (repeat and len(prompts) < len(source))
        if not fits:
            raise ValueError(
                f"{table} has {len(prompts):,} prompts, {path} has {len(source):,} images: they "
                "do not belong together"
                + (" (or say --repeat_prompts)" if len(prompts) < len(source) else "")
            )
        return prompts
    if table is None:
        return source.captions
    table = on_this_machine(table, "a table of prompts")
    if not table.is_file():
        raise ValueError(f"{table}: no such file")
    if table.suffix not in (".csv", ".jsonl"):
        raise ValueError(
            f"{table} does not say which prompt is of which picture of {path}: give a table like "
            f"{' or '.join(METADATA)} (file_name, text)"
        )
    return source.read_captions(table)


def _npz_images(path, channels, sizes, others):
    shape, dtype = shapes(path).get("arr_0", ((), None))
    if dtype != np.uint8 or len(shape) != 4:
        found = "no arr_0" if dtype is None else f"arr_0 of {shape}, {dtype}"
        raise ValueError(f"{path}: want {IMAGES}, found {found}{others}; it has {contents(path)}")
    if shape[3] not in MODES:
        order = "; (N, C, H, W) is another order" if shape[1] in MODES else ""
        raise ValueError(
            f"{path}: arr_0 {shape} has images of {shape[3]} channels, want 1 (grey) or 3 (RGB)"
            + order
        )
    if not shape[0]:
        raise ValueError(f"{path}: arr_0 {shape} has no images")
    records = _Images(read_npz(path, ("arr_0",))["arr_0"], channels)
    source = Source(path.name, records, image_shape=(*shape[1:3], channels), **sizes)
    if shape[3] != channels:
        names = mode_name(MODES[channels]), mode_name(MODES[shape[3]])
        source.note = f"{path}: {shape[0]:,} images; converted to {names[0]}: all, from {names[1]}"
        processes.say_once(source.note)
    return source


class _Images:
    """Records of a `Source`, with the channels that are wanted."""

    def __init__(self, images, channels):
        self._images, self._channels = images, channels

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        image = self._images[index]
        if image.shape[2] != self._channels:
            picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            image = np.asarray(picture.convert(MODES[self._channels]))
            image = image.reshape(*image.shape[:2], -1)
        return {"image": image}


def with_rows(statistics, samples):
    """A file's statistics, with what `Samples` of its images have beside them."""
    rows = {name: getattr(samples, name) for name in ("features", "logits", "cosines")}
    return dataclasses.replace(statistics, **rows)
