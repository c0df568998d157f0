"""What is done to images on the host before networks see them, and BK-SDM's protocol of it.

BK-SDM saves samples of 512 pixels as JPEG, makes them smaller (Pillow's bicubic, antialiased, which
squeezes what is oblong), and saves them as JPEG again; what is scored is read from there. Real
images are squeezed and saved once. `BK_SDM` is all of it as fields of config.evaluation.

JPEG and Pillow's resizing are work of the host: images leave the devices, threads handle them while
the devices draw the next batch, and they go back to have their features found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from liftplace_jax.evaluation.clip_score import ClipScorer
from liftplace_jax.host.outside import shown
from liftplace_jax.host.ranges import SIDE, Range, whole

BK_SDM: dict[str, Any] = {
    "features": "inception_bk_sdm",
    "jpeg_before": 75,
    "resize": 256,
    "jpeg": 75,
    "inception_rule": "torch_fidelity",
}
"""Fields of config.evaluation, each of which can be set otherwise. Real images: `evaluate ref`
with --protocol=bk_sdm, of all 40,504 of MS-COCO's val2014. The rest of the protocol: 30,000 of its
captions as prompts, PNDM in 25 steps, guidance 7.5, CLIP ViT-g/14 of LAION as clip_model."""
RANGES: dict[str, Range] = {
    "jpeg_before": whole(0, 100, why="of a JPEG's qualities"),
    "resize": whole(1, SIDE, optional=True),
    "jpeg": whole(0, 100, why="of a JPEG's qualities"),
}
_CHANNELS = (1, 3)
_MOST_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Handling:
    """What is done to each image, in this order; the default is nothing.

    Attributes:
      jpeg_before: it is saved as JPEG of this quality (Pillow's 0..100, chroma halved) and read
        again; 0: it is not. Of samples alone, never of real images.
      resize: it is squeezed to so many pixels a side, by Pillow's bicubic; None: it is not.
      jpeg: as `jpeg_before`, of what has come out.
    """

    jpeg_before: int = 0
    resize: int | None = None
    jpeg: int = 0

    def __bool__(self) -> bool:
        return bool(self.jpeg_before or self.resize or self.jpeg)

    def __str__(self) -> str:
        said = [f"saved as JPEG of quality {self.jpeg_before}"] if self.jpeg_before else []
        said += [f"squeezed to {self.resize}x{self.resize} (bicubic)"] if self.resize else []
        said += [f"saved as JPEG of quality {self.jpeg}"] if self.jpeg else []
        return ", then ".join(said) or "as they are"

    @property
    def of_real(self) -> Handling:
        """Of real images, which have been saved once already."""
        return dataclasses.replace(self, jpeg_before=0)

    @property
    def identity(self) -> dict[str, Any]:
        """What it does, as JSON types."""
        return dataclasses.asdict(self)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what comes out of an image of `shape`, (H, W, C).

        Raises:
          ValueError: it has other than 1 or 3 channels.
        """
        if not self:
            return shape
        if shape[2] not in _CHANNELS:
            raise ValueError(
                f"images of {shape[2]} channels cannot be resized or saved as JPEG, only grey (1) "
                "and RGB (3): set evaluation.jpeg_before and jpeg to 0, and resize to None"
            )
        return (self.resize, self.resize, shape[2]) if self.resize else shape

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The handled image (H', W', C) uint8 of one (H, W, C) uint8; grey ones stay grey."""
        if image.dtype != np.uint8:
            raise ValueError(f"images are {image.dtype}, and only uint8 can be handled")
        if not self:
            return image
        self.shape(image.shape)
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture = _through_jpeg(picture, self.jpeg_before)
        if self.resize and picture.size != (self.resize, self.resize):
            picture = picture.resize((self.resize, self.resize), Image.Resampling.BICUBIC)
        picture = _through_jpeg(picture, self.jpeg)
        return np.asarray(picture).reshape(picture.height, picture.width, image.shape[2])


AS_THEY_ARE = Handling()


def _through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    if not quality:
        return picture
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file, formats=["JPEG"])


def handling_of(fields: Mapping[str, Any]) -> Handling:
    """That of config.evaluation, or of other fields by the same names."""
    return Handling(**{field.name: fields[field.name] for field in dataclasses.fields(Handling)})


def said_of_reference(handling: Handling, info: Mapping[str, Any]) -> str:
    """What is to be said where a reference's images were handled in another way than `handling`.

    Args:
      handling: of the real images that would fit the samples.
      info: of the reference file; those of other tools say nothing of it, and nothing is said.
    """
    if "extractor" not in info:
        return ""
    found = info.get("handling", AS_THEY_ARE.identity)
    if found == handling.identity:
        return ""
    return (
        f"its images were handled otherwise than those that fit the samples: {shown(found)}, not "
        f"{handling.identity}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What is looked at beside an extractor's features, and what is done to images before.

    Attributes:
      handling: of every image.
      clip: what finds how well an image fits its prompt, or None.
      texts: (N, P), of image i row i mod N, as of `ClipScorer.text_features`; None without `clip`.
      identity: of the prompts, as JSON types.
    """

    handling: Handling = AS_THEY_ARE
    clip: ClipScorer | None = None
    texts: np.ndarray | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, handling: Handling, clip: ClipScorer, prompts: Sequence[str]) -> Look:
        """With the CLIP score of prompts, of image i prompt i mod their number.

        Raises:
          ValueError: as of `ClipScorer.text_features`.
        """
        digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        identity = {"count": len(prompts), "sha256": digest}
        return cls(handling, clip, clip.text_features(prompts), identity)

    def __bool__(self) -> bool:
        return bool(self.handling) or self.clip is not None

    def handled(self, batches: Generator[dict[str, Any], None, None]) -> Generator[dict[str, Any]]:
        """Batches as networks see them.

        Args:
          batches: a generator of them, with "image" (B, H, W, C) uint8 and "index" (B,), the
            numbers of the images.

        Yields:
          Them, their images handled; for `clip` with "clip" (B, S, S, C) uint8 and "text" (B, P).
        """
        threads = min(os.cpu_count() or 1, _MOST_THREADS)
        with (
            contextlib.closing(batches),
            ThreadPoolExecutor(threads, thread_name_prefix="handling") as pool,
        ):
            for batch in batches:
                images, more = list(pool.map(self.handling, batch["image"])), {}
                if self.clip is not None and self.texts is not None:
                    pictures = list(pool.map(self.clip.preparation.picture, images))
                    rows = self.texts[np.asarray(batch["index"]) % len(self.texts)]
                    more = {"clip": np.stack(pictures), "text": rows}
                yield {**batch, "image": np.stack(images), **more}
