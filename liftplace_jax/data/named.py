"""Data sets by name: TFDS's, the embedded ones, and folders of images."""

import functools
import importlib
import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liftplace_jax.data.captions import record_captions
from liftplace_jax.data.folder import ImageFolder
from liftplace_jax.data.pipeline import MEMORY_MB, Source
from liftplace_jax.data.tars import ImageTars, has_tars
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import as_path, cached, fetched, is_in_bucket, listed, reaching

# Published crop of CelebA, centre (89, 121) +- 64: left, upper, right, lower
# (Diff_Pruning datasets/__init__.py, after DDIM).
_CROPS = {"celeb_a": (25, 57, 153, 185)}
# Name -> module of this folder and the builder in it: data that ship with a package.
EMBEDDED = {"digits": ("digits", "Digits"), "emoji": ("emoji", "Emoji")}
_FORMAT = "array_record"  # TFDS's format with random access
# What often fails, and the way around it.
_BY_HAND = {
    "celeb_a": "Google Drive often refuses TFDS: then download by hand img_align_celeba.zip, "
    "identity_CelebA.txt, list_attr_celeba.txt, list_eval_partition.txt and "
    "list_landmarks_align_celeba.txt into {data_dir}/downloads/manual and run it again.\n",
    "lsun": "Where tensorflow-io cannot be installed, export the images of LSUN's lmdb files.\n",
}


def load_source(
    name,
    split,
    *,
    data_dir=None,
    image_size=None,
    path=None,
    channels=3,
    crop=None,
    resize="bilinear",
    cache_dir=None,
    memory_mb=MEMORY_MB,
):
    """Opens a split of a TFDS data set, prepared on first use, or of a folder of images or tars.

    Of a folder, one line on stderr counts what is left out, converted, cropped or guessed.

    Args:
      name: "folder", "digits" or "emoji" (embedded, need no network), or any TFDS image data set,
        such as "cifar10", "celeb_a" (published crop to 128x128 first) or "lsun/bedroom".
      split: TFDS split, such as "train", "test" or "train[:90%]"; for a folder see `ImageFolder`.
      data_dir: directory of prepared data; default $TFDS_DATA_DIR or ~/tensorflow_datasets. In a
        bucket (gs://...) the data must be prepared already; the split's files are copied to this
        machine first, but for those that are there already.
      image_size: optional side to resize and centre-crop to.
      path: the folder, if that is the name: of images, or of webdataset's tar files.
      channels: of the images of a folder, 1 or 3.
      crop: optional (left, upper, right, lower) in pixels, cut out first; default: the data set's
        published crop, if it has one.
      resize: how images are resized, of `pipeline.RESIZES`.
      cache_dir: where data of a bucket are copied to, as of `buckets.fetched`.
      memory_mb: see `Source`.

    Returns:
      A `Source`.

    Raises:
      ValueError: unknown name or split, no image feature, images of mixed or oblong size; a folder
        that is missing, or has no images or such that cannot be read; a bad crop.
      RuntimeError: the data cannot be prepared; the message says how to do it by hand.
    """
    crop = crop or _CROPS.get(name)
    if crop and not (len(crop) == 4 and 0 <= crop[0] < crop[2] and 0 <= crop[1] < crop[3]):
        raise ValueError(f"crop must be (left, upper, right, lower) in pixels, got {crop}")
    if name == "folder":
        kind = ImageTars if has_tars(path, split) else ImageFolder
        records = kind(path, split, channels)
        source = Source(
            f"{path} ({split})",
            records,
            image_shape=records.image_shape,
            crop=crop,
            image_size=image_size,
            num_classes=len(records.classes) or None,
            resize=resize,
            classes=records.classes,
            memory_mb=memory_mb,
            fingerprint=records.fingerprint,
        )
        source.without_classes = records.without_classes
        source.read_captions = records.captions
        source.note = records.note(crop, image_size, resize)
        if source.note:
            processes.say_once(source.note)
        return source
    import tensorflow_datasets as tfds

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if is_in_bucket(data_dir):
        data_dir = _fetch(name, split, as_path(data_dir), cache_dir)
    data_dir = os.fspath(Path(data_dir).expanduser())
    builder: Any = _prepared_builder(name, data_dir)
    features: Any = builder.info.features  # of a split of pictures, a mapping
    if not isinstance(features, dict | tfds.features.FeaturesDict) or "image" not in features:
        raise ValueError(f"data set {name} has no feature 'image', only {features}")
    label = features["label"] if "label" in features else None
    try:
        with _known_split(name, builder, split):
            records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise RuntimeError(
            f"data set {name} in {data_dir} was prepared in a format without random access; "
            f"prepare it in another directory: {_command(name, '<directory>')}"
        ) from error
    source = Source(
        f"{name} ({split})",
        records,
        image_shape=features["image"].shape,
        dtype=features["image"].np_dtype,
        num_classes=label.num_classes if isinstance(label, tfds.features.ClassLabel) else None,
        crop=crop,
        image_size=image_size,
        resize=resize,
        classes=label.names if isinstance(label, tfds.features.ClassLabel) else (),
        memory_mb=memory_mb,
        # Its version says what TFDS prepares; the files need not be the same everywhere.
        fingerprint=lambda: {"data": builder.info.full_name},
    )
    source.read_captions = functools.partial(record_captions, name, builder, split)
    return source


def _fetch(name, split, data_dir, cache_dir):
    """Copies a split from a bucket; returns the local directory that stands for data_dir."""
    with reaching(data_dir):
        builder = _builder(name, data_dir)
        folder = as_path(builder.data_path)
        found = listed(folder)
    if not found:
        raise RuntimeError(
            f"data set {name} is not in {folder}: prepare it on a machine with a disk and upload "
            f"it: {_command(name, '<directory>')}; gcloud storage rsync -r <directory> {data_dir}"
        )
    with _known_split(name, builder, split):
        wanted = set(builder.info.splits[split].filenames)
    fetched((f for f in found if _FORMAT not in f.name or f.name in wanted), cache_dir)
    return cached(data_dir, cache_dir)


@contextmanager
def _known_split(name, builder, split):
    try:
        yield
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"data set {name} has no split {split!r}, only {sorted(builder.info.splits)}"
        ) from error


def _builder(name, data_dir):
    import tensorflow_datasets as tfds

    try:
        embedded, _, variant = name.partition("/")
        if embedded in EMBEDDED:
            module, kind = EMBEDDED[embedded]
            builder = getattr(importlib.import_module(f"liftplace_jax.data.{module}"), kind)
            variants = list(builder.builder_configs)
            if variant and variant not in variants:
                known = f"only {variants}" if variants else "nor any other"
                raise ValueError(f"data set {embedded} has no variant {variant!r}, {known}")
            return builder(data_dir=data_dir, config=variant or None)
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"TFDS knows no data set {name!r}; tensorflow_datasets.list_builders() lists them, "
            f"{' and '.join(map(repr, EMBEDDED))} are embedded, and 'folder' is a folder of images"
        ) from error


def _prepared_builder(name, data_dir):
    builder = _builder(name, data_dir)
    try:
        if name.startswith("lsun") and not builder.data_path.exists():
            _need_tensorflow_io()  # before gigabytes are downloaded
        builder.download_and_prepare(file_format=_FORMAT)
    except Exception as error:
        # TFDS writes beside the target and renames, so a process that loses the race against
        # another finds the data in place.
        if not builder.data_path.exists():
            by_hand = _BY_HAND.get(name.partition("/")[0], "").format(data_dir=data_dir)
            raise RuntimeError(
                f"cannot prepare data set {name} in {data_dir}: {type(error).__name__}: {error}\n"
                "With the missing package installed, or on a machine with network access, run: "
                f"{_command(name, data_dir)}\n{by_hand}"
                "Or take the images from a folder: --config.data.name=folder "
                "--config.data.path=<folder>"
            ) from error
    return _builder(name, data_dir)  # reads the splits, also when another process has prepared them


def _need_tensorflow_io():
    if importlib.util.find_spec("tensorflow_io") is None:
        raise ModuleNotFoundError("TFDS reads LSUN's files with the package tensorflow-io")


def _command(name, data_dir):
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}')"
        f".download_and_prepare(file_format='{_FORMAT}')\""
    )
