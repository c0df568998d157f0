"""Digits 8x8: the demonstration, teacher to report in minutes on two CPU cores.

Setting: the embedded 1,797 real digits; teacher U-Net (ch 32, mult (1, 2)); students pruned by
90 % with the published rule (one channel a normalisation group), 2.3 % of its parameters.

    python -m liftplace_jax.main --config=configs/digits.py --workdir=runs/digits

Arguments after a colon, for example `--config=configs/digits.py:method=output_kd,seed=1`:
    method         no_kd, output_kd, feature_kd, output_feature_kd, lift, lift_place, or all
    ratio          share of channels removed (0.9)
    seed           of teacher and student (0); seeds=0+1+2 trains several students
    normalisation  published (the teacher's groups stay) or adapted (at least two channels each)
    process        gaussian, or flow: rectified flow, sampled by Euler's method
    runlocal       the same in under a minute
"""

from liftplace_jax.experiment.configuration import experiment_config, optimizer_config


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = experiment_config(
        arg,
        "digits",
        method="lift_place",
        ratio=0.9,
        normalisation="published",
        others={"process": "gaussian"},
    )
    config.process.kind = args.process
    config.model.update(image_size=8, ch=32, ch_mult=(1, 2), num_groups=8)
    config.teacher.steps = 2400
    config.teacher.ema_decay = 0.998
    config.teacher.optimizer = optimizer_config(learning_rate=2e-3, schedule="cosine")
    config.distill.steps = 2000
    config.distill.ema_decay = 0.998
    config.distill.optimizer = optimizer_config(learning_rate=2e-3)

    config.evaluation.clip = 1.0

    if args.runlocal:
        config.teacher.steps = config.distill.steps = 60
        config.teacher.log_every = config.distill.log_every = 20
        config.teacher.checkpoint_every = config.distill.checkpoint_every = 40
        config.evaluation.num_samples = 128
        config.evaluation.batch_size = 64
        config.evaluation.sample_steps = 10
        config.tensorboard = False
    return config
