"""From a sampler and a data set to scores. Models and processes come in as functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from liftplace_jax.data import eval_batches
from liftplace_jax.evaluation.frechet import (
    Moments,
    frechet_from_moments,
    moments_update,
    moments_zero,
)
from liftplace_jax.evaluation.metrics import precision_recall


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """What is kept of a set of images, real or generated.

    Attributes:
      moments: `Moments` of the features.
      features: (N, D) float32 NumPy array.
      images: the first images, (M, H, W, C) uint8 NumPy array.
      extractor: the `Extractor` that made the features; None: there are none, D = 0.
    """

    moments: Moments
    features: np.ndarray
    images: np.ndarray
    extractor: object


def to_uint8(images):
    """Images in [-1, 1] (clipped) to 0..255, to the nearest: the only such conversion."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _replicated(sharding):
    return sharding and NamedSharding(sharding.mesh, PartitionSpec())


def _on_host(array, sharding):
    """A batch as NumPy, all of it on every process."""
    if sharding is None:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _no_features(params, images):
    """What an extractor's `apply` is where there is none: (B, 0)."""
    return jnp.zeros((len(images), 0))


@functools.lru_cache(maxsize=8)
def _add_batch(apply, sharding):
    """Jitted (params, moments, images, mask) -> (moments, features, finite, mask), uint8 images.

    Images go through uint8, as a saved image would. All but the images are replicated, so that
    every process can read them.
    """

    def add(params, moments, images, mask):
        finite = jnp.isfinite(images).all(axis=(1, 2, 3))
        pixels = to_uint8(images)
        features = apply(params, pixels.astype(jnp.float32) / 127.5 - 1)
        finite &= jnp.isfinite(features).all(axis=1)
        return (moments_update(moments, features, mask), features, finite, mask), pixels

    return jax.jit(add, out_shardings=sharding and (_replicated(sharding), sharding))


@functools.lru_cache(maxsize=8)
def _draw(sample_fn, sharding):
    """Jitted (params, seed, first, batch_size, count) -> images first, first + 1, ... and mask."""

    def draw(params, seed, first, batch_size, count):
        indices = first + jnp.arange(batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        if sharding:
            keys = jax.lax.with_sharding_constraint(keys, sharding)
        return sample_fn(params, keys), indices < count

    return jax.jit(draw, static_argnames="batch_size", out_shardings=sharding)


def _check_batch(batch_size, sharding):
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if sharding is not None:
        axes = sharding.spec[0] if sharding.spec else None
        axes = axes if isinstance(axes, tuple) else (axes,)
        shards = int(np.prod([sharding.mesh.shape[axis] for axis in axes if axis]))
        if batch_size % shards:
            raise ValueError(f"batch_size {batch_size} is not a multiple of its {shards} shards")


def _gather(batches, extractor, sharding, keep_images, progress):
    """Features, moments and the first images of an iterable of (images, mask)."""
    add = _add_batch(extractor.apply if extractor else _no_features, sharding)
    params = jax.device_put(extractor.params if extractor else (), _replicated(sharding))
    moments = jax.device_put(
        moments_zero(extractor.dim if extractor else 0), _replicated(sharding)
    )
    features, kept, done = [], [], 0
    for images, mask in batches:
        if extractor and images.shape[1:] != extractor.image_shape:
            raise ValueError(
                f"images are {images.shape[1:]}, but the extractor {extractor.name!r} takes "
                f"{extractor.image_shape}"
            )
        (moments, rows, finite, mask), pixels = add(params, moments, images, mask)
        rows, finite, mask = np.asarray(rows), np.asarray(finite), np.asarray(mask)
        rows, finite = rows[mask], finite[mask]
        if not finite.all():
            raise ValueError(
                f"image {done + int(np.argmin(finite))} or its features have non-finite values"
            )
        features.append(rows)
        if done < keep_images:
            kept.append(_on_host(pixels, sharding)[mask][: keep_images - done])
        done += len(rows)
        if progress:
            progress(done)
    empty = np.zeros((0, *images.shape[1:]), np.uint8)
    return Samples(
        jax.device_get(moments), np.concatenate(features), np.concatenate([empty, *kept]), extractor
    )


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
    progress=None,
):
    """Draws samples and gathers their features; images stay on the devices.

    Sample i is drawn from the key fold_in(seed, i): it depends neither on the batch size nor on
    the number of devices or processes.

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
      progress: optional function called with the number of samples done.

    Returns:
      `Samples` of exactly `num_samples` samples.

    Raises:
      ValueError: sizes that do not fit, or a sample with non-finite values (named by number).
    """
    _check_batch(batch_size, sharding)
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    draw = _draw(sample_fn, sharding)
    batches = (
        draw(params, seed, first, batch_size, num_samples)
        for first in range(0, num_samples, batch_size)
    )
    return _gather(batches, extractor, sharding, keep_images, progress)


def reference(source, extractor, *, batch_size, limit=None, sharding=None, keep_images=0):
    """Features of real images.

    Args:
      source: a `liftplace_jax.data.Source`.
      extractor: an `Extractor`.
      batch_size: global batch size.
      limit: number of images, default all.
      sharding: optional `NamedSharding` of the batch axis; without one, every process reads all.
      keep_images: number of images to return.

    Returns:
      `Samples` of exactly `limit` images.

    Raises:
      ValueError: sizes that do not fit.
    """
    _check_batch(batch_size, sharding)
    batches = (
        (batch["image"], batch["mask"])
        for batch in _global_batches(source, batch_size, limit, sharding)
    )
    return _gather(batches, extractor, sharding, keep_images, None)


def _global_batches(source, batch_size, limit, sharding):
    """Evaluation batches: whole on each process, or one array over all of them."""
    if sharding is None:
        yield from eval_batches(
            source, batch_size=batch_size, limit=limit, process_index=0, process_count=1
        )
        return
    for batch in eval_batches(source, batch_size=batch_size, limit=limit):
        yield {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()
        }


def score(real, generated, *, k=5, allow_few=False):
    """Compares generated samples with real ones.

    Args:
      real: `Samples` of `reference`.
      generated: `Samples` of `collect`.
      k: neighbours of precision and recall.
      allow_few: accept fewer samples than feature dimensions.

    Returns:
      {"label": what "frechet" is called, "frechet", "precision", "recall", "density", "coverage",
      "k", "num_samples", "num_reference"}.

    Raises:
      ValueError: no features, features of different extractors, or too few samples.
    """
    if real.extractor is None or generated.extractor is None:
        raise ValueError("samples without features cannot be compared: name an extractor")
    if real.extractor is not generated.extractor:
        raise ValueError(
            f"features come from different extractors: {real.extractor.name!r} and "
            f"{generated.extractor.name!r}"
        )
    return {
        "label": real.extractor.label,
        "frechet": frechet_from_moments(real.moments, generated.moments, allow_few=allow_few),
        **precision_recall(real.features, generated.features, k),
        "k": k,
        "num_samples": len(generated.features),
        "num_reference": len(real.features),
    }


@functools.partial(jax.jit, static_argnames="shape")
def _levels_and_noise(seed, indices, shape):
    """Level in [0, 1) and noise of each example; a quarter of them in each quarter of levels."""

    def one(index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        level = (index % 4 + jax.random.uniform(jax.random.fold_in(key, 0))) / 4
        # Rounding up must not reach the next quarter.
        level = jnp.minimum(level, jnp.nextafter((index % 4 + 1) / 4, 0.0))
        return level, jax.random.normal(jax.random.fold_in(key, 1), shape)

    return jax.vmap(one)(indices)


@functools.lru_cache(maxsize=8)
def _quarter_errors(sharding):
    """Jitted sums of the squared error per element in each quarter of levels, and counts."""
    return jax.jit(_sum_quarters, out_shardings=_replicated(sharding))


def _sum_quarters(teacher, student, levels, mask):
    errors = jnp.square(teacher.astype(jnp.float32) - student.astype(jnp.float32))
    errors = jnp.where(mask, errors.reshape(len(errors), -1).mean(1), 0)
    members = (jnp.floor(levels * 4)[:, None] == jnp.arange(4)) & mask[:, None]
    return jnp.where(members, errors[:, None], 0).sum(0), members.sum(0)


def output_error(teacher, student, noising, source, *, batch_size, seed, limit=None, sharding=None):
    """Mean squared difference per element between two models' outputs on held-out data.

    Each example has its own fixed noise and noise level, decided by (seed, position): every model
    and every evaluation sees the same inputs.

    Args:
      teacher: (noisy, t, labels) -> prediction (B, ...); jitted by the caller.
      student: the same, of the same shape.
      noising: (images, levels, noise) -> (noisy, t), with `levels` (B,) in [0, 1) the fraction of
        the way from clean to noise, such as t = floor(levels * T) for T timesteps.
      source: a `liftplace_jax.data.Source` of held-out images.
      batch_size: global batch size.
      seed: int.
      limit: number of images, default all.
      sharding: optional `NamedSharding` of the batch axis; without one, every process reads all.

    Returns:
      {"output_error", "output_error_q1" (least noise) to "output_error_q4", "num_examples"};
      a quarter without examples (fewer than four) is NaN.

    Raises:
      ValueError: predictions of different shapes, or a non-finite error.
    """
    _check_batch(batch_size, sharding)
    sums, counts = np.zeros(4), np.zeros(4)
    for batch in _global_batches(source, batch_size, limit, sharding):
        levels, noise = _levels_and_noise(seed, batch["index"], source.image_shape)
        noisy, t = noising(batch["image"], levels, noise)
        outputs = [model(noisy, t, batch["label"]) for model in (teacher, student)]
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(
                f"teacher predicts {outputs[0].shape}, student {outputs[1].shape}; they must agree"
            )
        batch_sums, batch_counts = _quarter_errors(sharding)(*outputs, levels, batch["mask"])
        sums += np.asarray(batch_sums, np.float64)
        counts += np.asarray(batch_counts)
    if not np.isfinite(sums).all():
        raise ValueError("teacher or student predicted non-finite values")
    quarters = np.divide(sums, counts, out=np.full(4, np.nan), where=counts > 0)
    return {
        "output_error": float(sums.sum() / counts.sum()),
        **{f"output_error_q{i + 1}": float(value) for i, value in enumerate(quarters)},
        "num_examples": int(counts.sum()),
    }
