"""Suite "input": images a second that a host reads, against what a step needs, and a long soak."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from liftplace_jax.data import Source, load_latents, train_batches
from liftplace_jax.data.encoded import claim, list_shards, record_dtype, write_shard
from liftplace_jax.data.folder import ImageFolder
from liftplace_jax.host import sharding
from liftplace_jax.suites import prediction
from liftplace_jax.suites.options import Options, Result

FILES = 64  # different images; read again and again, they come from memory as from a fast disk
LENGTH = 100_000  # of the data set they stand for: too long to be kept decoded
BATCH = 64
SOAK, QUICK_SOAK = 20_000, 500
MEGA = 1e6


class Repeated(Sequence):
    """A few records as a long data set."""

    def __init__(self, records: Any, length: int):
        self._records, self._length = records, length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._records[index % len(self._records)]


def run(options: Options) -> Result:
    """Reads from memory, from JPEG files and from latents; quick: a few batches of each."""
    batches = 3 if options.quick else 20
    with tempfile.TemporaryDirectory() as folder:
        cases = _cases(Path(folder))
        rows = [
            _measure(*case, batches, options.repeats)
            for case in tqdm.tqdm(cases, desc="input", unit="case")
        ]
    soaked = soak(QUICK_SOAK if options.quick else SOAK)
    needs = [f"{kind} needs" for kind in prediction.DEVICES]
    threads = [f"{kind} threads" for kind in prediction.DEVICES]
    return {
        "title": "Reading training batches, images per second of a host",
        "columns": ["source", "one_thread", "two_threads", "sent_bytes", *needs, *threads],
        "formats": dict.fromkeys(["one_thread", "two_threads", "sent_bytes", *needs], ",.0f"),
        "rows": rows,
        "tables": {
            "soak": {
                "title": "A long run of batches",
                "rows": [soaked],
                "columns": list(soaked),
                "formats": {
                    "batches": ",",
                    "batch_mb": ".3f",
                    "start_mb": ".1f",
                    "end_mb": ".1f",
                    "peak_growth_mb": ".1f",
                },
            }
        },
        "notes": [
            f"Batches of {BATCH}, made by train_batches in one thread, and in two (its default). "
            f"JPEG: {FILES} photographs-like files of quality 90, read, decoded, cropped and "
            "resized each time, as of a data set too large to be kept decoded. Disks and networks "
            "slower than this file cache are not measured.",
            "sent_bytes: of an image and its columns, from the host to its devices: uint8 images, "
            "float16 moments of latents. Scaling, mirroring and drawing are left to the step.",
            "needs: what the hungriest student of the paper with such data asks of one host (suite "
            "scaling, with its assumptions); threads: how many of these cores that would take, "
            "if they scale. Data sets below config.memory_cache_mb (256 MiB) decoded are kept "
            "in memory after one epoch.",
            "Soak: a source in memory, batches placed on a device and let go; resident memory "
            "of the process after the first tenth, and at the end; peak_growth_mb: by how much the "
            "largest since the start grew after the first tenth.",
        ],
    }


def _cases(folder: Path) -> list[tuple[str, Any, str]]:
    """(name, source, what the names of its students begin with)."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2048, 64, 64, 3), np.uint8)
    memory = Source(
        "memory", [{"image": image, "label": 0} for image in pixels], image_shape=(64, 64, 3)
    )
    celeba = _jpegs(folder / "celeba", (178, 218), rng)
    bedroom = _jpegs(folder / "bedroom", (341, 256), rng)
    return [
        ("64x64x3 in memory", memory, "CelebA"),
        (
            "JPEG 178x218, crop, to 64x64",
            Source(
                "celeba",
                Repeated(celeba, LENGTH),
                image_shape=celeba.image_shape,
                crop=(25, 57, 153, 185),
                image_size=64,
            ),
            "CelebA",
        ),
        (
            "JPEG 341x256, to 256x256",
            Source(
                "bedroom",
                Repeated(bedroom, LENGTH),
                image_shape=bedroom.image_shape,
                image_size=256,
            ),
            "Bedroom",
        ),
        ("latents 32x32x4", _latents(folder / "latents", rng), "DiT"),
    ]


def _jpegs(folder: Path, size: tuple[int, int], rng: np.random.Generator) -> ImageFolder:
    """Smooth shapes with some noise: files of about the size of photographs."""
    folder.mkdir()
    for index in range(FILES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + rng.normal(scale=8, size=smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:03d}.jpg", quality=90)
    return ImageFolder(folder, "train")


def _latents(folder: Path, rng: np.random.Generator):
    """An encoded data set of random moments."""
    shape, count = (32, 32, 4), 512
    claim(
        folder,
        {
            "splits": {"train": count},
            "shape": shape,
            "dtype": "float16",
            "shard_size": count,
            "num_classes": 1000,
            "versions": {},
            "autoencoder": {"name": "", "sha256": "", "scaling_factor": 1.0, "shift_factor": 0.0},
        },
        0,
    )
    records = np.zeros(count, record_dtype(shape))
    records["label"] = np.arange(count)
    records["moments"] = rng.normal(size=records["moments"].shape)
    (shard,) = list_shards(folder, "train", count, count)
    write_shard(shard, [records])
    return load_latents(folder, "train")


def _measure(name: str, source: Any, kind: str, batches: int, repeats: int) -> dict[str, Any]:
    one, two = (images_per_second(source, n, batches, repeats) for n in (1, 2))
    row = {"source": name, "one_thread": one, "two_threads": two}
    row["sent_bytes"] = sent_bytes(source)
    students = [r for r in prediction.predicted_rows() if r["student"].startswith(kind)]
    for device in prediction.DEVICES:
        pods = [pod for pod, fields in prediction.PODS.items() if fields.device == device]
        need = max(r["images_per_s_host"] for r in students if r["pod"] in pods)
        row |= {f"{device} needs": need, f"{device} threads": math.ceil(need / one)}
    return row


def sent_bytes(source: Any) -> float:
    """Of an example in a training batch."""
    with contextlib.closing(train_batches(source, batch_size=BATCH, seed=0, flip=True)) as stream:
        return sum(values.nbytes for values in next(stream).values()) / BATCH


def images_per_second(source: Any, threads: int, batches: int, repeats: int) -> float:
    """Median over `repeats` stretches of so many batches, after one that fills caches."""
    stream = train_batches(source, batch_size=BATCH, seed=0, flip=True, prefetch=threads)
    rates = []
    try:
        for _ in range(max(1, len(source) // BATCH) if len(source) < LENGTH else batches):
            next(stream)
        for _ in range(repeats):
            started = time.perf_counter()
            for _ in range(batches):
                next(stream)
            rates.append(BATCH * batches / (time.perf_counter() - started))
    finally:
        stream.close()
    return statistics.median(rates)


def soak(batches: int) -> dict[str, Any]:
    """Reads so many batches of 64 32x32x3 images, places them on a device, and lets them go.

    Returns:
      {"batches", "batch_mb", "start_mb": resident memory after a tenth of them, "end_mb",
      "peak_growth_mb": how much more the process held since than ever before}. The resident
      memory is None where the system does not say it (other than Linux).
    """
    rng = np.random.default_rng(0)
    records = [{"image": i, "label": 0} for i in rng.integers(0, 256, (256, 32, 32, 3), np.uint8)]
    source = Source("soak", records, image_shape=(32, 32, 3))
    stream = train_batches(source, batch_size=BATCH, seed=0, flip=True)
    placed = sharding.global_batches(stream, sharding.make_mesh({"data": -1}))
    nbytes, start, peak = 0, None, 0
    try:
        for index in range(batches):
            batch = next(placed)
            nbytes = sum(x.nbytes for x in batch.values())
            if index == batches // 10:
                start, peak = resident_bytes(), _peak_bytes()
    finally:
        placed.close()
    end = resident_bytes()
    return {
        "batches": batches,
        "batch_mb": nbytes / MEGA,
        "start_mb": None if start is None else start / MEGA,
        "end_mb": None if end is None else end / MEGA,
        "peak_growth_mb": (_peak_bytes() - peak) / MEGA,
    }


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return None
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024  # where it is in bytes
