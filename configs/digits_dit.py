"""Digits 8x8 by class: a diffusion transformer, in minutes on two CPU cores.

Setting: the embedded 1,797 real digits; teacher DiT of 8 blocks (width 64, patches of 2: 16
tokens), conditional on the class; students keep 2 of its blocks. Losses as published for DiT:
0.1 (mse + vb) + 0.9 (LIFT + PLACE + vb_kd) + 0.01 masked FeatKD, falling to 0. Guidance 1.5.

    python -m liftplace_jax.main --config=configs/digits_dit.py --workdir=runs/digits_dit

Arguments after a colon, for example `--config=configs/digits_dit.py:method=output_kd,depth=4`:
    method    no_kd, output_kd, output_feature_kd, lift_place, lift_place_feature_kd, ..., or all
    depth     blocks that the student keeps (2)
    layers    which: uniform, similarity, loss, learned, or their numbers, 1+6
    process   gaussian, or flow: rectified flow, which has no variance to learn
    seed      of teacher and student (0); seeds=0+1+2 trains several students
    runlocal  the same in about a minute
"""

from liftplace_jax.experiment.configuration import optimizer_config
from liftplace_jax.experiment.presets import family_config


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(
        arg, "digits_dit", "dit", depth=2, layers="uniform", others={"process": "gaussian"}
    )
    config.model.update(image_size=8, patch_size=2, hidden_size=64, depth=8, num_heads=4)
    config.process.kind = args.process
    if args.process == "flow":
        config.process.variance, config.model.learn_sigma = "fixed", False
    config.teacher.steps = 4000
    config.distill.steps = 4000
    for run in (config.teacher, config.distill):
        run.batch_size = 32  # a batch of 64 takes three times as long on two cores
        run.ema_decay = 0.998
        run.optimizer = optimizer_config(
            name="adamw", learning_rate=3e-3, schedule="cosine", warmup_steps=100
        )
    if args.runlocal:
        config.model.update(hidden_size=32, depth=4)
        for run in (config.teacher, config.distill):
            run.steps = 60
            run.log_every = 20
            run.checkpoint_every = 40
            run.optimizer.warmup_steps = 10
        config.compress.learned.steps = 60
        config.evaluation.update(num_samples=128, batch_size=64, sample_steps=10)
        config.tensorboard = False
    return config
