"""Files of a bucket: as those of this machine. (Whole jobs: test_pods.)"""

import errno
import json
import os
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import gcsfs
import jax
import numpy as np
import optax
import pytest
import tiny_config
from absl import flags

from liftplace_jax import data, weights
from liftplace_jax.evaluation import load_reference, save_reference
from liftplace_jax.experiment import stages
from liftplace_jax.host import buckets, files
from liftplace_jax.host import flags as host_flags
from liftplace_jax.host.buckets import as_path
from liftplace_jax.training.checkpoints import Checkpoints
from liftplace_jax.training.metrics_io import MetricsLog, read_metrics
from liftplace_jax.training.profiling import watched
from liftplace_jax.training.state import create_state


@pytest.fixture
def folder(bucket, request, tmp_path, monkeypatch):
    """A folder of the test's own; at the end no temporary file is left on this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield as_path(f"{bucket}/{request.node.name}")
    assert not list((tmp_path / "temporary").glob("liftplace-*"))


def put_from_elsewhere(path, content):
    """Uploads a file as another host would."""
    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    urllib.request.urlopen(
        urllib.request.Request(
            f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?uploadType=media"
            f"&name={name}",
            data=content,
            headers={"Content-Type": "application/octet-stream"},
        )
    )


def test_paths_of_this_machine_stay_what_they_are():
    assert as_path("~/runs") == Path.home() / "runs"
    assert isinstance(as_path("runs/digits"), Path)
    assert os.fspath(as_path("gs://bucket/runs") / "a") == "gs://bucket/runs/a"
    with pytest.raises(ValueError, match="gs:/bucket/runs: a bucket's paths begin with gs://"):
        as_path(Path("gs://bucket/runs"))


def test_other_stores_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"s3://b/run: paths are .* gs://, not s3://"):
        as_path("s3://b/run")
    monkeypatch.setattr(buckets, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gcsfs: pip install 'liftplace_jax\[gcs\]'"):
        as_path("gs://b/run")


def test_files_are_written_replaced_and_read(folder):
    for content in ([1], {"b": 2}):
        files.write_json(folder / "a.json", content)
        assert json.loads((folder / "a.json").read_text()) == content
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    weights.write_safetensors(folder / "w.safetensors", tensors)
    files.write_npz(folder / "w.npz", tensors)
    for name in ("w.safetensors", "w.npz"):
        found = weights.read_tensors(os.fspath(folder / name))
        np.testing.assert_array_equal(found["w"], tensors["w"])
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "w.npz", "w.safetensors"]


def test_a_file_that_fails_leaves_the_one_before(folder):
    files.write_json(folder / "a.json", [1])
    with pytest.raises(RuntimeError), files.replacing(folder / "a.json") as temporary:
        temporary.write_text("[2")
        raise RuntimeError
    assert json.loads((folder / "a.json").read_text()) == [1]


def test_an_upload_that_is_cut_off_leaves_the_file_before(folder, monkeypatch):
    files.write_npz(folder / "a.npz", {"a": np.zeros(1)})
    monkeypatch.setattr("gcsfs.core.upload_chunk", cut_off)
    large = np.random.default_rng(0).normal(size=800_000)  # more than one request
    with pytest.raises(OSError, match="(?s)a.npz cannot be reached.*cut off"):
        files.write_npz(folder / "a.npz", {"a": large})
    assert weights.read_tensors(folder / "a.npz")["a"].shape == (1,)


def cut_off(*args, **kwargs):
    raise ConnectionError("cut off")


def test_a_full_disk_of_this_machine_is_not_blamed_on_the_bucket(folder, monkeypatch):
    files.write_json(folder / "a.json", [1])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "here")

    monkeypatch.setattr(buckets._store(), "get_file", full)
    with pytest.raises(OSError, match="No space left on device: 'here'$"):
        with buckets.local_copy(folder / "a.json"):
            pass
    with pytest.raises(OSError, match="cannot be written .No space left"):
        with files.replacing(folder / "a.json"):
            full()


def test_folders_that_the_console_made_are_empty(monkeypatch):
    entries = [{"name": "bucket/run/"}, {"name": "bucket/run/logs/"}, {"name": "bucket/run/a"}]
    store = SimpleNamespace(ls=lambda path, detail: entries)
    monkeypatch.setattr(buckets, "_store", lambda: store)
    found = buckets.listed(as_path("gs://bucket/run"))
    assert [os.fspath(path) for path in found] == ["gs://bucket/run/a", "gs://bucket/run/logs"]


def test_a_reference_file_has_the_same_digest(folder, tmp_path):
    statistics = {"features": (np.zeros(2), np.eye(2))}
    for path in (folder / "r.npz", tmp_path / "r.npz"):
        save_reference(path, statistics, None, {"count": 3})
    found = [load_reference(path) for path in (folder / "r.npz", tmp_path / "r.npz")]
    assert found[0].info == found[1].info == {"count": 3} and len(found[0].digest) == 64
    with pytest.raises(ValueError, match="gs://.*none.npz: no such file"):
        load_reference(folder / "none.npz")


def test_what_another_host_writes_is_seen(folder):
    files.write_json(folder / "a.json", [1])
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    put_from_elsewhere(folder / "b.json", b"[2]")
    assert (folder / "b.json").exists()
    put_from_elsewhere(folder / "a.json", b"[3]")
    assert json.loads((folder / "a.json").read_text()) == [3]


def test_a_bucket_that_is_not_there_is_named_and_not_made():
    with pytest.raises(OSError, match="(?s)gs://none/run.* cannot be .*a bucket n"):
        stages.run(tiny_config.get_config(), as_path("gs://none/run"), "teacher")
    with pytest.raises(ValueError, match="gs://none/w.npz: no such file"):
        weights.read_tensors("gs://none/w.npz")
    with pytest.raises(OSError, match="(?s)gs://none/x cannot be reached.*gcloud auth"):
        files.write_json("gs://none/x", [])


def test_metrics_are_uploaded_by_flush_and_now_and_then(folder, monkeypatch):
    log = MetricsLog(folder, 0, tensorboard=True)
    log.write(1, {"loss": 1.0})
    assert read_metrics(folder) == []
    log.flush()
    assert [row["step"] for row in read_metrics(folder)] == [1]
    log.write(2, {"loss": 0.5})
    monkeypatch.setattr("liftplace_jax.training.metrics_io._UPLOAD_SECONDS", 0)
    log.write(3, {"loss": 0.25})
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    log.close()
    log = MetricsLog(folder, 1, tensorboard=False)  # goes on from a checkpoint of step 1
    log.write(2, {"loss": 0.75})
    log.close()
    assert [row["loss"] for row in read_metrics(folder)] == [1.0, 0.75]
    assert any(".tfevents." in path.name for path in folder.iterdir())


def test_a_bucket_that_is_away_for_a_while_ends_no_run(folder, monkeypatch, capsys):
    monkeypatch.setattr("liftplace_jax.training.metrics_io._UPLOAD_SECONDS", 0)
    log = MetricsLog(folder, 0, tensorboard=False)
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "_store", cut_off)
        log.write(1, {"loss": 1.0})
        assert "metrics were not uploaded: gs://" in capsys.readouterr().err
        with pytest.raises(buckets.UnreachableError):  # a checkpoint would lack them
            log.flush()
    log.write(2, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "_store", cut_off)
        log.close()  # nothing is new
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: error reading gs://b"),
        gcsfs.retry.HttpError({"code": 503}),
        aiohttp.ClientConnectionError(),
    ],
)
def test_a_checkpoint_that_cannot_be_reached_is_not_called_damaged(
    folder, monkeypatch, error, capsys
):
    checkpoints = Checkpoints(folder / "checkpoints")
    state = create_state({"student": jax.numpy.zeros(2)}, optax.sgd(1.0))
    checkpoints.save(1, state)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints, "_read", fail)
    with pytest.raises(buckets.UnreachableError, match="cannot be read now: (.|\n)*tries again"):
        checkpoints.restore(state)
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(buckets.UnreachableError, match="step 2 cannot be written(.|\n)*step 1 is"):
        checkpoints.save(2, state)
    # The command says so in one line, with a status that is worth another try.
    names = ("coordinator", "num_processes", "process_id", "init_timeout", "heartbeat_timeout")
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**dict.fromkeys(names)))
    with pytest.raises(SystemExit) as ended, host_flags.running(debug=False):
        raise error
    assert ended.value.code == host_flags.EXIT_UNREACHABLE
    assert "Traceback" not in capsys.readouterr().err


def test_a_trace_is_uploaded(folder):
    config = tiny_config.get_config()
    config.profile_steps = "1:1"
    state = type("State", (), {"step": 0})()
    with watched(lambda state, *_: state, config, folder) as step:
        step(state, None, None)
    assert list((folder / "profile" / "plugins" / "profile").iterdir())


# Data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared")
    data.load_source("digits", "train", data_dir=path)
    return path


def test_a_data_set_is_copied_once(folder, prepared, tmp_path):
    buckets.upload(prepared, folder)
    local = data.load_source("digits", "test", data_dir=prepared)
    options = {"data_dir": os.fspath(folder), "cache_dir": tmp_path / "cache"}
    source = data.load_source("digits", "test[:50%]", **options)
    indices = np.arange(len(source))
    np.testing.assert_array_equal(source.get(indices)["image"], local.get(indices)["image"])
    copies = sorted((tmp_path / "cache").rglob("*.array_record*"))
    assert ["digits-test" in path.name for path in copies] == [True]  # and not those of "train"
    before = copies[0].stat().st_mtime_ns
    assert len(data.load_source("digits", "test", **options)) == 360
    assert copies[0].stat().st_mtime_ns == before
    content = bytearray(copies[0].read_bytes())
    content[100] ^= 1  # other data of the same size, in the bucket
    put_from_elsewhere(folder / "digits" / "1.0.0" / copies[0].name, bytes(content))
    data.load_source("digits", "test", **options)
    assert copies[0].read_bytes() == bytes(content)
    with pytest.raises(ValueError, match="has no split 'none', only"):
        data.load_source("digits", "none", **options)


def test_a_data_set_that_is_not_there_or_too_large(folder, prepared, tmp_path, monkeypatch):
    options = {"data_dir": os.fspath(folder), "cache_dir": tmp_path / "cache"}
    with pytest.raises(RuntimeError, match="not in gs://.*/digits/1.0.0: .*gcloud storage rsync"):
        data.load_source("digits", "test", **options)
    buckets.upload(prepared, folder)
    monkeypatch.setattr(buckets.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    message = r"GB are needed, there are 0 GB: .*config.data_cache.*/digits/1.0.0"
    with pytest.raises(OSError, match=message):
        data.load_source("digits", "test", **options)


def test_where_a_bucket_will_not_do_is_said(tmp_path):
    for path in ("gs://bucket/pictures", "s3://pictures"):
        with pytest.raises(ValueError, match="a folder of images must be on this machine.*mounted"):
            data.load_source("folder", "all", path=path)
    with pytest.raises(ValueError, match="a folder that is written must be on this machine"):
        with files.replacing_folder("gs://bucket/folder"):
            pass
