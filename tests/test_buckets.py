"""Files of a bucket: as those of this machine. (Whole jobs: test_pods.)"""

import json
import os
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_config

from liftplace_jax import buckets, data, files, main, weights
from liftplace_jax.buckets import as_path
from liftplace_jax.evaluation import load_reference, save_reference
from liftplace_jax.training.metrics_io import MetricsLog, read_metrics
from liftplace_jax.training.profiling import watched


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
    urllib.request.urlopen(urllib.request.Request(
        f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?uploadType=media"
        f"&name={name}", data=content, headers={"Content-Type": "application/octet-stream"},
    ))  # fmt: skip


def test_paths_of_this_machine_stay_what_they_are():
    assert as_path("~/runs") == Path.home() / "runs"
    assert isinstance(as_path("runs/digits"), Path)
    assert os.fspath(as_path("gs://bucket/runs") / "a") == "gs://bucket/runs/a"


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
    with pytest.raises(OSError, match="(?s)gs://none/run/config.json cannot be .*a bucket n"):
        main.run(tiny_config.get_config(), as_path("gs://none/run"), "teacher")
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
    copies[0].write_bytes(b"cut off")
    assert data.load_source("digits", "test", **options).get([0])["image"].shape == (1, 8, 8, 1)
    with pytest.raises(ValueError, match="has no split 'none', only"):
        data.load_source("digits", "none", **options)


def test_a_data_set_that_is_not_there_or_too_large(folder, prepared, tmp_path, monkeypatch):
    options = {"data_dir": os.fspath(folder), "cache_dir": tmp_path / "cache"}
    with pytest.raises(RuntimeError, match="not in gs://.*/digits/1.0.0: .*gcloud storage cp -r"):
        data.load_source("digits", "test", **options)
    buckets.upload(prepared, folder)
    monkeypatch.setattr(buckets.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"takes .* GB, .* has 0 GB left: .*config.data_cache"):
        data.load_source("digits", "test", **options)


def test_where_a_bucket_will_not_do_is_said(tmp_path):
    for path in ("gs://bucket/pictures", "s3://pictures"):
        with pytest.raises(ValueError, match="a folder of images must be on this machine.*mounted"):
            data.load_source("folder", "all", path=path)
    with pytest.raises(ValueError, match="a folder that is written must be on this machine"):
        with files.replacing_folder("gs://bucket/folder"):
            pass
