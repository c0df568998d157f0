"""Folders of diffusers' pipelines with a network of ours."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.loading import load_checkpoint
from liftplace_jax.families.mmdit import MMDiTConfig
from liftplace_jax.families.pipelines import write_pipeline
from liftplace_jax.nn import building
from liftplace_jax.weights.diffusers import DiffusersError

CONFIG = MMDiTConfig(
    4, 2, 2, head_size=8, in_channels=3, context_dim=12, pooled_dim=10, position_size=4
)
INDEX = {
    "_class_name": "StableDiffusion3Pipeline", "requires_safety_checker": False,
    "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder_3": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    return building.create(CONFIG)[1]


@pytest.fixture
def source(tmp_path):
    """A pipeline's folder, its files of no meaning."""
    folder = tmp_path / "source"
    weights = {"x": np.zeros(2, np.float32)}
    for part in ("transformer", "vae", "text_encoder", "tokenizer/more", "scheduler", "unnamed"):
        (folder / part).mkdir(parents=True)
        (folder / part.split("/")[0] / "config.json").write_text(json.dumps({"part": part}))
    for name in ("vae/diffusion_pytorch_model", "vae/diffusion_pytorch_model.fp16"):
        save_file(weights, folder / f"{name}.safetensors")
    for name in ("model-00001-of-00001.safetensors", "pytorch_model.fp16.bin", "model.onnx"):
        save_file(weights, folder / "text_encoder" / name)
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    )
    (folder / "tokenizer" / "more" / "merges.txt").write_text("a b")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_other_parts_are_copied(network, source, tmp_path):
    written = write_pipeline(tmp_path / "out", CONFIG, network, source)
    assert written.parts == ("vae", "text_encoder", "tokenizer", "scheduler")
    assert set(written.left_out) == {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.fp16.bin",
        "text_encoder/model.onnx",
    }
    assert files(tmp_path / "out") == {
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00001.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/config.json",
        "tokenizer/more/merges.txt",
        "scheduler/config.json",
    }
    assert json.loads((tmp_path / "out" / "model_index.json").read_text()) == INDEX
    again = load_checkpoint(tmp_path / "out", CONFIG)
    for found, expected in zip(
        jax.tree.leaves(again.params), jax.tree.leaves(network), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_variants_alone_are_copied(network, source, tmp_path):
    (source / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    written = write_pipeline(tmp_path / "out", CONFIG, network, source)
    assert not any(name.startswith("vae") for name in written.left_out)
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in files(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "no model_index.json there: it is no pipeline"),
        (
            {"transformer": ["diffusers", "FluxTransformer2DModel"]},
            "transformer is 'FluxTransformer2D",
        ),
        ({"transformer": None}, "transformer is None, must be SD3Transformer2DModel"),
        ({"safety_checker": ["diffusers", "Checker"]}, r"names \['safety_checker'\], which are no"),
        ({"../vae": ["diffusers", "AutoencoderKL"]}, "are no names of parts"),
    ],
)
def test_a_folder_that_is_no_such_pipeline(network, source, tmp_path, changes, message):
    index = source / "model_index.json"
    if changes is None:
        index.unlink()
    else:
        index.write_text(json.dumps(INDEX | changes))
    with pytest.raises(DiffusersError, match=message) as raised:
        write_pipeline(tmp_path / "out", CONFIG, network, source)
    assert str(source) in str(raised.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_network_that_diffusers_cannot_have_leaves_nothing(source, tmp_path):
    config = DiTConfig(image_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    index = INDEX | {"transformer": ["diffusers", "DiTTransformer2DModel"]}
    (source / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DiffusersError, match="frequency_shift"):
        write_pipeline(tmp_path / "out", config, building.create(config)[1], source)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
