"""diffusers' `UNet2DModel` folders, against the arrays of one and against the library live."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import nhwc
from diffusers import UNet2DModel
from torch_unet import randomise

from liftplace_jax import weights
from liftplace_jax.families.loading import load_checkpoint, read_diffusers, write_diffusers
from liftplace_jax.families.unet.channels import pruned_config
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.diffusers import config_from_diffusers, config_to_diffusers
from liftplace_jax.nn import building
from liftplace_jax.nn.network import make_apply
from liftplace_jax.weights.diffusers import DiffusersError

ROOT = Path(__file__).parent.parent
# config.json of google/ddpm-cifar10-32, as published: fields of diffusers 0.0.4.
CIFAR10 = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
    "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
# And of google/ddpm-celebahq-256, google/ddpm-bedroom-256, google/ddpm-church-256.
LSUN = CIFAR10 | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*4 * ["DownBlock2D"], "AttnDownBlock2D", "DownBlock2D"],
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *4 * ["UpBlock2D"]],
}
# Tiny networks: as CIFAR-10's; another attention, other channels, widths that are no multiples.
TINY = CIFAR10 | {
    "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "sample_size": 16,
    "layers_per_block": 1,
}  # fmt: skip
UNEVEN = CIFAR10 | {
    "block_out_channels": [16, 24, 40], "in_channels": 1, "out_channels": 2,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
    "norm_num_groups": 8, "sample_size": 8, "dropout": 0.1, "time_embedding_dim": 40,
}  # fmt: skip
NETWORKS = {"tiny": TINY, "uneven": UNEVEN}
T = np.array([3, 977])


@functools.cache
def peer(name):
    fields = {key: value for key, value in NETWORKS[name].items() if key[0] != "_"}
    return randomise(UNet2DModel(**fields))


def images(fields):
    shape = (2, fields["sample_size"], fields["sample_size"], fields["in_channels"])
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def torch_output(model, fields):
    x = np.moveaxis(images(fields), -1, 1).copy()
    with torch.no_grad():
        return nhwc(model(torch.from_numpy(x), torch.from_numpy(T)).sample.numpy())


def output(network, x, t=T, features=False):
    run = jax.jit(make_apply(network.graphdef), static_argnums=(3, 4))
    y, found = run(network.params, x, t, features, None)
    return (y, found) if features else y


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> the folder that diffusers itself wrote."""

    @functools.cache
    def write(name):
        path = tmp_path_factory.mktemp(name)
        peer(name).save_pretrained(path)
        return path

    return write


@pytest.fixture(scope="module")
def network(folder):
    """name -> what is loaded of that folder."""
    return functools.cache(lambda name: load_checkpoint(folder(name)))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder("tiny"), tmp_path / "unet"))


# Reading ------------------------------------------------------------------------------------------


def test_outputs_of_the_golden_network(golden, tmp_path):
    arrays, meta = golden("peer_unet2d")
    tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    fields = {"_class_name": "UNet2DModel"} | meta["config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    weights.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    network = load_checkpoint(tmp_path)
    assert building.count_parameters(network.params) == meta["num_params"]
    y, features = output(
        network, nhwc(arrays["in/sample"]), arrays["in/timestep"].astype(np.int32), features=True
    )
    np.testing.assert_allclose(y, nhwc(arrays["out/sample"]), atol=5e-5)
    for theirs, ours in {
        "down_blocks.0": "down.0.downsample.conv",
        "down_blocks.1": "down.1.downsample.conv",
        "down_blocks.2": "down.2.block.1",
        "mid_block": "mid.block_2",
        "up_blocks.0": "up.2.upsample.conv",
        "up_blocks.1": "up.1.upsample.conv",
        "up_blocks.2": "up.0.block.2",
    }.items():
        expected = nhwc(arrays[f"out/block/{theirs}"])
        np.testing.assert_allclose(features[ours], expected, atol=5e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_live_both_ways(folder, network, tmp_path, name):
    network = network(name)
    assert network.config.dropout == NETWORKS[name].get("dropout", 0.0)
    expected = torch_output(peer(name), NETWORKS[name])
    assert expected.std() > 0.5
    found = output(network, images(NETWORKS[name]))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    write_diffusers(tmp_path / "new" / "unet", network.config, network.params)
    again = UNet2DModel.from_pretrained(tmp_path / "new" / "unet").eval()
    np.testing.assert_array_equal(torch_output(again, NETWORKS[name]), expected)
    written = json.loads((tmp_path / "new" / "unet" / "config.json").read_text())
    full = json.loads((folder(name) / "config.json").read_text())
    assert {k: full[k] for k in written} == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["unet"]


def old_names(tensors):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub("|".join(map(re.escape, old)), lambda match: old[match[0]], name): value
        for name, value in tensors.items()
    }


def as_bin(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {k: torch.from_numpy(v) for k, v in old_names(weights.read_tensors(path)).items()}
    assert any(".proj_attn." in name for name in tensors)
    torch.save(tensors, path.with_suffix(".bin"))
    path.unlink()
    # As these folders are: with the first fields, and a model_index.json beside.
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return folder


def as_shards(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    peer("tiny").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def as_pipeline(folder):
    (folder.parent / "pipeline").mkdir()
    folder.rename(folder.parent / "pipeline" / "unet")
    (folder.parent / "pipeline" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return folder.parent / "pipeline"


@pytest.mark.parametrize("change", [as_bin, as_shards, as_pipeline])
def test_other_layouts_hold_the_same(folder, copy, change):
    config, expected = read_diffusers(folder("tiny"))
    found_config, found = read_diffusers(change(copy))
    assert found_config == config and found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_configs_of_published_folders():
    cifar10 = UNetConfig(image_size=32, ch_mult=(1, 2, 2, 2))
    lsun = UNetConfig(image_size=256, ch_mult=(1, 1, 2, 2, 4, 4))
    assert config_from_diffusers(CIFAR10) == cifar10
    assert config_from_diffusers(LSUN) == lsun
    assert building.count_parameters(building.abstract(cifar10)[1]) == 35_746_307
    assert building.count_parameters(building.abstract(lsun)[1]) == 113_673_219
    for fields, config in ((CIFAR10, cifar10), (LSUN, lsun)):
        written = config_to_diffusers(config)
        assert {key: written[key] for key in fields if key != "_diffusers_version"} == {
            key: value for key, value in fields.items() if key != "_diffusers_version"
        }


def test_harmless_fields_and_first_names_of_blocks():
    first = {
        key: [f"UNetRes{block}" for block in CIFAR10[key]]
        for key in ("down_block_types", "up_block_types")
    }
    more = {"act_fn": "swish", "decay": 0.9999, "sample_size": [32, 32], "class_embed_type": None}
    assert config_from_diffusers(CIFAR10 | first | more) == config_from_diffusers(CIFAR10)


def test_every_field_that_cannot_be_is_listed():
    changes = {
        "act_fn": "gelu", "add_attention": False, "attention_head_dim": 8,
        "attn_norm_num_groups": 16, "center_input_sample": True, "class_embed_type": "timestep",
        "down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "downsample_type": "resnet", "flip_sin_to_cos": True,
        "freq_shift": 0, "mid_block_scale_factor": 2, "mid_block_type": None, "norm_eps": 1e-5,
        "norm_num_groups": None, "num_class_embeds": 10, "resnet_time_scale_shift": "scale_shift",
        "sample_size": None, "time_embedding_type": "fourier", "upsample_type": "resnet",
        "of_the_future": 1,
    }  # fmt: skip
    with pytest.raises(DiffusersError) as error:
        config_from_diffusers(CIFAR10 | changes)
    first, *lines = str(error.value).splitlines()
    assert first == f"not the DDPM U-Net, {len(changes)} fields cannot be represented:"
    assert sorted(line.split()[0] for line in lines) == sorted(changes)
    # An absent field has the library's default, which is not the DDPM U-Net's.
    absent = {"norm_eps", "downsample_padding", "attention_head_dim", "flip_sin_to_cos"}
    with pytest.raises(DiffusersError, match="4 fields") as error:
        config_from_diffusers({k: v for k, v in CIFAR10.items() if k not in absent})
    assert all(f"\n  {name} " in str(error.value) for name in absent)
    assert "norm_eps 1e-05 (the default, as the field is absent): must be 1e-06" in str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({"_class_name": "UNet3DConditionModel"}, "_class_name 'UNet3DConditionModel'"),
    ({"up_block_types": CIFAR10["down_block_types"]}, "up_block_types .*'AttnDownBlock2D'"),
    ({"up_block_types": ["AttnUpBlock2D", *3 * ["UpBlock2D"]]}, "attention where down_block_types"),
    ({"down_block_types": 3, "up_block_types": []}, r"down_block_types \[\]: must be one"),
    ({"block_out_channels": 128}, "block_out_channels 128: must be widths"),
    ({"attention_head_dim": [8]}, r"attention_head_dim \[8\]: must be null"),
    ({"norm_num_groups": 48}, "num_groups 48 does not divide 128 channels"),
    ({"sample_size": 36}, "image_size 36 cannot be halved 3 times"),
    ({"sample_size": [32, 64]}, r"sample_size \[32, 64\]: must be"),
])  # fmt: skip
def test_bad_fields_are_named_with_the_file(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(CIFAR10 | changes))
    with pytest.raises(DiffusersError, match=rf"config.json: (?s:.*){message}"):
        load_checkpoint(tmp_path)


def change_tensors(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = weights.read_tensors(path)
    del tensors["mid_block.attentions.0.to_q.weight"]
    tensors["down_blocks.0.resnets.0.norm1.weight"] = np.ones(9, np.float32)
    tensors["class_embedding.weight"] = np.ones((3, 2), np.float32)
    weights.write_safetensors(path, old_names(tensors))


def cut(folder):
    os.truncate(folder / "diffusion_pytorch_model.safetensors", 2000)


def no_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def no_shard(folder):
    next(as_shards(folder).glob("*00002*")).unlink()


def escaping_shard(folder):
    index = next(as_shards(folder).glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def no_index(folder):
    next(as_shards(folder).glob("*.index.json")).write_text("[]")


@pytest.mark.parametrize("damage, messages", [
    (change_tensors, ["unet: 3 tensors do not fit",
                      r"  class_embedding.weight: unexpected, of shape \(3, 2\)",
                      r"  down_blocks.0.resnets.0.norm1.weight: has shape \(9,\)",
                      "  mid_block.attentions.0.to_q.weight: missing"]),
    (cut, ["unet/diffusion_pytorch_model.safetensors: cannot be read as weights only"]),
    (no_weights, ["unet: no diffusion_pytorch_model.safetensors or .bin"]),
    (no_shard, ["-00002-of-.*: no such file"]),
    (escaping_shard, ["index.json: names files outside its folder"]),
    (no_index, ["index.json: no index of weight files"]),
])  # fmt: skip
def test_damaged_folders_are_refused(copy, damage, messages):
    damage(copy)
    with pytest.raises(ValueError, match="(?s:.*)".join(messages)):
        load_checkpoint(copy)


def test_misfits_with_the_wanted_config_are_listed(copy):
    wanted = config_from_diffusers(TINY)
    assert load_checkpoint(copy, wanted.replace(dropout=0.1)).config.dropout == 0.1
    wanted = wanted.replace(ch_mult=(1, 2, 2), image_size=8)
    # Levels with attention are compared as a set.
    wanted = wanted.replace(attn_resolutions=(4, 4))
    with pytest.raises(ValueError, match="unet is not what config.model says") as error:
        load_checkpoint(copy, wanted)
    assert str(error.value).splitlines()[1:4] == [
        "  attn_resolutions: [8] -> [4]",
        "  ch_mult: [1, 2, 2, 2] -> [1, 2, 2]",
        "  image_size: 16 -> 8",
    ]
    with pytest.raises(ValueError, match="is the weights of diffusers alone: give its folder"):
        load_checkpoint(copy / "diffusion_pytorch_model.safetensors", wanted)


# Writing ------------------------------------------------------------------------------------------


def test_irregular_networks_are_refused_with_their_layers(tmp_path):
    config = config_from_diffusers(TINY)
    widths = dict(config.widths) | {"mid.attn_1.q": 8, "down.0.block.0.conv1": 4}
    changed = config.replace(widths=widths)
    with pytest.raises(DiffusersError, match="no UNet2DModel is equal to it") as error:
        write_diffusers(tmp_path / "unet", changed, building.abstract(changed)[1])
    assert str(error.value).splitlines()[1:] == [
        "  down.0.block.0.conv1: 4 channels, must be 8",
        "  mid.attn_1.q: 8 channels, must be 16",
    ]
    assert list(tmp_path.iterdir()) == []
    # What pruning leaves of a level may be regular, but it never narrows the embedding of t.
    with pytest.raises(DiffusersError, match="  conv_in: 4 channels, must be 8"):
        config_to_diffusers(pruned_config(config, 0.5))
    with pytest.raises(DiffusersError, match="resamp_with_conv: False, must be True"):
        config_to_diffusers(config.replace(resamp_with_conv=False))
    with pytest.raises(DiffusersError, match=r"normalisation: \[1, 2, 4\] groups"):
        config_to_diffusers(
            UNetConfig(image_size=8, ch=8, ch_mult=(1, 3), num_groups=4, min_channels_per_group=5)
        )
    narrow = {name: width if "temb" in name else 8 for name, width in config.widths}
    with pytest.raises(DiffusersError, match="down.1.block.0: a nin_shortcut though"):
        config_to_diffusers(config.replace(widths=narrow))


def test_a_failed_write_leaves_nothing(network, tmp_path, monkeypatch):
    network = network("uneven")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="full exists already: name a new folder"):
        write_diffusers(tmp_path / "full", network.config, network.params)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("liftplace_jax.families.loading.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_diffusers(tmp_path / "unet", network.config, network.params)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# The command --------------------------------------------------------------------------------------


def commands(*arguments):
    """Runs conversions side by side; returns (exit status, stdout, stderr) of each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "liftplace_jax.convert", *map(str, line)],
            cwd=ROOT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for line in arguments
    ]
    ends = [process.communicate(timeout=240) for process in started]
    return [(p.returncode, *end) for p, end in zip(started, ends, strict=True)]


def test_the_command_there_and_back(folder, network, tmp_path):
    there, back, file = (tmp_path / name for name in ("published", "unet", "list.ckpt"))
    state = tmp_path / "state"
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder("tiny"), state / name)
    tensors = weights.to_torch(network("tiny").params)
    torch.save([{}, {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}], file)
    config = tmp_path / "config.py"
    fields = network("tiny").config.described()
    model = {key: value for key, value in fields.items() if key != "widths"}
    config.write_text(
        "from liftplace_jax.experiment.configuration import default_config\n\n"
        f"def get_config(arg=None):\n    config = default_config()\n    config.model = {model}\n"
        "    config.model.image_size = 64\n    return config\n"
    )
    ends = commands(
        [f"--model={state}", "--entry=unet_ema", "--to=published", f"--out={there}"],
        [
            f"--model={file}",
            f"--config={config}",
            "--config.model.image_size=16",
            "--entry=-1",
            "--to=diffusers",
            f"--out={back}",
        ],
    )
    assert [(status, err) for status, _, err in ends] == 2 * [(0, "")]
    assert re.match(rf"{there}: [\d,]+ parameters of ", ends[0][1])
    assert json.loads((there / "config.json").read_text()) == fields
    name = "diffusion_pytorch_model.safetensors"
    for found, expected in (
        (weights.read_tensors(there / "model.safetensors"), tensors),
        (weights.read_tensors(back / name), weights.read_tensors(folder("tiny") / name)),
    ):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_refused_commands_are_one_error_and_leave_nothing(folder, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    (tmp_path / "model.pt").write_bytes(b"no weights")
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder("tiny"), tmp_path / "state" / name)
    errors = {
        f"error: {tmp_path / 'state'}: holds several networks, ['unet', 'unet_ema']; choose one as "
        "entry (--entry)": [f"--model={tmp_path / 'state'}", "--to=published", out],
        "error: flag --to=None": [f"--model={tmp_path}", out],
        f"error: no model.safetensors and config.json in {tmp_path}": [
            f"--model={tmp_path}",
            "--to=diffusers",
            out,
        ],
        f"error: {tmp_path / 'model.pt'}: a file of weights does not say its model, so give": [
            f"--model={tmp_path / 'model.pt'}",
            "--to=published",
            out,
        ],
        f"error: {tmp_path / 'model.pt'}: cannot be read as weights only": [
            f"--model={tmp_path / 'model.pt'}",
            "--to=published",
            out,
            "--config=configs/digits.py",
        ],
    }
    for (status, printed, err), message in zip(commands(*errors.values()), errors, strict=True):
        assert (status, printed) == (2, "")
        assert err.startswith(message) and len(err.splitlines()) == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "state"]
