"""Stable Diffusion 3 with students by depth, 512x512: ours, not published.

The paper says that LIFT and PLACE extend to flow-based models such as MMDiT (SD3), and no more:
teacher, students, data, steps and losses below are ours, not published, and were never run in full.

Teacher: SD3-medium, 24 blocks, 2,028,328,000 parameters (without the table of positions), 1,054G
MACs at 512x512 with 333 tokens of text; or SD3.5-medium, 2,243,171,520 and 1,221G. Students keep
some of its blocks, the last one always, here those of layers=uniform:

    depth   of SD3-medium     MACs   of SD3.5-medium     MACs
    18      1,518,443,584     789G     1,683,707,712     918G
    12      1,008,559,168     524G     1,107,717,952     602G
    8         668,636,224     348G       734,742,080     400G
    6         498,674,752     260G       548,254,144     299G

First encode the images and captions, once; then the run, from the same folder of a pipeline:

    OPTIONS="--config.latents.autoencoder=stable-diffusion-3-medium-diffusers
        --config.text.folder=stable-diffusion-3-medium-diffusers
        --config.data.path=laion --config.latents.path=laion-sd3"
    python -m liftplace_jax.encode --config=configs/sd3_mmdit.py $OPTIONS --yes
    python -m liftplace_jax.main --config=configs/sd3_mmdit.py:depth=12 $OPTIONS \\
        --config.teacher.checkpoint=stable-diffusion-3-medium-diffusers \\
        --config.evaluation.prompts=coco.csv --workdir=runs/sd3-12

"laion" holds images with metadata.csv (file_name, text), such as the 212,776 pairs of
LAION-Aesthetics V2 6.5+. Each takes 2.9 MB, 625 GB in all: latents of both flips 0.5 MB, states of
the text 2.4, of which T5's are 2.1. `--config.text.t5_tokens=77 --config.model.context_tokens=154`
makes 0.9 of the 2.4, `--config.text.left_out="('text_encoder_3',)"` 0.3: zeros stand for T5, which
the teacher knows. With `--config.text.cached=False` the step computes all states, T5's 4.8 billion
parameters on every device; so they are where samples are drawn, as prompts are not cached.

Settings: 1 (flow) + 1 (LIFT + PLACE on velocities, groups of 16) + 1 (mean squared errors of the
image's tokens after each block, with those at the end of the interval that it stands for); AdamW
5e-5 (weight decay 1e-2), clip 1.0, batch 128, 50k steps, EMA 0.9999, bfloat16; logit-normal
timesteps, shift 3; 10 % of captions become "" in all encoders, the same for teacher and student; no
flips, since captions are of letters and sides too. Sampling: Euler, 28 steps as diffusers spaces
them, guidance 5, prompts as of configs/sd21_bksdm.py. These are the settings of Stable Diffusion's
published students where SD3 has no reason to differ, and SD3's own process.

Hardware: by MACs a step of depth 12 takes 6.7e14 floating-point operations, of which the teacher's
forward pass is 2.7e14; 50k steps 3.4e19; 30,000 guided samples of depth 12 1.8e18. Blocks are
computed again in the backward pass (remat), which is a third more of the student's part. Not timed
here. Parameters, averages, AdamW's moments and gradients of depth 12 take 21 GB in float32, the
teacher 4 GB in bfloat16. `--config.mesh.data=1 --config.mesh.fsdp=-1 --config.distill.scan_blocks
--config.sharding_rules="(('kernel', ('fsdp',)),)"` splits them among all devices, which gather one
block at a time: by `benchmark --suite=scaling` depth 12 then takes 13 of the 16 GB of a chip of
v5e-16 (36 GB unsplit, 23 gathered together), and 21 of the 80 GB of one of 8 H100.

Arguments after a colon, as in `--config=configs/sd3_mmdit.py:depth=8,layers=learned`:
    depth     blocks of the student (12)
    teacher   sd3-medium or sd3.5-medium
    layers    which blocks: uniform, similarity, loss, learned, or their numbers, 0+2+4+23
    method    one, several joined by "+", or all (lift_place_feature_kd)
    seed      of the students (0); seeds=0+1+2 trains several
    runlocal  encoded images to report on two CPU cores in a minute or two: 16x16 images, latents of
              4x4, 4 blocks of width 32, 30 steps; its numbers mean nothing. It trains its teacher,
              and repeats prompts. Random encoders will do:
              python -c "from liftplace_jax.encoders import autoencoder_folder, joint_texts
              autoencoder_folder.write_random_autoencoder('tiny/vae', latent_channels=16)
              joint_texts.write_random_joint_texts('tiny', ['a cat', 'a dog'])"
"""

from ml_collections import config_dict

from liftplace_jax.experiment.presets import family_config, runlocal

TEACHERS = ("sd3-medium", "sd3.5-medium")


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = _of(TEACHERS[0], arg)
    if args.teacher not in TEACHERS:
        raise ValueError(f"teacher must be one of {list(TEACHERS)}, got {args.teacher!r}")
    if args.teacher != TEACHERS[0]:
        config, args = _of(args.teacher, arg)
    config.data.update(name="folder", test_split="train", image_size=512)
    config.text.update(cached=True, dtype="bfloat16", dropout=0.1)
    config.latents.decode_dtype = "bfloat16"
    config.compress.learned.update(batch_size=128, steps=2000, dtype="bfloat16")
    config.distill.steps = 50_000
    for run in (config.teacher, config.distill):
        run.dtype = "bfloat16"
        run.remat = "nothing_saveable"
        run.log_every = 100
        run.checkpoint_every = 5000
    config.evaluation.features = config_dict.placeholder(str)
    config.evaluation.update(num_samples=30_000, batch_size=16, dtype="bfloat16")
    if not args.runlocal:
        return config
    config = runlocal(config)
    # As `write_random_joint_texts` has them.
    config.model.update(context_dim=32, pooled_dim=16, context_tokens=24)
    config.text.t5_tokens = 8
    config.evaluation.repeat_prompts = True
    return config


def _of(teacher, arg):
    return family_config(
        arg,
        "sd3_mmdit",
        "mmdit",
        teacher,
        depth=12,
        layers="uniform",
        others={"teacher": TEACHERS[0]},
    )
