"""Decoding in tiles: large images in little memory, with the numbers of whole images.

What looks at all of an image is done for all of it: levels that are small run whole, attention
takes a few queries at a time, and the statistics of each normalisation are those of all tiles. So
tiles do not differ where they overlap, and nothing is blended.

They overlap by 16 pixels, 8 on each side, with the published decoder: as far as the 7 or 8
convolutions of a level reach. Of the images' range the difference is 1e-6 or less in float32. With
Stable Diffusion's decoder, an image of 1024x1024 and float32 the compiled program (CPU) takes 3.8
GB beside parameters and result, in tiles of 512 pixels 1.9 GB, of 256 0.84 GB, of 128 0.74 GB: what
is left is the input and result of a level, the largest 512x512x256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from liftplace_jax.nn.attention import attention

QUERIES = 1024
"""That attention takes at a time."""
Layer = Callable[[Any, jax.Array], jax.Array]
Run = Callable[[jax.Array, Layer, Layer], jax.Array]  # (h, convolution, normalisation) -> h
Moments = tuple[jax.Array, jax.Array]  # mean and variance, (B, groups)


def by_queries(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` with at most QUERIES queries at a time: its scores take so much less memory."""
    batch, tokens, *rest = q.shape
    part = next(n for n in range(min(QUERIES, tokens), 0, -1) if tokens % n == 0)
    parts = jnp.moveaxis(q.reshape(batch, tokens // part, part, *rest), 1, 0)
    return jnp.moveaxis(jax.lax.map(lambda q: attention(q, k, v), parts), 0, 1).reshape(q.shape)


def doubled_in_tiles(run: Run, h: jax.Array, tile: int) -> jax.Array:
    """A level of a decoder, tile by tile: as `run(h)`, but for rounding.

    A tile sees as many pixels more on each side as the 3x3 convolutions of the level reach. There
    is one pass over all tiles for each normalisation, up to it, for its statistics, and one for the
    result: for levels of 6 normalisations and 7 convolutions about 5 times the arithmetic.

    Args:
      run: the level: (h, conv, norm) -> its result, of twice the height and width. It begins with
        doubling h, and calls conv(layer, x) for each convolution, norm(layer, x) for each
        `nnx.GroupNorm`; all else it does pixel by pixel.
      h: (B, H, W, C).
      tile: pixels along a side of a tile of the result, about.
    """
    convolutions, norms = [], []

    def count(h):
        # Shapes alone: what layers there are, and how far they reach.
        return run(h, _noting(convolutions), _noting(norms, call=False))

    result = jax.eval_shape(count, h)
    reach = sum(layer.kernel_size[0] // 2 for layer in convolutions)
    tiles = _Tiles.of(h.shape[1:3], tile, -(-reach // 2))
    padded = tiles.padded(h)

    def run_tile(index, moments):
        """(the tile's result, what went into each normalisation, pixels that are its own)."""
        inside, own = tiles.masks(index)
        seen = []

        def conv(layer, x):
            return layer(jnp.where(inside, x, 0))  # an image ends in zeros, wherever tiles do

        def norm(layer, x):
            seen.append(x)
            # Without moments nothing that comes of it is used, nor computed.
            return _normalised(layer, x, moments[len(seen) - 1]) if len(seen) <= len(moments) else x

        return run(tiles.cut(padded, index), conv, norm), seen, own

    moments: list[Moments] = []
    for place, layer in enumerate(norms):

        def part(index, place=place, layer=layer):
            _, seen, own = run_tile(index, moments)
            return _part_moments(seen[place], own, layer.num_groups)

        moments.append(_all_moments(*jax.lax.map(part, jnp.arange(tiles.number))))

    def add(index, whole):
        return tiles.put(whole, run_tile(index, moments)[0], index)

    whole = jnp.zeros((len(h), *tiles.room, result.shape[-1]), result.dtype)
    whole = jax.lax.fori_loop(0, tiles.number, add, whole)
    return whole[:, : result.shape[1], : result.shape[2]]


def _noting(found: list[Any], call: bool = True) -> Layer:
    def layer_on(layer, x):
        found.append(layer)
        return layer(x) if call else x

    return layer_on


class _Tiles(NamedTuple):
    """How an image is cut, in pixels of what goes into a level: what comes out has twice as many.

    Attributes:
      size: height and width.
      core: of the part that is a tile's own.
      count: of tiles along both.
      halo: pixels around the core that a tile sees too.
    """

    size: tuple[int, ...]
    core: tuple[int, ...]
    count: tuple[int, ...]
    halo: int

    @classmethod
    def of(cls, size: tuple[int, ...], tile: int, halo: int) -> _Tiles:
        """Tiles as equal as can be, of at most `tile` pixels of the result (rounded up to 2)."""
        core = [-(-side // -(-2 * side // tile)) for side in size]
        count = [-(-side // own) for side, own in zip(size, core, strict=True)]
        return cls(tuple(size), tuple(core), tuple(count), halo)

    @property
    def number(self) -> int:
        return self.count[0] * self.count[1]

    @property
    def room(self) -> tuple[int, ...]:
        """Height and width of the result when all tiles are whole."""
        return tuple(2 * n * own for n, own in zip(self.count, self.core, strict=True))

    def padded(self, h: jax.Array) -> jax.Array:
        """With zeros around it, so that every tile can be cut out."""
        past = [room // 2 - side for room, side in zip(self.room, self.size, strict=True)]
        return jnp.pad(h, ((0, 0), *((self.halo, self.halo + more) for more in past), (0, 0)))

    def start(self, index: jax.Array) -> tuple[jax.Array, ...]:
        """Where a tile's core begins; in the padded image the tile itself does."""
        places = jnp.divmod(index, self.count[1])
        return tuple(n * own for n, own in zip(places, self.core, strict=True))

    def cut(self, padded: jax.Array, index: jax.Array) -> jax.Array:
        """A tile with its halo."""
        sides = [own + 2 * self.halo for own in self.core]
        shape = (len(padded), *sides, padded.shape[-1])
        return jax.lax.dynamic_slice(padded, (0, *self.start(index), 0), shape)

    def put(self, whole: jax.Array, found: jax.Array, index: jax.Array) -> jax.Array:
        """The core of a tile's result in its place."""
        skip = 2 * self.halo
        rows, columns = (slice(skip, skip + 2 * own) for own in self.core)
        start = (0, *(2 * n for n in self.start(index)), 0)
        return jax.lax.dynamic_update_slice(whole, found[:, rows, columns], start)

    def masks(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(1, h, w, 1) of a tile's result: what is inside the image, and what is its own of it."""
        inside, own = [], []
        for start, core, side in zip(self.start(index), self.core, self.size, strict=True):
            place = jnp.arange(2 * (core + 2 * self.halo)) - 2 * self.halo
            inside.append((place + 2 * start >= 0) & (place + 2 * start < 2 * side))
            own.append(inside[-1] & (place >= 0) & (place < 2 * core))
        return tuple((m[0][:, None] & m[1])[None, :, :, None] for m in (inside, own))


def _part_moments(x, own, groups):
    """(number, mean, sum of squared deviations) of a tile's own pixels, by image and group."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    mask = own[..., None]
    number = own.sum() * float(x.shape[-1])
    mean = jnp.where(mask, x, 0).sum((1, 2, 4)) / number
    deviation = jnp.where(mask, x - mean[:, None, None, :, None], 0)
    return number, mean, jnp.square(deviation).sum((1, 2, 4))


def _all_moments(number, mean, squares) -> Moments:
    """(mean, variance) of all tiles, by image and group."""
    share = (number / number.sum())[:, None, None]
    whole = (share * mean).sum(0)
    return whole, (squares.sum(0) / number.sum()) + (share * jnp.square(mean - whole)).sum(0)


def _normalised(layer: nnx.GroupNorm, x: jax.Array, moments: Moments) -> jax.Array:
    """As the layer itself, which takes the moments of x."""
    assert layer.scale is not None and layer.bias is not None, "an affine layer"
    x, scale, bias = layer.promote_dtype((x, layer.scale[...], layer.bias[...]), dtype=layer.dtype)
    mean, variance = (jnp.repeat(m, layer.group_size, axis=1)[:, None, None] for m in moments)
    y = (x - mean) * (jax.lax.rsqrt(variance + layer.epsilon) * scale) + bias
    return y.astype(layer.dtype)
