"""A picture of a file: what its header says, and its pixels as a viewer shows them."""

import dataclasses
import functools
import io
import os
import stat
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image

# Formats of rasters alone: Pillow hands others, such as EPS, to programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2",
    ".j2k", ".jpx", ".avif", ".apng", ".dib", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
BACKGROUND = "white"  # below what is transparent
MODES = {1: "L", 3: "RGB"}  # by the number of channels
_NAMES = {"L": "grey", "RGB": "RGB"}
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# Where Pillow keeps what may say how the camera was held. TIFF has it among its tags.
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# EXIF's orientation -> what makes the picture upright. `ImageOps.exif_transpose` knows it too, but
# it also writes the rest of the EXIF data anew, and fails where any of it is damaged.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = [_UPRIGHT[number] for number in (5, 6, 7, 8)]  # width and height


@dataclasses.dataclass(frozen=True)
class Member:
    """A picture that is a part of a larger file.

    Attributes:
      name: for messages.
      path: the larger file.
      start: of its first byte there.
      size: its number of bytes.
    """

    name: str
    path: str | os.PathLike
    start: int
    size: int

    def __str__(self):
        return self.name

    def read(self):
        """Its bytes.

        Raises:
          OSError: the file cannot be read, or ends before.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.path} ends before it does")
        return content


@dataclasses.dataclass(frozen=True)
class Header:
    """What can be said of a picture without decoding it.

    Attributes:
      size: (width, height), upright.
      mode: Pillow's, of how the pixels are stored.
      changes: what `read_pixels` does to it beside converting the mode, in words.
    """

    size: tuple[int, int]
    mode: str
    changes: tuple[str, ...]


def read_header(file):
    """The `Header` of an image file, by its path, or of a `Member`.

    Raises:
      ValueError: it cannot be read, or has other than 8 bits a channel; names the file.
    """
    with _opened(file) as image:
        method = _UPRIGHT.get(_orientation(image))
        # Pillow turns TIFF itself, and gives its size upright.
        swapped = image.format != "TIFF" and method in _SWAPPING
        found = {
            f"with transparency, laid on {BACKGROUND}": _has_alpha(image),
            "turned as their EXIF data say": method is not None,
            "of several frames, of which the first is taken": getattr(image, "is_animated", False),
            "with 16 bits a channel, of which the upper 8 are taken": _has_16_bits(image),
        }
        width, height = image.size
        size = (height, width) if swapped else (width, height)
        return Header(size, image.mode, tuple(text for text, is_so in found.items() if is_so))


def read_pixels(file, mode):
    """The pixels of an image file, upright, on white where they are transparent.

    Args:
      file: its path, or a `Member`.
      mode: "RGB" or "L" (grey).

    Returns:
      (H, W, C) uint8, C = 3 or 1.

    Raises:
      ValueError: as `read_header`.
    """
    with _opened(file) as image:
        image.load()
        method = _UPRIGHT.get(_orientation(image))
        picture = image if method is None else image.transpose(method)
        if _has_alpha(image):
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, BACKGROUND)
            picture = Image.alpha_composite(ground, picture)
        elif image.mode == "LAB":
            picture = picture.convert("RGB")  # there is no other way to grey
        pixels = np.asarray(picture.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)


def mode_name(mode):
    """What a mode is called in messages."""
    return _NAMES.get(mode, mode)


@contextmanager
def _opened(file):
    """Whatever goes wrong in the block becomes a ValueError of one line that names the file."""
    try:
        with Image.open(_content(file), formats=_formats()) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}, want 8 bits a channel")
            yield image
    except Exception as error:  # what a broken file raises depends on its format
        raise ValueError(f"cannot read image {file}: {_reason(error)}") from error


def _content(file):
    """What Pillow opens."""
    if isinstance(file, Member):
        if not file.size:
            raise ValueError("it is empty")
        return io.BytesIO(file.read())
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")  # reading a pipe would wait for ever
    if not found.st_size:
        raise ValueError("it is empty")
    return file


def _reason(error):
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is of no format that is known here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


@functools.cache
def _formats():
    """Those of _FORMATS that this Pillow knows."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _orientation(image):
    """EXIF's number of how the camera was held; 1: upright, or nothing is known."""
    if image.format != "TIFF" and not any(name in image.info for name in _EXIF):
        return 1  # `getexif` of a PNG would decode it
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged data; the pixels are none the worse
        return 1


def _has_alpha(image):
    return image.mode in _ALPHA or "transparency" in image.info


def _has_16_bits(image):
    return any(";16" in str(tile[3]) for tile in image.tile)
