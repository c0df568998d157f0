"""Folders as others write them: several networks, variants, damaged and hostile JSON, pipes."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_config
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.training_utils import EMAModel
from test_autoencoder import TINY as AUTOENCODER
from test_diffusers import TINY, peer

from liftplace_jax import weights
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.encoders.autoencoder_folder import load_autoencoder
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.experiment.training import train_teacher
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.dit.diffusers import config_from_diffusers as dit_from_diffusers
from liftplace_jax.families.loading import load_checkpoint, read_diffusers
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.diffusers import config_from_diffusers
from liftplace_jax.host.outside import MAX_JSON_BYTES, read_json
from liftplace_jax.weights import EntryError, WeightFileError, WeightMismatchError
from liftplace_jax.weights.diffusers import DiffusersError

NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A training state: the network, and its EMA, which differs, as diffusers writes both."""
    folder = tmp_path_factory.mktemp("state")
    peer("tiny").save_pretrained(folder / "unet")
    ema = EMAModel(peer("tiny").parameters(), model_cls=UNet2DModel, model_config=TINY)
    for value in ema.shadow_params:
        value.add_(1)
    ema.save_pretrained(folder / "unet_ema")
    return folder


@pytest.fixture
def copy(state, tmp_path):
    return Path(shutil.copytree(state / "unet", tmp_path / "unet"))


@functools.cache
def tensors():
    return {name: value.numpy() for name, value in peer("tiny").state_dict().items()}


def bias(folder, entry=None):
    return read_diffusers(folder, entry)[1]["conv_out.bias"]


# Which one is meant -------------------------------------------------------------------------------


def test_a_network_and_its_average_are_chosen_by_name(state):
    with pytest.raises(EntryError, match=r"networks, \['unet', 'unet_ema'\]; choose one as entry"):
        load_checkpoint(state)
    with pytest.raises(EntryError, match="'raw' is none of its folders; holds several networks"):
        load_checkpoint(state, entry="raw")
    raw = tensors()["conv_out.bias"]
    np.testing.assert_array_equal(bias(state, "unet"), raw)
    np.testing.assert_allclose(bias(state, "unet_ema"), raw + 1, atol=1e-6)
    network = load_checkpoint(state, entry="unet_ema")
    np.testing.assert_allclose(network.params["conv_out"]["bias"][...], raw + 1, atol=1e-6)


def test_a_config_chooses_by_its_entry(state, tmp_path):
    config = tiny_config.get_config()
    config.compress.checkpoint = str(state)
    with pytest.raises(ValueError, match=r"holds several networks, .*\(config.compress.entry\)"):
        open_experiment(config, tmp_path / "run")
    config.compress.entry = "unet_ema"
    # It is read, and what it is told.
    with pytest.raises(ValueError, match="compress.checkpoint .* has image_size 16, config.model"):
        open_experiment(config, tmp_path / "run")
    config = tiny_config.get_config()
    config.teacher.checkpoint = str(state)
    with pytest.raises(ValueError, match=r"holds several networks, .*\(config.teacher.entry\)"):
        train_teacher(open_experiment(config, tmp_path / "run"))


def test_any_two_networks_are_not_guessed_between(state, tmp_path):
    for name in ("ema", "student"):
        shutil.copytree(state / "unet", tmp_path / name)
    with pytest.raises(EntryError, match=r"\['ema', 'student'\]"):
        load_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "ema")
    assert bias(tmp_path) is not None
    # Of another kind beside it.
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(AUTOENCODER))
    assert bias(tmp_path) is not None


@pytest.mark.parametrize(
    "variant, options",
    [
        ("fp16", {}),
        ("non_ema", {"safe_serialization": False}),
        ("fp16", {"max_shard_size": "40KB"}),
    ],
    ids=["fp16", "non_ema.bin", "shards"],
)
def test_variants_are_read_when_asked_for(tmp_path, variant, options):
    folder = tmp_path / "pipeline" / "unet"
    peer("tiny").save_pretrained(folder, variant=variant, **options)
    message = rf"unet: no {NAME}.safetensors or .bin.* variants \['{variant}'\]: choose one as ent"
    for path in (folder, folder.parent):
        with pytest.raises(EntryError, match=message):
            load_checkpoint(path)
        np.testing.assert_array_equal(bias(path, variant), tensors()["conv_out.bias"])
    np.testing.assert_array_equal(bias(folder.parent, f"unet.{variant}"), bias(folder, variant))
    with pytest.raises(EntryError, match=rf"no {NAME}.bf16.safetensors .*\['{variant}'\]"):
        load_checkpoint(folder, entry="bf16")


def test_a_plain_file_beside_a_variant_is_the_default(copy):
    other = {name: value + 1 for name, value in tensors().items()}
    weights.write_safetensors(copy / f"{NAME}.non_ema.safetensors", other)
    np.testing.assert_array_equal(bias(copy), tensors()["conv_out.bias"])
    np.testing.assert_array_equal(bias(copy, "non_ema"), other["conv_out.bias"])


def test_an_autoencoder_and_its_average(tmp_path):
    model = AutoencoderKL(**{k: v for k, v in AUTOENCODER.items() if k[0] != "_"})
    model.save_pretrained(tmp_path / "vae", variant="fp16")
    with pytest.raises(EntryError, match=r"vae: no .*the variants \['fp16'\]"):
        load_autoencoder(tmp_path)
    expected = load_autoencoder(tmp_path, "fp16").sha256
    model.save_pretrained(tmp_path / "vae_ema")
    with pytest.raises(EntryError, match=r"networks, \['vae', 'vae_ema'\]"):
        load_autoencoder(tmp_path)
    assert load_autoencoder(str(tmp_path), "vae_ema").sha256 == expected


def test_a_folder_of_ours_has_no_entry(copy, tmp_path):
    network = load_checkpoint(copy)
    weights.save_model(tmp_path / "own", network.config.described(), network.params)
    with pytest.raises(ValueError, match="own is a folder, only a file has an entry 'ema', or a f"):
        load_checkpoint(tmp_path / "own", entry="ema")


# config.json --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_changes_nothing(copy, encoding):
    (copy / "config.json").write_text(json.dumps(TINY), encoding=encoding)
    assert read_diffusers(copy)[0] == config_from_diffusers(TINY)


TEXT = json.dumps(TINY)[:-1]  # its last bracket left out
CONTENTS = {
    "empty": (b"", "it is empty"),
    "no text": (b"\xe4\xff", "codec can't decode"),
    "brackets": (b"[" * 200_000, "its brackets are nested too deeply"),
    "objects": (b'{"a":' * 200_000, "its brackets are nested too deeply"),
    "closed brackets": (
        f'{TEXT}, "a": {"[" * 100}{"]" * 100}}}'.encode(), "nested more than 32 deep"
    ),
    "twice": (f'{TEXT}, "act_fn": "gelu"}}'.encode(), "the key 'act_fn' is there more than once"),
    "NaN": (f'{TEXT}, "dropout": NaN}}'.encode(), "it has the number NaN, which is not finite"),
    "large": (f'{TEXT}, "x": -1e999}}'.encode(), "it has the number -1e999, which is not finite"),
    "digits": (f'{TEXT}, "x": {"1" * 5000}}}'.encode(), "it has a whole number of 5,000 digits"),
    "long": (b" " * MAX_JSON_BYTES + b"{}", "it is longer than 16,777,216 bytes"),
    "list": (b"[1]", "it is no JSON object but a list"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", CONTENTS.values(), ids=CONTENTS)
def test_json_that_cannot_be_is_one_line(copy, content, message):
    (copy / "config.json").write_bytes(content)
    for read in (load_checkpoint, load_autoencoder):
        with pytest.raises(ValueError, match=f"unet/config.json: cannot be read: .*{message}") as e:
            read(copy)
        assert len(str(e.value).splitlines()) == 1


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make, message", [
    (pipe, "it is a pipe, a socket or a device, not a file"),
    (Path.mkdir, "it is a folder, not a file"),
    (loop, "it is a link that leads to no file"),
    (device, "it is a pipe, a socket or a device, not a file"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", f"{NAME}.safetensors", f"{NAME}.bin.index.json"])
def test_what_is_no_file_is_said_at_once(copy, name, make, message):
    if "index" in name:
        (copy / f"{NAME}.safetensors").unlink()
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    with pytest.raises(ValueError, match=f"unet/{name}: (.*: )?cannot be read: {message}"):
        load_checkpoint(copy)


def test_pipes_in_a_folder_of_ours(tmp_path):
    pipe(tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="config.json: cannot be read: it is a pipe"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [None, 3, ["UNet2DModel"], "x" * 10**6])
def test_a_class_that_is_none_is_what_the_message_says(copy, name):
    fields = TINY | {"_class_name": name}
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DiffusersError, match="config.json: _class_name .*no network") as error:
        load_checkpoint(copy)
    assert len(str(error.value)) < 600
    del fields["_class_name"]
    (copy / "config.json").write_text(json.dumps(fields))
    for path in (copy, copy.parent):
        with pytest.raises(DiffusersError, match="unet/config.json: has no _class_name: add the"):
            load_checkpoint(path)


def test_many_fields_are_few_lines(copy):
    fields = TINY | {f"field{i}": "x" * 10**4 for i in range(1000)}
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(DiffusersError, match="1000 fields cannot be represented") as error:
        load_checkpoint(copy)
    assert str(error.value).splitlines()[-1] == "  and 960 more"
    assert len(str(error.value)) < 20_000


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value, message", [
    ("layers_per_block", 10**9, r"num_res_blocks must be .* 1..100 .*diffusers' layers_per_bl"),
    ("layers_per_block", 1e9, "layers_per_block 1000000000.0: must be a number above 0"),
    ("layers_per_block", 100, r"the config says 806 blocks, and there are \d+ tensors in all"),
    ("sample_size", 2**40, "image_size must be .* 1..16384, .*diffusers' sample_size"),
    ("block_out_channels", [8, 8, 8, 10**9], "ch_mult.3. must be .* 1..1024, .*block_out_channels"),
    ("norm_num_groups", 10**12, "num_groups must be .* 1..65536, .*norm_num_groups"),
    ("time_embedding_dim", {}, r"must be .* 1..65536, got \{\} .*time_embedding_dim"),
    ("time_embedding_dim", 0, "must be a whole number in 1..65536, got 0 .*time_embedding_dim"),
    ("down_block_types", 7, "down_block_types"),
])  # fmt: skip
def test_absurd_fields_are_refused_at_once(copy, field, value, message):
    (copy / "config.json").write_text(json.dumps(TINY | {field: value}))
    with pytest.raises(DiffusersError, match=f"unet/config.json: (?s:.*){message}"):
        load_checkpoint(copy)


DIT = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8,
    "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 5,
}  # fmt: skip


@pytest.mark.parametrize("make, fields, message", [
    (dit_from_diffusers, DIT | {"num_layers": 10**9}, "depth must be .* 1..1000 .*num_layers"),
    (dit_from_diffusers, DIT | {"sample_size": 16_000}, "make 64,000,000 tokens .*sample_size"),
    (dit_from_diffusers, DIT | {"num_attention_heads": 10**9}, "hidden_size must be .* got 8"),
    (DiTConfig, {"image_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 1,
                 "mlp_ratio": float("inf")}, "mlp_ratio must be a number in .0, 1024., got inf"),
    (UNetConfig, {"image_size": 32, "num_res_blocks": 10**9}, "num_res_blocks must be .* 1..100"),
    (AutoencoderConfig, {"layers_per_block": 10**9}, "layers_per_block must be .* 1..100"),
    (AutoencoderConfig, {"block_out_channels": 10**4 * (32,)}, "block_out_channels must be at mo"),
])  # fmt: skip
def test_absurd_models_are_refused_at_once(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields) if isinstance(make, type) else make(fields)


# Shards -------------------------------------------------------------------------------------------


@pytest.fixture
def shards(copy):
    (copy / f"{NAME}.safetensors").unlink()
    peer("tiny").save_pretrained(copy, max_shard_size="40KB")
    return sorted(copy.glob("*-of-*"))


@pytest.mark.parametrize("name", [
    "../../etc/passwd", "/etc/passwd", "..", "", "a/b.bin", "config.json", "a\0b.bin", 3, None,
    ["a.bin"], "x" * 5000,
])  # fmt: skip
def test_an_index_names_files_of_its_folder(copy, shards, name):
    index = copy / f"{NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightFileError, match="index.json: names files outside its folder, or non"):
        load_checkpoint(copy)


def test_missing_and_double_shards_are_named(copy, shards):
    first, second, third = shards[:3]
    both = weights.read_tensors(first) | weights.read_tensors(second)
    name = sorted(weights.read_tensors(first))[0]
    weights.write_safetensors(second, both)
    with pytest.raises(WeightFileError, match=f"{second.name}: has {name}.*, as another shard has"):
        load_checkpoint(copy)
    second.unlink()
    third.unlink()
    with pytest.raises(WeightFileError, match=f"unet: {second.name}, {third.name}: no such file, "):
        load_checkpoint(copy)
    (copy / f"{NAME}.safetensors.index.json").unlink()
    with pytest.raises(WeightFileError, match=f"nor an index.json of one; there is .*{first.name}"):
        load_checkpoint(copy)


def test_a_prefix_in_a_folder_is_one_line(copy):
    prefixed = {f"unet.{name}": value for name, value in tensors().items()}
    weights.write_safetensors(copy / f"{NAME}.safetensors", prefixed)
    with pytest.raises(WeightMismatchError, match="unet: the names do not fit .*'unet.'") as error:
        load_checkpoint(copy)
    assert len(str(error.value).splitlines()) == 1


def test_json_is_read_from_a_text_as_from_a_path(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, true, null]}')
    assert read_json(str(tmp_path / "a.json")) == {"a": [1, 2.5, True, None]}
    with pytest.raises(ValueError, match="b.json: cannot be read: no such file"):
        read_json(tmp_path / "b.json")
