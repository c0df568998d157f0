"""Images in webdataset's tar files, with random access, and their captions.

A tar file is read through once, for the places of its members; after that each is read alone. In
order, as `encode` does, that is one pass over the file.
"""

import hashlib
import os
import tarfile
from collections import Counter
from itertools import groupby

from liftplace_jax.data.captions import JSON, member_captions
from liftplace_jax.data.folder import ImageFolder, color_mode, find_split
from liftplace_jax.data.pictures import SUFFIXES, Member

TAR = ".tar"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_CAPTIONS = (".txt", JSON)


def has_tars(path, split):
    """Whether the folder of a split has tar files.

    Raises:
      ValueError: as of `ImageFolder`; or tar files that are packed.
    """
    _, folder, _ = find_split(path, split)
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    packed = sorted(name for name in names if name.lower().endswith(_PACKED))
    if packed:
        raise ValueError(f"{folder / packed[0]} is packed: unpack it to a .tar, for random access")
    return any(name.endswith(TAR) for name in names)


class ImageTars(ImageFolder):
    """A sequence of {"image", "label", "file"} out of tar files; see `ImageFolder`.

    An example is what has one name up to its first dot: its image, and its caption in .txt or,
    where there is none, in .json ("caption" or "text"). There are no classes.
    """

    def __init__(self, path, split, channels=3):
        """Finds the images, in the order of the tar files' names and of their members.

        Args:
          path: the folder; splits are subfolders, as of `ImageFolder`.
          split: as of `ImageFolder`.
          channels: as of `ImageFolder`.

        Raises:
          ValueError: as of `ImageFolder`; or a tar file that is damaged, an example of several
            images, or a name that comes twice in a tar file.
        """
        self._mode = color_mode(channels)
        self._top, self._root, self._remarks = find_split(path, split)
        names = sorted(name for name in os.listdir(self._root) if not name.startswith("."))
        loose = [name for name in names if name.lower().endswith(SUFFIXES)]
        if loose:
            raise ValueError(f"{self._root} has tar files and images ({loose[0]}): keep one kind")
        others = Counter(os.path.splitext(n)[1] or "no suffix" for n in names if n[-4:] != TAR)
        self._images, self._texts = [], []
        for name in names:
            if name.endswith(TAR):
                self._read(name, others)
        if not self._images:
            raise ValueError(f"no images ({', '.join(SUFFIXES)}) in the tar files of {self._root}")
        left_out = [f"{n:,} of {suffix}" for suffix, n in sorted(others.items())]
        self._remarks += [f"left out: {', '.join(left_out)}"] if left_out else []
        self._places = {os.path.relpath(m.name, self._root): m for m in self._images}
        self._files = list(self._places)
        self.classes, self.without_classes = [], "tar files have no classes"
        self._look()
        self.image_shape = self[0]["image"].shape

    def _read(self, name, others):
        """Adds the examples of a tar file; `others` counts what is left out, by suffix."""
        path = self._root / name
        try:
            with tarfile.open(path, "r:") as tar:
                members = [m for m in tar if not m.isdir()]
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot read tar file {path}: {reason}") from error
        size, seen = path.stat().st_size, set()
        for key, parts in groupby(members, lambda member: _key(member.name)):
            if key in seen:
                raise ValueError(f"{path}: {key} comes twice, with others between: rename one")
            seen.add(key)
            images, captions = [], {}
            for part in parts:
                suffix = part.name[len(key) :].lower()
                if not part.isreg():
                    others["links and the like"] += 1
                    continue
                if part.offset_data + part.size > size:
                    raise ValueError(f"cannot read tar file {path}: it ends within {part.name}")
                found = Member(f"{path}/{part.name}", path, part.offset_data, part.size)
                if suffix.endswith(SUFFIXES):
                    images.append(found)
                elif suffix in _CAPTIONS:
                    captions[suffix] = found
                else:
                    others[suffix or "no suffix"] += 1
            if len(images) > 1:
                raise ValueError(f"{images[1]}: {key} has another image, {images[0].name}")
            text = next((captions[s] for s in _CAPTIONS if s in captions), None)
            if images:
                self._images.append(images[0])
                self._texts.append(text)
            elif captions:
                others["captions without an image"] += 1

    def _place(self, file):
        return self._places[file]

    def captions(self, table=None):
        """A caption of each image, a list of str.

        Args:
          table: none: the captions are in the tar files.

        Raises:
          ValueError: there are none, or some are missing or broken; or there is a table.
        """
        if table:
            raise ValueError(f"{self._root} has captions in its tar files: leave {table} out")
        lacking = [m for m, text in zip(self._images, self._texts, strict=True) if text is None]
        if lacking:
            others = f" (and {len(lacking) - 1:,} others have none)" if len(lacking) > 1 else ""
            raise ValueError(f"{lacking[0]} has no caption, .txt or .json beside it{others}")
        return member_captions(self._root, self._files, self._texts)

    def fingerprint(self):
        """What changes with a tar file, or a member, that is added, removed or renamed, as JSON."""
        names = hashlib.sha256()
        for member in self._images:
            names.update(f"{os.path.relpath(member.name, self._root)}\0{member.size} ".encode())
        total = sum(path.stat().st_size for path in {member.path for member in self._images})
        return {"bytes": total, "names": names.hexdigest()[:16]}


def _key(name):
    """A member's name up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem
