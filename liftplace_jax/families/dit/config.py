"""The diffusion transformer's configuration, and which of a teacher's blocks a student follows."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from flax.typing import Dtype

from liftplace_jax.conditioning import Classes
from liftplace_jax.host.ranges import INT32, SHARE, SIDE, positive, whole
from liftplace_jax.nn.model_config import (
    MOST_BLOCKS,
    MOST_PIXELS,
    StackConfig,
)

_MOST_TOKENS = 2**16
EMBEDDERS = ("shared", "per_block")
_WIDTH = whole(1, SIDE)

# Student depth, teacher depth -> (student block, teacher block) pairs that are not uniform.
# Source: "TinyFusion_EXP/train_masked_kd.py".
_PUBLISHED_PAIRS = {
    (19, 28): ((2, 3), (5, 7), (7, 11), (10, 15), (12, 19), (15, 23), (18, 27)),
    (4, 28): ((0, 1), (1, 8), (2, 15), (3, 22)),
    (4, 7): ((0, 1), (1, 3), (2, 4), (3, 6)),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig(StackConfig):
    """Everything that defines a `DiT`; hashable and JSON friendly.

    Attributes:
      image_size: height and width of the images or latents, in pixels.
      hidden_size: width of a token, a multiple of 4 and of num_heads.
      depth: number of blocks.
      num_heads: heads of each block's attention.
      patch_size: pixels along a side of the square that becomes a token.
      in_channels: channels of the images or latents.
      mlp_ratio: width inside a block's MLP, over hidden_size.
      num_classes: labels are 0..num_classes - 1.
      class_dropout: share of training labels to replace by `null_label`, in [0, 1). The objective
        does it, not the model; 0: the model has no null label.
      learn_sigma: whether the prediction has as many channels again, for the variance.
      frequency_shift: the timestep's frequencies are 10000 ** (-i / (128 - frequency_shift)):
        0 as published, 1 in diffusers.
      norm_epsilon: of the normalisation before each MLP: 1e-6 as published, 1e-5 in diffusers.
      embedders: "shared", one timestep and one label embedder as published; "per_block", one of
        each for every block, as a model trained in diffusers has them; block 0's serve the final
        layer too.
      kept_layers: the teacher's blocks that a depth-pruned student began with, a record alone;
        None: not pruned.

    Raises:
      ValueError: a field is out of its range, or fields do not fit each other; names them.
    """

    image_size: int
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 2
    in_channels: int = 4
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout: float = 0.1
    learn_sigma: bool = True
    frequency_shift: int = 0
    norm_epsilon: float = 1e-6
    embedders: str = "shared"
    kept_layers: tuple[int, ...] | None = None

    model: ClassVar[str] = "dit"
    equal_blocks: ClassVar[bool] = True
    RANGES: ClassVar = {
        "image_size": whole(1, MOST_PIXELS),
        "hidden_size": _WIDTH,
        "depth": whole(1, MOST_BLOCKS, why="each is a layer of its own in the program"),
        "num_heads": _WIDTH,
        "patch_size": _WIDTH,
        "in_channels": _WIDTH,
        "mlp_ratio": positive(1024.0),
        "num_classes": whole(1, INT32 - 1, why="labels have 32 bits"),
        "class_dropout": SHARE,
        "frequency_shift": whole(0, 1),
        "norm_epsilon": positive(1.0),
        "kept_layers": whole(0, MOST_BLOCKS - 1, many=True, optional=True),
    }

    def __post_init__(self):
        self.check_numbers()
        for field, divisor in (
            ("image_size", "patch_size"),
            ("hidden_size", "num_heads"),
            ("hidden_size", 4),
        ):
            value = getattr(self, field)
            by = getattr(self, divisor) if isinstance(divisor, str) else divisor
            if value % by:
                named = f"{divisor} {by}" if isinstance(divisor, str) else by
                raise ValueError(f"{field} {value} must be a multiple of {named}")
        if self.num_tokens > _MOST_TOKENS:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} make "
                f"{self.num_tokens:,} tokens of an image, more than {_MOST_TOKENS:,}"
            )
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio must be at least 1 / hidden_size, got {self.mlp_ratio!r}")
        for field, choices in (("learn_sigma", (False, True)), ("embedders", EMBEDDERS)):
            value = getattr(self, field)
            if value not in choices or type(value) is not type(choices[0]):
                raise ValueError(f"{field} must be one of {list(choices)}, not {value!r}")
        if self.kept_layers is not None and self.embedders == "per_block":
            raise ValueError(
                "a DiT with embedders='per_block' cannot lose blocks: its final layer depends on "
                "block 0's embedder; prune a DiT with embedders='shared'"
            )
        self.check_kept()

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: the mean half, then the variance half if it is learned."""
        return (1 + self.learn_sigma) * self.in_channels

    @property
    def mlp_width(self) -> int:
        """Width inside a block's MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_labels(self) -> int:
        """Classes, and the null label if there is one."""
        return self.num_classes + (self.null_label is not None)

    @property
    def null_label(self) -> int | None:
        """The label that says nothing, for guidance; None if the model was trained without."""
        return self.num_classes if self.class_dropout else None

    @property
    def conditioning(self) -> Classes:
        """See `DenoiserConfig.conditioning`."""
        return Classes(self.num_classes, self.null_label, self.class_dropout)

    def build(
        self, *, rngs: nnx.Rngs, dtype: Dtype, remat: str | None = None, scan_blocks: bool = False
    ) -> nnx.Module:
        """See `ModelConfig.build`."""
        from liftplace_jax.families.dit.model import DiT  # late: it takes its config from here

        return DiT(self, rngs=rngs, dtype=dtype, remat=remat, scan_blocks=scan_blocks)

    def architecture(self) -> list[dict[str, Any]]:
        """See `ModelConfig.architecture`: all but the record, and the rate of dropping labels."""
        fields = self.to_dict()
        del fields["kept_layers"], fields["class_dropout"]
        return [fields | {"null_label": self.null_label}]

    def visible_in(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """See `ModelConfig.visible_in`."""
        seen = {}
        blocks = {int(n.split(".")[1]) for n in tensors if re.match(r"blocks\.\d+\.", n)}
        if blocks:
            seen["depth"] = max(blocks) + 1
        patches = tensors.get("x_embedder.proj.weight")
        if patches is not None and patches.ndim == 4:
            seen["hidden_size"], seen["in_channels"], seen["patch_size"], _ = patches.shape
        table = tensors.get("y_embedder.embedding_table.weight")
        if table is not None:
            seen["num_classes"] = table.shape[0] - (self.num_labels - self.num_classes)
        return seen

    def layer_map(self, teacher: Any) -> dict[str, str] | None:
        """Which feature of a teacher this model's are compared with; None: those of its name."""
        if not isinstance(teacher, DiTConfig):
            return None
        return published_layer_map(self.depth, teacher.depth)


def published_layer_map(student_depth: int, teacher_depth: int) -> dict[str, str]:
    """Pairs of blocks whose features distillation compares.

    The published pairs where they are not uniform (19 and 4 blocks of 28, 4 of 7); else a student
    block follows the last block of its share of the teacher: 2i + 1 for 14 of 28, 4i + 3 for 7 of
    28. Source: "TinyFusion_EXP/train_masked_kd.py".

    Returns:
      Student feature -> teacher feature, such as {"blocks.0": "blocks.1"}.

    Raises:
      ValueError: the student is deeper than the teacher.
    """
    whole(1, MOST_BLOCKS).check("the student's depth", student_depth)
    if student_depth > teacher_depth:
        raise ValueError(
            f"a student of {student_depth} blocks is deeper than its teacher of {teacher_depth}: "
            "say which features to compare (config.distill.layer_map)"
        )
    uniform = [(i, (i + 1) * teacher_depth // student_depth - 1) for i in range(student_depth)]
    pairs = _PUBLISHED_PAIRS.get((student_depth, teacher_depth), uniform)
    return {f"blocks.{student}": f"blocks.{teacher}" for student, teacher in pairs}
