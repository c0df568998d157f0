"""The embedded emoji: their pictures, captions and splits, and the networks trained on them."""

import functools

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from PIL import Image

from liftplace_jax.data import eval_batches, load_source, make_emoji
from liftplace_jax.data.captions import digest
from liftplace_jax.data.emoji import (
    GROUPS,
    LEFT_OUT,
    Emoji,
    caption,
    composition,
    emoji_pictures,
    emoji_table,
    split_indices,
    words,
)
from liftplace_jax.encoders import make_emoji_autoencoder, make_emoji_clip
from liftplace_jax.encoders.autoencoder_folder import load_autoencoder
from liftplace_jax.encoders.clip import load_image_encoder, load_text_encoder
from liftplace_jax.encoders.make_emoji_autoencoder import as_floats
from liftplace_jax.encoders.shipped import find_shipped, read_record, sha256_of
from liftplace_jax.encoders.tokenizer import load_tokenizer
from liftplace_jax.evaluation import feature_extractor, frechet_distance

FOLDER = find_shipped("emoji")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@functools.cache
def held_out():
    """(N, 32, 32, 3) uint8 pictures of the test split, and their captions."""
    _, test = split_indices(emoji_table())
    return emoji_pictures()[test], [caption(emoji_table()[index]) for index in test]


def test_the_table_and_the_sheet_are_whole():
    table, pictures = emoji_table(), emoji_pictures()
    assert len(table) == len(pictures) == 3780 and pictures.shape[1:] == (32, 32, 3)
    assert pictures.dtype == np.uint8 and not pictures.flags.writeable
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert len({caption(entry) for entry in table}) == len(table)
    counts = {group: sum(e["group"] == group for e in table) for group in GROUPS}
    assert counts["people and body"] == 2265 and min(counts.values()) == counts["component"] == 9
    # Colours of what the captions say, in the middle of the picture.
    means = pictures[:, 12:20, 12:20].mean((1, 2))
    middle = {caption(entry): mean for entry, mean in zip(table, means, strict=True)}
    assert middle["red apple"].argmax() == 0 and middle["blue heart"].argmax() == 2
    assert middle["green book"].argmax() == 1 and middle["black large square"].max() < 80
    tones = [
        middle[f"raised fist: {tone} skin tone"].sum()
        for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
    ]
    assert tones == sorted(tones, reverse=True)


def test_what_is_drawn_is_what_is_read(tmp_path, monkeypatch):
    entries = [
        {
            "emoji": chr(65 + n),
            "name": f"Letter {n}",
            "group": n % 2,
            "subgroup": n,
            "keywords": ["a", "b"][:n],
        }
        for n in range(3)
    ]
    drawn = [Image.new("RGB", (32, 32), (n, 0, 9)) for n in range(3)]
    make_emoji.write(drawn, entries, tmp_path)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    table = emoji_table.__wrapped__()
    monkeypatch.setattr("liftplace_jax.data.emoji.emoji_table", lambda: table)
    pictures = emoji_pictures.__wrapped__()
    assert [{**entry, "group": GROUPS.index(entry["group"])} for entry in table] == entries
    assert (pictures == np.stack([np.asarray(picture) for picture in drawn])).all()


def test_captions_that_say_left_and_right_mirror_each_other():
    """Why these pictures are not mirrored for training."""
    picture = {caption(e): p for e, p in zip(emoji_table(), emoji_pictures(), strict=True)}
    left, right = (picture[f"backhand index pointing {way}"] for way in ("left", "right"))
    difference = np.abs(left.astype(int) - right[:, ::-1]).mean()
    assert difference < 0.2 * np.abs(left.astype(int) - right).mean()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("woman cook: dark skin tone", ("\U0001f9d1\u200d\U0001f373", "woman", "\U0001f3ff")),
        ("firefighter", ("\U0001f9d1\u200d\U0001f692", "person", "")),
        ("man running: light skin tone", ("\U0001f3c3", "man", "\U0001f3fb")),
        ("woman running: facing right", ("\U0001f3c3\u200d\u27a1", "woman", "")),
        ("handshake: dark skin tone, light skin tone",
         ("\U0001faf1\u200d\U0001faf2", "person", "\U0001f3ff\U0001f3fb")),
        ("red apple", ("\U0001f34e", "person", "")),
    ],
)  # fmt: skip
def test_compositions(name, expected):
    entry = next(entry for entry in emoji_table() if entry["name"] == name)
    assert composition(entry["emoji"]) == expected


def test_the_split_holds_out_compositions_alone():
    table = emoji_table()
    train, test = split_indices(table)
    assert (len(train), len(test)) == (3443, 337)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(table)))
    assert {table[index]["group"] for index in test} == {"people and body"}
    parts = [composition(entry["emoji"]) for entry in table]
    seen = {parts[index] for index in train if table[index]["group"] == "people and body"}
    new = [parts[index] for index in test]
    assert not seen & set(new)
    activities, genders, tones = ({part[place] for part in seen} for place in range(3))
    assert all(a in activities and g in genders and t in tones for a, g, t in new)
    # A tenth of the pairs (activity, gender) is held out in every tone, one of an activity at most.
    lost = {part[:2] for part in new} - {part[:2] for part in seen}
    several = {p[:2] for p in seen | set(new)}
    several = {p for p in several if sum(q[0] == p[0] for q in several) > 1}
    assert lost <= several and len({activity for activity, _ in lost}) == len(lost)
    assert 0.08 < len(lost) / len(several) < 0.12
    known = set().union(*(words(caption(table[index])) for index in train))
    assert all(words(caption(table[index])) <= known for index in test)


def test_the_split_is_the_same_for_ever():
    names = [caption(entry) for entry in emoji_table()]
    _, test = split_indices(emoji_table())
    assert digest(names[index] for index in test) == "9d246ec9643ccf10"
    shuffled = [emoji_table()[index] for index in np.random.default_rng(0).permutation(len(names))]
    assert {caption(shuffled[i]) for i in split_indices(shuffled)[1]} == {names[i] for i in test}


@pytest.mark.parametrize(
    "name, size, train, test, classes",
    [
        ("emoji", 32, 2949, 337, [g for g in GROUPS if g not in LEFT_OUT]),
        ("emoji/16", 16, 2949, 337, [g for g in GROUPS if g not in LEFT_OUT]),
        ("emoji/people-16", 16, 1928, 337, [str(n) for n in range(16, 32)]),
        ("emoji/all-16", 16, 3443, 337, list(GROUPS)),
    ],
)
def test_variants(data_dir, name, size, train, test, classes):
    sources = [load_source(name, split, data_dir=data_dir) for split in ("train", "test")]
    assert [len(source) for source in sources] == [train, test]
    for source in sources:
        assert source.image_shape == (size, size, 3) and list(source.classes) == classes
        assert len(source.captions) == len(source)
    batch = next(eval_batches(sources[1], batch_size=64))
    by_name = {caption(e): (e, p) for e, p in zip(emoji_table(), emoji_pictures(), strict=True)}
    captions = sources[1].captions[:64]
    for image, label, text in zip(batch["image"], batch["label"], captions, strict=True):
        entry, picture = by_name[text]
        expected = picture.reshape(size, 32 // size, size, 32 // size, 3).mean((1, 3))
        pixels = image if image.dtype == np.uint8 else (image + 1) * 127.5
        np.testing.assert_allclose(pixels, expected, atol=1)
        assert classes[label] in (entry["group"], str(entry["subgroup"]))


def test_a_variant_that_there_is_not_is_named(data_dir):
    with pytest.raises(ValueError, match=r"emoji has no variant '8', only \['32', '16', 'all-32'"):
        load_source("emoji/8", "train", data_dir=data_dir)
    with pytest.raises(ValueError, match="digits has no variant '16', nor any other"):
        load_source("digits/16", "train", data_dir=data_dir)


def test_the_builder_is_one_of_tfds(data_dir):
    builder = Emoji(data_dir=data_dir, config="all-16")
    assert builder.info.full_name == "emoji/all-16/1.0.0"
    assert isinstance(builder.info.features["text"], tfds.features.Text)


def test_shipped_files_are_those_on_record():
    record = read_record(FOLDER)
    assert sorted(record) == ["image_encoder", "text_encoder", "tokenizer", "vae"]
    for part, entry in record.items():
        found = {path.name: sha256_of(path) for path in (FOLDER / part).iterdir()}
        assert found == entry["files"], part
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert total < 8e6


def test_the_autoencoder_is_as_good_as_it_says():
    network, record = load_autoencoder("emoji"), read_record(FOLDER)["vae"]
    assert network.name == "emoji" and network.config.downsampling == 2
    module = nnx.merge(network.graphdef, network.params)
    found = make_emoji_autoencoder.evaluate(module, held_out()[0])
    assert found["psnr"] > record["test_psnr_db"] - 0.05 and record["test_psnr_db"] > LEAST_PSNR
    # Latents as a network sees them have a deviation of about one.
    assert found["std"] * network.config.scaling_factor == pytest.approx(1, abs=0.1)


def test_diffusers_reads_the_autoencoder():
    import diffusers  # late: seconds
    import torch

    theirs = diffusers.AutoencoderKL.from_pretrained(FOLDER, subfolder="vae").float()
    network = load_autoencoder(FOLDER)
    assert theirs.config.scaling_factor == network.config.scaling_factor
    images = as_floats(held_out()[0][:4])
    mean, _ = nnx.merge(network.graphdef, network.params).encode(images)
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mean
        decoded = theirs.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(mean, latents.permute(0, 2, 3, 1), atol=1e-4)
    scaled = mean * network.config.scaling_factor
    decode, params = network.decoder()
    np.testing.assert_allclose(decode(params, scaled), decoded, atol=1e-4)


def test_the_pair_finds_captions_as_well_as_it_says():
    text, image = load_text_encoder("emoji"), load_image_encoder("emoji")
    tokenizer, record = load_tokenizer("emoji"), read_record(FOLDER)["text_encoder"]
    pictures, captions = held_out()
    ids = tokenizer.encode(captions)
    assert tokenizer.vocab_size == text.config.vocab_size and (ids[:, -1] == 2047).all()
    texts = make_emoji_clip.project(text.graphdef, text.params, ids)
    images = make_emoji_clip.project(image.graphdef, image.params, as_floats(pictures))
    found = make_emoji_clip.retrieval(texts, images)
    said = record["test_image_to_text"], record["test_text_to_image"]
    # Two of 337 may change sides by rounding.
    assert min(np.subtract(found, said)) > -0.007 and min(said) > LEAST_RETRIEVAL
    assert record["test_pictures"] == len(pictures)


def test_transformers_reads_the_pair():
    import torch  # late: seconds
    import transformers

    load = functools.partial(transformers.CLIPTextModelWithProjection.from_pretrained, FOLDER)
    text, their_text = load_text_encoder("emoji"), load(subfolder="text_encoder").float()
    load = functools.partial(transformers.CLIPVisionModelWithProjection.from_pretrained, FOLDER)
    image, their_image = load_image_encoder("emoji"), load(subfolder="image_encoder").float()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(FOLDER, subfolder="tokenizer")
    pictures, captions = held_out()
    captions = [*captions[:7], "an Unseen w\u00f6rd, 42!"]
    ids = load_tokenizer("emoji").encode(captions)
    assert np.array_equal(tokenizer(captions, padding="max_length")["input_ids"], ids)
    images = as_floats(pictures[:4])
    with torch.no_grad():
        texts = their_text(torch.tensor(ids)).text_embeds.numpy()
        others = their_image(torch.tensor(images).permute(0, 3, 1, 2)).image_embeds.numpy()
    np.testing.assert_allclose(text.encode(text.params, ids).projected, texts, atol=1e-4)
    np.testing.assert_allclose(image.encode(image.params, images).projected, others, atol=1e-4)


def test_retrieval_is_right():
    eye = np.eye(4, dtype=np.float32)
    assert make_emoji_clip.retrieval(eye, 3 * eye) == (1, 1)
    assert make_emoji_clip.retrieval(eye, eye[::-1]) == (0, 0)
    assert make_emoji_clip.retrieval(eye, eye[[0, 0, 2, 3]]) == (0.75, 0.75)


def test_features_tell_pictures_from_spoilt_ones():
    features = feature_extractor("emoji")
    assert features.label == "emoji-feature Frechet distance"
    assert "test_image_to_text" in features.info
    pictures = emoji_pictures()[split_indices(emoji_table())[0]][::4]
    images, apply = as_floats(pictures), jax.jit(features.apply)
    rng = np.random.default_rng(0)
    noisy = np.clip(images + 0.5 * rng.standard_normal(images.shape), -1, 1).astype(np.float32)
    moments = []
    for kind in (images[::2], images[1::2], noisy[1::2]):
        rows = np.asarray(apply(features.params, kind), np.float64)
        assert rows.shape == (len(kind), features.dim)
        moments.append((rows.mean(0), np.cov(rows, rowvar=False)))
    same, spoilt = (frechet_distance(*moments[0], *other) for other in moments[1:])
    assert spoilt > 3 * same
    with pytest.raises(ValueError, match="images are .8, 8, 3., but the extractor 'emoji' takes"):
        features.check_shape((8, 8, 3))
    with pytest.raises(ValueError, match="features 'emoji' come with their weights"):
        feature_extractor("emoji", "file.npz")


def test_training_batches_are_functions_of_the_step():
    (pictures, _), table = held_out(), emoji_table()
    entries = [table[index] for index in split_indices(table)[1]]
    tokenizer = load_tokenizer("emoji")
    one, other = (make_emoji_clip.batches(tokenizer, entries, pictures, first) for first in (0, 1))
    next(one)
    jax.tree.map(np.testing.assert_array_equal, next(one), next(other))
    one, other = (make_emoji_autoencoder.batches(pictures, first) for first in (3, 3))
    np.testing.assert_array_equal(next(one), next(other))
    assert next(one).shape == (make_emoji_autoencoder.BATCH, 32, 32, 3)


LEAST_PSNR, LEAST_RETRIEVAL = 32, 0.5
