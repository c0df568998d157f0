"""From images to batches, without state: the order of examples is f(seed, step).

Batches are as small as they are stored; `unpacking` makes of them, on devices, what networks see.

Example j of global step k has position k * batch_size + j; position // N is its epoch, and each
epoch has its own permutation. Nothing needs to be stored or replayed to resume at any step, and
any number of processes sees the same global batch, cut into contiguous slices.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image

from liftplace_jax.data.columns import LABEL, Columned
from liftplace_jax.data.unpacking import unpack_images

MEMORY_MB = 256
_EPOCHS = threading.Lock()
RESIZES = {
    "bilinear": Image.Resampling.BILINEAR,
    "adm": Image.Resampling.BICUBIC,
    "squeeze": Image.Resampling.BICUBIC,
}


class Source(Columned):
    """Random access to the images of one split, decoded, cropped and resized.

    A small split is kept in memory, decoded, as it is read.

    Attributes:
      name: name used in error messages.
      image_shape: (H, W, C) of every image, H = W.
      num_classes: number of classes, or None if there are no labels.
      classes: their names, if known.
      check_labels: whether a label that is no class is refused; set where labels are used.
      without_classes: why there are no classes, in words, if that is known.
      note: what was left out, guessed or converted, in words, if that is known.
      columns: what `get` gives beside the images: "label", and what `with_column` added.
      unpack: pure (batch, key or None) -> batch as a network sees it, as `unpack_images`; the key
        is that of what a network must see anew each time.
      read_captions: () -> a caption of each image, a sequence of str; None: there are none.
    """

    check_labels = False
    without_classes = note = ""
    unpack = staticmethod(unpack_images)
    _own_columns = {LABEL: jax.ShapeDtypeStruct((), np.int32)}
    read_captions: Callable[[], Sequence[str] | None] | None = None

    def __init__(
        self,
        name,
        records,
        *,
        image_shape,
        dtype: Any = np.uint8,
        num_classes=None,
        crop=None,
        image_size=None,
        resize="bilinear",
        classes=(),
        memory_mb=MEMORY_MB,
        fingerprint=None,
    ):
        """Wraps a random-access sequence of {"image": (H, W, C) array, "label": int, ...}.

        A record's optional "file" is named in error messages.

        Args:
          name: name used in error messages.
          records: sequence with `len` and integer indexing, safe to read from threads.
          image_shape: (H, W, C) of the stored images; H and W may be None (mixed sizes).
          dtype: uint8 (0..255), or a floating type (images in [-1, 1] already, never resized).
          num_classes: number of classes, or None: all labels are then 0.
          crop: optional (left, upper, right, lower) in pixels, cut out first.
          image_size: optional side of the result: the shorter side is resized to it, then the
            centre is cropped, unless `resize` squeezes.
          resize: how, of RESIZES: "bilinear" (antialiased), or "adm", as ADM and DiT prepare
            ImageNet: halved by averaging while twice as large, then bicubic; or "squeeze": nothing
            is cropped, both sides are resized to it (bicubic, antialiased), as BK-SDM does.
          classes: names of the classes, if known.
          memory_mb: splits that take less decoded, in MiB, are kept in memory.
          fingerprint: optional () -> dict of JSON types that tells these records from others of
            the same number.

        Raises:
          ValueError: no images, a dtype other than these, an unknown resize, or a result that is
            not square.
        """
        if len(records) == 0:
            raise ValueError(f"data set {name} has no images")
        self.name = name
        self.num_classes = num_classes
        self.classes = tuple(classes)
        self._fingerprint = fingerprint
        if resize not in RESIZES:
            raise ValueError(f"unknown resize {resize!r}; known: {list(RESIZES)}")
        self._resize = resize
        self._records = records
        self._dtype = self._kept = np.dtype(dtype)
        self._crop = crop
        self._image_size = image_size
        if self._dtype != np.uint8 and not np.issubdtype(self._dtype, np.floating):
            raise ValueError(f"data set {name}: images are {self._dtype}, want uint8 or floats")
        if self._dtype.itemsize > 4:
            self._kept = np.dtype(np.float32)  # no network sees more
        if self._dtype != np.uint8 and (crop or image_size):
            raise ValueError(f"data set {name}: only uint8 images can be cropped or resized")
        height, width, channels = image_shape
        if crop:
            height, width = crop[3] - crop[1], crop[2] - crop[0]
        if image_size:
            height = width = image_size
        if height is None or width is None:
            raise ValueError(f"data set {name} has images of mixed sizes: set image_size")
        if height != width:
            raise ValueError(
                f"data set {name} has images of {height}x{width}, not square: set image_size"
            )
        self.image_shape = (height, width, channels)
        shape = (len(records), *self.image_shape)
        small = np.prod(shape, dtype=np.int64) * self._kept.itemsize < memory_mb * 2**20
        self._images = np.zeros(shape, self._kept) if small else None
        self._labels = np.zeros(len(records), np.int32)
        self._cached = np.zeros(len(records), bool)

    def __len__(self):
        return len(self._records)

    @functools.cached_property
    def captions(self):
        """A caption of each image, a sequence of str, or None; read when first asked for.

        Raises:
          ValueError: captions that are missing, broken or doubtful; names file and line.
        """
        return None if self.read_captions is None else self.read_captions()

    def fingerprint(self):
        """What tells the stored images from others, as JSON types; how many at the least."""
        own = self._fingerprint() if self._fingerprint else {}
        columns = self.column_identities
        return {"images": len(self)} | own | ({"columns": columns} if columns else {})

    def get(self, indices, mirrored=None):
        """Reads the examples at `indices`.

        Args:
          indices: (B,) integers in [0, len).
          mirrored: optional (B,) bool, which images are to be mirrored left-right by `unpack`.

        Returns:
          {"image": (B, H, W, C) uint8 in 0..255 or float in [-1, 1], "label": (B,) int32}, the
          other columns, and "mirrored" if it was given.

        Raises:
          ValueError: an image of another shape, type or with non-finite values; a column's values
            are not what it says.
        """
        indices = np.asarray(indices)
        if self._images is None:
            rows = [self._read(int(index)) for index in indices]
            images = np.stack([image for image, _ in rows])
            labels = np.asarray([label for _, label in rows], np.int32)
        else:
            # Threads may read the same example twice, never an unfinished one.
            for index in indices[~self._cached[indices]]:
                self._images[index], self._labels[index] = self._read(int(index))
                self._cached[index] = True
            images, labels = self._images[indices], self._labels[indices]
        batch = {"image": images, LABEL: labels} | self._read_given(indices)
        return batch if mirrored is None else batch | {"mirrored": np.asarray(mirrored, bool)}

    def _read(self, index):
        record = self._records[index]
        image = np.asarray(record["image"])
        where = f"data set {self.name}, example {index}"
        where += f" ({record['file']})" if "file" in record else ""
        if image.dtype != self._dtype:
            raise ValueError(f"{where}: image is {image.dtype}, want {self._dtype}")
        if self._crop and (image.shape[1] < self._crop[2] or image.shape[0] < self._crop[3]):
            raise ValueError(f"{where}: the crop {self._crop} is not within {image.shape}")
        if self._crop or self._image_size:
            image = _crop_and_resize(image, self._crop, self._image_size, self._resize)
        if image.shape != self.image_shape:
            raise ValueError(f"{where}: image has shape {image.shape}, want {self.image_shape}")
        image = image.astype(self._kept, copy=False)
        if self._dtype != np.uint8 and not np.isfinite(image).all():
            raise ValueError(f"{where}: image has non-finite values")
        label = 0 if self.num_classes is None else int(record["label"])
        if self.check_labels and not 0 <= label < (self.num_classes or 0):
            raise ValueError(
                f"{where}: label {label} is no class, there are {self.num_classes} from 0; this "
                "split may be unlabelled"
            )
        return image, label


def _crop_and_resize(image, crop, size, resize):
    """Crop, resize of the shorter side, centre crop; bilinear as torchvision does on PIL images."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if crop:
        picture = picture.crop(crop)
    if size and resize == "squeeze":
        picture = picture.resize((size, size), RESIZES[resize])
    if size and picture.size != (size, size):
        while resize == "adm" and min(picture.size) >= 2 * size:
            halved = picture.width // 2, picture.height // 2
            picture = picture.resize(halved, Image.Resampling.BOX)
        width, height = picture.size
        short = min(width, height)
        if resize == "adm":
            shape = (round(size / short * width), round(size / short * height))
            left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
        else:
            shape = (int(size * width / short), int(size * height / short))
            left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        picture = picture.resize(shape, RESIZES[resize])
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture).reshape(picture.height, picture.width, image.shape[-1])


@functools.lru_cache(maxsize=8)
def _epoch_of(count, seed, epoch):
    """The order of an epoch, (count,) int64, and which of its positions are flipped, bool."""
    # Raw Philox bits, so that no NumPy release changes the order.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(2 * count)
    return np.argsort(bits[:count], kind="stable"), (bits[count:] & 1).astype(bool)


def _epoch(count, seed, epoch):
    """As `_epoch_of`; threads that come to an epoch together wait for the one that makes it."""
    with _EPOCHS:
        return _epoch_of(count, seed, epoch)


def _local_rows(batch_size, process_index, process_count):
    """Rows of the global batch that this process holds, as (start, stop)."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of {count} processes")
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is not in [0, {count})")
    size = batch_size // count
    return index * size, (index + 1) * size


def _prefetched(make, steps, ahead):
    """Yields make(step) in order, `ahead` of them under way in threads, until close()."""
    with ThreadPoolExecutor(ahead, thread_name_prefix="batches") as pool:
        pending = deque()
        try:
            for step in steps:
                pending.append(pool.submit(make, step))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _count_from(step):
    while True:
        yield step
        step += 1


def train_batches(
    source,
    *,
    batch_size,
    seed,
    start_step=0,
    flip=False,
    process_index=None,
    process_count=None,
    prefetch=2,
):
    """Endless training batches, the same for the same (seed, step) wherever they start.

    Args:
      source: a `Source` or `LatentSource`.
      batch_size: global batch size, a multiple of `process_count`.
      seed: non-negative int; decides the order and the flips.
      start_step: first step, counted from 0.
      flip: mirror each image left-right with probability 1/2 (not for digits).
      process_index: this process; default `jax.process_index()`.
      process_count: number of processes; default `jax.process_count()`.
      prefetch: batches made ahead, one thread each.

    Returns:
      A generator of what `source.get` gives of the local batch, small as it is sent to devices,
      for `source.unpack`: "image" (local batch, H, W, C) uint8 and, with `flip`, "mirrored" (local
      batch,) bool, or the "moments" of the flips; and columns, such as "label". Its `close()` stops
      the threads; an error in a thread is raised by `next`.

    Raises:
      ValueError: a batch size that the processes do not divide, a negative seed or step.
    """
    start, stop = _local_rows(batch_size, process_index, process_count)
    if seed < 0 or start_step < 0 or prefetch < 1:
        raise ValueError(
            f"want seed >= 0, start_step >= 0 and prefetch >= 1, got {seed}, {start_step}, "
            f"{prefetch}"
        )

    def make(step):
        positions = step * batch_size + np.arange(start, stop, dtype=np.int64)
        epochs, offsets = np.divmod(positions, len(source))
        indices = np.empty_like(positions)
        mirrored = np.zeros(len(positions), bool)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, flips = _epoch(len(source), seed, int(epoch))
            indices[here], mirrored[here] = order[offsets[here]], flips[offsets[here]]
        return source.get(indices, mirrored if flip else None)

    return _prefetched(make, _count_from(start_step), prefetch)


def eval_batches(
    source, *, batch_size, limit=None, process_index=None, process_count=None, prefetch=2
):
    """One pass in stored order; the last batch is padded, and a mask counts every example once.

    Args:
      source: a `Source` or `LatentSource`.
      batch_size: global batch size, a multiple of `process_count`.
      limit: number of examples, default all.
      process_index: this process; default `jax.process_index()`.
      process_count: number of processes; default `jax.process_count()`.
      prefetch: batches made ahead, one thread each.

    Returns:
      A generator of what `source.get` gives of the local batch, as of `train_batches`, with "index"
      (local batch,) int32, the position in the source, and "mask" bool. Padding repeats the last
      example, mask False. Every process gets the same number of batches.

    Raises:
      ValueError: a batch size that the processes do not divide, a limit not in 1..len(source).
    """
    start, stop = _local_rows(batch_size, process_index, process_count)
    count = len(source) if limit is None else limit
    if not 1 <= count <= len(source):
        raise ValueError(
            f"limit {limit} is not in 1..{len(source)}, the size of data set {source.name}"
        )

    def make(step):
        positions = step * batch_size + np.arange(start, stop)
        mask = positions < count
        positions = np.minimum(positions, count - 1)
        return source.get(positions) | {"index": positions.astype(np.int32), "mask": mask}

    return _prefetched(make, range(-(-count // batch_size)), prefetch)
