"""Students out of teachers: structured channel pruning."""

from liftplace_jax.compress.channels import Pruned, View, prune_unet, pruned_config
from liftplace_jax.compress.importance import IMPORTANCES, taylor_gradients

__all__ = ["IMPORTANCES", "Pruned", "View", "prune_unet", "pruned_config", "taylor_gradients"]
