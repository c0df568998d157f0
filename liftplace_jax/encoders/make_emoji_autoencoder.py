"""Trains the small autoencoder of the embedded emoji, and writes its folder as diffusers has it.

python -m liftplace_jax.encoders.make_emoji_autoencoder [--output DIR] [--workdir DIR] [--steps N]

32x32 pixels to latents of 16x16x4 and back; a quarter of an hour on two cores. It learns from the
training pictures of every group; the held-out combinations are looked at once, at the end, for the
quality that is written into `made.json`. An interrupted run goes on in the same --workdir.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax import weights
from liftplace_jax.data.emoji import emoji_pictures, emoji_table, split_indices
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.encoders.autoencoder_folder import config_to_diffusers
from liftplace_jax.encoders.shipped import find_shipped, save_part
from liftplace_jax.nn import building
from liftplace_jax.training.loop import train
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.state import create_state, random_key
from liftplace_jax.training.step import make_train_step

SEED, STEPS, BATCH, RATE, EMA = 0, 4000, 16, 2e-3, 0.995
KL_WEIGHT = 1e-4  # nats a latent element, against the squared error of a pixel
CONFIG = AutoencoderConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=32,
    scaling_factor=1.0,
)


def make_loss(graphdef):
    """The loss of `make_train_step`: squared error, and how far latents are from noise."""

    def loss_fn(params, teacher_params, batch, step):
        del teacher_params
        network = nnx.merge(graphdef, params["student"])
        mean, logvar = network.encode(batch)
        noise = jax.random.normal(random_key(SEED, "noise", step), mean.shape)
        decoded = network.decode(mean + jnp.exp(logvar / 2) * noise)
        error = jnp.mean((decoded - batch) ** 2)
        divergence = jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar) / 2
        return error + KL_WEIGHT * divergence, {"error": error, "divergence": divergence}

    return loss_fn


def batches(pictures, first):
    """Endless (BATCH, 32, 32, 3) in [-1, 1] of uint8 pictures from a step on; half are mirrored."""
    for step in itertools.count(first):
        bits = np.random.Philox(np.random.SeedSequence([SEED, step])).random_raw(2 * BATCH)
        chosen = pictures[(bits[:BATCH] % np.uint64(len(pictures))).astype(np.int64)]
        mirrored = (bits[BATCH:] & np.uint64(1)).astype(bool)
        chosen[mirrored] = chosen[mirrored, :, ::-1]
        yield as_floats(chosen)


def as_floats(pictures):
    """uint8 -> float32 in [-1, 1]."""
    return pictures.astype(np.float32) / np.float32(127.5) - 1


def evaluate(network, pictures):
    """How good an `AutoencoderNetwork` or a module is on (N, 32, 32, 3) uint8 pictures.

    Returns:
      {"psnr": mean over pictures of the peak signal to noise ratio of the decoded mean, in dB of
      0..255, rounded to 8 bits; "std": of the latents, not scaled}.
    """
    encode = jax.jit(lambda x: network.encode(x)[0])
    decode = jax.jit(network.decode)
    ratios, latents = [], []
    for start in range(0, len(pictures), 128):
        part = pictures[start : start + 128]
        latent = encode(as_floats(part))
        decoded = np.clip(np.rint((np.asarray(decode(latent)) + 1) * 127.5), 0, 255)
        error = ((decoded - part) ** 2).mean((1, 2, 3))
        ratios.append(10 * np.log10(255**2 / np.maximum(error, 1e-3)))
        latents.append(np.asarray(latent))
    values = np.concatenate(latents)
    return {"psnr": float(np.concatenate(ratios).mean()), "std": float(values.std())}


def train_parameters(pictures, steps, folder):
    """Averaged parameters after `steps` on uint8 pictures; checkpoints lie in `folder`."""
    graphdef, params = building.create(CONFIG, SEED)
    fields = ConfigDict(
        dict(
            name="adam",
            learning_rate=RATE,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            grad_clip=1.0,
            schedule="cosine",
            warmup_steps=min(100, steps),
            final_scale=0.01,
        )
    )
    optimizer, _ = make_optimizer(fields, steps)
    state = create_state({"student": params}, optimizer)
    step = make_train_step(make_loss(graphdef), optimizer, ema_decay=EMA)
    state = train(
        step,
        state,
        {},
        lambda first: batches(pictures, first),
        total_steps=steps,
        folder=folder,
        title="autoencoder",
        log_every=100,
        checkpoint_every=500,
    )
    return graphdef, state.ema


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=find_shipped("emoji"), help="folder")
    parser.add_argument("--workdir", type=Path, help="of checkpoints; default: thrown away")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    pictures = emoji_pictures()
    seen, held_out = (pictures[part] for part in split_indices(emoji_table()))
    with tempfile.TemporaryDirectory() as scratch:
        graphdef, params = train_parameters(seen, args.steps, args.workdir or Path(scratch))
    stored = {name: value.astype(np.float16) for name, value in weights.to_torch(params).items()}
    # What is measured is what is written.
    params = weights.from_torch(params, stored)
    network = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    found, test = evaluate(network, seen), evaluate(network, held_out)
    config = CONFIG.replace(scaling_factor=round(1 / found["std"], 5))
    made = {
        "made_by": "python -m liftplace_jax.encoders.make_emoji_autoencoder",
        "data": "emoji 1.0.0, all groups, train split; quality on the test split",
        "test_psnr_db": round(test["psnr"], 2),
        "train_psnr_db": round(found["psnr"], 2),
        "seed": SEED,
        "steps": args.steps,
        "jax": jax.__version__,
    }
    files = {
        "config.json": config_to_diffusers(config),
        "diffusion_pytorch_model.safetensors": stored,
    }
    save_part(args.output, "vae", files, made)
    print(f"{args.output}/vae: {made}")


if __name__ == "__main__":
    main()
