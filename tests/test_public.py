"""What people import: the public places of names, and paths as texts."""

from pathlib import Path

import numpy as np
import pytest
import tiny_config

from liftplace_jax import evaluation, families, weights
from liftplace_jax.data.encoded import check_autoencoder, load_latents, read_manifest
from liftplace_jax.encoders.autoencoder_folder import load_autoencoder, write_random_autoencoder
from liftplace_jax.experiment import stages, workdir
from liftplace_jax.families import registry
from liftplace_jax.families.dit.config import published_layer_map
from liftplace_jax.families.loading import (
    find_folder,
    load_checkpoint,
    load_network,
    read_diffusers,
    write_diffusers,
)
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.published import PUBLISHED_UNETS
from liftplace_jax.nn import building
from liftplace_jax.nn.network import is_finished, is_saved
from liftplace_jax.training.checkpoints import Checkpoints
from liftplace_jax.training.metrics_io import read_metrics
from liftplace_jax.weights.diffusers_files import read_weights

CONFIG = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    ch=8,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(8,),
    num_groups=4,
)


@pytest.mark.parametrize("package, names", [
    (families, ("config_parameters", "count_macs", "load_checkpoint", "FAMILIES")),
    (families.unet, ("PUBLISHED_UNETS", "UNetConfig")),
    (families.dit, ("PUBLISHED_DITS", "published_layer_map")),
    (evaluation, ("load_inception", "resize_bilinear")),
    (weights, ("read_tensors", "EntryError", "WeightFileError", "WeightMismatchError")),
])  # fmt: skip
def test_names_that_people_need_are_public(package, names):
    assert set(names) <= set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert not callable(value) or value.__doc__, name


def test_counts_and_layers_by_their_public_names():
    unet = PUBLISHED_UNETS["cifar10"]
    # "Diff_Pruning" and "TinyFusion" say these of their networks.
    assert round(registry.count_macs(unet) / 1e9, 1) == 6.1
    assert registry.config_parameters(unet) == 35_746_307
    assert published_layer_map(7, 28)["blocks.0"] == "blocks.3"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model in "own", found by texts that are relative, absolute or begin with ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    params = building.create(CONFIG)[1]
    weights.save_model("own", CONFIG.described(), params)
    weights.save_raw("own", params)
    return params


def test_networks_are_read_from_texts(saved, tmp_path):
    for path in ("own", "~/own", str(tmp_path / "own"), tmp_path / "own"):
        assert is_saved(path) and is_finished(path)
        loaded = (load_network(path), load_network(path, params="raw"), load_checkpoint(path))
        assert all(network.config == CONFIG for network in loaded)
        with weights.open_model(path) as (fields, tensors):
            assert registry.config_from_dict(fields) == CONFIG and "conv_in.bias" in tensors
    assert not is_saved("none")
    for path in ("own/model.safetensors", "~/own/model.safetensors"):
        assert load_checkpoint(path, CONFIG).config == CONFIG
        assert "conv_in.bias" in weights.read_tensors(path)
    with pytest.raises(ValueError, match="none: no such file or folder"):
        load_checkpoint("none")
    with pytest.raises(ValueError, match="no model.safetensors and config.json in none: check the"):
        load_network("none")
    with pytest.raises(ValueError, match=r"params must be one of \['ema', 'raw'\], got 'best'"):
        load_network("own", params="best")


def test_folders_of_diffusers_are_read_from_texts(saved, tmp_path):
    write_diffusers("unet", CONFIG, saved)
    for path in ("unet", "~/unet", tmp_path / "unet"):
        assert find_folder(path).name == "unet"
        assert read_diffusers(path)[0] == load_checkpoint(path).config
        assert "conv_in.bias" in read_weights(path)
    assert find_folder("own") is None
    write_random_autoencoder("vae")
    assert load_autoencoder("~/vae").sha256 == load_autoencoder(tmp_path / "vae").sha256


def test_work_directories_and_results_are_named_by_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config.get_config()
    workdir.claim("run", config)
    assert (
        stages.open_experiment(config, "run").teacher_folder.resolve()
        == tmp_path / "run" / "teacher"
    )
    with pytest.raises(ValueError, match="run --mode=teacher first"):
        stages.run(config, "run", "compress")
    assert read_metrics("run/teacher") == []
    assert Checkpoints("run/checkpoints").latest_step() is None
    evaluation.save_reference("ref.npz", {"features": (np.zeros(2), np.eye(2))}, None, {})
    assert evaluation.load_reference("ref.npz").digest
    for read in (read_manifest, lambda path: load_latents(path, "train")):
        with pytest.raises(ValueError, match="no latents.json in run"):
            read("run")
    check_autoencoder("run", {})  # nothing encoded there yet


@pytest.mark.parametrize("path", ["none.pth", Path("none.pth")])
def test_the_inception_network_is_read_from_texts(path):
    with pytest.raises(ValueError, match="none.pth: no such file"):
        evaluation.load_inception(path)
