"""Configs of CLIP's towers; names, defaults and meaning of transformers' `CLIPConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.host.outside import shown
from liftplace_jax.host.ranges import INT32, SIDE, positive, whole
from liftplace_jax.nn.model_config import MOST_BLOCKS, MOST_PIXELS, ModelConfig


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": _quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
_WIDTH = whole(1, SIDE)
# More than any dictionary has; a table of so many rows still fits a machine.
_MOST_TOKENS = 2**22


class _TowerConfig(ModelConfig):
    """What both towers have; the fields are those of the dataclasses below."""

    architectures: ClassVar[tuple[str, str]]  # without a projection, and with it
    model_type: ClassVar[str]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    projection_dim: int | None
    RANGES: ClassVar = {
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": whole(1, MOST_BLOCKS, why="each is a layer of its own in the program"),
        "num_attention_heads": _WIDTH,
        "layer_norm_eps": positive(1.0),
        "projection_dim": whole(1, SIDE, optional=True),
    }

    def __post_init__(self):
        self.check_numbers()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {shown(self.hidden_act)}: must be one of {sorted(ACTIVATIONS)}"
            )

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig.num_blocks`."""
        return self.num_hidden_layers + 2

    def described(self) -> dict[str, Any]:
        """The content of a config.json, which is transformers' own."""
        name = self.architectures[self.projection_dim is not None]
        fields = {k: v for k, v in self.to_dict().items() if v is not None}
        return {"architectures": [name], "model_type": self.model_type} | fields

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any], projection_dim: int | None):
        """The config of transformers' fields; absent ones have its defaults.

        Args:
          fields: of one tower; those that do not change its function are passed over.
          projection_dim: width of the projection; None if there is none.

        Raises:
          ValueError: a field is out of its range; names it.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"projection_dim"}
        found = {name: value for name, value in fields.items() if name in known}
        return cls(**found | {"projection_dim": projection_dim})


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_TowerConfig):
    """Everything that defines a `CLIPText`; the defaults are those of CLIP ViT-B/32.

    Attributes:
      vocab_size: number of tokens.
      hidden_size: width.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of layers.
      num_attention_heads: must divide the width.
      max_position_embeddings: tokens of the longest text.
      layer_norm_eps: of all normalisations.
      hidden_act: "quick_gelu" or "gelu" (the exact one).
      eos_token_id: the token whose state is the pooled one. 2 stands for the token of the highest
        number: the published configs say 2, and mean the end token, 49407.
      projection_dim: width of the projected pooled state; None: there is no projection.

    Raises:
      ValueError: a field is out of its range; names it.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    eos_token_id: int = 49407
    projection_dim: int | None = None

    model: ClassVar[str] = "clip_text"
    architectures: ClassVar = ("CLIPTextModel", "CLIPTextModelWithProjection")
    model_type: ClassVar[str] = "clip_text_model"
    RANGES: ClassVar = {
        **_TowerConfig.RANGES,
        "vocab_size": whole(1, _MOST_TOKENS),
        "max_position_embeddings": whole(1, SIDE),
        "eos_token_id": whole(0, INT32),
    }

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.encoders.clip.model import CLIPText  # late: it imports this module

        return CLIPText(self, rngs=rngs, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(_TowerConfig):
    """Everything that defines a `CLIPVision`; the defaults are those of CLIP ViT-B/32.

    Attributes:
      hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, layer_norm_eps,
        hidden_act, projection_dim: as of `CLIPTextConfig`.
      image_size: height and width of the images, in pixels.
      patch_size: of a token, in pixels; what is left over of the image is not seen.
      num_channels: of the images.

    Raises:
      ValueError: a field is out of its range; names it.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    projection_dim: int | None = None

    model: ClassVar[str] = "clip_vision"
    architectures: ClassVar = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
    model_type: ClassVar[str] = "clip_vision_model"
    RANGES: ClassVar = {
        **_TowerConfig.RANGES,
        "image_size": whole(1, MOST_PIXELS),
        "patch_size": whole(1, MOST_PIXELS),
        "num_channels": _WIDTH,
    }

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Patches, and one token for the whole image."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.encoders.clip.model import CLIPVision  # late: it imports this module

        return CLIPVision(self, rngs=rngs, dtype=dtype)
