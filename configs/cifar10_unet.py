r"""CIFAR-10 32x32: the setting of Diff-Pruning, with LIFT + PLACE.

Teacher: DDPM U-Net, 35,746,307 parameters, 6.07G MACs, 800k steps. Diff-Pruning's student, ratio
0.3 and no distillation: 100k steps, 19,851,157 parameters, 3.39G MACs, published FID 5.29 (5.24 in
its README). LIFT + PLACE has no published row here. At ratios 0.5, 0.7 and 0.9 students have
8,968,451, 5,120,462 and 661,496 parameters.

    python -m liftplace_jax.main --workdir=runs/cifar10-30 \
        --config=configs/cifar10_unet.py:method=no_kd+lift_place_feature_kd

Settings: batch 128, Adam 2e-4 (0.9, 0.999, eps 1e-8), clip 1.0, EMA 0.9999, dropout 0.1, flips,
antithetic timesteps, groups of 16, lambda 1; DDIM, 100 quadratic steps (Diff-Pruning's choice for
CIFAR-10), eta 0, 50,000 samples. Pruning: Taylor importance over timesteps up to a loss of 0.05 of
the largest, batch 128.
Source: "Diff-Pruning ddpm_exp/scripts/simple_cifar_our.sh, sample_cifar_ddpm_pruning.sh".

Hardware: any accelerator that holds the batch, or several: it is split over all devices. By MACs,
the teacher takes 3.7e18 floating-point operations, the student of ratio 0.3 4.2e17, 50,000 samples
of the teacher 6.1e16; not timed here. A published teacher saves its training, for example
`--config.teacher.checkpoint=ddpm-cifar10-32` (https://huggingface.co/google/ddpm-cifar10-32).

Arguments after a colon, for example `:method=output_kd,ratio=0.5`: ratio (0.3; each
takes 100k steps), method, seed, seeds, normalisation, runlocal (teacher to report on two CPU cores
in under a minute; its numbers mean nothing). configs/celeba64_unet.py explains them.

Without TFDS: `--config.data.name=folder --config.data.path=FOLDER`, images in FOLDER/train and
FOLDER/test, or any images: then both splits are the same.
"""

from liftplace_jax.experiment.presets import family_config, runlocal, steps_for

STEPS = {0.3: 100_000}
"""Of a student, by ratio."""


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(
        arg, "cifar10", "unet", "cifar10", ratio=0.3, normalisation="published"
    )
    config.data.name = "cifar10"
    config.distill.steps = steps_for(args.ratio, STEPS)
    config.teacher.steps = 800_000
    for run in (config.teacher, config.distill):
        run.batch_size = 128
        run.ema_decay = 0.9999
        run.optimizer.learning_rate = 2e-4
    config.compress.taylor_batch_size = 128
    config.evaluation.skip_type = "quad"
    config.evaluation.batch_size = 512
    return runlocal(config) if args.runlocal else config
