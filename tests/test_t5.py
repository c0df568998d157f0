"""T5's encoder against transformers live."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel, T5ForConditionalGeneration

from liftplace_jax.encoders.t5 import T5Config, load_t5, write_random_t5
from liftplace_jax.encoders.t5.model import distance_buckets
from liftplace_jax.nn import building

FIELDS = {
    "vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 50, (2, 60)).astype(np.int32)


def states(network, ids=IDS):
    return jax.jit(network.encode)(network.params, ids)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    torch.manual_seed(0)
    model = T5EncoderModel(TheirConfig(**FIELDS)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("t5")
    model.save_pretrained(path)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS).long()).last_hidden_state.numpy()
    return path, expected


def test_states_of_a_folder(peer):
    path, expected = peer
    network = load_t5(path)
    np.testing.assert_allclose(states(network), expected, atol=5e-5)
    low = states(load_t5(path, dtype="bfloat16"))
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - expected).max() < 0.1 * np.abs(expected).max()


def test_a_whole_t5_in_a_pipeline_and_shards(peer, tmp_path):
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(TheirConfig(**FIELDS)).eval()
    model.save_pretrained(tmp_path / "text_encoder_3", max_shard_size="20KB")
    network = load_t5(tmp_path, "text_encoder_3")
    with torch.no_grad():
        expected = model.encoder(torch.from_numpy(IDS).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(states(network), expected, atol=5e-5)
    assert network.identity["name"] == tmp_path.name
    assert network.identity["sha256"] != load_t5(peer[0]).identity["sha256"]


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_table_of_tokens_under_either_name(peer, tmp_path, name):
    path, expected = peer
    tensors = load_file(path / "model.safetensors")
    table = tensors.pop("shared.weight")
    save_file(tensors | {name: table}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    np.testing.assert_allclose(states(load_t5(tmp_path)), expected, atol=5e-5)


def test_buckets_of_long_texts():
    config = T5Config()
    model = T5EncoderModel(TheirConfig(**FIELDS))
    attention = model.encoder.block[0].layer[0].SelfAttention
    offset = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = attention._relative_position_bucket(offset, True, 32, 128).numpy()
    assert np.array_equal(distance_buckets(600, config), expected)


def test_what_we_write_transformers_reads(tmp_path):
    write_random_t5(tmp_path / "t5", vocab_size=50)
    network = load_t5(tmp_path / "t5")
    model = T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(states(network), expected, atol=5e-5)


def test_the_published_size():
    # T5 v1.1 XXL's encoder, 4.76 billion.
    width, inside, layers = 4096, 64 * 64, 24
    block = 4 * width * inside + 3 * width * 10240 + 2 * width
    expected = 32128 * width + 32 * 64 + layers * block + width
    _, params = building.abstract(T5Config())
    assert building.count_parameters(params) == expected
    assert round(expected / 1e9, 2) == 4.76


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu': must be 'gated-gelu'"),
        ({"d_kv": 0}, "d_kv must be"),
        ({"num_layers": None}, "num_layers must be"),
        ({"relative_attention_num_buckets": 6}, "multiple of 4"),
        ({"architectures": ["BertModel"]}, "is of .*BertModel.*, must be one of"),
    ],
)
def test_bad_folders_are_named(tmp_path, changes, message):
    fields = FIELDS | {"architectures": ["T5EncoderModel"], "model_type": "t5"} | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as raised:
        load_t5(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_bad_ids():
    config = T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = nnx.merge(*building.create(config))
    for ids, message in ((IDS[0], "shape"), (IDS.astype(float), "whole numbers")):
        with pytest.raises(ValueError, match=message):
            model(jnp.asarray(ids))
