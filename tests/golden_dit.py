"""The DiTs of the golden arrays: a teacher of four blocks, and a student of three of them."""

from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.nn.network import from_tensors

SIZES = ("hidden_size", "depth", "num_heads", "num_classes")


def golden_dit(golden, name):
    """The network of a golden file ("dit_d4" or "dit_diffusion_losses")."""
    arrays, meta = golden(name)
    fields = meta.get("config") or meta["student_config"]
    config = DiTConfig(
        image_size=fields["input_size"],
        patch_size=fields["patch_size"],
        **{field: fields[field] for field in SIZES},
    )
    tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    return from_tensors(config, tensors)
