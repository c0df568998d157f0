"""Weight files and the generic rule between PyTorch's parameters and ours."""

import argparse
import functools
import os
import sys
import tracemalloc
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from liftplace_jax import weights
from liftplace_jax.families.dit.config import DiTConfig
from liftplace_jax.families.loading import load_network
from liftplace_jax.host import sharding
from liftplace_jax.nn import building
from liftplace_jax.weights import WeightFileError, WeightMismatchError


class Small(nnx.Module):
    """One leaf of every kind, and a bare parameter."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs)])
        self.norm = nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(4, 5, rngs=rngs)
        self.embed = nnx.Embed(6, 5, rngs=rngs)
        self.pos = nnx.Param(jnp.ones((1, 5)))

    def __call__(self, x, label):
        h = self.norm(self.blocks[0](x)).mean((1, 2))
        return self.fc(h) + self.embed(label) + self.pos[...]


class TorchSmall(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(2, 4, 3, padding=1)])
        self.norm = torch.nn.GroupNorm(2, 4)
        self.fc = torch.nn.Linear(4, 5)
        self.embed = torch.nn.Embedding(6, 5)
        self.pos = torch.nn.Parameter(torch.randn(1, 5))
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, x, label):
        h = self.norm(self.blocks[0](x)).mean((2, 3))
        return self.fc(h) + self.embed(label) + self.pos


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return TorchSmall()


@pytest.fixture(scope="module")
def abstract():
    return nnx.split(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))


@pytest.fixture
def tensors(published):
    return {name: value.detach().numpy() for name, value in published.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_every_leaf_kind_computes_what_torch_computes(published, abstract, tensors):
    graphdef, params = abstract
    loaded = weights.from_torch(params, tensors)
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype(np.float32)
    label = np.array([0, 5, 2])
    expected = published(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(label))
    found = nnx.merge(graphdef, loaded)(x, label)
    np.testing.assert_allclose(found, expected.detach(), atol=2e-6)
    jitted = jax.jit(lambda p: nnx.merge(graphdef, p)(x, label))(loaded)
    np.testing.assert_allclose(jitted, expected.detach(), atol=2e-6)


def test_to_torch_inverts_from_torch(abstract, tensors):
    loaded = weights.from_torch(abstract[1], tensors)
    assert jax.tree.structure(loaded) == jax.tree.structure(abstract[1])
    assert_same(weights.to_torch(loaded), tensors)


def test_pure_dicts_and_dtypes_are_carried_too(abstract, tensors):
    pure = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), nnx.to_pure_dict(abstract[1])
    )
    loaded = weights.from_torch(pure, tensors)
    assert loaded["fc"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        loaded["fc"]["kernel"].T.astype(np.float32), tensors["fc.weight"], rtol=1e-2
    )


def test_every_misfit_is_listed_at_once_in_order(abstract, tensors):
    del tensors["norm.weight"]
    tensors["fc.weight"] = tensors["fc.weight"].T
    tensors["head.bias"] = np.zeros(7)
    tensors["blocks.0.conv.weight"] = np.zeros(1)
    with pytest.raises(WeightMismatchError) as error:
        weights.from_torch(abstract[1], tensors)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("4 tensors do not fit")
    assert lines[1:] == [
        "  blocks.0.conv.weight: unexpected, of shape (1,)",
        "  fc.weight: has shape (4, 5), the model needs (5, 4)",
        "  head.bias: unexpected, of shape (7,)",
        "  norm.weight: missing, the model needs (4,)",
    ]


def test_ignore_excuses_left_over_tensors_only(abstract, tensors):
    extra = tensors | {"ema.decay": np.zeros(()), "ema.steps": np.zeros(())}
    assert_same(
        weights.to_torch(weights.from_torch(abstract[1], extra, ignore=[r"ema\..*"])), tensors
    )
    with pytest.raises(WeightMismatchError, match="ema.steps: unexpected"):
        weights.from_torch(abstract[1], extra, ignore=["ema.decay"])
    del extra["fc.bias"]
    with pytest.raises(WeightMismatchError, match="fc.bias: missing"):
        weights.from_torch(abstract[1], extra, ignore=[".*"])


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4)},
    "ema": lambda state: {"ema": state, "opt": {"step": 1}},
    "list": lambda state: [state, {"step": 1}, 7],
    "module": lambda state: OrderedDict((f"module.{name}", value) for name, value in state.items()),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_torch_files(tmp_path, published, tensors, wrapping, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPPINGS[wrapping](published.state_dict()), path)
    assert_same(weights.read_tensors(path), tensors)


def test_entry_chooses_among_several_state_dicts(tmp_path):
    path = tmp_path / "both.pth"
    torch.save({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, path)
    with pytest.raises(WeightFileError, match=r"both.pth.*several.*'model', 'ema'.*entry"):
        weights.read_tensors(path)
    np.testing.assert_array_equal(weights.read_tensors(path, entry="ema")["a"], np.ones(2))
    with pytest.raises(WeightFileError, match="no state dict.*at entry 'raw'"):
        weights.read_tensors(path, entry="raw")
    path = tmp_path / "list.ckpt"
    torch.save([{"a": torch.zeros(2)}, 1, {"a": torch.ones(2)}], path)
    np.testing.assert_array_equal(weights.read_tensors(path, entry=-1)["a"], np.ones(2))


def test_bfloat16_is_read_as_float32(tmp_path):
    state = {"a": torch.tensor([1.0, 2.5, -3.0]).bfloat16()}
    torch.save(state, tmp_path / "a.pt")
    save_torch_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        value = weights.read_tensors(tmp_path / name)["a"]
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, [1.0, 2.5, -3.0])


def test_safetensors_round_trip_is_read_by_torch(tmp_path, tensors):
    path = tmp_path / "w.safetensors"
    tensors["step"] = np.array(3)
    transposed = tensors | {"fc.weight": np.asfortranarray(tensors["fc.weight"])}
    weights.write_safetensors(path, transposed, {"format": "pt"})
    assert_same(weights.read_tensors(path), tensors)
    assert_same({name: value.numpy() for name, value in load_file(path).items()}, tensors)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_failed_write_leaves_the_old_file_alone(tmp_path, tensors):
    path = tmp_path / "w.safetensors"
    weights.write_safetensors(path, tensors)
    with pytest.raises(OSError, match="w.safetensors cannot be written: Unknown dtype"):
        weights.write_safetensors(path, {"a": np.array(["text"])})
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert_same(weights.read_tensors(path), tensors)


def test_npz_prefers_parameters(tmp_path):
    np.savez(tmp_path / "a.npz", **{"param/fc.weight": np.ones(2), "in/x": np.zeros(3)})
    assert_same(weights.read_tensors(tmp_path / "a.npz"), {"fc.weight": np.ones(2)})
    np.savez(tmp_path / "b.npz", **{"fc.weight": np.ones(2), "x": np.zeros(3)})
    assert weights.read_tensors(tmp_path / "b.npz").keys() == {"fc.weight", "x"}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload(trap)}, tmp_path / "bad.pt")
    with pytest.raises(WeightFileError, match="bad.pt: cannot be read as weights only"):
        weights.read_tensors(tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", a=np.array([Payload(trap)], dtype=object))
    with pytest.raises(WeightFileError, match="bad.npz: cannot be read as weights only"):
        weights.read_tensors(tmp_path / "bad.npz")
    assert not trap.exists()


def test_whole_pickled_modules_are_refused(tmp_path, published):
    torch.save(published, tmp_path / "module.pth")
    with pytest.raises(WeightFileError, match="module.pth: cannot be read as weights only"):
        weights.read_tensors(tmp_path / "module.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("keep", [0, 20, -9])
def test_truncated_files_are_refused(tmp_path, tensors, suffix, keep):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    elif suffix == ".npz":
        np.savez(path, **tensors)
    else:
        weights.write_safetensors(path, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightFileError, match=f"w{suffix}: cannot be read"):
        weights.read_tensors(path)


@pytest.mark.parametrize("content", [torch.ones(2), {"epoch": 3}, [], {}, {"model": {"a": 1}}, 5])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(WeightFileError, match="other.pt: no state dict"):
        weights.read_tensors(tmp_path / "other.pt")


def test_unknown_and_missing_files(tmp_path):
    with pytest.raises(WeightFileError, match=r"w.h5: unknown kind '.h5'.*\.npz"):
        weights.read_tensors(tmp_path / "w.h5")
    with pytest.raises(WeightFileError, match="w.pt: no such file"):
        weights.read_tensors(tmp_path / "w.pt")


def test_a_torch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightFileError, match="pip install torch"):
        weights.read_tensors(tmp_path / "w.pt")


def test_saved_model_round_trip(tmp_path, abstract, tensors):
    params = weights.from_torch(abstract[1], tensors)
    config = {"model": "small", "widths": {"fc": 5}}
    weights.save_model(tmp_path / "new" / "student", config, params)
    with weights.open_model(tmp_path / "new" / "student") as (found, arrays):
        assert found == config
        assert_same(arrays, tensors)
        assert "none" not in arrays
    assert sorted(os.listdir(tmp_path / "new" / "student")) == ["config.json", "model.safetensors"]


def open_and_read(folder):
    with weights.open_model(folder) as (_, tensors):
        return dict(tensors)


def test_a_model_is_read_straight_into_its_sharding(tmp_path):
    config = DiTConfig(
        image_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=128,
        depth=12,
        num_heads=4,
        num_classes=10,
    )
    params = building.create(config)[1]
    weights.save_model(tmp_path, config.described(), params)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 4})
    shardings = functools.partial(
        sharding.tree_shardings, rules=((r"kernel", ("fsdp",)),), mesh=mesh
    )
    load_network(tmp_path, shardings=shardings)  # what is imported and compiled counts no more
    tracemalloc.start()
    try:
        loaded = load_network(tmp_path, shardings=shardings).params
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak < 0.5 * size
    wanted = jax.tree.leaves(shardings(params))
    for one, other, place in zip(*map(jax.tree.leaves, (loaded, params)), wanted, strict=True):
        assert one.sharding == place
        np.testing.assert_array_equal(one, other)
    assert sum(not place.is_fully_replicated for place in wanted) > 50


def test_a_model_is_initialised_straight_into_its_sharding():
    config = DiTConfig(
        image_size=4,
        patch_size=2,
        in_channels=1,
        hidden_size=32,
        depth=1,
        num_heads=2,
        num_classes=3,
    )
    mesh = sharding.make_mesh({"data": -1, "fsdp": 4})
    shardings = functools.partial(
        sharding.tree_shardings, rules=((r"kernel", ("fsdp",)),), mesh=mesh
    )
    graphdef, whole = building.create(config, 3)
    split_graphdef, split = building.create(config, 3, shardings=shardings)
    assert split_graphdef == graphdef
    for one, other, place in zip(
        *map(jax.tree.leaves, (split, whole, shardings(whole))), strict=True
    ):
        assert one.sharding == place
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_damaged_model_folders_are_refused(tmp_path, abstract, tensors):
    with pytest.raises(WeightFileError, match="config.json: cannot be read"):
        open_and_read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightFileError, match="config.json: cannot be read"):
        open_and_read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightFileError, match="model.safetensors: no such file"):
        open_and_read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"9" * 100)
    with pytest.raises(WeightFileError, match="model.safetensors: cannot be read as weights only"):
        open_and_read(tmp_path)
    with pytest.raises(TypeError):
        weights.save_model(tmp_path / "bad", {"f": object()}, abstract[1])
    assert not (tmp_path / "bad").exists()
