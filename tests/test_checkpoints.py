"""Teachers from elsewhere: DDPM checkpoints and folders against live PyTorch, and what misfits."""

import functools
import json
import os
import shutil
from collections import OrderedDict

import jax
import numpy as np
import pytest
import tiny_config
import torch
from torch_unet import TorchUNet, randomise

from liftplace_jax import weights
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.experiment.training import train_teacher
from liftplace_jax.families import registry
from liftplace_jax.families.loading import load_checkpoint
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.nn import building
from liftplace_jax.nn.network import make_apply

FIELDS = dict(
    image_size=8,
    in_channels=2,
    out_channels=3,
    ch=8,
    ch_mult=(1, 3),
    num_res_blocks=2,
    attn_resolutions=(4,),
    num_groups=4,
)
CONFIG = UNetConfig(**FIELDS)
TINY = registry.config_from_dict({"widths": None} | tiny_config.get_config().model.to_dict())
X = np.random.default_rng(0).normal(size=(2, 8, 8, 2)).astype(np.float32)
T = np.array([3, 977])


@functools.cache
def peer(seed=0):
    return randomise(TorchUNet(**FIELDS), seed)


def torch_output(model):
    with torch.no_grad():
        y = model(torch.from_numpy(np.moveaxis(X, -1, 1).copy()), torch.from_numpy(T))
    return np.moveaxis(y.numpy(), 1, -1)


@jax.jit
def apply(params):
    return make_apply(building.abstract(CONFIG)[0])(params, X, T, False, None)[0]


def published_checkpoint(model, ema):
    """As "Diff_Pruning runners/diffusion.py" saves it: model, optimizer, epoch, step, EMA."""
    optimizer = torch.optim.Adam(model.parameters())
    module = OrderedDict((f"module.{k}", v) for k, v in model.state_dict().items())
    return [module, optimizer.state_dict(), 3, 500, dict(ema.named_parameters())]


WRAPPINGS = {
    "bare": (lambda model, ema: model.state_dict(), None, 0),
    "module": (lambda model, ema: published_checkpoint(model, ema)[0], None, 0),
    "list, the model": (published_checkpoint, "0", 0),
    "list, EMA": (published_checkpoint, "-1", 1),
    "list without EMA": (lambda model, ema: published_checkpoint(model, ema)[:4], None, 0),
    "dictionary, EMA": (
        lambda model, ema: {"state_dict": model.state_dict(), "ema": ema.state_dict(), "step": 1},
        "ema", 1,
    ),
}  # fmt: skip


def test_the_torch_peer_is_the_published_model(golden):
    arrays, meta = golden("ddpm_unet_u16")
    fields = meta["config"]["model"]
    model = TorchUNet(
        image_size=meta["config"]["data"]["image_size"],
        num_groups=32,
        out_channels=fields["out_ch"],
        **{k: fields[k] for k in FIELDS.keys() & fields.keys()},
    ).eval()
    parameters = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in parameters.items()})
    with torch.no_grad():
        y = model(*(torch.from_numpy(arrays[f"in/{name}"]) for name in "xt"))
    np.testing.assert_allclose(y, arrays["out/y"], atol=5e-5)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_ddpm_checkpoints_compute_what_torch_computes(tmp_path, wrapping):
    wrap, entry, seed = WRAPPINGS[wrapping]
    torch.save(wrap(peer(0), peer(1)), tmp_path / "model.ckpt")
    network = load_checkpoint(tmp_path / "model.ckpt", CONFIG, entry)
    expected = torch_output(peer(seed))
    assert expected.std() > 0.5 and np.abs(expected - torch_output(peer(1 - seed))).max() > 0.5
    np.testing.assert_allclose(apply(network.params), expected, atol=1e-5 * np.abs(expected).max())


def test_what_was_loaded_goes_back_into_torch(tmp_path):
    torch.save(peer().state_dict(), tmp_path / "model.pth")
    network = load_checkpoint(tmp_path / "model.pth", CONFIG)
    weights.save_model(tmp_path / "saved", CONFIG.described(), network.params)
    again = TorchUNet(**FIELDS).eval()
    tensors = weights.read_tensors(tmp_path / "saved" / "model.safetensors")
    again.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    np.testing.assert_array_equal(torch_output(again), torch_output(peer()))
    network = load_checkpoint(tmp_path / "saved")
    assert network.config == CONFIG
    np.testing.assert_allclose(apply(network.params), torch_output(peer()), atol=1e-4)


def test_every_misfit_of_a_file_is_listed_at_once(tmp_path):
    state = peer().state_dict()
    del state["norm_out.bias"]
    state["conv_in.weight"] = state["conv_in.weight"][:, :1]
    state["mid.attn_1.q.bias"] = torch.full((24,), torch.nan)
    state["head.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "model.pt", CONFIG)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path / 'model.pt'}: 4 tensors do not fit")
    assert lines == [
        "  conv_in.weight: has shape (8, 1, 3, 3), the model needs (8, 2, 3, 3)",
        "  head.bias: unexpected, of shape (3,)",
        "  mid.attn_1.q.bias: has values that are not finite in float32: 24 of 24",
        "  norm_out.bias: missing, the model needs (8,)",
    ]


def test_what_lacks_is_asked_for(tmp_path):
    torch.save(peer().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: a file of weights does not say its model"):
        load_checkpoint(tmp_path / "model.pt")
    with pytest.raises(weights.EntryError, match="is itself a state dict, it has no entry 'ema'"):
        load_checkpoint(tmp_path / "model.pt", CONFIG, "ema")
    with pytest.raises(ValueError, match="is a folder, only a file has an entry 'ema'"):
        load_checkpoint(tmp_path, CONFIG, "ema")
    with pytest.raises(ValueError, match="no model.safetensors and config.json in"):
        load_checkpoint(tmp_path, CONFIG)


# Through the experiment ---------------------------------------------------------------------------


def tiny_params(config=TINY, seed=0):
    return building.create(config, seed)[1]


@pytest.fixture
def run(tmp_path):
    """Runs the teacher stage on a checkpoint; returns what it left in the work directory."""

    def run(path, entry=None, **model):
        config = tiny_config.get_config()
        config.teacher.checkpoint, config.teacher.entry = str(path), entry
        config.model.update(model)
        train_teacher(open_experiment(config, tmp_path / "run"))
        return tmp_path / "run" / "teacher"

    return run


def save(folder, config=TINY, seed=0):
    weights.save_model(folder, config.described(), tiny_params(config, seed))


def cut(folder):
    os.truncate(folder / "model.safetensors", 900)


def no_json(folder):
    (folder / "config.json").write_text("{")


def json_list(folder):
    (folder / "config.json").write_text("[]")


def bad_field(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"widths": [1]}))


def incomplete(folder):
    tensors = weights.read_tensors(folder / "model.safetensors")
    del tensors["conv_in.bias"], tensors["temb.dense.1.weight"]
    weights.write_safetensors(folder / "model.safetensors", tensors)


def other_architecture(folder):
    save(folder, TINY.replace(ch=16, num_res_blocks=2, in_channels=3, num_groups=8, dropout=0.5))


def other_widths(folder):
    widths = dict(TINY.widths) | {"temb.dense.0": 5, "mid.attn_1.q": 4}
    save(folder, TINY.replace(widths=widths))


BAD_FOLDERS = [
    (cut, ["teacher/model.safetensors: cannot be read as weights only"]),
    (no_json, ["teacher/config.json: cannot be read"]),
    (json_list, ["teacher/config.json: cannot be read: it is no JSON object"]),
    (bad_field, ["teacher/config.json: "]),
    (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors and config"]),
    (shutil.rmtree, ["teacher: (unknown kind|no such file)"]),
    (incomplete, ["teacher: 2 tensors do not fit", r"conv_in.bias: missing.*\(8,",
                  r"temb.dense.1.weight: missing.*\(32, 32\)"]),
    (other_architecture, [r"teacher is not what config.model says \(checkpoint -> config.model\)",
                          "  ch: 16 -> 8", "in_channels: 3 -> 1", "num_groups: 8 -> 4",
                          "num_res_blocks: 2 -> 1"]),
    (other_widths, ["teacher is not what", "widths.mid.attn_1.q: 4 -> 8",
                    "widths.temb.dense.0: 5 -> 32"]),
]  # fmt: skip


@pytest.mark.parametrize("damage, messages", BAD_FOLDERS)
def test_bad_folders_are_one_error_and_leave_nothing(tmp_path, run, damage, messages):
    save(tmp_path / "teacher")
    damage(tmp_path / "teacher")
    with pytest.raises(ValueError, match="(?s:.*)".join(messages)):
        run(tmp_path / "teacher")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    # Corrected, the same work directory serves.
    save(tmp_path / "teacher", TINY.replace(dropout=0.3), seed=1)
    folder = run(tmp_path / "teacher")
    assert json.loads((folder / "config.json").read_text()) == TINY.described()
    for name, value in weights.to_torch(tiny_params(seed=1)).items():
        found = weights.read_tensors(folder / "model.safetensors")[name]
        np.testing.assert_array_equal(found, value)


def test_a_config_file_can_name_any_widths(tmp_path, run):
    other_widths(tmp_path / "teacher")
    widths = json.loads((tmp_path / "teacher" / "config.json").read_text())["widths"]
    folder = run(tmp_path / "teacher", widths=tuple(widths.items()))
    assert json.loads((folder / "config.json").read_text())["widths"] == widths


def test_the_entry_of_a_list_is_chosen_by_the_config(tmp_path, run):
    states = [
        {name: torch.from_numpy(value.copy()) for name, value in weights.to_torch(params).items()}
        for params in (tiny_params(seed=0), tiny_params(seed=1))
    ]
    torch.save([states[0], {"step": 1}, 3, 500, states[1]], tmp_path / "list.ckpt")
    for entry, message in {
        None: r"list.ckpt: holds several state dicts, \[0, 4\]; choose.*-1 its EMA",
        "2": r"list.ckpt: no state dict.*at entry 2; there are some at \[0, 4\]",
        "ema": r"at entry 'ema'; there are some at \[0, 4\]",
    }.items():
        with pytest.raises(ValueError, match=rf"{message}.*\(config.teacher.entry\)"):
            run(tmp_path / "list.ckpt", entry)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    found = weights.read_tensors(run(tmp_path / "list.ckpt", "-1") / "model.safetensors")
    np.testing.assert_array_equal(found["conv_in.weight"], states[1]["conv_in.weight"])


def test_a_whole_pickled_model_is_refused_with_what_to_do(tmp_path, run):
    for name, content in {"a": peer(), "b": [peer(), 1]}.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError) as error:
            run(tmp_path / f"{name}.pth")
        assert f"{name}.pth: cannot be read as weights only: it holds" in str(error.value)
        assert "torch_unet.TorchUNet" in str(error.value)
        assert "torch.save(model.state_dict()" in str(error.value)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
