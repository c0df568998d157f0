"""Students out of teachers: the contract of pruners, depth pruning, summed gradients."""

from liftplace_jax.compress.depth import (
    LAYER_IMPORTANCES,
    layer_scores,
    most_important,
    prune_depth,
    pruned_depth_config,
    read_layers,
    uniform_layers,
)
from liftplace_jax.compress.depth_pruner import DepthPruner
from liftplace_jax.compress.gradients import taylor_gradients
from liftplace_jax.compress.learned_depth import (
    BlockGroups,
    annealed,
    expected_gates,
    init_search,
    make_groups,
    most_probable,
    searched_apply,
    smallest_groups,
)
from liftplace_jax.compress.pruner import Pruner, Search, Student, Tools

__all__ = [
    "DepthPruner",
    "BlockGroups",
    "LAYER_IMPORTANCES",
    "Pruner",
    "Search",
    "Student",
    "Tools",
    "annealed",
    "expected_gates",
    "init_search",
    "layer_scores",
    "make_groups",
    "most_important",
    "most_probable",
    "prune_depth",
    "pruned_depth_config",
    "read_layers",
    "searched_apply",
    "smallest_groups",
    "taylor_gradients",
    "uniform_layers",
]
