"""Trains the digit classifier whose features are compared, and writes its weights.

python -m liftplace_jax.evaluation.make_digit_features [--data_dir DIR] [--output FILE]

One core, under two minutes. The weights are chosen without looking at the test split: the last
step's are kept, and the test accuracy is measured once and written into the file.
"""

import argparse
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from liftplace_jax.data import eval_batches, load_source, train_batches, unpack_images
from liftplace_jax.evaluation.features import DIGIT_WEIGHTS, digit_logits

SEED, STEPS, BATCH, PEAK_RATE = 0, 1200, 128, 2e-3
SHAPES = {
    "conv1.kernel": (3, 3, 1, 32),
    "conv1.bias": (32,),
    "conv2.kernel": (3, 3, 32, 64),
    "conv2.bias": (64,),
    "hidden.kernel": (4 * 4 * 64, 64),
    "hidden.bias": (64,),
    "classes.kernel": (64, 10),
    "classes.bias": (10,),
}


def initial_params(key):
    """Kernels with He's normal scale, zero biases."""
    init = jax.nn.initializers.he_normal()
    return {
        name: init(jax.random.fold_in(key, index), shape) if len(shape) > 1 else jnp.zeros(shape)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def shifted(images, key):
    """Each image moved by up to one pixel each way; the uncovered border is black (-1)."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    corners = jax.random.randint(key, (len(images), 2), 0, 3)

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def train(source, steps=STEPS):
    """Trains on `source` (digits, train split); returns the weights by name."""
    tx = optax.adamw(optax.cosine_decay_schedule(PEAK_RATE, steps), weight_decay=1e-2)

    @jax.jit
    def step(params, state, batch, key):
        images, labels = unpack_images(batch)["image"], batch["label"]

        def loss(params):
            logits = digit_logits(params, shifted(images, key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = initial_params(jax.random.key(SEED))
    state = tx.init(params)
    batches = train_batches(source, batch_size=BATCH, seed=SEED)
    for index, batch in zip(range(steps), batches, strict=False):
        key = jax.random.fold_in(jax.random.key(SEED + 1), index)
        params, state = step(params, state, batch, key)
    batches.close()
    return {name: np.asarray(value) for name, value in params.items()}


def accuracy(params, source):
    """Number of correctly classified examples of `source`, and the number of examples."""
    correct = 0
    for batch in eval_batches(source, batch_size=256):
        predicted = np.argmax(digit_logits(params, unpack_images(batch)["image"]), axis=-1)
        correct += int(((predicted == batch["label"]) & batch["mask"]).sum())
    return correct, len(source)


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_dir", help="where TFDS keeps prepared data")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name(DIGIT_WEIGHTS), help="file to write"
    )
    args = parser.parse_args(argv)
    params = train(load_source("digits", "train", data_dir=args.data_dir))
    correct, count = accuracy(params, load_source("digits", "test", data_dir=args.data_dir))
    info = {
        "made_by": "python -m liftplace_jax.evaluation.make_digit_features",
        "data": "digits 1.0.0, train split; accuracy on the test split",
        "test_accuracy": f"{correct / count:.4f}",
        "test_correct": f"{correct}/{count}",
        "seed": str(SEED),
        "steps": str(STEPS),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    temporary = args.output.with_name(args.output.name + ".tmp")
    # One entry, since safetensors writes several in random order: the same run, the same file.
    temporary.write_bytes(save(params, metadata={"info": json.dumps(info)}))
    os.replace(temporary, args.output)
    print(f"{args.output}: test accuracy {correct}/{count} = {correct / count:.4f}")


if __name__ == "__main__":
    main()
