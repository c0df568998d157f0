"""The multimodal transformer's configuration, and which of a teacher's blocks a student follows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.conditioning import Text
from liftplace_jax.host.ranges import SIDE, whole
from liftplace_jax.nn.model_config import MOST_BLOCKS, MOST_PIXELS, StackConfig

_MOST_TOKENS = 2**16
QK_NORMS = (None, "rms_norm")
_WIDTH = whole(1, SIDE)
_LAYERS = whole(0, MOST_BLOCKS - 1, many=True, optional=True)


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(StackConfig):
    """Everything that defines an `MMDiT`; hashable and JSON friendly.

    Attributes:
      image_size: height and width of the latents that it is trained on, in pixels.
      depth: number of blocks.
      num_heads: heads of each block's attention.
      head_size: width of a head; tokens are num_heads * head_size wide, a multiple of 4.
      patch_size: pixels along a side of the square that becomes a token.
      in_channels: channels of the latents.
      context_dim: width of the text's tokens.
      pooled_dim: width of the vector that stands for the whole text.
      position_size: side, in tokens, of the square table of positions; inputs get its centre.
      qk_norm: None, or "rms_norm": queries and keys of each head are normalised.
      dual_attention_layers: blocks with a second attention, of the image's tokens alone.
      context_tokens: tokens of a text, for counting multiply-accumulates alone.
      kept_layers: the teacher's blocks that a depth-pruned student began with, a record alone;
        None: not pruned.

    Raises:
      ValueError: a field is out of its range, or fields do not fit each other; names them.
    """

    image_size: int
    depth: int
    num_heads: int
    head_size: int = 64
    patch_size: int = 2
    in_channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 2048
    position_size: int = 192
    qk_norm: str | None = None
    dual_attention_layers: tuple[int, ...] = ()
    context_tokens: int = 333
    kept_layers: tuple[int, ...] | None = None

    model: ClassVar[str] = "mmdit"
    equal_blocks: ClassVar[bool] = True
    STACK: ClassVar[str] = "transformer_blocks"
    RANGES: ClassVar = {
        "image_size": whole(1, MOST_PIXELS),
        "depth": whole(1, MOST_BLOCKS, why="each is a layer of its own in the program"),
        "num_heads": _WIDTH,
        "head_size": _WIDTH,
        "patch_size": _WIDTH,
        "in_channels": _WIDTH,
        "context_dim": _WIDTH,
        "pooled_dim": _WIDTH,
        "position_size": whole(1, MOST_PIXELS),
        "dual_attention_layers": _LAYERS,
        "context_tokens": whole(1, _MOST_TOKENS),
        "kept_layers": _LAYERS,
    }

    def __post_init__(self):
        object.__setattr__(self, "dual_attention_layers", tuple(self.dual_attention_layers or ()))
        self.check_numbers()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"num_heads {self.num_heads} times head_size {self.head_size} must be a multiple "
                "of 4"
            )
        if self.side > self.position_size:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} make {self.side} "
                f"tokens along a side, the table of positions has {self.position_size} "
                "(position_size)"
            )
        if self.position_size**2 > 4 * _MOST_TOKENS:
            raise ValueError(f"position_size must be at most {2 * 2**8}, got {self.position_size}")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {list(QK_NORMS)}, not {self.qk_norm!r}")
        dual = self.dual_attention_layers
        if list(dual) != sorted(set(dual)) or (dual and dual[-1] >= self.depth):
            raise ValueError(
                f"dual_attention_layers must be different block numbers in 0..{self.depth - 1} in "
                f"order, not {list(dual)}"
            )
        self.check_kept()

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.num_heads * self.head_size

    @property
    def side(self) -> int:
        """Tokens along a side of an image of image_size."""
        return self.image_size // self.patch_size

    @property
    def always_kept(self) -> tuple[int, ...]:
        """See `StackConfig.always_kept`: the last block, which has no output for the text."""
        return (self.depth - 1,)

    @property
    def conditioning(self) -> Text:
        """See `DenoiserConfig.conditioning`."""
        return Text(self.context_dim, self.pooled_dim)

    def keep(self, layers: tuple[int, ...]) -> MMDiTConfig:
        """See `StackConfig.keep`; the blocks keep their second attention."""
        dual = (new for new, old in enumerate(layers) if old in self.dual_attention_layers)
        return self.replace(
            depth=len(layers), kept_layers=layers, dual_attention_layers=tuple(dual)
        )

    def build(
        self, *, rngs: nnx.Rngs, dtype: Dtype, remat: str | None = None, scan_blocks: bool = False
    ) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.families.mmdit.model import MMDiT  # late: it takes its config from here

        return MMDiT(self, rngs=rngs, dtype=dtype, remat=remat, scan_blocks=scan_blocks)

    def architecture(self) -> list[dict[str, Any]]:
        """See `ModelConfig.architecture`: all but the record, and what is for counting alone."""
        fields = self.to_dict()
        for name in ("kept_layers", "context_tokens", "image_size"):
            del fields[name]
        return [fields]

    def visible_in(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """See `ModelConfig.visible_in`."""
        seen = {}
        stack = rf"{self.STACK}\.(\d+)\."
        blocks = {int(m[1]) for name in tensors if (m := re.match(stack, name))}
        if blocks:
            seen["depth"] = max(blocks) + 1
        patches = tensors.get("pos_embed.proj.weight")
        if patches is not None and patches.ndim == 4:
            _, seen["in_channels"], seen["patch_size"], _ = patches.shape
        for field, name in (
            ("context_dim", "context_embedder.weight"),
            ("pooled_dim", "time_text_embed.text_embedder.linear_1.weight"),
        ):
            if name in tensors and tensors[name].ndim == 2:
                seen[field] = tensors[name].shape[1]
        return seen

    def layer_map(self, teacher: Any) -> dict[str, str] | None:
        """Which block of a teacher each of this model's is compared with, by the image's tokens.

        A student's block stands for an interval of the teacher's, and is compared with its end.
        Where each of `depth` equal shares of the teacher has one kept block, the intervals are the
        shares, as for the DiT; else an interval begins with its kept block. Nothing is published
        for this family.
        """
        if not isinstance(teacher, MMDiTConfig) or self.depth > teacher.depth:
            return None
        ends = [(i + 1) * teacher.depth // self.depth - 1 for i in range(self.depth)]
        kept = self.kept_layers or tuple(ends)
        begins = [0, *(end + 1 for end in ends[:-1])]
        shares = all(b <= k <= e for b, k, e in zip(begins, kept, ends, strict=True))
        if not shares and kept[-1] < teacher.depth:
            ends = [*(k - 1 for k in kept[1:]), teacher.depth - 1]
        return {f"{self.STACK}.{i}": f"{self.STACK}.{end}" for i, end in enumerate(ends)}
