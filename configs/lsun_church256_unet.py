r"""LSUN-Church 256x256, set up as LSUN-Bedroom.

The paper has no row for it, only settings in its code: there is no number to expect. Teacher: DDPM
U-Net, 113,673,219 parameters, 248.69G MACs; the published one had 4,400k steps. Students, pruned
from it, with the steps of the published code's table ("Diff_Pruning functions/losses.py"):

    ratio   steps   parameters     MACs
    0.3      200k   63,205,897  138.87G
    0.5      500k   28,463,619   62.42G
    0.7      500k   12,556,214   52.43G
    0.9      500k    1,945,770   11.88G

    git clone https://huggingface.co/google/ddpm-ema-church-256
    python -m liftplace_jax.main --config=configs/lsun_church256_unet.py --workdir=runs/church \
        --config.teacher.checkpoint=ddpm-ema-church-256

Settings: batch 8, Adam 2e-5 (0.9, 0.999, eps 1e-8), no clipping (the published file sets none;
`--config.distill.optimizer.grad_clip=1.0` does), EMA 0.999, no dropout, flips, antithetic
timesteps, groups of 16, lambda 1; DDIM, 100 uniform steps, eta 0, 50,000 samples. Pruning: Taylor
importance over timesteps up to a loss of 0.01 of the largest, batch 4.
Source: "Diff_Pruning configs/church.yml"; pruning as for Bedroom.

Hardware: any accelerator that holds the batch (`--config.distill.accumulation=2` takes it in
halves), or up to eight: it is split over all devices. By MACs, the student of ratio 0.3 takes
2.1e18 floating-point operations, 50,000 samples of the teacher 2.5e18, a teacher of one's own
(4,400k steps) 5.3e19; not timed here.

Arguments after a colon, for example `:method=output_kd,ratio=0.5`: ratio (0.3; one between two
rows takes the steps of the larger), method, seed,
seeds, normalisation, runlocal (teacher to report on two CPU cores in under a minute; its numbers
mean nothing). configs/celeba64_unet.py explains them.

Without TFDS: `--config.data.name=folder --config.data.path=FOLDER`, images in FOLDER/train and
FOLDER/validation, or any images: then both splits are the same.
"""

from liftplace_jax.experiment.presets import family_config, runlocal, steps_for

STEPS = {0.3: 200_000, 0.5: 500_000, 0.7: 500_000, 0.9: 500_000}
"""Of a student, by ratio."""


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(
        arg, "lsun_church256", "unet", "church", ratio=0.3, normalisation="published"
    )
    config.data.name = "lsun/church_outdoor"
    config.data.test_split = "validation"
    config.distill.steps = steps_for(args.ratio, STEPS)
    config.teacher.steps = 4_400_000
    for run in (config.teacher, config.distill):
        run.batch_size = 8
        run.ema_decay = 0.999
        run.optimizer.learning_rate = 2e-5
        run.optimizer.grad_clip = 0.0
    config.compress.taylor_batch_size = 4
    config.compress.taylor_threshold = 0.01
    config.evaluation.batch_size = 64
    return runlocal(config) if args.runlocal else config
