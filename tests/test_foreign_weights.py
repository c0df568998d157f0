"""Weight files as others write them: wrapped, averaged, nested, damaged, hostile."""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import re
import struct
import types
import zipfile

import jax
import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from liftplace_jax import weights
from liftplace_jax.weights import EntryError, WeightFileError, WeightMismatchError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@pytest.fixture
def read(tmp_path):
    """(content, entry) -> the tensors of a file that torch.save wrote."""

    def read(content, entry=None, **options):
        torch.save(content, tmp_path / "w.pt", **options)
        return weights.read_tensors(tmp_path / "w.pt", entry)

    return read


def assert_same(found, state):
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value.numpy())


# Names and entries --------------------------------------------------------------------------------


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def compiled_parts(model):
    return torch.nn.Sequential(*(torch.compile(part) for part in model))


@pytest.mark.parametrize(
    "wrap",
    [
        averaged,
        torch.compile,
        torch.nn.DataParallel,
        lambda model: torch.compile(averaged(torch.nn.DataParallel(torch.compile(model)))),
        lambda model: torch.nn.DataParallel(averaged(torch.compile(model))),
        compiled_parts,
    ],
    ids=["averaged", "compiled", "parallel", "chain", "other chain", "compiled parts"],
)
def test_what_pytorch_puts_around_a_model_leaves_its_names(read, model, state, wrap):
    wrapped = wrap(model).state_dict()
    assert wrapped.keys() != state.keys()
    assert_same(read(wrapped), state)
    assert_same(read({"epoch": 3, "ema": wrapped}), state)


def test_names_that_become_one_are_refused(read, state):
    both = {f"_orig_mod.{name}": value for name, value in state.items()} | dict(state)
    with pytest.raises(WeightFileError, match="_orig_mod.0.weight and 0.weight are both 0.weight"):
        read(both)


def test_entries_two_levels_down(read, state):
    raw = {name: value + 1 for name, value in state.items()}
    content = {"model": raw, "ema": {"shadow": dict(state), "decay": 0.999}}
    with pytest.raises(EntryError, match=r"several state dicts, \['model', 'ema.shadow'\]"):
        read(content)
    for entry in ("ema.shadow", "ema"):
        assert_same(read(content, entry), state)
    assert_same(read(content, "model"), raw)
    with pytest.raises(EntryError, match=r"at entry 'ema.raw'; there are some at \['model', 'e"):
        read(content, "ema.raw")
    content = {"state_dict": {"ema": dict(state), "raw": raw}}
    with pytest.raises(EntryError, match=r"\['state_dict.ema', 'state_dict.raw'\]"):
        read(content)
    with pytest.raises(EntryError, match=r"\['state_dict.ema', 'state_dict.raw'\]"):
        read(content, "state_dict")
    assert_same(read(content, "state_dict.raw"), raw)
    assert_same(read({"state_dict": {"ema": dict(state)}, "epoch": 1}), state)
    assert_same(read([{"epoch": 1}, {"ema": dict(state), "raw": raw}], "1.ema"), state)
    assert_same(read([{"epoch": 1}, {"ema": dict(state), "raw": raw}], "-1.raw"), raw)


def test_an_entry_may_be_how_names_begin(read, state):
    raw = {name: value + 1 for name, value in state.items()}
    flat = {f"net.{k}": v for k, v in raw.items()} | {f"ema.net.{k}": v for k, v in state.items()}
    assert_same(read(flat, "ema.net"), state)
    assert_same(read({"state_dict": flat, "epoch": 1}, "state_dict.net"), raw)
    assert_same(read({"state_dict": flat, "epoch": 1}, "net"), raw)
    with pytest.raises(EntryError, match="is itself a state dict, it has no entry 'raw', and no"):
        read(flat, "raw")


def test_what_lies_beside_weights_is_no_state_dict(read, model, state):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert_same(
        read(
            {
                "model": dict(state),
                "optimizer": optimizer.state_dict(),
                "rng": {"cpu": torch.get_rng_state(), "numpy": np.random.get_state()},
                "decay": torch.tensor(0.9),
            }
        ),
        state,
    )
    # More tensors beside could be what is meant.
    content = {"model": dict(state), "betas": torch.ones(5)}
    with pytest.raises(EntryError, match=r"\['.', 'model'\]; choose.*'.' is the tensors beside"):
        read(content)
    assert read(content, ".").keys() == {"betas"}
    with pytest.raises(EntryError, match="shadow_params is a list of 4 tensors without names"):
        read({"decay": 0.9, "shadow_params": list(state.values())})


BESIDE = {
    "float64": np.float64(3),
    "int32": np.int32(2),
    "bool": np.bool_(True),
    "text": np.str_("a"),
    "date": np.datetime64("2026-01-01"),
    "dtype": np.dtype("f4"),
    "path": pathlib.Path("a/b"),
    "namespace": types.SimpleNamespace(lr=1e-4),
    "flags": argparse.Namespace(out=pathlib.Path("a")),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "version": torch.__version__,
}


@pytest.mark.parametrize("kind", BESIDE)
def test_plain_data_beside_weights(read, state, kind):
    assert_same(read({"model": dict(state), "x": BESIDE[kind]}), state)
    # In one dictionary with them.
    assert_same(read(dict(state) | {"x": BESIDE[kind], "step": 3, "none": None}), state)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_weights_that_are_arrays_of_numpy(read, options):
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "big": np.arange(3, dtype=">f8"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.zeros((0, 2)),
    }
    found = read(arrays, **options)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)


# Misfits ------------------------------------------------------------------------------------------


def expected(layers):
    leaf = jax.ShapeDtypeStruct
    return {
        f"blocks.{i}.{name}": leaf(shape, np.float32)
        for i in range(layers)
        for name, shape in (("fc.bias", (3,)), ("norm.bias", (3,)))
    }


def tensors_of(params, change=lambda value: value):
    return {name: change(np.zeros(leaf.shape, leaf.dtype)) for name, leaf in params.items()}


def test_one_prefix_is_one_line():
    params = expected(100)
    prefixed = {f"unet.{name}": value for name, value in tensors_of(params).items()}
    with pytest.raises(WeightMismatchError) as error:
        weights.from_torch(params, prefixed | {"vae.bias": np.zeros(3)})
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert "without the prefix 'unet.' (200 of 201): choose it as the file's entry" in message
    both = prefixed | {f"ema.unet.{name}": value for name, value in tensors_of(params).items()}
    with pytest.raises(WeightMismatchError, match=r"'ema.unet.' \(200 of 400\) or 'unet.' \(200 "):
        weights.from_torch(params, both)


def test_many_misfits_are_few_lines():
    params = expected(100)
    found = tensors_of(params)
    for i in range(100):
        found[f"blocks.{i}.fc.bias"] = np.zeros(4, np.float32)
    del found["blocks.7.norm.bias"]
    with pytest.raises(WeightMismatchError) as error:
        weights.from_torch(params, found)
    assert len(error.value.misfits) == 101
    assert str(error.value).splitlines()[1:] == [
        "  blocks.*.fc.bias (100 tensors): has shape (4,), the model needs (3,)",
        "  blocks.7.norm.bias: missing, the model needs (3,)",
    ]
    # Of one fault in all, or of a hundred different ones.
    names = [chr(97 + i) + chr(97 + j) for i in range(10) for j in range(10)]
    misfits = [(name, "is of int8, the model needs numbers of float32") for name in names]
    assert str(WeightMismatchError(misfits)).splitlines()[1:] == [
        "  aa and 99 more: is of int8, the model needs numbers of float32"
    ]
    misfits = [(name, f"has shape ({i},)") for i, name in enumerate(names)]
    assert str(WeightMismatchError(misfits)).splitlines()[-1] == "  and 84 more"


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda v: v.astype(bool), "is of bool, the model needs numbers of float32"),
        (lambda v: v.astype(np.int64), "is of int64, the model needs numbers of float32"),
        (lambda v: v.astype(np.complex64), "is of complex64, the model needs numbers of float32"),
        (
            lambda v: np.array([1, np.nan, np.inf], np.float32),
            "has values that are not finite in float32: 2 of 3",
        ),
        (lambda v: np.array([1, 2, 1e300]), "has values that are not finite in float32: 1 of 3"),
    ],
)
def test_values_that_are_no_weights(change, problem):
    params = expected(1)
    found = tensors_of(params)
    found["blocks.0.fc.bias"] = change(found["blocks.0.fc.bias"])
    assert weights.find_misfits(params, found) == [("blocks.0.fc.bias", problem)]
    found["blocks.0.fc.bias"] = np.zeros(3, np.float16)
    assert weights.find_misfits(params, found) == []


# Damaged and hostile files ------------------------------------------------------------------------


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, np.load])
@pytest.mark.parametrize("protocol", [None, "old", 0, 2, 4, 5])
def test_code_is_refused_in_words_that_advise_nothing_unsafe(tmp_path, function, protocol):
    trap, path = tmp_path / "ran", tmp_path / "bad.pt"
    text = {os.mkdir: str(trap), os.system: f"mkdir {trap}"}.get(function, f"open('{trap}', 'w')")
    content = {"model": {"a": torch.ones(1)}, "x": Call(function, text)}
    if protocol in (None, "old"):
        torch.save(content, path, _use_new_zipfile_serialization=protocol is None)
    else:
        path.write_bytes(pickle.dumps(content["x"], protocol))
    with pytest.raises(WeightFileError) as error:
        weights.read_tensors(path)
    message = str(error.value)
    assert message.startswith(f"{path}: cannot be read as weights only: it ")
    assert "torch.save(model.state_dict(), file)" in message
    assert "weights_only" not in message and len(message.splitlines()) == 1
    assert not trap.exists()


def test_arrays_of_objects_are_refused(read):
    with pytest.raises(WeightFileError, match="it holds a NumPy array of 'O8', no plain numbers"):
        read({"model": {"a": torch.ones(1)}, "x": np.array([{}], dtype=object)})


def test_programs_are_refused(tmp_path, model):
    torch.jit.save(torch.jit.script(model), tmp_path / "program.pt")
    with pytest.raises(WeightFileError, match="program.pt: .*it is a TorchScript program: save"):
        weights.read_tensors(tmp_path / "program.pt")


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.eye(2).to_sparse(), r"a is sparse, quantised or nested \(float32\): save it dense"),
        (torch.ones(2, device="meta"), "a has no content, only a shape"),
        (torch.ones(2).to(torch.float8_e4m3fn), "a is of float8_e4m3fn, of a quantised model"),
        (
            torch.ones(1).expand(10**6, 10**6),
            r"a has shape \(1000000, 1000000\), but the file holds f",
        ),
        (torch.ones(1).bfloat16().expand(10**6, 10**6), r"a has shape \(1000000, 1000000\), but"),
    ],
    ids=["sparse", "meta", "float8", "expanded", "expanded bfloat16"],
)
def test_tensors_that_are_no_plain_arrays_are_named(read, tensor, message):
    with pytest.raises(WeightFileError, match=f"w.pt: {message}"):
        read({"a": tensor, "b": torch.ones(2)})


BEGINNINGS = {
    b"": "it is empty \\(0 bytes\\)",
    b"<!DOCTYPE html>": "it is a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "it is a pointer of Git LFS",
    b"\x1f\x8b123456789": "it is compressed",
    bytes(100): "it begins with zeros",
    b"abcdefgh" * 9: "it is damaged, or no file of",
}


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
@pytest.mark.parametrize("content", BEGINNINGS, ids=BEGINNINGS.values())
def test_files_that_are_something_else_are_said(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    message = f"w{suffix}: cannot be read.*: {BEGINNINGS[content]}"
    with pytest.raises(WeightFileError, match=message):
        weights.read_tensors(path)


def test_the_wrong_name_is_said(tmp_path):
    weights.write_safetensors(tmp_path / "a.pt", {"a": np.ones(2)})
    with pytest.raises(WeightFileError, match="it is a .safetensors file: name it so"):
        weights.read_tensors(tmp_path / "a.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightFileError, match="it is an archive, of torch.save"):
        weights.read_tensors(tmp_path / "a.safetensors")


def test_what_is_no_file_is_said_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "blob.pt").symlink_to("gone")
    (tmp_path / "endless.pt").symlink_to("/dev/zero")
    for name, message in {
        "pipe": "it is a pipe, a socket or a device",
        "folder": "it is a folder",
        "loop": "it is a link that leads to no file",
        "blob": "it is a link that leads to no file",
        "endless": "it is a pipe, a socket or a device",
    }.items():
        with pytest.raises(WeightFileError, match=f"{name}.pt: cannot be read: {message}"):
            weights.read_tensors(tmp_path / f"{name}.pt")


def safetensors(header, data=b"", length=None):
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def part(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content, message",
    [
        (safetensors({}, length=2**62), "it is damaged.*header too large"),
        (safetensors({"a": part(0, 8), "b": part(4, 12)}, bytes(12)), "it is damaged.*offset.*`b`"),
        (safetensors({"a": part(0, 8, (10**12,))}, bytes(8)), "it is damaged.*invalid shape"),
        (safetensors({"a": part(0, 8, (2**63, 2**63))}, bytes(8)), "it is damaged.*overflow"),
        (safetensors({"a": part(0, 8)}, bytes(20)), "it is damaged.*not fully covered"),
        (
            safetensors({"a": part(0, 2, dtype="F8_E4M3")}, bytes(2)),
            "numbers of the kind float8_e4m3",
        ),
    ],
)
def test_headers_of_safetensors_that_lie(tmp_path, content, message):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(WeightFileError, match=f"w.safetensors: cannot be read .*: .*{message}"):
        weights.read_tensors(tmp_path / "w.safetensors")


def write_npz(path, shape, dtype="<f4", names=("a",)):
    header = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(8))


@pytest.mark.parametrize("shape", [(10**12,), (10**30, 10**30), (1,), (-2,)])
def test_arrays_larger_or_smaller_than_their_file(tmp_path, shape):
    write_npz(tmp_path / "w.npz", shape)
    with pytest.raises(WeightFileError, match=rf"a has shape {re.escape(str(shape))} of float32"):
        weights.read_tensors(tmp_path / "w.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_arrays_of_one_name_or_of_objects(tmp_path):
    write_npz(tmp_path / "w.npz", (2,), names=("a", "a"))
    with pytest.raises(WeightFileError, match="w.npz: has a.npy more than once"):
        weights.read_tensors(tmp_path / "w.npz")
    write_npz(tmp_path / "w.npz", (1,), "|O")
    with pytest.raises(WeightFileError, match="w.npz: .*a holds Python objects, and reading them"):
        weights.read_tensors(tmp_path / "w.npz")


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_archives_that_would_fill_the_memory(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("liftplace_jax.weights.pickled._SMALL", 2**20)
    path = tmp_path / f"w{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**23))
    with pytest.raises(WeightFileError, match=f"w{suffix}: [\\d,]+ bytes that unpack to 8,388,608"):
        weights.read_tensors(path)
