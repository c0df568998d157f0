"""A data set through an autoencoder, once: from a config to the shards that training reads.

Every process encodes shards of its own, on its own devices: none waits for another but at the end,
and what is cut off goes on at the first shard that is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from liftplace_jax import data
from liftplace_jax.conditioning import check_sources
from liftplace_jax.data import encoded
from liftplace_jax.data.encoded import Shard
from liftplace_jax.encoders.autoencoder_folder import AutoencoderNetwork, load_autoencoder
from liftplace_jax.evaluation.samples import check_batch, replicated
from liftplace_jax.experiment.sources import load_split
from liftplace_jax.experiment.texts import bind, open_texts, with_captions
from liftplace_jax.families import registry
from liftplace_jax.host import processes
from liftplace_jax.host.buckets import on_this_machine
from liftplace_jax.host.progress import progress
from liftplace_jax.host.versions import versions

LARGE = 10**10
"""Bytes of columns beside the latents, such as states of texts, that are written unasked."""


def encode_data(
    config: ConfigDict,
    sharding: NamedSharding,
    *,
    batch_size: int,
    shard_size: int = encoded.SHARD_SIZE,
    process_index: int | None = None,
    process_count: int | None = None,
    agreed: bool = False,
) -> str:
    """Encodes the splits of a config that are not encoded yet, both flips of every image.

    Args:
      config: an experiment's; config.latents says the autoencoder and where to write.
      sharding: of the batch axis, over devices of this process.
      batch_size: images encoded at a time.
      shard_size: examples in a shard.
      process_index: this process, which makes every process_count-th shard; default
        `jax.process_index()`.
      process_count: number of processes; default `jax.process_count()`.
      agreed: whether columns beside the latents may take more than LARGE.

    Returns:
      What was done, as a sentence.

    Raises:
      ValueError: a field of the config is missing or does not fit the others, or the folder was
        encoded with other settings; nothing is written then.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    for field in ("autoencoder", "path"):
        if not config.latents[field]:
            raise ValueError(f"config.latents.{field} is not set: it must be a folder")
    check_batch(batch_size, sharding)
    autoencoder = load_autoencoder(config.latents.autoencoder)
    sources = _open_images(config, autoencoder)
    folder = on_this_machine(config.latents.path, "the folder that latents are written to")
    manifest = _manifest(config, autoencoder, sources, shard_size)
    size = _check_size(manifest, sources, agreed)
    if index == 0:
        print(f"{folder}: {size}", file=sys.stderr)
    encoded.claim(folder, manifest, index)
    plan = [
        (sources[split], shard)
        for split, size in manifest["splits"].items()
        for shard in encoded.list_shards(folder, split, size, shard_size)
    ]
    own = plan[index::count]
    todo = [(source, shard) for source, shard in own if not shard.is_whole()]
    if todo:
        run = functools.partial(
            _program(autoencoder.graphdef, sharding),
            jax.device_put(autoencoder.params, replicated(sharding)),
        )
        total, left = (sum(s.stop - s.start for _, s in part) for part in (own, todo))
        with progress("encode", total, total - left, unit="image") as bar:
            for source, shard in todo:
                chunks = _encoded(run, source, shard, batch_size, sharding)
                encoded.write_shard(shard, _counted(chunks, bar))
    processes.barrier("encoded")
    return _summary(folder, manifest, sum(not shard.is_whole() for _, shard in plan))


def _open_images(config: ConfigDict, autoencoder: AutoencoderNetwork) -> dict[str, data.Source]:
    """Split -> its images, which must become what config.model takes."""
    fields, step = config.data, autoencoder.config.downsampling
    sources = {
        split: load_split(config, split, autoencoder.config.in_channels)
        for split in dict.fromkeys((fields.train_split, fields.test_split))
    }
    wanted = config.model.image_size * step
    expected = (wanted, wanted, autoencoder.config.in_channels)
    for source in sources.values():
        if source.image_shape != expected:
            raise ValueError(
                f"data set {source.name} has images {source.image_shape}; latents of "
                f"config.model.image_size {config.model.image_size} are made of {expected}: set "
                "config.data.image_size or config.model.image_size"
            )
    if config.model.in_channels != autoencoder.config.latent_channels:
        raise ValueError(
            f"{config.latents.autoencoder} makes latents of {autoencoder.config.latent_channels} "
            f"channels, config.model.in_channels is {config.model.in_channels}: change one of them"
        )
    model = registry.config_from_dict(config.model.to_dict(), partial=True)
    texts = open_texts(config)
    conditioning = bind(config, model, texts)
    # Token ids in any case: they are little, and whoever caches no states can go on with them.
    sources = {
        split: with_captions(source, texts, conditioning, tokens=True)
        for split, source in sources.items()
    }
    check_sources(conditioning, sources.values())
    first, *others = sources.values()
    for other in others:
        if (other.columns, other.column_identities) != (first.columns, first.column_identities):
            raise ValueError(
                f"{first.name} has the columns {list(first.columns)}, {other.name} has "
                f"{list(other.columns)}, or of other shapes or origin: both splits must have the "
                "same"
            )
    return sources


def _manifest(config, autoencoder, sources, shard_size) -> dict[str, Any]:
    fields, size, first = config.data, config.model.image_size, next(iter(sources.values()))
    return {
        "data": {
            "name": fields.name,
            "image_size": fields.image_size,
            "resize": fields.resize,
            "crop": fields.crop and list(fields.crop),
            "folder": fields.path and Path(fields.path).expanduser().resolve().name,
        },
        "splits": {split: len(source) for split, source in sources.items()},
        "num_classes": first.num_classes,
        "classes": list(first.classes),
        "autoencoder": autoencoder.identity,
        "shape": [size, size, autoencoder.config.latent_channels],
        "dtype": encoded.DTYPE,
        "columns": encoded.described_columns(first.columns, first.column_identities),
        "shard_size": shard_size,
        "versions": versions(),
    }


def _check_size(manifest, sources, agreed: bool) -> str:
    """What will be written, as words.

    Raises:
      ValueError: columns take more than LARGE, and nobody has agreed to it.
    """
    columns = next(iter(sources.values())).columns
    record = encoded.record_dtype(manifest["shape"], columns)
    count = sum(manifest["splits"].values())
    beside = record.itemsize - record["moments"].itemsize
    if count * beside > LARGE and not agreed:
        raise ValueError(
            f"columns {sorted(columns)} take {beside / 1e6:.3g} MB for each of {count:,} images, "
            f"{count * beside / 1e9:,.4g} GB in all beside the latents: say --yes, or set "
            "config.text.cached=False, and networks are told token ids"
        )
    each = f"{record.itemsize / 1e6:.2g} MB each"
    return f"{count:,} images take {each}, {count * record.itemsize / 1e9:,.2g} GB in all"


@functools.lru_cache(maxsize=8)
def _program(graphdef: nnx.GraphDef, sharding: NamedSharding) -> Callable[..., jax.Array]:
    """Jitted (params, images (B, H, W, C) as of a source) -> moments (B, 2, 2, h, w, C) float16.

    Of both flips, mean and log variance.
    """

    @jax.default_matmul_precision("highest")  # latents are data: the same on every machine
    def encode(params, images):
        def moments(x):
            return jnp.stack(nnx.merge(graphdef, params).encode(x), axis=1)

        images = data.unpack_images({"image": images})["image"]
        # Pixels are mirrored, not latents: an encoder is not symmetric.
        flips = jax.lax.map(moments, jnp.stack([images, images[:, :, ::-1]]))
        return jnp.moveaxis(flips, 0, 1).astype(encoded.DTYPE)

    return jax.jit(encode, out_shardings=sharding)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The examples of a shard, as a source of their own."""

    source: data.Source
    shard: Shard

    @property
    def name(self):
        return self.source.name

    def __len__(self):
        return self.shard.stop - self.shard.start

    def get(self, indices):
        return self.source.get(indices + self.shard.start)


def _encoded(run, source, shard, batch_size, sharding) -> Iterator[np.ndarray]:
    """Records of a shard, batch by batch; one batch ahead is on the devices."""
    batches = data.eval_batches(
        _Part(source, shard), batch_size=batch_size, process_index=0, process_count=1
    )
    waiting = None
    try:
        for batch in batches:
            under_way = run(jax.device_put(batch["image"], sharding)), batch
            if waiting:
                yield _records(*waiting, source, shard)
            waiting = under_way
        assert waiting is not None, "a shard is not empty"
        yield _records(*waiting, source, shard)
    finally:
        batches.close()


def _records(moments, batch, source, shard) -> np.ndarray:
    mask = batch["mask"]
    moments = np.asarray(moments)[mask]
    finite = np.isfinite(moments).reshape(len(moments), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"data set {source.name}, example {shard.start + batch['index'][np.argmin(finite)]}: "
            f"its latents are not finite in {encoded.DTYPE}"
        )
    records = np.empty(len(moments), encoded.record_dtype(moments.shape[3:], source.columns))
    records["moments"] = moments
    for name in source.columns:
        records[name] = batch[name][mask]
    return records


def _counted(chunks: Iterator[np.ndarray], bar) -> Iterator[np.ndarray]:
    for records in chunks:
        yield records
        bar.update(len(records))


def _summary(folder, manifest, missing) -> str:
    if missing:
        return (
            f"{folder}: this process's shards are written; {missing} of other processes are not yet"
        )
    sizes = " and ".join(f"{n:,} images of {split!r}" for split, n in manifest["splits"].items())
    shape = "x".join(map(str, manifest["shape"]))
    return f"Done: {folder} holds latents {shape} of {sizes}, both flips"
