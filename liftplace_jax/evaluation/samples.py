"""From a sampler or a data set to features, moments and, if asked, images."""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from liftplace_jax.data import eval_batches
from liftplace_jax.data.unpacking import unpack_images
from liftplace_jax.evaluation.frechet import Moments, moments_update, moments_zero
from liftplace_jax.host.sharding import placed_ahead

MOMENTS = ("features", "spatial")  # kinds of outputs whose moments are kept
ROWS = ("features", "logits")  # kinds that are kept as they are
COSINES = "cosines"  # another one, of images and their prompts
REFERENCE_ROWS = 10_000  # of real features, for precision, recall and KID


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """What is kept of a set of images, real or generated.

    Attributes:
      moments: `Moments` of the features.
      features: (N, D) float32 NumPy array; of real images the first REFERENCE_ROWS.
      images: the first images, (M, H, W, C) uint8 NumPy array, as they were looked at.
      extractor: the `Extractor` that made the features; None: there are none, D = 0.
      spatial: `Moments` of the spatial features, or None if the extractor has none.
      logits: (N, classes) float32 NumPy array, or None likewise.
      cosines: (N,) float32 NumPy array, as of `clip_score`, or None: no prompts were looked at.
    """

    moments: Moments
    features: np.ndarray
    images: np.ndarray
    extractor: object
    spatial: Moments | None = None
    logits: np.ndarray | None = None
    cosines: np.ndarray | None = None


def to_uint8(images):
    """Images in [-1, 1] (clipped) to 0..255, to the nearest: the only such conversion."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def collect(
    sample_fn,
    params,
    num_samples,
    *,
    batch_size,
    extractor,
    seed,
    sharding=None,
    keep_images=0,
    condition=None,
    progress=None,
    look=None,
):
    """Draws samples and gathers their features, in one compiled program a batch; or in two, where
    the host handles images between them.

    Sample i is drawn from the key fold_in(seed, i): it depends neither on the batch size nor on
    the number of devices or processes. Images stay on the devices unless they are kept.

    Args:
      sample_fn: jit-able (params, keys) -> images (B, H, W, C) in [-1, 1], clipped if beyond;
        `keys` is a (B,) array of random keys, one per sample. Pass the same function again to
        reuse its compiled program.
      params: pytree handed to `sample_fn`.
      num_samples: number of samples N.
      batch_size: global number drawn at a time.
      extractor: an `Extractor`, or None to draw the samples alone.
      seed: int.
      sharding: optional `NamedSharding` of the batch axis, such as P("data").
      keep_images: number of images to return.
      condition: optional pytree of (N, ...) arrays, handed to `sample_fn` after the keys.
      progress: optional function called with the number of samples done.
      look: optional `Look`, what is done to images before they are looked at, and what at beside
        the features. While the host handles a batch, the devices draw the next one.

    Returns:
      `Samples` of exactly `num_samples` samples.

    Raises:
      ValueError: sizes that do not fit, or a sample with non-finite values (named by number).
    """
    check_batch(batch_size, sharding)
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    # Where the host handles images, the first of the two programs finds nothing.
    apply, extractor_params = _apply(None if look else extractor, sharding)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    shape = jax.eval_shape(sample_fn, params, keys).shape
    for leaf in jax.tree.leaves(condition):
        if np.shape(leaf)[:1] != (num_samples,):
            raise ValueError(f"want {num_samples} conditions, got an array of {np.shape(leaf)}")

    def batch(moments, first, keep):
        program = _sample_program(sample_fn, apply, sharding, keep)
        more = ()
        if condition is not None:
            positions = np.minimum(first + np.arange(batch_size), num_samples - 1)
            more = (jax.tree.map(lambda x: np.asarray(x)[positions], condition),)
        return program(
            extractor_params,
            moments,
            params,
            seed,
            first,
            num_samples,
            *more,
            batch_size=batch_size,
        )

    starts = range(0, num_samples, batch_size)
    limits = dict.fromkeys((*ROWS, COSINES), num_samples)
    if not look:
        return _gather(batch, starts, shape, extractor, sharding, keep_images, limits, progress)
    batches = _handled(_drawn(batch, starts, num_samples, sharding), look, sharding)
    shape = (batch_size, *look.handling.shape(shape[1:]))
    add = _adding(extractor, sharding, look)
    return _gather(add, batches, shape, extractor, sharding, keep_images, limits, progress)


def _drawn(draw, starts, count, sharding):
    """Batches of samples as NumPy, this process's part: "image", "index" and "mask"."""
    moments, under_way = jax.device_put(_no_moments(None, ()), replicated(sharding)), deque()

    def fetched(first, finite, mask, pixels):
        _check_finite(np.asarray(finite), np.asarray(mask), first)
        positions, rows = {}, {}
        for shard in pixels.addressable_shards:  # replicas are the same
            start = shard.index[0].start or 0
            rows[start] = np.asarray(shard.data)
            positions[start] = first + start + np.arange(len(rows[start]))
        order = sorted(rows)
        index = np.concatenate([positions[start] for start in order])
        images = np.concatenate([rows[start] for start in order])
        return {"image": images, "index": index.astype(np.int32), "mask": index < count}

    for first in starts:
        (moments, _, finite, mask), pixels = draw(moments, first, True)
        under_way.append((first, finite, mask, pixels))
        if len(under_way) > 1:
            yield fetched(*under_way.popleft())
    yield fetched(*under_way.popleft())


def reference(
    source,
    extractor,
    *,
    batch_size,
    limit=None,
    sharding=None,
    keep_images=0,
    progress=None,
    generated=False,
    look=None,
):
    """Features of real images, or of generated ones that were saved.

    Args:
      source: a `liftplace_jax.data.Source`.
      extractor: an `Extractor`.
      batch_size: global batch size.
      limit: number of images, default all.
      sharding: optional `NamedSharding` of the batch axis; without one, every process reads all.
      keep_images: number of images to return.
      progress: optional function called with the number of images done.
      generated: whether they are generated images: then, as in `collect`, the rows of all are
        kept, and their logits.
      look: optional `Look`, as of `collect`.

    Returns:
      `Samples` of exactly `limit` images.

    Raises:
      ValueError: sizes that do not fit.
    """
    check_batch(batch_size, sharding)
    shape = (batch_size, *(look.handling.shape if look else tuple)(source.image_shape))
    batches = eval_inputs(source, batch_size, limit, sharding, look)
    limits = {"features": REFERENCE_ROWS}
    if generated:
        limits = dict.fromkeys((*ROWS, COSINES), len(source))
    add = _adding(extractor, sharding, look)
    return _gather(add, batches, shape, extractor, sharding, keep_images, limits, progress)


def _adding(extractor, sharding, look):
    """(moments, batch, keep) -> as `_add`; images that it keeps beside."""
    apply, extractor_params = _apply(extractor, sharding)

    def add(moments, batch, keep):
        program = _real_program(apply, sharding, keep)
        (moments, rows, *rest), pixels = program(
            extractor_params, moments, batch["image"], batch["mask"]
        )
        if look and look.clip:
            rows[COSINES] = look.clip.cosines(batch["clip"], batch["text"], sharding)
        return (moments, rows, *rest), pixels

    return add


def _apply(extractor, sharding):
    if extractor is None:
        return _no_features, ()
    return extractor.apply, jax.device_put(extractor.params, replicated(sharding))


def _no_features(params, images):
    """What an extractor's `apply` is where there is none: (B, 0)."""
    return jnp.zeros((len(images), 0))


def _outputs(apply, params, images):
    """What an extractor finds, by kind: "features", perhaps "spatial" and "logits"."""
    found = apply(params, images)
    return dict(found) if isinstance(found, Mapping) else {"features": found}


def _add(apply, params, moments, images, mask):
    """(moments, rows, finite, mask), uint8 images: they go through uint8, as a saved one would."""
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    pixels = to_uint8(images)
    found = _outputs(apply, params, pixels.astype(jnp.float32) / 127.5 - 1)
    for rows in found.values():
        finite &= jnp.isfinite(rows).all(axis=1)
    moments = {kind: moments_update(moments[kind], found[kind], mask) for kind in moments}
    rows = {kind: found[kind] for kind in found if kind in ROWS}
    return (moments, rows, finite, mask), pixels


@functools.lru_cache(maxsize=8)
def _real_program(apply, sharding, keep):
    """Jitted (extractor's params, moments, images, mask) -> as `_add`; images only if kept."""

    def program(params, moments, images, mask):
        result, pixels = _add(apply, params, moments, images, mask)
        return result, pixels if keep else None

    return _jit(program, sharding)


@functools.lru_cache(maxsize=8)
def _sample_program(sample_fn, apply, sharding, keep):
    """Jitted (extractor's params, moments, params, seed, first, count, condition,
    batch_size) -> likewise; the condition may be left out."""

    def program(extractor_params, moments, params, seed, first, count, *condition, batch_size):
        indices = first + jnp.arange(batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        if sharding:
            keys, *condition = jax.lax.with_sharding_constraint((keys, *condition), sharding)
        images = sample_fn(params, keys, *condition)
        result, pixels = _add(apply, extractor_params, moments, images, indices < count)
        return result, pixels if keep else None

    return _jit(program, sharding, static_argnames="batch_size")


def _jit(program, sharding, **options):
    """All but the images are replicated, so that every process can read them."""
    options |= {"out_shardings": sharding and (replicated(sharding), sharding)}
    return jax.jit(program, donate_argnames="moments", **options)


def _gather(batch, items, shape, extractor, sharding, keep_images, limits, progress):
    """`Samples` of batch(moments, item, keep) over all items; `shape` is a batch's.

    `limits` says how many rows of each kind are kept.
    """
    moments = _no_moments(extractor, shape)
    moments = jax.device_put(moments, replicated(sharding))
    rows, kept, done = {}, [], 0
    for item in items:
        (moments, new, finite, mask), pixels = batch(moments, item, done < keep_images)
        finite, mask = np.asarray(finite), np.asarray(mask)
        _check_finite(finite, mask, done)
        for kind in new.keys() & limits.keys():
            if done < limits[kind]:
                values = np.asarray(new[kind])[mask][: limits[kind] - done]
                rows.setdefault(kind, []).append(values)
        if pixels is not None:
            kept.append(_on_host(pixels, sharding)[mask][: keep_images - done])
        done += int(mask.sum())
        if progress:
            progress(done)
    moments = jax.device_get(moments)
    rows = {kind: np.concatenate(values) for kind, values in rows.items()}
    images = np.concatenate([np.zeros((0, *shape[1:]), np.uint8), *kept])
    return Samples(
        moments["features"],
        rows["features"],
        images,
        extractor,
        moments.get("spatial"),
        rows.get("logits"),
        rows.get(COSINES),
    )


def _check_finite(finite, mask, done):
    if not finite[mask].all():
        raise ValueError(
            f"image {done + int(np.argmin(finite[mask]))} or its features have non-finite values"
        )


def _no_moments(extractor, shape):
    """Moments of no images, by kind."""
    if extractor is None:
        return {"features": moments_zero(0)}
    extractor.check_shape(shape[1:])
    images = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    found = jax.eval_shape(functools.partial(_outputs, extractor.apply), extractor.params, images)
    return {kind: moments_zero(found[kind].shape[1]) for kind in MOMENTS if kind in found}


def replicated(sharding):
    """The sharding that puts a whole array on every device of another one's mesh."""
    return sharding and NamedSharding(sharding.mesh, PartitionSpec())


def _on_host(array, sharding):
    """A batch as NumPy, all of it on every process."""
    if sharding is None:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def check_batch(batch_size, sharding):
    """Raises a ValueError if a batch cannot be cut into the sharding's parts."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if sharding is not None:
        axes = sharding.spec[0] if sharding.spec else None
        axes = axes if isinstance(axes, tuple) else (axes,)
        shards = int(np.prod([sharding.mesh.shape[axis] for axis in axes if axis]))
        if batch_size % shards:
            raise ValueError(f"batch_size {batch_size} is not a multiple of its {shards} shards")


def eval_inputs(source, batch_size, limit, sharding, look=None):
    """Evaluation batches as networks see them: whole on each process, or split over all of them.

    Handled on the host first, where a `Look` says how.
    """
    alone = {"process_index": 0, "process_count": 1} if sharding is None else {}
    batches = eval_batches(source, batch_size=batch_size, limit=limit, **alone)
    batches = look.handled(batches) if look else batches
    unpack, placed = _unpacking(source.unpack), batches
    if sharding is not None:
        placed = placed_ahead(batches, sharding)
    with contextlib.closing(placed):
        for batch in placed:
            yield unpack(batch)


def _handled(drawn, look, sharding):
    """Batches of `_drawn` as networks see them.

    They are drawn by the thread that also runs what finds their features: processes must start
    programs in one order.
    """
    unpack = _unpacking(unpack_images)
    with contextlib.closing(look.handled(drawn)) as batches:
        for batch in batches:
            if sharding is not None:
                batch = {
                    name: jax.make_array_from_process_local_data(sharding, value)
                    for name, value in batch.items()
                }
            yield unpack(batch)


@functools.lru_cache(maxsize=8)
def _unpacking(unpack):
    """Jitted, once for all sources that unpack in the same way."""
    return jax.jit(unpack)
