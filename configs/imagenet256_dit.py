"""ImageNet 256x256, class-conditional latent diffusion: the paper's DiT table.

Teacher: DiT-XL/2, 675,129,632 parameters, 118.69G MACs; published FID 2.27, Inception Score 278.2,
precision .83, recall .57. Students keep some of its 28 blocks:

    student   parameters     MACs   published FID / Inception Score / precision / recall
    D14      340,457,504   59.35G    2.79 / 235.6 / .82 / .55   (TinyFusion  2.86 / 234.5)
    D7       173,121,440   29.69G    5.91 / 164.2 / .78 / .53   (TinyFusion  5.99 / 164.0)
    D4       101,405,984   16.97G   21.17 /  79.5 / .62 / .54   (TinyFusion 22.11 /  78.7)
    D19      459,983,264   80.55G   no row in the paper

First encode the images, once; then the run, with the teacher of the DiT project:

    OPTIONS="--config.latents.autoencoder=sd-vae-ft-ema --config.latents.path=imagenet256-latents"
    python -m liftplace_jax.encode --config=configs/imagenet256_dit.py $OPTIONS
    python -m liftplace_jax.main --config=configs/imagenet256_dit.py:student=D14 $OPTIONS \\
        --config.teacher.checkpoint=DiT-XL-2-256x256.pt --workdir=runs/d14

Settings: 0.1 (mse + vb) + 0.9 (LIFT + PLACE + vb_kd) + 0.01 masked FeatKD, falling to 0; groups of
16; AdamW 2e-4 without decay, cosine to half, batch 256, 500k steps, EMA 0.9999; 10 % of labels
dropped, the same for teacher and student; flips. Blocks of the teacher that features are compared
with: 2i + 1 (D14), 4i + 3 (D7), 1, 8, 15, 22 (D4). Sampling: ancestral, 250 spaced steps, guidance
1.5 on all channels (`--config.evaluation.guidance_channels=3` is the published code's), 50,000
samples. Source: "TinyFusion_EXP/train_masked_kd.py, scripts/" and the paper; the number of steps is
that in the names of TinyFusion's published checkpoints (the scripts count epochs).

The blocks that a student keeps: `layers=learned` searches them as TinyFusion does, 1 of 2, 4 or 7
neighbours (D19: 2 of 3, and the last). A published start: `--config.compress.checkpoint=FILE.pt`.

Hardware: by MACs a step of D14 takes 1.5e14 floating-point operations, of which the teacher's
forward pass is 6.1e13; 500k steps 7.6e19; 50,000 guided samples of D14 3e18. Not timed here.

Arguments after a colon, as in `--config=configs/imagenet256_dit.py:student=D7,layers=learned`:
    student   D19, D14, D7 or D4 (D14)
    layers    which blocks: uniform, similarity, loss, learned, or their numbers, 0+9+18+27
    method    one, several joined by "+", or all. Default: lift_place_feature_kd, the published sum
    seed      of teacher and student (0); seeds=0+1+2 trains several students
    runlocal  teacher to report on two CPU cores in a minute or two: 16x16 images, latents of 4x4,
              4 blocks of width 32, 30 steps; its numbers mean nothing. It needs an autoencoder of
              three levels, and a random one will do:
              python -c "from liftplace_jax.encoders import autoencoder_folder as a
              a.write_random_autoencoder('ae')"

Without TFDS: `--config.data.name=folder --config.data.path=FOLDER`, images in FOLDER/train/<class>/
and FOLDER/validation/<class>/, with `--config.model.num_classes=N` if there are not 1000 classes.
"""

from ml_collections import config_dict

from liftplace_jax.experiment.presets import family_config, runlocal

STUDENTS = {"D19": 19, "D14": 14, "D7": 7, "D4": 4}


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(
        arg, "imagenet256_dit", "dit", "DiT-XL/2", layers="uniform", others={"student": "D14"}
    )
    if args.student not in STUDENTS:
        raise ValueError(f"student must be one of {list(STUDENTS)}, got {args.student!r}")
    config.data.update(
        name="imagenet2012", test_split="validation", image_size=256, flip=True, resize="adm"
    )
    config.compress.depth = STUDENTS[args.student]
    # The search runs one epoch, as "TinyFusion_EXP/prune_by_learning.py" is started.
    config.compress.learned.update(batch_size=128, steps=10_009, dtype="bfloat16")
    config.teacher.steps = 7_000_000
    config.distill.steps = 500_000
    config.distill.optimizer.update(schedule="cosine", final_scale=0.5)
    for run in (config.teacher, config.distill):
        run.batch_size = 256
        run.ema_decay = 0.9999
        run.log_every = 100
        run.checkpoint_every = 5000
    config.teacher.optimizer.learning_rate = 1e-4
    config.evaluation.features = config_dict.placeholder(str)
    config.evaluation.update(
        num_samples=50_000,
        sampler="ancestral",
        sample_steps=250,
        skip_type="spaced",
        batch_size=64,  # decoding takes 0.24 GB an image
    )
    return runlocal(config) if args.runlocal else config
