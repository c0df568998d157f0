"""Emoji 32x32 by caption: a small Stable Diffusion, sized for two CPU cores.

Setting: the embedded emoji of people (Noto, 1,928 pictures; 337 more are held out, whose words all
occur in training, but never together), encoded into 16x16x4 latents by the embedded autoencoder;
captions through the embedded tokenizer and text encoder; teacher U-Net of Stable Diffusion's kind,
three levels, told the text by cross-attention; students by leaving out blocks, as BK-SDM.
Losses as published for Stable Diffusion: task + PLACE + features, each weighed 1. A tenth of the
captions are dropped; samples are drawn for the held-out captions, guidance 2.

    python -m liftplace_jax.encode --config=configs/emoji_sd.py
    python -m liftplace_jax.main --config=configs/emoji_sd.py --workdir=runs/emoji_sd

Arguments after a colon, for example `--config=configs/emoji_sd.py:method=output_kd,student=base`:
    student   base, small (default), tiny, extreme, or names of layers that stay, joined by "+"
    method    no_kd, output_kd, output_feature_kd, lift_place, lift_place_feature_kd, ..., or all
    seed      of teacher and student (0); seeds=0+1+2 trains several students
    runlocal  the same in a minute or two; at full length it has not been timed yet

The encoded data are written to runs/emoji_latents; another place: --config.latents.path=FOLDER, for
both commands.
"""

from liftplace_jax.experiment.configuration import optimizer_config
from liftplace_jax.experiment.presets import family_config


def get_config(arg=None):
    """The config; see the module's text for `arg`."""
    config, args = family_config(arg, "emoji_sd", "sd_unet", student="small")
    config.data.update(name="emoji/people-32", flip=False)
    config.latents.update(autoencoder="emoji", path="runs/emoji_latents")
    config.text.update(folder="emoji", dropout=0.1)
    config.model.update(
        image_size=16,
        in_channels=4,
        out_channels=4,
        widths=(32, 64, 96),
        layers=(2, 2, 2),
        heads=(2, 4, 4),
        down_attention=(False, True, True),  # where it is cheap
        up_attention=(True, True, False),
        context_dim=128,
        num_groups=8,
    )
    config.teacher.steps = 4000
    config.distill.steps = 2000
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
        sampler="dpmpp_2m",
        sample_steps=20,
        skip_type="linspace",
        steps_offset=0,
        set_alpha_to_one=True,
        repeat_prompts=True,
        clip_model="emoji",
    )
    if args.runlocal:
        config.model.update(
            widths=(16, 32),
            layers=(2, 2),
            heads=(2, 2),
            down_attention=(False, True),
            up_attention=(True, False),
        )
        for run in (config.teacher, config.distill):
            run.steps = 40
            run.batch_size = 16
            run.log_every = 20
            run.checkpoint_every = 40
            run.optimizer.warmup_steps = 10
        config.evaluation.update(num_samples=128, batch_size=64, sample_steps=5)
        config.tensorboard = False
    return config
