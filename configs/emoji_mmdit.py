"""Emoji 32x32 by caption: a small MMDiT with rectified flow, sized for two CPU cores.

Setting: data, autoencoder and text encoder of configs/emoji_sd.py (embedded, all of it); teacher of
6 blocks, 128 wide, 64 tokens of 16x16x4 latents, told the text's tokens and its pooled vector;
rectified flow on logit-normal times; students by depth, of 2 blocks, the last one always kept.
Losses: task + PLACE + features, each weighed 1, on the velocity. Nothing is published for this
family: loss and settings are ours. Samples are drawn for the held-out captions, guidance 2, by 20
Euler steps.

    python -m liftplace_jax.encode --config=configs/emoji_mmdit.py
    python -m liftplace_jax.main --config=configs/emoji_mmdit.py --workdir=runs/emoji_mmdit

Arguments after a colon, for example `--config=configs/emoji_mmdit.py:method=output_kd,depth=3`:
    depth     blocks that the student keeps (2)
    layers    which: uniform, similarity, loss, learned, or their numbers, 2+5
    method    no_kd, output_kd, output_feature_kd, lift_place, lift_place_feature_kd, ..., or all
    seed      of teacher and student (0); seeds=0+1+2 trains several students
    runlocal  the same in a minute or two; at full length it has not been timed yet

The encoded data are written to runs/emoji_latents, and are those of configs/emoji_sd.py; another
place: --config.latents.path=FOLDER, for both commands.
"""

from liftplace_jax.experiment.configuration import optimizer_config
from liftplace_jax.experiment.presets import family_config


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(arg, "emoji_mmdit", "mmdit", depth=2, layers="uniform")
    config.data.update(name="emoji/people-32", flip=False)
    config.latents.update(autoencoder="emoji", path="runs/emoji_latents")
    config.text.update(folder="emoji", dropout=0.1)
    config.model.update(
        image_size=16,
        in_channels=4,
        depth=6,
        num_heads=4,
        head_size=32,
        patch_size=2,
        context_dim=128,
        pooled_dim=128,
        position_size=8,
        context_tokens=24,
    )
    config.process.shift = 1.0
    config.teacher.steps = 6000
    config.distill.steps = 3000
    for run in (config.teacher, config.distill):
        run.batch_size = 16  # what two cores do in the time
        run.ema_decay = 0.998
        run.optimizer = optimizer_config(
            name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=100
        )
    config.evaluation.update(
        features="emoji",
        prompts="captions",
        guidance=2.0,
        num_samples=1024,
        batch_size=128,
        skip_type="uniform",
        sample_steps=20,
        repeat_prompts=True,
        clip_model="emoji",
    )
    if args.runlocal:
        config.model.update(depth=4, head_size=16)
        for run in (config.teacher, config.distill, config.compress.learned):
            run.steps = 40
            run.batch_size = 16
            run.log_every = 20
            run.checkpoint_every = 40
            run.optimizer.warmup_steps = 10
        config.evaluation.update(num_samples=128, batch_size=64, sample_steps=5)
        config.tensorboard = False
    return config
