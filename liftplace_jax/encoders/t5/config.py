"""The config of T5's encoder; names, defaults and meaning of transformers' `T5Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from flax.typing import Dtype

from liftplace_jax.host.outside import shown
from liftplace_jax.host.ranges import SIDE, positive, whole
from liftplace_jax.nn.model_config import MOST_BLOCKS, ModelConfig

_WIDTH = whole(1, SIDE)
_ACTIVATION = "gated-gelu"


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
    """Everything that defines a `T5`; the defaults are those of T5 v1.1 XXL, SD3's third encoder.

    Attributes:
      vocab_size: number of tokens.
      d_model: width.
      d_kv: width of a head of attention.
      d_ff: width inside the MLPs.
      num_layers: number of layers.
      num_heads: of attention.
      relative_attention_num_buckets: distances that attention tells apart; even.
      relative_attention_max_distance: all farther ones count as one.
      layer_norm_epsilon: of all normalisations.

    Raises:
      ValueError: a field is out of its range; names it.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    model: ClassVar[str] = "t5"
    RANGES: ClassVar = {
        "vocab_size": whole(1, 2**22),
        "d_model": _WIDTH,
        "d_kv": _WIDTH,
        "d_ff": _WIDTH,
        "num_layers": whole(1, MOST_BLOCKS, why="each is a layer of its own in the program"),
        "num_heads": _WIDTH,
        "relative_attention_num_buckets": whole(4, SIDE),
        "relative_attention_max_distance": whole(2, SIDE),
        "layer_norm_epsilon": positive(1.0),
    }

    def __post_init__(self):
        self.check_numbers()
        buckets, farthest = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets % 4 or farthest <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets {buckets} must be a multiple of 4, and "
                f"relative_attention_max_distance {farthest} larger than a quarter of it"
            )

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig.num_blocks`."""
        return self.num_layers

    def described(self) -> dict[str, Any]:
        """The content of a config.json, which is transformers' own."""
        fixed = {"feed_forward_proj": _ACTIVATION, "is_encoder_decoder": False}
        return {"architectures": ["T5EncoderModel"], "model_type": "t5"} | fixed | self.to_dict()

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any]) -> T5Config:
        """The config of transformers' fields.

        Args:
          fields: of config.json; those that do not change the encoder are passed over.

        Raises:
          ValueError: a field is missing or out of its range, or the MLPs are not gated by GELU;
            names it.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in known[:6] if name not in fields]
        if missing:
            raise ValueError(f"missing fields {missing}")
        activation = fields.get("feed_forward_proj", "relu")
        if activation != _ACTIVATION:
            raise ValueError(
                f"feed_forward_proj {shown(activation)}: must be {_ACTIVATION!r}, as of T5 v1.1"
            )
        return cls(**{name: fields[name] for name in known if name in fields})

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.encoders.t5.model import T5  # late: it imports this module

        return T5(self, rngs=rngs, dtype=dtype)
