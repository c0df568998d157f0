"""The DDPM U-Net's configuration: every width, and the dataflow they give.

Source of names and rules: "Diff_Pruning models/diffusion.py".
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.host.outside import cut
from liftplace_jax.host.ranges import SHARE, SIDE, whole
from liftplace_jax.nn.model_config import (
    MOST_BLOCKS_OF_LEVEL,
    MOST_PIXELS,
    DenoiserConfig,
)

_WIDTH = whole(1, SIDE)


@dataclasses.dataclass(frozen=True)
class Node:
    """One step of the U-Net's dataflow.

    Attributes:
      name: module name in the published checkpoints; resampling without a convolution has no
        module and is named "down.<i>.downsample" or "up.<i>.upsample".
      kind: "conv_in", "block", "attention", "downsample" or "upsample".
      inputs: names of the nodes whose outputs, concatenated along channels, are the input
        (none for conv_in, two for the blocks of the way up: the previous node, then the skip).
      in_width: input channels.
      hidden_width: channels inside: conv1 of a block, q, k and v of an attention; else 0.
      out_width: output channels.
      resolution: height and width of the output, in pixels.
      shortcut: whether a block carries its input to its output through `nin_shortcut`; without
        it, a block's out_width equals its in_width.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    in_width: int
    hidden_width: int
    out_width: int
    resolution: int
    shortcut: bool = False


@dataclasses.dataclass(frozen=True)
class UNetConfig(DenoiserConfig):
    """Everything that defines a `UNet`; hashable and JSON friendly.

    Attributes:
      image_size: height and width of the images, in pixels.
      in_channels: image channels.
      out_channels: channels of the prediction.
      ch: base width and dimension of the sinusoidal embedding; pruning never changes it.
      ch_mult: width of each level, over ch.
      num_res_blocks: residual blocks a level on the way down (one more on the way up).
      attn_resolutions: resolutions (pixels) with attention after each block, each one that the
        network has: image_size, halved at each further level. None: 16, if it has that.
      dropout: rate inside the residual blocks, in [0, 1).
      resamp_with_conv: resample with convolutions, or by averaging and repeating alone.
      num_groups: normalisation groups. Must divide every normalised width if
        min_channels_per_group is 1, the published rule.
      min_channels_per_group: above 1, a layer of C channels has the largest number of groups up
        to num_groups that divides C and leaves so many channels in each.
      widths: (layer name, output channels) for every layer whose width is free: the two
        "temb.dense", "conv_in", "<block>.conv1", "<block>.conv2", "<attention>.q" (k and v have
        the same width) and the resampling convolutions. A mapping is accepted too. None, the
        unpruned model, is replaced by the widths that ch and ch_mult give.

    Raises:
      ValueError: a field is out of its range, widths has unknown or missing names, or widths do
        not fit each other; names the field or the layer.
    """

    image_size: int
    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    # None is what __post_init__ replaces.
    attn_resolutions: tuple[int, ...] = None  # pyright: ignore[reportAssignmentType]
    dropout: float = 0.0
    resamp_with_conv: bool = True
    num_groups: int = 32
    min_channels_per_group: int = 1
    widths: tuple[tuple[str, int], ...] = None  # pyright: ignore[reportAssignmentType]

    model: ClassVar[str] = "unet"
    RANGES: ClassVar = {
        "image_size": whole(1, MOST_PIXELS),
        "in_channels": _WIDTH,
        "out_channels": _WIDTH,
        "ch": whole(4, SIDE),
        "ch_mult": whole(1, 1024, many=True),
        "num_res_blocks": whole(
            1, MOST_BLOCKS_OF_LEVEL, why="each is a layer of its own in the program"
        ),
        "attn_resolutions": whole(1, SIDE, many=True),
        "dropout": SHARE,
        "num_groups": _WIDTH,
        "min_channels_per_group": _WIDTH,
    }

    def __post_init__(self):
        published = self.attn_resolutions is None
        if published:
            object.__setattr__(self, "attn_resolutions", (16,))
        for field in ("ch_mult", "attn_resolutions"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple):
                raise ValueError(f"{field} must be a sequence of integers, not {value!r}")
            object.__setattr__(self, field, tuple(value))
        if not isinstance(self.widths, Mapping | list | tuple | None):
            raise ValueError(f"widths must map layer names to widths, not be {self.widths!r}")
        self._check_fields()
        if published and 16 not in self._resolutions():
            object.__setattr__(self, "attn_resolutions", ())
        self._check_attention()
        default = self._unpruned_widths()
        widths = default if self.widths is None else dict(self.widths)
        unknown, missing = sorted(widths.keys() - default), sorted(default.keys() - widths)
        if unknown or missing:
            raise ValueError(
                f"widths: unknown layers {cut(unknown)}, missing layers {cut(missing)}; "
                "give one width for each layer of this architecture"
            )
        for name, width in widths.items():
            widths[name] = width.item() if isinstance(width, np.integer) else width
            _WIDTH.check(f"widths[{name!r}]", widths[name])
        object.__setattr__(self, "widths", tuple((name, widths[name]) for name in default))
        self._check_plan()

    def _check_fields(self):
        self.check_numbers()
        if not self.ch_mult:
            raise ValueError("ch_mult is empty; give one multiplier for each level")
        if self.image_size % 2 ** (len(self.ch_mult) - 1):
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {len(self.ch_mult) - 1} times, "
                f"as the {len(self.ch_mult)} levels of ch_mult need"
            )
        if not isinstance(self.resamp_with_conv, bool):
            raise ValueError(f"resamp_with_conv must be a bool, not {self.resamp_with_conv!r}")

    def _check_attention(self):
        """Or the attention that was asked for would silently not be there."""
        sizes = self._resolutions()
        strange = [size for size in self.attn_resolutions if size not in sizes]
        if strange:
            raise ValueError(
                f"attn_resolutions {strange}: the network has none of them, only {sizes} "
                "(image_size, halved at each further level of ch_mult)"
            )

    def _resolutions(self) -> list[int]:
        return [self.image_size >> level for level in range(len(self.ch_mult))]

    def _check_plan(self):
        nodes = self.block_plan()
        for node in nodes:
            if node.kind == "block":
                self.norm_groups(node.in_width, f"{node.name}.norm1")
                self.norm_groups(node.hidden_width, f"{node.name}.norm2")
                if not node.shortcut and node.in_width != node.out_width:
                    raise ValueError(
                        f"widths: {node.name}.conv2 has {node.out_width} channels, its input "
                        f"{node.in_width}; they must be equal, this block has no nin_shortcut"
                    )
            elif node.kind == "attention":
                self.norm_groups(node.in_width, f"{node.name}.norm")
        self.norm_groups(nodes[-1].out_width, "norm_out")

    def norm_groups(self, channels: int, name: str) -> int:
        """Number of normalisation groups of a layer.

        Args:
          channels: the layer's width.
          name: the layer's name, for the error message.

        Raises:
          ValueError: no permitted number of groups divides the width; names the layer.
        """
        if self.min_channels_per_group == 1:
            if channels % self.num_groups:
                raise ValueError(
                    f"{name}: num_groups {self.num_groups} does not divide {channels} channels; "
                    "change the width, or set min_channels_per_group above 1"
                )
            return self.num_groups
        if channels < self.min_channels_per_group:
            raise ValueError(
                f"{name}: {channels} channels are fewer than min_channels_per_group "
                f"{self.min_channels_per_group}"
            )
        most = min(self.num_groups, channels // self.min_channels_per_group)
        return next(groups for groups in range(most, 0, -1) if channels % groups == 0)

    def block_plan(self) -> tuple[Node, ...]:
        """The dataflow with this config's widths, in execution order, conv_in first.

        The last node feeds norm_out and conv_out. `shortcut` is decided by the unpruned widths,
        as in the published code: pruning neither adds nor removes layers.
        """
        widths, nodes = dict(self.widths), []
        out, unpruned = {}, {}
        for name, kind, inputs, width, resolution in self._topology():
            in_width = sum(out[source] for source in inputs) if inputs else self.in_channels
            shortcut = kind == "block" and sum(unpruned[source] for source in inputs) != width
            hidden = {"block": f"{name}.conv1", "attention": f"{name}.q"}.get(kind)
            # An attention and a resampling without convolution keep the width of their input.
            own = f"{name}.conv2" if kind == "block" else name
            out[name], unpruned[name] = widths.get(own, in_width), width
            hidden_width = widths[hidden] if hidden else 0
            nodes.append(
                Node(name, kind, inputs, in_width, hidden_width, out[name], resolution, shortcut)
            )
        return tuple(nodes)

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig.num_blocks`."""
        return len(self.ch_mult) * (2 * self.num_res_blocks + 1) + 2

    def _unpruned_widths(self) -> dict[str, int]:
        widths = {"temb.dense.0": 4 * self.ch, "temb.dense.1": 4 * self.ch}
        for name, kind, _, width, _ in self._topology():
            if kind == "block":
                widths |= {f"{name}.conv1": width, f"{name}.conv2": width}
            elif kind == "attention":
                widths[f"{name}.q"] = width
            elif kind == "conv_in" or self.resamp_with_conv:
                widths[name] = width
        return widths

    def _topology(self) -> Iterable[tuple[str, str, tuple[str, ...], int, int]]:
        """Yields (name, kind, inputs, unpruned width, output resolution) in execution order."""
        suffix = ".conv" if self.resamp_with_conv else ""
        last, width, resolution = "conv_in", self.ch, self.image_size
        skips = [last]
        yield last, "conv_in", (), width, resolution
        for level, mult in enumerate(self.ch_mult):
            width = self.ch * mult
            for index in range(self.num_res_blocks):
                name = f"down.{level}.block.{index}"
                yield name, "block", (last,), width, resolution
                last = name
                if resolution in self.attn_resolutions:
                    last = f"down.{level}.attn.{index}"
                    yield last, "attention", (name,), width, resolution
                skips.append(last)
            if level < len(self.ch_mult) - 1:
                resolution //= 2
                name = f"down.{level}.downsample{suffix}"
                yield name, "downsample", (last,), width, resolution
                last = name
                skips.append(last)
        yield "mid.block_1", "block", (last,), width, resolution
        yield "mid.attn_1", "attention", ("mid.block_1",), width, resolution
        yield "mid.block_2", "block", ("mid.attn_1",), width, resolution
        last = "mid.block_2"
        for level in reversed(range(len(self.ch_mult))):
            width = self.ch * self.ch_mult[level]
            for index in range(self.num_res_blocks + 1):
                name = f"up.{level}.block.{index}"
                yield name, "block", (last, skips.pop()), width, resolution
                last = name
                if resolution in self.attn_resolutions:
                    last = f"up.{level}.attn.{index}"
                    yield last, "attention", (name,), width, resolution
            if level:
                resolution *= 2
                name = f"up.{level}.upsample{suffix}"
                yield name, "upsample", (last,), width, resolution
                last = name

    def replace(self, **changes: Any) -> "UNetConfig":
        """A copy with changes; widths follow ch and ch_mult unless they are pruned or given."""
        if dict(self.widths) == self._unpruned_widths():
            changes = {"widths": None} | changes
        return dataclasses.replace(self, **changes)

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype, remat: str | None = None) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.families.unet.model import UNet  # late: it takes its config from here

        return UNet(self, rngs=rngs, dtype=dtype, remat=remat)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; the inverse of `from_dict`."""
        return super().to_dict() | {"widths": dict(self.widths)}

    def architecture(self) -> list[dict[str, Any]]:
        """See `ModelConfig.architecture`: all but dropout; widths follow from the other fields."""
        fields = self.to_dict()
        del fields["dropout"]
        widths = {"widths": fields.pop("widths")}
        fields["attn_resolutions"] = sorted(set(self.attn_resolutions))
        return [fields, widths]
