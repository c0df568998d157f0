"""Images in a folder, with random access."""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from liftplace_jax.host.buckets import on_this_machine

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = ("train", "validation", "val", "test")  # what a subfolder for a split may be called
_MODES = {1: "L", 3: "RGB"}
_READ_WHOLE = 64 * 2**20  # bytes; of larger folders a fingerprint has names and sizes alone


class ImageFolder:
    """A sequence of {"image": (H, W, C) uint8, "label": int, "file": path}, for `Source`.

    Attributes:
      image_shape: (H, W, C) of the first image.
      classes: names of the subfolders, sorted, if every image is in one: their numbers are the
        labels. Otherwise empty, and all labels are 0.
    """

    def __init__(self, path, split, channels=3):
        """Finds the images, recursively, in the order of their paths.

        Args:
          path: the folder. If it has a subfolder named like the split, only that one is read.
          split: name of a split, such as "train"; a folder without subfolders for splits is the
            same images in each. "all": the folder as it is.
          channels: 3 (RGB) or 1 (grey); images are converted.

        Raises:
          ValueError: no such folder or split, no images, or the first cannot be read.
        """
        root = on_this_machine(path, "a folder of images")
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}")
        if channels not in _MODES:
            raise ValueError(f"a folder of images has 1 or 3 channels, not {channels}")
        self._mode, self._root = _MODES[channels], _split_folder(root, split)
        self._files = _find(self._root)
        if not self._files:
            raise ValueError(f"no images ({', '.join(SUFFIXES)}) in {self._root}")
        folders = [Path(file).parts[0] for file in self._files if os.sep in file]
        self.classes = sorted(set(folders)) if len(folders) == len(self._files) else []
        self.image_shape = self[0]["image"].shape

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        file = self._root / self._files[index]
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"pixels of mode {image.mode}, want 8 bits a channel")
                pixels = np.asarray(image.convert(self._mode))
        except Exception as error:  # what a broken file raises depends on its format
            raise ValueError(f"cannot read image {file}: {error}") from error
        label = self.classes.index(Path(self._files[index]).parts[0]) if self.classes else 0
        return {
            "image": pixels.reshape(*pixels.shape[:2], -1), "label": label, "file": str(file)
        }  # fmt: skip

    def fingerprint(self):
        """What changes with a file that is added, removed, renamed or replaced, as JSON.

        A file that is replaced by another one of as many bytes is noticed in folders of up to
        64 MiB, whose files are read for this.

        Raises:
          ValueError: a file is gone, or cannot be read.
        """
        names, content, total = hashlib.sha256(), hashlib.sha256(), 0
        try:
            sizes = [os.stat(self._root / file).st_size for file in self._files]
            total = sum(sizes)
            for file, size in zip(self._files, sizes, strict=True):
                names.update(os.fsencode(file) + b"\0")
                content.update(b"%d " % size)
                if total <= _READ_WHOLE:
                    content.update(b"%d " % zlib.crc32((self._root / file).read_bytes()))
        except OSError as error:
            raise ValueError(f"cannot read image {error.filename}: {error.strerror}") from error
        return {
            "bytes": total, "names": names.hexdigest()[:16], "content": content.hexdigest()[:16]
        }  # fmt: skip


def _split_folder(root, split):
    if not split.isidentifier():
        raise ValueError(
            f"split {split!r} of a folder of images: slices are not supported; name a subfolder "
            f"of {root}"
        )
    if split == "all":
        return root
    if (root / split).is_dir():
        return root / split
    others = [name for name in SPLITS if (root / name).is_dir()]
    if others:
        raise ValueError(
            f"{root} has no subfolder {split!r}, only {others}: choose another split "
            "(config.data.train_split, config.data.test_split)"
        )
    return root


def _find(root):
    """Paths relative to `root`, as sorted strings: millions of them must fit."""
    def unreadable(error):
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")

    found, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        if os.path.realpath(folder) in visited:  # a link back
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [n for n in files if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(found)
