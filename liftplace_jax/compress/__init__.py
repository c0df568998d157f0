"""Students out of teachers: structured channel pruning, and depth pruning."""

from liftplace_jax.families.unet.channels import Pruned, View, prune_unet, pruned_config
from liftplace_jax.compress.depth import (
    LAYER_IMPORTANCES,
    layer_scores,
    most_important,
    prune_depth,
    pruned_depth_config,
    read_layers,
    uniform_layers,
)
from liftplace_jax.families.unet.importance import IMPORTANCES, taylor_gradients
from liftplace_jax.compress.learned_depth import (
    Groups,
    annealed,
    expected_gates,
    init_search,
    make_groups,
    most_probable,
    searched_apply,
    smallest_groups,
)

__all__ = [
    "Groups",
    "IMPORTANCES",
    "LAYER_IMPORTANCES",
    "Pruned",
    "View",
    "annealed",
    "expected_gates",
    "init_search",
    "layer_scores",
    "make_groups",
    "most_important",
    "most_probable",
    "prune_depth",
    "prune_unet",
    "pruned_config",
    "pruned_depth_config",
    "read_layers",
    "searched_apply",
    "smallest_groups",
    "taylor_gradients",
    "uniform_layers",
]
