"""CLIP's towers, against golden arrays and transformers live."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import nhwc
from safetensors.numpy import load_file, save_file
from torch_unet import randomise
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)
from transformers import CLIPTextConfig as TheirTextConfig
from transformers import CLIPVisionConfig as TheirVisionConfig

from liftplace_jax import weights
from liftplace_jax.encoders.clip import (
    CLIPTextConfig,
    CLIPVisionConfig,
    load_image_encoder,
    load_text_encoder,
    save_clip,
    write_random_text_encoder,
)
from liftplace_jax.nn import building

TEXT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 9, "eos_token_id": 39, "bos_token_id": 38,
    "pad_token_id": 39, "projection_dim": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 11, "patch_size": 4, "num_channels": 2, "projection_dim": 12,
}  # fmt: skip
RNG = np.random.default_rng(0)
IDS = np.array([[38, 4, 7, 39, 39, 39], [38, 9, 39, 0, 0, 0]], np.int32)
IMAGES = RNG.normal(size=(2, 11, 11, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder of transformers' CLIPModel, and the model."""
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    model = CLIPModel(config).eval()
    for part in model.children():
        randomise(part)
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    return path, model


@functools.partial(jax.jit, static_argnums=0)
def run(network_encode, params, inputs):
    return network_encode(params, inputs)


def encode(network, inputs):
    return run(type(network)(network.config, network.graphdef, None).encode, network.params, inputs)


# Golden arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peer_clip_sd21", "peer_clip_sd1", "peer_clip_proj"])
def test_golden(golden, tmp_path, name):
    arrays, meta = golden(name)
    tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    names = {"architectures": [meta["what"].split()[-1]], "model_type": "clip_text_model"}
    (tmp_path / "config.json").write_text(json.dumps(names | meta["config"]))
    weights.write_safetensors(tmp_path / "model.safetensors", tensors)
    network = load_text_encoder(tmp_path)
    assert building.count_parameters(network.params) == meta["num_params"]
    found = encode(network, arrays["in/input_ids"].astype(np.int32))
    expected = {k.removeprefix("out/"): v for k, v in arrays.items() if k.startswith("out/")}
    values = {
        "last_hidden_state": found.last,
        "penultimate": found.hidden[-2],
        "pooled": found.pooled,
        "text_embeds": found.projected,
    } | {f"hidden_states/{i}": state for i, state in enumerate(found.hidden)}
    for key, wanted in expected.items():
        np.testing.assert_allclose(values[key], wanted, atol=5e-5, err_msg=key)
    assert len(found.hidden) == 4 and (found.projected is None) == ("text_embeds" not in expected)


# Live ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_vision_is_that_of_transformers(tmp_path, act):
    model = randomise(CLIPVisionModelWithProjection(TheirVisionConfig(**VISION, hidden_act=act)))
    model.save_pretrained(tmp_path)
    network = load_image_encoder(tmp_path)
    # A side that patches do not divide: what is left over is not seen, here as there.
    assert network.config.num_tokens == 5
    with torch.no_grad():
        images = torch.from_numpy(np.moveaxis(IMAGES, -1, 1).copy())
        wanted = model(images, output_hidden_states=True)
    found = encode(network, IMAGES)
    assert wanted.image_embeds.std() > 0.1
    np.testing.assert_allclose(found.projected, wanted.image_embeds, atol=2e-5)
    np.testing.assert_allclose(found.last, wanted.last_hidden_state, atol=2e-5)
    for ours, theirs in zip(found.hidden, wanted.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("end", [2, 39])
def test_folders_of_transformers_are_read(tmp_path, kind, end):
    config = TheirTextConfig(**TEXT | {"eos_token_id": end})
    model = randomise(kind(config))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(torch.from_numpy(IDS.astype(np.int64)))
    found = encode(load_text_encoder(tmp_path), IDS)
    np.testing.assert_allclose(found.last, wanted.last_hidden_state, atol=2e-5)
    if kind is CLIPTextModel:
        np.testing.assert_allclose(found.pooled, wanted.pooler_output, atol=2e-5)
        assert found.projected is None
    else:
        np.testing.assert_allclose(found.projected, wanted.text_embeds, atol=2e-5)


def test_both_towers_of_a_pair(pair):
    path, model = pair
    with torch.no_grad():
        wanted = model(
            torch.from_numpy(IDS.astype(np.int64)),
            torch.from_numpy(np.moveaxis(IMAGES, -1, 1).copy()),
        )
    text, image = load_text_encoder(path), load_image_encoder(path)
    for network, inputs, theirs in (
        (text, IDS, wanted.text_embeds),
        (image, IMAGES, wanted.image_embeds),
    ):
        ours = encode(network, inputs).projected
        ours = ours / jnp.linalg.norm(ours, axis=-1, keepdims=True)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert text.identity["sha256"] != image.identity["sha256"]


def test_a_pair_of_ours_is_read_by_transformers(tmp_path):
    fields = {k: v for k, v in TEXT.items() if k not in ("bos_token_id", "pad_token_id")}
    configs = CLIPTextConfig(**fields), CLIPVisionConfig(**VISION)
    text, vision = (
        type("N", (), {"config": c, "params": building.create(c, seed)[1]})
        for seed, c in enumerate(configs)
    )
    save_clip(tmp_path, text, vision, 2.5)
    model = CLIPModel.from_pretrained(tmp_path)
    assert model.logit_scale.item() == 2.5
    ours = sum(building.count_parameters(tower.params) for tower in (text, vision))
    assert model.num_parameters() == ours + 1
    # Weights are drawn as transformers draws them: none is left at zero.
    theirs = CLIPModel(model.config).state_dict()
    for name, value in model.state_dict().items():
        if value.numel() > 1:
            ours, wanted = float(value.std()), float(theirs[name].std())
            assert abs(ours - wanted) <= 0.35 * wanted, name
    again = load_text_encoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, text.params)
    narrow = type("N", (), {"config": configs[1].replace(projection_dim=8), "params": {}})
    with pytest.raises(ValueError, match=re.escape("projection_dim must be one of both towers")):
        save_clip(tmp_path / "new", text, narrow, 0.0)
    assert not (tmp_path / "new").exists()


# Files --------------------------------------------------------------------------------------------


def text_folder(tmp_path):
    path = write_random_text_encoder(tmp_path / "text_encoder", vocab_size=40)
    return path, load_file(path / "model.safetensors")


def test_shards_variants_pickles_and_old_buffers(tmp_path):
    path, tensors = text_folder(tmp_path)
    wanted = load_text_encoder(path).sha256
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]  # before transformers 4.31
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (name > names[9])}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, path / file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert load_text_encoder(path).sha256 == wanted
    for file in {*files.values(), index.name}:
        (path / file).unlink()
    save_file(
        {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors.items()},
        path / "model.fp16.safetensors",
    )
    with pytest.raises(ValueError, match=r"model.safetensors or pytorch_model.bin.*\['fp16'\]"):
        load_text_encoder(path)
    halves = load_text_encoder(tmp_path, "text_encoder.fp16")
    assert halves.sha256 != wanted and halves.name == tmp_path.name
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, path / "pytorch_model.bin")
    assert load_text_encoder(path).sha256 == wanted


def test_the_one_of_a_pipeline_is_found(tmp_path):
    text_folder(tmp_path)
    # As of Stable Diffusion 1: of the model type of both towers, and neither.
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "safety_checker" / "config.json").write_text(
        json.dumps({"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip"})
    )
    assert load_text_encoder(tmp_path).config.vocab_size == 40
    shutil.copytree(tmp_path / "text_encoder", tmp_path / "text_encoder_2")
    with pytest.raises(ValueError, match=r"\['text_encoder', 'text_encoder_2'\]; choose one"):
        load_text_encoder(tmp_path)
    assert load_text_encoder(tmp_path, "text_encoder_2").config.vocab_size == 40
    with pytest.raises(ValueError, match="StableDiffusionSafetyChecker.*must be one of"):
        load_text_encoder(tmp_path / "safety_checker")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no config.json of a CLIP text model"):
        load_text_encoder(tmp_path / "none")


def test_an_old_config_of_a_pair_goes_by_its_older_part(pair, tmp_path):
    path = shutil.copytree(pair[0], tmp_path / "clip")
    fields = json.loads((path / "config.json").read_text())
    fields["text_config_dict"] = {k: v for k, v in TEXT.items() if k != "hidden_act"}
    fields["text_config"] = {"hidden_size": 99}
    (path / "config.json").write_text(json.dumps(fields))
    assert load_text_encoder(path).sha256 == load_text_encoder(pair[0]).sha256


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu_new", "hidden_act 'gelu_new': must be one of ['gelu', 'quick_gelu']"),
        ("num_attention_heads", 3, "num_attention_heads 3 does not divide hidden_size 16"),
        ("num_hidden_layers", 10**6, "num_hidden_layers must be a whole number in 1..1000"),
        ("hidden_size", "wide", "hidden_size must be a whole number"),
        ("vocab_size", 41, "text_model.embeddings.token_embedding.weight: has shape (40, 16)"),
        ("num_hidden_layers", 1, "text_model.encoder.layers.1.layer_norm1.bias: unexpected"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, field, value, message):
    path, _ = text_folder(tmp_path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_text_encoder(path)
    assert str(path) in str(error.value)


def test_ids_and_images_are_checked(pair):
    text, image = load_text_encoder(pair[0]), load_image_encoder(pair[0])
    for ids in (np.zeros((2, 10), np.int32), np.zeros(3, np.int32), np.zeros((2, 0), np.int32)):
        with pytest.raises(ValueError, match=re.escape("T in 1..9, not " + str(ids.shape))):
            jax.eval_shape(text.encode, text.params, ids)
    with pytest.raises(ValueError, match="whole numbers, not float32"):
        jax.eval_shape(text.encode, text.params, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=re.escape("(B, 11, 11, 2), not (2, 2, 11, 11)")):
        jax.eval_shape(image.encode, image.params, nhwc(nhwc(IMAGES)))


def test_bfloat16_computes_in_it_and_returns_float32(pair):
    text = load_text_encoder(pair[0], dtype="bfloat16")
    found = encode(text, IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    exact = encode(load_text_encoder(pair[0]), IDS).last
    assert 0 < np.abs(found.last - exact).max() < 0.05 * np.abs(exact).max()
