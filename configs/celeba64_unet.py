"""CelebA 64x64: the paper's table, its LIFT + PLACE rows.

Teacher: DDPM U-Net, 78,700,803 parameters, 23.92G MACs, 500k steps; published FID 6.48, precision
.812, recall .587. Students, pruned from it:

    ratio   steps   parameters    MACs   published FID / precision / recall
    0.5      200k   19,714,179   6.00G    4.93 / .784 / .612   (no KD   5.30, output KD  5.53)
    0.7      240k    9,252,711   4.18G    5.97 / .777 / .577   (no KD   6.32, output KD  6.46)
    0.9      500k    1,312,076   0.77G   15.73 / .690 / .366   (no KD 223.56, output KD 55.41)

    python -m liftplace_jax.main --config=configs/celeba64_unet.py --workdir=runs/celeba-90

Settings: batch 96, Adam 2e-4 (0.9, 0.999, eps 1e-8), clip 1.0, EMA 0.9999, dropout 0.1, flips,
antithetic timesteps, groups of 16, lambda 1; DDIM, 100 uniform steps, eta 0, 50,000 samples.
Pruning: Taylor importance over all timesteps (threshold 0), batch 64.
Source: "Diff_Pruning configs/celeba.yml, scripts/old/prune_celeba_ddpm.sh" and the paper.

Hardware: any accelerator that holds the batch (`--config.distill.accumulation=2` takes it in
halves), or several: it is split over all devices. By MACs, the teacher takes 6.9e18 floating-point
operations, the student of ratio 0.9 2.5e18, 50,000 samples of the teacher 2.4e17; not timed here.
A published teacher saves its training: `--config.teacher.checkpoint=ckpt.pth`.

Arguments after a colon, for example `--config=configs/celeba64_unet.py:method=output_kd,ratio=0.5`:
    ratio          share of channels removed (0.9); a ratio between two rows takes the steps of the
                   larger, one up to 0.3 100k, as the published code's table
    method         one, several joined by "+", or all. Default: lift_place_feature_kd, which is the
                   published LIFT + PLACE: a feature loss, weighed 1e-6, is part of it. All of the
                   row: no_kd+output_kd+feature_kd+output_feature_kd+lift_place_feature_kd
    seed           of teacher and student (0); seeds=0+1+2 trains several students
    normalisation  published (32 groups stay) or adapted (at least two channels in each)
    runlocal       teacher to report on two CPU cores in under a minute: 16x16 images, 16 channels,
                   30 steps, 20 timesteps, 64 samples; its numbers mean nothing

Without TFDS: `--config.data.name=folder --config.data.path=FOLDER`, images in FOLDER/train and
FOLDER/test, or any images: then both splits are the same. The aligned photographs of 178x218 need
the published crop, which TFDS's celeb_a gets by itself: `--config.data.crop="(25, 57, 153, 185)"`.
"""

from liftplace_jax.experiment.presets import family_config, runlocal, steps_for

STEPS = {0.3: 100_000, 0.5: 200_000, 0.7: 240_000, 0.9: 500_000}
"""Of a student, by ratio."""


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(
        arg, "celeba64", "unet", "celeba", ratio=0.9, normalisation="published"
    )
    config.data.name = "celeb_a"
    config.memory_cache_mb = 2560  # all of it, decoded
    config.distill.steps = steps_for(args.ratio, STEPS)
    config.teacher.steps = 500_000
    for run in (config.teacher, config.distill):
        run.batch_size = 96
        run.ema_decay = 0.9999
        run.optimizer.learning_rate = 2e-4
    config.compress.taylor_threshold = 0.0
    return runlocal(config) if args.runlocal else config
