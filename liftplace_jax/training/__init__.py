"""State, step, objective, loop, checkpoints, sharding and logs: one of each."""
