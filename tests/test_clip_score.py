"""CLIP score: cosines and preparation of images, against transformers live, and what is refused."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_clip import LENGTH, PROMPTS, SIZE, processor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from liftplace_jax import evaluation, weights
from liftplace_jax.data.emoji import caption, emoji_pictures, emoji_table, split_indices
from liftplace_jax.encoders.clip import CLIPVisionConfig, load_image_encoder, load_text_encoder
from liftplace_jax.encoders.clip.preparing import load_preparation
from liftplace_jax.host import sharding

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (4, 18, 18, 3), dtype=np.uint8)


def test_cosines_are_those_of_transformers(clip_folder):
    clip, model = evaluation.load_clip(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    inputs = tokenizer(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    images = [Image.fromarray(picture) for picture in PICTURES]
    pixels = processor()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model(**inputs, pixel_values=pixels)
        expected = (found.image_embeds * found.text_embeds).sum(-1).numpy()
    texts = clip.text_features(PROMPTS)
    pictures = np.stack([clip.preparation.picture(picture) for picture in PICTURES])
    cosines = np.asarray(clip.cosines(pictures, texts))
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    assert np.ptp(cosines) > 0.05 and cosines.dtype == np.float32
    # Neither what fills a batch up nor how it is split changes a number.
    mesh = sharding.batch_sharding(sharding.make_mesh({"data": -1}))
    padded = [np.pad(x, ((0, 4), *((0, 0),) * (x.ndim - 1))) for x in (pictures, texts)]
    np.testing.assert_allclose(np.asarray(clip.cosines(*padded, mesh))[:4], cosines, atol=1e-6)
    np.testing.assert_array_equal(clip.text_features(PROMPTS * 33)[-4:], texts)
    score = evaluation.clip_score(cosines)
    assert score["clip_score"] == pytest.approx(expected.mean(), abs=1e-5)  # no factor, no clamp
    error = expected.std(ddof=1) / 2
    assert score["clip_score_error"] == pytest.approx(error, abs=1e-5)
    assert score["clip_pairs"] == 4


@pytest.mark.parametrize("shape", [(18, 18), (14, 14), (9, 9), (17, 31), (40, 23)])
@pytest.mark.parametrize("changes", [
    {}, {"size": {"shortest_edge": 17}}, {"size": {"height": 19, "width": 15}}, {"resample": 2},
    {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 127.5},
    {"do_normalize": False}, {"do_rescale": False},
])  # fmt: skip
def test_pictures_are_prepared_as_by_transformers(tmp_path, changes, shape):
    theirs = processor(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_preparation(tmp_path, CLIPVisionConfig(image_size=SIZE, patch_size=4))
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    found = np.asarray(ours.scaled(ours.picture(image)[None]))[0]
    np.testing.assert_allclose(found, np.moveaxis(expected, 0, -1), rtol=1e-5, atol=1e-5)


def test_of_a_folder_without_a_preparation_it_is_openais(tmp_path):
    theirs = CLIPImageProcessorPil()  # 224, bicubic, centre crop
    ours = load_preparation(tmp_path, CLIPVisionConfig())
    grey = RNG.integers(0, 256, (256, 256, 1), dtype=np.uint8)
    expected = theirs(Image.fromarray(grey[..., 0]), return_tensors="np")["pixel_values"][0]
    found = np.asarray(ours.scaled(ours.picture(grey)[None]))[0]  # grey is shown in three channels
    np.testing.assert_allclose(found, np.moveaxis(expected, 0, -1), atol=1e-5)
    assert ours.identity["resample"] == "BICUBIC" and ours.identity["crop"] == 224
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": [0.5] * 3}})
    )
    assert load_preparation(tmp_path, CLIPVisionConfig()).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"shortest_edge": 0}}, "size must be a whole number in 1..65536, got 0"),
        ({"size": {"longest_edge": 9}}, "size {'longest_edge': 9} must have height and width"),
        ({"crop_size": {"height": 14, "width": 13}}, "crop_size (14, 13) is no square"),
        ({"crop_size": 13}, "pictures become 13, the tower takes 14"),
        ({"size": 13, "crop_size": 14}, "crop_size 14 is larger than size 13"),
        ({"do_center_crop": False, "size": 18}, "pictures become 18, the tower takes 14"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std [1.0, 0.0, 1.0] must be above 0"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "image_mean and image_std must be 3 numbers"),
        ({"image_mean": "bright"}, "image_mean must be a sequence"),
        ({"resample": 17}, "resample 17 is none of Pillow's ways"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number"),
    ],
)
def test_a_preparation_that_cannot_be_is_refused(tmp_path, fields, message):
    usual = {"size": SIZE, "crop_size": SIZE}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(usual | fields))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {message}")):
        load_preparation(tmp_path, CLIPVisionConfig(image_size=SIZE, patch_size=4))


def test_a_folder_that_has_no_cosine_is_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="/nowhere: no config.json of a CLIP text model"):
        evaluation.load_clip("/nowhere")
    for tower in ("text", "image"):  # one without a projection
        folder = tmp_path / tower
        parts = split(clip_folder, folder)
        fields = json.loads((parts[tower] / "config.json").read_text())
        fields["architectures"] = [fields["architectures"][0].removesuffix("WithProjection")]
        fields.pop("projection_dim")
        (parts[tower] / "config.json").write_text(json.dumps(fields))
        drop_projection(parts[tower] / "model.safetensors")
        with pytest.raises(ValueError, match=f"the tower of {tower}s has no projection"):
            evaluation.load_clip(folder)


def split(pair, folder):
    """The pair as text_encoder, image_encoder and tokenizer; name of a tower -> its folder."""
    parts = {"text": folder / "text_encoder", "image": folder / "image_encoder"}
    for load, part in zip((load_text_encoder, load_image_encoder), parts.values(), strict=True):
        network = load(pair)
        weights.save_model(part, network.config.described(), network.params)
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(pair / name, folder / "tokenizer")
    shutil.copy(pair / "preprocessor_config.json", parts["image"])
    return parts


def drop_projection(path):
    tensors = {k: v for k, v in load_file(path).items() if "_projection" not in k}
    save_file(tensors, path, {"format": "pt"})


def test_a_pair_of_folders_is_as_good_as_one(clip_folder, tmp_path):
    one = evaluation.load_clip(clip_folder)
    features = one.text_features(PROMPTS)
    split(clip_folder, tmp_path)
    two = evaluation.load_clip(tmp_path)
    np.testing.assert_array_equal(two.text_features(PROMPTS), features)
    assert two.preparation == one.preparation


def test_scores_of_cosines_that_are_none():
    with pytest.raises(ValueError, match="the cosine of image 1 is not finite"):
        evaluation.clip_score([0.1, np.nan])
    with pytest.raises(ValueError, match="want .N,. cosines"):
        evaluation.clip_score([])
    assert evaluation.clip_score([-0.5]) == {
        "clip_score": -0.5,
        "clip_score_error": None,
        "clip_pairs": 1,
    }


# Samples and their prompts ------------------------------------------------------------------------


def sample(params, keys, condition=None):
    return jax.vmap(lambda key: jax.random.uniform(key, (16, 16, 3), minval=-1))(keys)


def drawn(look, sharded, batch_size):
    mesh = sharding.batch_sharding(sharding.make_mesh({"data": -1})) if sharded else None
    return evaluation.collect(
        sample,
        (),
        10,
        batch_size=batch_size,
        extractor=None,
        seed=3,
        sharding=mesh,
        keep_images=10,
        look=look,
    )


def test_sample_i_is_scored_with_prompt_i_however_it_is_drawn(clip_folder):
    clip = evaluation.load_clip(clip_folder)
    look = evaluation.Look.of(evaluation.Handling(), clip, PROMPTS)
    found = drawn(look, False, 4)
    texts = clip.text_features(PROMPTS)[np.arange(10) % 4]
    pictures = np.stack([clip.preparation.picture(image) for image in found.images])
    expected = np.asarray(clip.cosines(pictures, texts))
    np.testing.assert_allclose(found.cosines, expected, atol=1e-6)
    other = drawn(look, True, 8)
    np.testing.assert_array_equal(other.images, found.images)
    np.testing.assert_allclose(other.cosines, expected, atol=1e-6)
    plain = drawn(None, False, 5)  # the same samples come out
    np.testing.assert_array_equal(plain.images, found.images)
    assert plain.cosines is None


def test_the_embedded_pair_knows_emoji_by_their_captions():
    table, pictures = emoji_table(), emoji_pictures()
    chosen = split_indices(table)[1][::6]  # held out
    texts = [caption(table[index]) for index in chosen]
    clip = evaluation.load_clip("emoji")
    prepared = np.stack([clip.preparation.picture(pictures[index]) for index in chosen])
    features = clip.text_features(texts)
    own, others = (
        evaluation.clip_score(np.asarray(clip.cosines(prepared, np.roll(features, by, axis=0))))
        for by in (0, 20)
    )
    assert own["clip_score"] > others["clip_score"] + 0.3
    assert own["clip_score_error"] < 0.05
