"""Images in a folder, with random access.

Nothing that is left out, converted, cropped or guessed goes unsaid: `ImageFolder.note` counts it.
"""

import functools
import hashlib
import os
import re
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from liftplace_jax.data.captions import find_metadata, read_captions
from liftplace_jax.data.pictures import MODES, SUFFIXES, mode_name, read_header, read_pixels
from liftplace_jax.host.buckets import on_this_machine

# Split -> what its subfolder may be called, in upper or lower case.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
LOOKED_AT = 100_000  # headers that are read at first; of more images, so many evenly spaced ones
_THREADS = 16  # for disks that answer late
_NAMED = 3  # of each kind, in messages
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
# A split's name as a word of a longer one: train2017, val_images, DIV2K_train_HR.
_LIKE_A_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF)})(?![a-z])")
_CHOOSE = "(config.data.train_split, config.data.test_split)"
_READ_WHOLE = 64 * 2**20  # bytes; of larger folders a fingerprint has names and sizes alone


class ImageFolder:
    """A sequence of {"image": (H, W, C) uint8, "label": int, "file": path}, for `Source`.

    Images are as a viewer shows them: turned as their EXIF data say, transparent ones laid on
    white, the first frame of several.

    Attributes:
      image_shape: (H, W, C) of the first image.
      classes: names of the subfolders, sorted, if every image is in one: their numbers are the
        labels. Otherwise empty, and all labels are 0.
      without_classes: why there are none although there are subfolders, in words; or empty.
    """

    def __init__(self, path, split, channels=3):
        """Finds the images, recursively, in the order of their paths, and looks at their headers.

        Args:
          path: the folder. If it has a subfolder named like the split (in upper or lower case, or
            a usual name of it, of SPLITS), only that one is read.
          split: name of a split, such as "train", or of any subfolder; a folder without subfolders
            for splits is the same images in each. "all": the folder as it is.
          channels: 3 (RGB) or 1 (grey); images are converted.

        Raises:
          ValueError: no such folder or split, several that it may be, no images, or images that
            cannot be read.
        """
        self._mode = color_mode(channels)
        root, self._root, self._remarks = find_split(path, split)
        self._top = root
        metadata = find_metadata(self._root, root)
        self._files, left_out, folders, texts = _find(self._root, metadata)
        if not self._files:
            raise ValueError(
                f"no images ({', '.join(SUFFIXES)}) in {self._root}"
                + "".join(f"; left out: {text}" for text in left_out)
            )
        if self._root == root and split != "all":
            _check_no_splits_below(root, folders)
        self._remarks += [f"left out: {', '.join(left_out)}"] if left_out else []
        if metadata:
            self._remarks.append(f"captions in {' and '.join(path.name for path in metadata)}")
        elif texts:
            self._remarks.append(f"captions in {texts:,} .txt files beside them")
        self.classes, self.without_classes = self._classes(folders)
        self._look()
        self.image_shape = self[0]["image"].shape

    def _classes(self, folders):
        """(names, why there are none)."""
        inside = [Path(file).parts[0] for file in self._files if os.sep in file]
        names, loose = sorted(set(inside)), len(self._files) - len(inside)
        why = ""
        if names and loose:
            beside = [file for file in self._files if os.sep not in file]
            why = (
                f"{_some(beside)} {'lies' if loose == 1 else 'lie'} beside the subfolders, which "
                "therefore are no classes"
            )
        elif len(_splits(names)) > 1:
            why = f"{', '.join(_splits(names))} are splits, read together, and no classes"
        if why:
            self._remarks.append(why)
            return [], why
        empty = sorted({name for name in folders if os.sep not in name} - set(names))
        if names and empty:
            self._remarks.append(f"no images, and so no class, in {_some(empty)}")
        folded = Counter(name.casefold() for name in names)
        alike = [name for name in names if folded[name.casefold()] > 1]
        if alike:
            self._remarks.append(f"{', '.join(alike)} differ by case alone: classes of their own")
        return names, ""

    def _look(self):
        """Counts what the headers say, and refuses what cannot be read, before any work."""
        count = len(self._files)
        looked = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))
        files = [self._files[index] for index in looked]

        def look(file):
            try:
                return read_header(self._place(file)), None
            except ValueError as error:
                return None, error

        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(look, files))
        headers = [header for header, _ in found if header]
        bad = [error for _, error in found if error]
        if bad:
            others = f" (and {len(bad) - 1:,} other images cannot be read)" * (len(bad) > 1)
            raise ValueError(f"{bad[0]}{others}: mend it or take it away")
        self._looked = len(files)
        self._changes = Counter(change for header in headers for change in header.changes)
        self._modes = Counter(header.mode for header in headers)
        self._sizes = {}  # (width, height) -> (number, first file)
        for file, header in zip(files, headers, strict=True):
            number, first = self._sizes.get(header.size, (0, file))
            self._sizes[header.size] = number + 1, first

    def __len__(self):
        return len(self._files)

    def _place(self, file):
        """Where a picture's bytes are."""
        return self._root / file

    def __getitem__(self, index):
        file = self._place(self._files[index])
        label = self.classes.index(Path(self._files[index]).parts[0]) if self.classes else 0
        return {"image": read_pixels(file, self._mode), "label": label, "file": str(file)}

    def captions(self, table=None):
        """A caption of each image, a list of str; see `read_captions`.

        Args:
          table: as of `read_captions`.

        Raises:
          ValueError: there are none, or some are missing, broken or doubtful.
        """
        return read_captions(self._root, self._top, self._files, table)

    def note(self, crop=None, image_size=None, resize="bilinear"):
        """One line of all that was guessed or left out and will be converted; empty if nothing.

        Args:
          crop: as of `Source`.
          image_size: as of `Source`.
          resize: as of `Source`.

        Raises:
          ValueError: images that the crop does not fit, or of mixed sizes that will not become one.
        """
        said = [*self._remarks]
        converted = [
            f"{number:,} {mode_name(mode)}"
            for mode, number in sorted(self._modes.items())
            if mode != self._mode
        ]
        if converted:
            said.append(f"converted to {mode_name(self._mode)}: {', '.join(converted)}")
        said += [f"{number:,} {change}" for change, number in sorted(self._changes.items())]
        said += self._sizes_said(crop, image_size, resize)
        if said and self._looked < len(self):
            said.append(f"numbers are of {self._looked:,} that were looked at")
        return f"{self._root}: {len(self):,} images; {'; '.join(said)}" if said else ""

    def _sizes_said(self, crop, image_size, resize):
        def check(fits, wanted):
            bad = [(n, size, file) for size, (n, file) in self._sizes.items() if not fits(size)]
            if bad:
                _, (width, height), file = bad[0]
                channels = self.image_shape[2]
                raise ValueError(
                    f"{self._root / file}: image has shape {(height, width, channels)}, {wanted}; "
                    f"so have {sum(n for n, *_ in bad):,} of {self._looked:,} images in all"
                )

        if crop:
            check(
                lambda size: size[0] >= crop[2] and size[1] >= crop[3],
                f"the crop {tuple(crop)} is not within it",
            )
            return []
        if not image_size:
            height, width, _ = self.image_shape
            wanted = f"want {self.image_shape}, as of the first image: set image_size"
            check(lambda size: size == (width, height), wanted)
            return []
        oblong = sum(n for (w, h), (n, _) in self._sizes.items() if w != h)
        small = sum(n for size, (n, _) in self._sizes.items() if min(size) < image_size)
        how = "squeezed" if resize == "squeeze" else "cropped to the centre"
        said = [f"{oblong:,} not square, {how}"] if oblong else []
        return said + ([f"{small:,} smaller than {image_size}, enlarged"] if small else [])

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
            "bytes": total,
            "names": names.hexdigest()[:16],
            "content": content.hexdigest()[:16],
        }


def color_mode(channels):
    """Pillow's mode of images of 1 or 3 channels.

    Raises:
      ValueError: another number.
    """
    if channels not in MODES:
        raise ValueError(f"a folder of images has 1 or 3 channels, not {channels}")
    return MODES[channels]


def find_split(path, split) -> tuple[Path, Path, list[str]]:
    """(the folder, that of a split in it or itself, what was guessed or left out for it).

    Raises:
      ValueError: as of `ImageFolder`.
    """
    if path is None:
        raise ValueError("a folder of images needs its path (config.data.path)")
    root = on_this_machine(path, "a folder of images")
    if not root.is_dir():
        exists = root.exists()
        raise ValueError(f"{root} is no folder" if exists else f"there is no folder {root}")
    folder, remarks = _split_folder(root, split)
    return root, folder, remarks


def _split_folder(root, split):
    """(folder of a split, list of what was guessed or left out for it)."""
    if split == "all":
        return root, []
    names = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    wanted = split.casefold()
    kind = _SPLIT_OF.get(wanted, wanted)
    found = [name for name in names if _SPLIT_OF.get(name.casefold(), name.casefold()) == kind]
    if len(found) > 1:
        raise ValueError(
            f"{root} has subfolders {found}, and each may be the split {split!r}: rename or move "
            "all but one"
        )
    if found:
        return root / found[0], _beside(root)
    if not split.isidentifier():
        raise ValueError(
            f"split {split!r} of a folder of images: slices are not supported; name a subfolder "
            f"of {root}"
        )
    others = list(_splits(names))
    if others:
        raise ValueError(
            f"{root} has no subfolder {split!r}, only {others}: choose another split {_CHOOSE}"
        )
    if kind not in SPLITS:
        raise ValueError(
            f"{root} has no subfolder {split!r}: choose another split {_CHOOSE}, or 'all'"
        )
    return root, [f"no subfolder for a split, so {split!r} is all of them"]


def _splits(names):
    """Those of the names that are of splits, as keys, in the order of SPLITS."""
    known = [name for name in names if name.casefold() in _SPLIT_OF]
    return {name: None for split in SPLITS for name in known if _SPLIT_OF[name.casefold()] == split}


def _beside(root):
    """What lies beside the folders of splits, as a list of at most one remark."""
    names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    others = [name for name in names if not (root / name).is_dir() or not _splits([name])]
    images = [name for name in others if (root / name).is_dir() or _is_image(name)]
    return [f"left out beside the folders of splits: {_some(images)}"] if images else []


def _check_no_splits_below(root, folders):
    """Raises a ValueError if folders look like splits that are not recognised as such."""
    found = {}
    for folder in folders:
        match = _LIKE_A_SPLIT.search(os.path.basename(folder).casefold())
        if match:
            found.setdefault(_SPLIT_OF[match[1]], folder)
    if "train" in found and len(found) > 1:
        raise ValueError(
            f"{root} has the folders {sorted(found.values())}, which look like splits but are no "
            f"subfolders named {', '.join(SPLITS)}: rename or move them, or name them as splits "
            f"{_CHOOSE}; 'all' reads everything"
        )


def _is_image(name):
    return name.lower().endswith(SUFFIXES)


def _some(names):
    """The number of names, and the first of them, in words."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED:,} others"


def _find(root, metadata):
    """(images, what is left out in words, folders, number of captions): paths relative to `root`.

    The images are sorted strings: millions of them must fit. Files of captions are not left out:
    `metadata`, and where there is none, name.txt beside name.jpg.
    """

    def unreadable(error):
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")

    found, visited, below, texts = [], set(), [], 0
    captions = {os.fspath(path) for path in metadata}
    others, example, hidden, again = Counter(), {}, [], []
    relative = functools.partial(os.path.relpath, start=root)
    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        if os.path.realpath(folder) in visited:  # a link back
            again.append(relative(folder))
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        below += [relative(folder)] if folder != os.fspath(root) else []
        hidden += [name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        stems = {os.path.splitext(name)[0] for name in files if _is_image(name)}
        for name in files:
            stem, suffix = os.path.splitext(name)
            if name.startswith(".") or (captions and os.path.join(folder, name) in captions):
                continue
            if suffix == ".txt" and stem in stems and not captions:
                texts += 1
                continue
            file = relative(os.path.join(folder, name))
            if _is_image(name):
                found.append(file)
                continue
            suffix = suffix.lower() or "no suffix"
            others[suffix] += 1
            example[suffix] = min(file, example.get(suffix, file))
    left_out = [f"{n:,} of {suffix} ({example[suffix]})" for suffix, n in sorted(others.items())]
    left_out += [f"{len(hidden):,} hidden ({_some(sorted(hidden))})"] if hidden else []
    left_out += [f"{len(again):,} links to folders that are read ({_some(again)})"] if again else []
    return sorted(found), left_out, sorted(below), texts
