"""Config of the Stable Diffusion autoencoders; names and rules of diffusers' `AutoencoderKL`."""

import dataclasses
from typing import ClassVar

from flax import nnx
from flax.typing import Dtype

from liftplace_jax.host.ranges import LARGE, SIDE, Range, positive, whole
from liftplace_jax.nn.model_config import MOST_BLOCKS_OF_LEVEL, ModelConfig

_WIDTH = whole(1, SIDE)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Everything that defines an `Autoencoder`, and the scale of its latents; JSON friendly.

    The defaults are those of Stable Diffusion 1 and 2 (KL-f8).

    Attributes:
      block_out_channels: width of each level, from the pixels down.
      layers_per_block: residual blocks a level on the way down (one more on the way up).
      latent_channels: channels of a latent.
      norm_num_groups: normalisation groups; must divide every width.
      scaling_factor: latents that a network sees are (z - shift_factor) * scaling_factor.
      shift_factor: see there.
      use_quant_conv: whether a 1x1 convolution ends the encoder (not in Stable Diffusion 3).
      use_post_quant_conv: whether one begins the decoder.
      in_channels: channels of the images that are encoded.
      out_channels: and of the decoded ones.
      sample_size: side in pixels of the images it was trained on; only a record.

    Raises:
      ValueError: a field is out of its range; names it.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 512

    model: ClassVar[str] = "autoencoder"
    RANGES: ClassVar = {
        "block_out_channels": whole(1, SIDE, many=True),
        "layers_per_block": whole(
            1, MOST_BLOCKS_OF_LEVEL, why="each is a layer of its own in the program"
        ),
        "latent_channels": _WIDTH,
        "norm_num_groups": _WIDTH,
        "scaling_factor": positive(),
        "shift_factor": Range(float, -LARGE, LARGE),
        "in_channels": _WIDTH,
        "out_channels": _WIDTH,
        "sample_size": _WIDTH,
    }

    def __post_init__(self):
        if not isinstance(self.block_out_channels, list | tuple) or not self.block_out_channels:
            raise ValueError(
                f"block_out_channels must be a sequence of widths, not {self.block_out_channels!r}"
            )
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        self.check_numbers()
        if len(self.block_out_channels) > 16:
            raise ValueError(
                f"block_out_channels must be at most 16 levels, got {len(self.block_out_channels)}"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the width {width} of "
                    "block_out_channels"
                )
        for name in ("use_quant_conv", "use_post_quant_conv"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, not {getattr(self, name)!r}")

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig.num_blocks`."""
        return len(self.block_out_channels) * (2 * self.layers_per_block + 1) + 4

    @property
    def downsampling(self) -> int:
        """Pixels along a side for each element of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    def build(self, *, rngs: nnx.Rngs, dtype: Dtype) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.encoders.autoencoder import Autoencoder  # late: it imports this module

        return Autoencoder(self, rngs=rngs, dtype=dtype)
