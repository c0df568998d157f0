"""Structured channel pruning of a U-Net with the published rule: teacher in, smaller student out.

Source: Diff_Pruning_EXP/prune.py (MagnitudePruner, local, conv_out ignored). The normalisation
layers keep their number of groups, so at 90 % a 128-wide layer ends with one channel a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.coupling import ChannelGroup, Slice, channel_groups

Tensors = Mapping[str, np.ndarray]
NORMALISATIONS = {"published": None, "adapted": 2}
"""Name -> the student's least number of channels in a normalisation group."""


class View(NamedTuple):
    """What one coupled layer says about the channels of a group.

    Attributes:
      weight: (channels, elements per channel).
      gradient: same shape, or None without gradients.
      is_norm: whether the layer is a normalisation.
    """

    weight: np.ndarray
    gradient: np.ndarray | None
    is_norm: bool


class Pruned(NamedTuple):
    """A pruned student.

    Attributes:
      config: the student's architecture.
      tensors: its weights under published names, torch layouts; copies of the teacher's values.
      kept: root layer of each group -> indices of the channels that stay, ascending.
    """

    config: UNetConfig
    tensors: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]


def kept_per_block(width: int, ratio: float, blocks: int) -> int:
    """Channels that stay in each of `blocks` equal stretches of `width` channels.

    Removed are (width - int(width * (1 - ratio))) // blocks channels of each, in the published
    code's float arithmetic; `blocks` is 1 where no normalisation is involved.
    """
    return width // blocks - (width - int(width * (1 - ratio))) // blocks


def pruned_config(
    config: UNetConfig, ratio: float, min_channels_per_group: int | None = None
) -> UNetConfig:
    """The student's architecture alone; touches no weight.

    Args:
      config: the teacher's.
      ratio: share of channels to remove, in [0, 1).
      min_channels_per_group: None keeps the teacher's normalisation (published). 2 or more lowers
        the number of normalisation groups of narrow layers, so that each has so many channels.

    Raises:
      ValueError: ratio out of range, or no channel would stay; names the layer.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    widths = dict(config.widths)
    for group in channel_groups(config):
        blocks = _blocks(config, group)
        width = blocks * kept_per_block(group.width, ratio, blocks)
        if not width:
            raise ValueError(
                f"ratio {ratio} leaves none of the {group.width} channels of {group.root}; "
                "choose a smaller ratio or a wider teacher"
            )
        widths |= {name: width for name in group.outputs if name in widths}
    changes = (
        {} if min_channels_per_group is None else {"min_channels_per_group": min_channels_per_group}
    )
    return config.replace(widths=tuple(widths.items()), **changes)


def prune_unet(
    config: UNetConfig,
    tensors: Tensors,
    ratio: float,
    importance: Callable[[list[View]], np.ndarray],
    *,
    gradients: Tensors | None = None,
    min_channels_per_group: int | None = None,
) -> Pruned:
    """Removes the least important channels, group after group.

    Args:
      config: the teacher's architecture.
      tensors: its weights under published names, torch layouts.
      ratio: share of channels to remove, in [0, 1).
      importance: views of a group's channels -> (channels,) scores, such as `magnitude`.
      gradients: d loss / d weight under the same names, for importances that use them.
      min_channels_per_group: see `pruned_config`.

    Raises:
      ValueError: see `pruned_config`; or a tensor of the architecture is missing.
    """
    student = pruned_config(config, ratio, min_channels_per_group)
    state = _Shrinking(tensors, gradients)
    kept = {}
    for group in channel_groups(config):
        blocks = _blocks(config, group)
        keep = kept_per_block(group.width, ratio, blocks)
        scores = np.asarray(importance(list(state.views(group)))).reshape(blocks, -1)
        order = np.argsort(scores, axis=1, kind="stable")[:, scores.shape[1] - keep :]
        starts = np.arange(blocks)[:, None] * scores.shape[1]
        kept[group.root] = np.sort((order + starts).ravel())
        state.keep(group, kept[group.root])
    return Pruned(student, state.result(), kept)


def _blocks(config: UNetConfig, group: ChannelGroup) -> int:
    """In how many stretches channels are removed evenly: as many as normalisation groups."""
    if not group.norms:
        return 1
    return config.norm_groups(group.width, group.root)


class _Shrinking:
    """The weights while channels are being removed: full tensors and what still stands of them."""

    def __init__(self, tensors: Tensors, gradients: Tensors | None):
        self.tensors, self.gradients = tensors, gradients
        self.alive: dict[tuple[str, int], np.ndarray] = {}

    def _weight_name(self, layer: str) -> str:
        name = f"{layer}.weight"
        if name not in self.tensors:
            raise ValueError(f"the weights lack {name!r}, which this architecture has")
        return name

    def _alive(self, layer: str, axis: int) -> np.ndarray:
        size = self.tensors[self._weight_name(layer)].shape[axis]
        return self.alive.setdefault((layer, axis), np.ones(size, bool))

    def views(self, group: ChannelGroup) -> Iterator[View]:
        for layer in group.outputs:
            yield self._view(Slice(layer, 0), group.width, axis=0)
        for pieces, axis, is_norm in ((group.inputs, 1, False), (group.norms, 0, True)):
            layers = Counter(piece.layer for piece in pieces)
            for piece in pieces:
                # The published code leaves out a layer that a group enters twice (both halves
                # of a concatenation): the lengths differ there.
                if layers[piece.layer] == 1:
                    yield self._view(piece, group.width, axis, is_norm)

    def _view(self, piece: Slice, width: int, axis: int, is_norm: bool = False) -> View:
        name = self._weight_name(piece.layer)

        def rows(tensor):
            tensor = np.moveaxis(tensor, axis, 0)[piece.offset : piece.offset + width]
            if not is_norm:
                tensor = tensor[:, self._alive(piece.layer, 1 - axis)]
            return tensor.reshape(width, -1)

        gradient = None if self.gradients is None else rows(self.gradients[name])
        return View(rows(self.tensors[name]), gradient, is_norm)

    def keep(self, group: ChannelGroup, kept: np.ndarray) -> None:
        stays = np.zeros(group.width, bool)
        stays[kept] = True
        places = [(Slice(layer, 0), 0) for layer in group.outputs]
        places += [(piece, 1) for piece in group.inputs] + [(piece, 0) for piece in group.norms]
        for piece, axis in places:
            self._alive(piece.layer, axis)[piece.offset : piece.offset + group.width] = stays

    def result(self) -> dict[str, np.ndarray]:
        result = {}
        for name, tensor in self.tensors.items():
            layer = name.rpartition(".")[0]
            for axis in (0, 1):
                if (layer, axis) in self.alive and tensor.ndim > axis:
                    tensor = tensor.compress(self.alive[layer, axis], axis=axis)
            result[name] = np.array(tensor)
        return result
