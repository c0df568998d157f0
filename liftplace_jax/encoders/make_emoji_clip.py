"""Trains the small CLIP pair of the embedded emoji, and writes its folders as transformers has it.

python -m liftplace_jax.encoders.make_emoji_clip [--output DIR] [--workdir DIR] [--steps N]

A byte-level BPE vocabulary in CLIP's layout from the training captions and keywords; then a text
and an image tower, so that a picture is nearest to its own caption (Radford et al. 2021). A quarter
of an hour on two cores. It learns from the training pictures of every group; the held-out
combinations are looked at once, at the end, for the quality that is written into `made.json`. An
interrupted run goes on in the same --workdir.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax import weights
from liftplace_jax.data.emoji import (
    caption,
    composition,
    emoji_pictures,
    emoji_table,
    split_indices,
)
from liftplace_jax.encoders.clip import CLIPTextConfig, CLIPVisionConfig
from liftplace_jax.encoders.shipped import find_shipped, save_part
from liftplace_jax.encoders.tokenizer import train_tokenizer
from liftplace_jax.nn import building
from liftplace_jax.training.loop import train
from liftplace_jax.training.optimizer import make_optimizer
from liftplace_jax.training.state import create_state
from liftplace_jax.training.step import make_train_step

SEED, STEPS, BATCH, RATE, EMA = 0, 1500, 64, 1e-3, 0.995
RUN = 8  # neighbours on the sheet that a batch takes together: tones and genders of one emoji
VOCABULARY, LENGTH, PROJECTION = 2048, 24, 128
SHIFT = 2  # pixels that a picture is moved by, at most
TEXT = CLIPTextConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    eos_token_id=VOCABULARY - 1,
    projection_dim=PROJECTION,
)
IMAGE = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    projection_dim=PROJECTION,
)


def varied(entry, rng):
    """A caption of an entry: its name, two times of five with keywords; seldom these alone."""
    keywords = [word.lower() for word in entry["keywords"]]
    draw = rng.random()
    if draw < 0.6 or not keywords:
        return caption(entry)
    chosen = [keywords[place] for place in rng.permutation(len(keywords))[:3]]
    if draw < 0.7 and not composition(entry["emoji"])[2]:  # tones have no keywords
        return ", ".join(chosen)
    return ", ".join([caption(entry), *chosen])


def batches(tokenizer, entries, pictures, first):
    """Endless {"images", "ids"} from a step on: runs of neighbours, which are much alike."""
    for step in itertools.count(first):
        rng = np.random.default_rng([SEED, step])
        starts = rng.integers(0, len(entries), BATCH // RUN)
        chosen = (starts[:, None] + np.arange(RUN)).reshape(-1) % len(entries)
        chosen = np.unique(chosen)
        chosen = np.concatenate(
            [
                chosen,
                rng.choice(
                    np.setdiff1d(np.arange(len(entries)), chosen),
                    BATCH - len(chosen),
                    replace=False,
                ),
            ]
        )
        padded = np.pad(
            pictures[chosen], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), constant_values=255
        )
        corners = rng.integers(0, 2 * SHIFT + 1, (BATCH, 2))
        size = pictures.shape[1]
        moved = [p[y : y + size, x : x + size] for p, (y, x) in zip(padded, corners, strict=True)]
        texts = [varied(entries[index], rng) for index in chosen]
        yield {"images": as_floats(np.stack(moved)), "ids": tokenizer.encode(texts)}


def as_floats(pictures):
    """uint8 -> float32 in [-1, 1]."""
    return pictures.astype(np.float32) / np.float32(127.5) - 1


def unit(vectors):
    """(N, P) of length one."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def make_loss(text_graph, image_graph):
    """CLIP's loss for `make_train_step`: cross-entropies of cosines, whose factor is learnt."""

    def loss_fn(params, teacher_params, batch, step):
        del teacher_params, step
        pair = params["student"]
        texts = unit(nnx.merge(text_graph, pair["text"])(batch["ids"]).projected)
        images = unit(nnx.merge(image_graph, pair["image"])(batch["images"]).projected)
        scale = jnp.exp(jnp.minimum(pair["logit_scale"], jnp.log(100.0)))
        logits = scale * images @ texts.T
        right = jnp.arange(len(logits))
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(x, right).mean()
            for x in (logits, logits.T)
        ]
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == right)
        return (losses[0] + losses[1]) / 2, {"accuracy": accuracy}

    return loss_fn


def retrieval(texts, images):
    """Share of pictures whose own caption is the nearest, and of captions whose picture is.

    Args:
      texts: (N, P) projected states of captions; row i belongs to row i of the images.
      images: (N, P) those of pictures.

    Returns:
      (image to text, text to image), in 0..1.
    """
    cosines = np.asarray(unit(jnp.asarray(images)) @ unit(jnp.asarray(texts)).T)
    right = np.arange(len(cosines))
    return tuple(float((np.argmax(x, axis=1) == right).mean()) for x in (cosines, cosines.T))


def project(graphdef, params, inputs):
    """(N, P) projected states of inputs, in parts."""
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x).projected)
    return np.concatenate(
        [
            np.asarray(run(params, inputs[start : start + 256]))
            for start in range(0, len(inputs), 256)
        ]
    )


def train_pair(tokenizer, entries, pictures, steps, folder):
    """(graphdef of texts, of images, averaged parameters); checkpoints lie in `folder`."""
    (text_graph, text), (image_graph, image) = (
        building.create(config, SEED + place) for place, config in enumerate((TEXT, IMAGE))
    )
    fields = ConfigDict(
        dict(
            name="adamw",
            learning_rate=RATE,
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.05,
            grad_clip=1.0,
            schedule="cosine",
            warmup_steps=min(100, steps),
            final_scale=0.01,
        )
    )
    optimizer, _ = make_optimizer(fields, steps)
    pair = {"text": text, "image": image, "logit_scale": jnp.log(jnp.float32(1 / 0.07))}
    state = create_state({"student": pair}, optimizer)
    step = make_train_step(make_loss(text_graph, image_graph), optimizer, ema_decay=EMA)
    state = train(
        step,
        state,
        {},
        lambda first: batches(tokenizer, entries, pictures, first),
        total_steps=steps,
        folder=folder,
        title="clip",
        log_every=100,
        checkpoint_every=250,
    )
    return text_graph, image_graph, state.ema


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=find_shipped("emoji"), help="folder")
    parser.add_argument("--workdir", type=Path, help="of checkpoints; default: thrown away")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    table, pictures = emoji_table(), emoji_pictures()
    seen, held_out = split_indices(table)
    entries = [table[index] for index in seen]
    texts = [caption(entry) for entry in entries]
    texts += [word for entry in entries for word in entry["keywords"]]
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = Path(scratch, "tokenizer")
        tokenizer = train_tokenizer(vocabulary, texts, VOCABULARY, LENGTH)
        files = {path.name: path.read_text("utf-8") for path in vocabulary.iterdir()}
        text_graph, image_graph, pair = train_pair(
            tokenizer, entries, pictures[seen], args.steps, args.workdir or Path(scratch, "run")
        )
    stored = {
        name: {key: value.astype(np.float16) for key, value in weights.to_torch(pair[name]).items()}
        for name in ("text", "image")
    }
    # What is measured is what is written.
    text, image = (weights.from_torch(pair[name], stored[name]) for name in ("text", "image"))
    ids = tokenizer.encode([caption(entry) for entry in table])
    texts = project(text_graph, text, ids)
    images = project(image_graph, image, as_floats(pictures))
    quality = {}
    for name, chosen in (("test", held_out), ("train", seen), ("all", np.arange(len(table)))):
        found = retrieval(texts[chosen], images[chosen])
        quality[f"{name}_pictures"] = len(chosen)
        quality[f"{name}_image_to_text"], quality[f"{name}_text_to_image"] = (
            round(value, 4) for value in found
        )
    made = {
        "made_by": "python -m liftplace_jax.encoders.make_emoji_clip",
        "data": "emoji 1.0.0, all groups, train split; nearest of all captions or pictures of the "
        "split, share that is right",
        **quality,
        "seed": SEED,
        "steps": args.steps,
        "logit_scale": float(pair["logit_scale"]),
        "jax": jax.__version__,
    }
    save_part(args.output, "tokenizer", files, {"made_by": made["made_by"]})
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "do_center_crop": True,
        "size": {"shortest_edge": IMAGE.image_size},
        "do_normalize": True,
        "crop_size": {"height": IMAGE.image_size, "width": IMAGE.image_size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    save_part(
        args.output,
        "text_encoder",
        {"config.json": TEXT.described(), "model.safetensors": stored["text"]},
        made,
    )
    save_part(
        args.output,
        "image_encoder",
        {
            "config.json": IMAGE.described(),
            "preprocessor_config.json": preprocessor,
            "model.safetensors": stored["image"],
        },
        made,
    )
    print(f"{args.output}: {made}")


if __name__ == "__main__":
    main()
