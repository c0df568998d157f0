"""The digits job in miniature, for tests: seconds from teacher to report.

python -m liftplace_jax.main --config=tests/tiny_config.py --workdir=runs/tiny

Arguments after a colon: method, seeds. Data: $LIFTPLACE_TEST_DATA, else where TFDS keeps it.
"""

import os

from liftplace_jax.experiment.configuration import default_config, optimizer_config, parse_arg


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    args = parse_arg(arg, method="lift_place", seeds=(0,))
    config = default_config()
    config.name = "tiny"
    config.method = args.method
    config.seeds = args.seeds
    config.data.data_dir = os.environ.get("LIFTPLACE_TEST_DATA")
    config.model.ch = 8
    config.model.ch_mult = (1,)
    config.model.attn_resolutions = ()
    config.model.dropout = 0.1  # its randomness must resume too
    config.model.num_groups = 4
    config.process.num_timesteps = 20
    config.compress.ratio = 0.5
    for room in (config.teacher, config.distill):
        room.steps = 8
        room.batch_size = 16
        room.log_every = 1
        room.checkpoint_every = 3
        room.optimizer = optimizer_config(learning_rate=2e-3, schedule="cosine", warmup_steps=2)
    config.evaluation.num_samples = 24
    config.evaluation.batch_size = 48
    config.evaluation.sample_steps = 4
    config.evaluation.clip = 1.0
    config.evaluation.allow_few = True
    config.tensorboard = False
    return config
