"""The Stable Diffusion U-Net's configuration, its blocks, and which of a teacher's it follows.

Source of names and rules: diffusers 0.42 "models/unets/unet_2d_condition.py".
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.conditioning import Text
from liftplace_jax.host.ranges import SIDE, positive, whole
from liftplace_jax.nn.model_config import MOST_BLOCKS_OF_LEVEL, MOST_PIXELS, DenoiserConfig

_WIDTH = whole(1, SIDE)


@dataclasses.dataclass(frozen=True)
class Block:
    """Layers of one width and resolution, and a change of resolution after them.

    A layer is a residual block and, where the block has attention, a transformer after it; the
    block in the middle has two residual blocks and one transformer between them.

    Attributes:
      name: module name in the published checkpoints, "down_blocks.0", "mid_block", "up_blocks.0".
      width: output channels of every layer.
      heads: of the transformers' attention; 0: the block has none.
      inputs: for each residual block, the channels that come from the one before it and those of
        the skip that is concatenated after them (0: none).
      resolution: height and width of its layers, in pixels.
      resample: "downsamplers", "upsamplers" or None: what follows the last layer.
    """

    name: str
    width: int
    heads: int
    inputs: tuple[tuple[int, int], ...]
    resolution: int
    resample: str | None

    @property
    def attentions(self) -> int:
        """How many transformers it has: the first residual blocks have one each after them."""
        if not self.heads:
            return 0
        return 1 if self.name == "mid_block" else len(self.inputs)


@dataclasses.dataclass(frozen=True)
class SDUNetConfig(DenoiserConfig):
    """Everything that defines an `SDUNet`; hashable and JSON friendly.

    Levels count from the full resolution, down_blocks.0; up_blocks.0 is of the last one.

    Attributes:
      image_size: height and width of the latents, in pixels.
      in_channels: channels of the latents.
      out_channels: channels of the prediction.
      widths: channels of each level. The embedding of the timestep has four times the first.
      layers: of each level on the way down; on the way up it has one more.
      heads: of each level's attention, the last one's for the middle too. (diffusers calls the
        number of heads attention_head_dim.)
      down_attention: whether down_blocks.<i> has transformers.
      up_attention: whether up_blocks.<i> has transformers.
      mid_block: whether there is a block in the middle.
      context_dim: channels of the text states, 768 in SD 1.x and 1024 in 2.x.
      linear_projection: whether a transformer begins and ends with linear layers on tokens, as in
        2.x, not 1x1 convolutions, as in 1.x; their weights have other shapes.
      upcast_attention: whether the published model computes attention's scores in float32, a
        record alone: here they always are (see `nn.attention`).
      num_groups: normalisation groups; divides every width.
      norm_epsilon: of the residual blocks' and the last normalisation.

    Raises:
      ValueError: a field is out of its range, or fields do not fit each other; names them.
    """

    image_size: int
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    mid_block: bool = True
    context_dim: int = 1024
    linear_projection: bool = True
    upcast_attention: bool = False
    num_groups: int = 32
    norm_epsilon: float = 1e-5

    model: ClassVar[str] = "sd_unet"
    RANGES: ClassVar = {
        "image_size": whole(1, MOST_PIXELS),
        "in_channels": _WIDTH,
        "out_channels": _WIDTH,
        "widths": whole(2, SIDE, many=True),
        "layers": whole(
            1, MOST_BLOCKS_OF_LEVEL, many=True, why="each is a layer of its own in the program"
        ),
        "heads": whole(1, SIDE, many=True),
        "context_dim": _WIDTH,
        "num_groups": _WIDTH,
        "norm_epsilon": positive(1.0),
    }

    def __post_init__(self):
        for field in ("widths", "layers", "heads", "down_attention", "up_attention"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple):
                raise ValueError(f"{field} must be a sequence, one for each level, not {value!r}")
            object.__setattr__(self, field, tuple(value))
        self.check_numbers()
        levels = len(self.widths)
        if not levels:
            raise ValueError("widths is empty; give the channels of each level")
        for field in ("layers", "heads", "down_attention", "up_attention"):
            if len(getattr(self, field)) != levels:
                raise ValueError(
                    f"{field} {getattr(self, field)} must have one for each of the {levels} widths"
                )
        flags = {
            name: getattr(self, name)
            for name in ("mid_block", "linear_projection", "upcast_attention")
        }
        for field in ("down_attention", "up_attention"):
            flags |= {f"{field}[{i}]": value for i, value in enumerate(getattr(self, field))}
        for field, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{field} must be a bool, not {value!r}")
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {levels - 1} times, as the "
                f"{levels} levels of widths need"
            )
        self._check_divisors()

    def _check_divisors(self):
        for level, width in enumerate(self.widths):
            if width % self.num_groups:
                raise ValueError(
                    f"widths[{level}] {width} is no multiple of num_groups {self.num_groups}"
                )
        for block in self.blocks():
            if block.heads and block.width % block.heads:
                raise ValueError(
                    f"heads: {block.heads} do not divide the {block.width} channels of {block.name}"
                )

    def blocks(self) -> tuple[Block, ...]:
        """The blocks with their widths, in execution order, between conv_in and conv_norm_out."""
        last, width = len(self.widths) - 1, self.widths[0]
        found, skips = [], [width]
        for level, own in enumerate(self.widths):
            inputs = tuple((own if layer else width, 0) for layer in range(self.layers[level]))
            skips += len(inputs) * [own]
            if level < last:
                skips.append(own)
            width = own
            found.append(
                Block(
                    f"down_blocks.{level}",
                    own,
                    self.heads[level] * self.down_attention[level],
                    inputs,
                    self.image_size >> level,
                    "downsamplers" if level < last else None,
                )
            )
        if self.mid_block:
            found.append(
                Block(
                    "mid_block",
                    width,
                    self.heads[-1],
                    2 * ((width, 0),),
                    self.image_size >> last,
                    None,
                )
            )
        for index, level in enumerate(reversed(range(last + 1))):
            own, inputs = self.widths[level], []
            for _ in range(self.layers[level] + 1):
                inputs.append((width, skips.pop()))
                width = own
            found.append(
                Block(
                    f"up_blocks.{index}",
                    own,
                    self.heads[level] * self.up_attention[index],
                    tuple(inputs),
                    self.image_size >> level,
                    "upsamplers" if level else None,
                )
            )
        return tuple(found)

    @property
    def time_width(self) -> int:
        """Width of the timestep's embedding."""
        return 4 * self.widths[0]

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig.num_blocks`."""
        return sum(len(block.inputs) + block.attentions for block in self.blocks()) + 2

    @property
    def conditioning(self) -> Text:
        """See `DenoiserConfig.conditioning`."""
        return Text(width=self.context_dim)

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype, remat: str | None = None) -> nnx.Module:
        """See `ModelConfig.build`."""
        # Late: it takes its config from here.
        from liftplace_jax.families.sd_unet.model import SDUNet

        return SDUNet(self, rngs=rngs, dtype=dtype, remat=remat)

    def architecture(self) -> list[dict[str, Any]]:
        """See `ModelConfig.architecture`: the levels, then all but the record upcast_attention, and
        image_size, which no weight and no layer depends on."""
        fields = self.to_dict()
        del fields["upcast_attention"], fields["image_size"]
        return [{name: fields.pop(name) for name in ("widths", "layers", "mid_block")}, fields]

    def visible_in(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """See `ModelConfig.visible_in`."""
        found: dict[int, int] = {}
        widths: dict[int, int] = {}
        for name, value in tensors.items():
            match = re.fullmatch(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight", name)
            if match:
                level, layer = map(int, match.groups())
                found[level] = max(found.get(level, 0), layer + 1)
                widths[level] = value.shape[0]
        if sorted(found) != list(range(len(found))) or not found:
            return {}
        seen = {
            "widths": tuple(widths[level] for level in sorted(widths)),
            "layers": tuple(found[level] for level in sorted(found)),
            "mid_block": any(name.startswith("mid_block.") for name in tensors),
        }
        for name, value in tensors.items():
            if name.endswith(".attn2.to_k.weight") and value.ndim == 2:
                seen["context_dim"] = value.shape[1]
            if name.endswith(".proj_in.weight"):
                seen["linear_projection"] = value.ndim == 2
        return seen

    def layer_map(self, teacher: Any) -> dict[str, str] | None:
        """Which feature of a teacher this model's are compared with; None: those of its name."""
        if not isinstance(teacher, SDUNetConfig):
            return None
        return published_layer_map(self, teacher)


def published_layer_map(student: SDUNetConfig, teacher: SDUNetConfig) -> dict[str, str]:
    """Pairs of features that distillation compares: the outputs of blocks of equal resolution.

    A student without the teacher's last levels has no downsampling after its own last one, so what
    is compared there is the output of the last transformer's projection. The middle never is.
    Source: "BK_SDM_EXP/src/kd_t2i.py", base, small and tiny. Its extreme compares outputs of
    different resolution (and cannot run): here it follows the rule of tiny.

    Returns:
      Student feature -> teacher feature, such as {"up_blocks.0": "up_blocks.1"}.

    Raises:
      ValueError: the student has more levels than the teacher.
    """
    levels, more = len(student.widths), len(teacher.widths) - len(student.widths)
    if more < 0:
        raise ValueError(
            f"a student of {levels} levels has more than its teacher of {len(teacher.widths)}: say "
            "which features to compare (config.distill.layer_map)"
        )
    last = levels - 1
    pairs = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(levels if not more else last)}
    if more and student.down_attention[last] and teacher.down_attention[last]:
        ours, theirs = (
            f"down_blocks.{last}.attentions.{config.layers[last] - 1}.proj_out"
            for config in (student, teacher)
        )
        pairs[ours] = theirs
    return pairs | {f"up_blocks.{i}": f"up_blocks.{i + more}" for i in range(levels)}
