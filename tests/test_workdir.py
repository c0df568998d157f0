"""A work directory: one run at a time, the data it was begun with, and files that were damaged."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import tiny_config
from PIL import Image

from liftplace_jax import weights
from liftplace_jax.experiment import report
from liftplace_jax.experiment import workdir as workdirs
from liftplace_jax.experiment.scoring import read_evaluation, read_samples
from liftplace_jax.experiment.stages import open_experiment, run
from liftplace_jax.families.loading import load_network
from liftplace_jax.host import buckets, locks
from liftplace_jax.host.buckets import UnreachableError, as_path
from liftplace_jax.host.files import write_json
from liftplace_jax.host.locks import locked
from liftplace_jax.nn import building
from liftplace_jax.training.metrics_io import MetricsLog, read_metrics


def tiny(**changes):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


# One run at a time ------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who_has_it(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError) as error:
            run(tiny(), tmp_path / "run", "teacher")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    who = f"{tmp_path / 'run'} is in use by process {os.getpid()} on {socket.gethostname()}, since "
    assert str(error.value).startswith(who) and "pytest" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()  # as before


def test_readers_are_not_kept_out(tmp_path):
    open_experiment(tiny(), tmp_path)
    with locked(tmp_path):
        open_experiment(tiny(), tmp_path, claim=False)
        assert read_metrics(tmp_path / "teacher") == []


def test_folders_that_were_there_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine" / "a" / "b") as alone:
        assert alone
    assert list((tmp_path / "mine").iterdir()) == []
    with locked(tmp_path / "mine"):
        (tmp_path / "mine" / "made").touch()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["made"]


def test_the_lock_of_a_killed_process_is_free(tmp_path, capsys):
    code = (
        "import sys, time; from pathlib import Path; from liftplace_jax.host.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    )
    program = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            run(tiny(), tmp_path, "teacher")
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 1}', "\0" * 50])
def test_a_lock_that_says_nothing_is_only_a_lock(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with locked(tmp_path):
        pass
    (tmp_path / ".lock").write_text(content)
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another run, which has not said who"):
            run(tiny(), tmp_path, "teacher")
    assert (tmp_path / ".lock").read_text() == content


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def link(path):
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make, message", [
    (folder, "cannot be written: .*Is a directory.*/.lock"), (pipe, "/.lock is no file: delete it"),
    (link, "cannot be written: .*symbolic links.*/.lock"),
])  # fmt: skip
def test_a_lock_that_is_no_file_is_named(tmp_path, make, message):
    make(tmp_path / ".lock")
    with pytest.raises((ValueError, OSError), match=message):
        run(tiny(), tmp_path, "teacher")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path) as alone:
        assert not alone
    assert "cannot be locked (Operation not supported): make sure" in capsys.readouterr().err


def test_what_another_host_left_is_said(tmp_path, capsys):
    (tmp_path / ".lock").write_text(json.dumps({"host": "other", "pid": 7, "since": "yesterday"}))
    with locked(tmp_path):
        pass
    said = capsys.readouterr().err
    assert "taken over from process 7 on other, since yesterday" in said


def test_a_lock_that_was_removed_by_its_holder_is_not_taken_for_locked(tmp_path, monkeypatch):
    """Between opening the file and locking it."""
    flock, path = fcntl.flock, tmp_path / ".lock"

    def removed_before(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with locked(tmp_path):
        with pytest.raises(ValueError, match="in use"), locked(tmp_path):
            pass
    assert not path.exists()


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="/.lock cannot be written: .*No space left"):
        run(tiny(), tmp_path / "run", "teacher")
    assert not (tmp_path / "run").exists()


def test_a_refused_config_is_said_before_the_lock(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="config.seed"):
        run(tiny(seed=-1), tmp_path, "teacher")


# In a bucket ------------------------------------------------------------------------------------


@pytest.fixture
def place(bucket, request, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT", 0.1)
    monkeypatch.setattr(locks, "_SILENCE", 2)
    return as_path(f"{bucket}/{request.node.name}")


def test_a_bucket_is_held_by_who_gives_signs_of_life(place, monkeypatch, capsys):
    with locked(place) as alone:
        assert alone
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on") as error:
            run(tiny(), place, "teacher")
        assert "\n" not in str(error.value)
        assert [path.name for path in place.iterdir()] == [".lock"]
        assert f"was taken by process {os.getpid()} on" in capsys.readouterr().err
    assert buckets.listed(place) == []


def left_by(place, **changes):
    (place / ".lock").write_text(json.dumps(locks._holder() | changes))


def test_a_silent_holder_is_taken_for_dead(place, capsys):
    left_by(place, machine="another")
    begin = time.monotonic()
    with locked(place):
        assert time.monotonic() - begin > 2
        assert json.loads((place / ".lock").read_text())["machine"] == locks._machine()
    assert "waiting for a sign of life, 2 s at most" in capsys.readouterr().err


def test_a_dead_holder_of_this_machine_is_not_waited_for(place, monkeypatch, capsys):
    with subprocess.Popen(["true"]) as process:
        pass
    left_by(place, pid=process.pid)
    monkeypatch.setattr(locks, "_SILENCE", 1000)
    with locked(place):
        pass
    assert capsys.readouterr().err == ""
    for content in (b"", b"{"):
        monkeypatch.setattr(locks, "_SILENCE", 0.2)
        (place / ".lock").write_bytes(content)
        with locked(place):
            pass
    assert buckets.listed(place) == []


def test_a_holder_whose_place_was_taken_says_so_and_leaves_it(place, capsys):
    with locked(place):
        left_by(place, pid=1)
        time.sleep(1)
    assert "another run has taken this one for dead" in capsys.readouterr().err
    assert json.loads((place / ".lock").read_text())["pid"] == 1


def test_a_bucket_that_is_away_is_not_called_in_use(place, monkeypatch):
    def cut_off():
        raise ConnectionError("cut off")

    monkeypatch.setattr(buckets, "_store", cut_off)
    with pytest.raises(UnreachableError, match="(?s)/.lock cannot be reached.*cut off"):
        run(tiny(), place, "teacher")


# Data -------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Twelve images, as bitmaps: all files are of the same size."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        pixels = rng.integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i:02d}.bmp")
    return tmp_path / "pictures"


def opened(tmp_path, pictures, claim=True):
    config = tiny(data__name="folder", data__path=str(pictures), evaluation__features=None)
    experiment = open_experiment(config, tmp_path / "run", claim=claim)
    return experiment.sources


def begun(tmp_path, pictures):
    """A work directory in which something was made of the pictures."""
    opened(tmp_path, pictures)
    (tmp_path / "run" / "teacher").mkdir()
    return tmp_path / "run" / "data.json"


def remove_one(pictures):
    (pictures / "03.bmp").unlink()


def add_one(pictures):
    shutil.copy(pictures / "03.bmp", pictures / "99.bmp")


def rename_one(pictures):
    (pictures / "03.bmp").rename(pictures / "99.bmp")


def replace_one(pictures):
    shutil.copy(pictures / "04.bmp", pictures / "03.bmp")


def grow_one(pictures):
    with (pictures / "03.bmp").open("ab") as file:
        file.write(bytes(64))  # behind the picture, which stays as it is


@pytest.mark.parametrize("change, said", [
    (remove_one, "images.train.images: 12 -> 11"), (add_one, "images.test.images: 12 -> 13"),
    (rename_one, "images.train.names: '.*' -> '.*'"), (grow_one, r"images.train.bytes: \d+ -> "),
    (replace_one, "images.train.content: '.*' -> '.*'"),
])  # fmt: skip
def test_data_that_changed_are_refused(tmp_path, pictures, change, said):
    path = begun(tmp_path, pictures)
    before = path.read_text()
    opened(tmp_path, shutil.copytree(pictures, tmp_path / "moved"), claim=False)  # no change
    change(pictures)
    with pytest.raises(ValueError, match=said) as error:
        opened(tmp_path, pictures)
    assert "the data are not those that" in str(error.value) and "\n" not in str(error.value)
    assert path.read_text() == before
    path.unlink()  # as the message says
    opened(tmp_path, pictures)
    assert json.loads(path.read_text()) != json.loads(before)


def test_of_large_folders_names_and_sizes_are_compared(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("liftplace_jax.data.folder._READ_WHOLE", 0)
    begun(tmp_path, pictures)
    replace_one(pictures)
    opened(tmp_path, pictures)
    grow_one(pictures)
    with pytest.raises(ValueError, match="images.train.content: "):
        opened(tmp_path, pictures)


def test_an_older_work_directory_learns_its_data(tmp_path, pictures):
    path = begun(tmp_path, pictures)
    path.unlink()
    opened(tmp_path, pictures, claim=False)
    assert not path.exists()  # a reader writes nothing
    opened(tmp_path, pictures)
    assert path.exists()


def test_data_of_which_nothing_was_made_do_not_bind(tmp_path, pictures):
    opened(tmp_path, pictures)
    remove_one(pictures)
    opened(tmp_path, pictures)
    known = json.loads((tmp_path / "run" / "data.json").read_text())
    assert known["images"]["train"]["images"] == 11


@pytest.mark.parametrize("content", ["", '{"images": ', "[1]"])
def test_a_damaged_record_of_the_data_is_named(tmp_path, pictures, content):
    begun(tmp_path, pictures).write_text(content)
    with pytest.raises(ValueError, match="run/data.json is damaged: .*Delete it if"):
        opened(tmp_path, pictures)


# Leftovers and damage ---------------------------------------------------------------------------


def test_what_killed_runs_were_writing_is_removed(tmp_path):
    mine = [".notes.md", ".env.json", "metrics.jsonl", ".samples.png.old", "samples.png.12"]
    theirs = [".samples.png.123", ".model.safetensors.7", ".a.json.99999999", "metrics.tmp"]
    for place in (tmp_path, tmp_path / "student" / "lift" / "seed0"):
        place.mkdir(exist_ok=True, parents=True)
        for name in mine + theirs:
            (place / name).touch()
    for kept in ("evaluations", "teacher/checkpoints"):
        (tmp_path / kept).mkdir(parents=True)
        (tmp_path / kept / ".a.json.5").touch()
    workdirs.remove_leftovers(tmp_path)
    for place in (tmp_path, tmp_path / "student" / "lift" / "seed0"):
        assert {path.name for path in place.iterdir() if path.is_file()} == set(mine)
    assert (tmp_path / "evaluations" / ".a.json.5").exists()
    assert (tmp_path / "teacher" / "checkpoints" / ".a.json.5").exists()


def test_a_run_removes_leftovers_at_its_start(tmp_path):
    open_experiment(tiny(), tmp_path)
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / ".model.safetensors.123").touch()
    with pytest.raises(ValueError, match="run --mode=teacher first"):
        run(tiny(), tmp_path, "compress")
    assert list((tmp_path / "pruned").iterdir()) == []


@pytest.mark.parametrize("content, why", [
    ("", "Expecting value"), ('{"frechet": 1.0, "para', "Unterminated"),
    ("[1]", "a list, no object"),
    ("{}", "no number of parameters"), ('{"parameters": "3"}', "no number of parameters"),
    ("[" * 200_000, "recursion"), ("\xff", "codec"), ("null", "no object"),
])  # fmt: skip
def test_a_damaged_evaluation_is_named_with_what_to_do(tmp_path, content, why):
    (tmp_path / "evaluation.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read_evaluation(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'evaluation.json'} is damaged: ") and why in said
    assert said.endswith("Delete it and run --mode=evaluate again") and "\n" not in said


def test_a_report_on_a_damaged_evaluation_is_refused(tmp_path):
    experiment = open_experiment(tiny(), tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "evaluation.json").mkdir()
    with pytest.raises(ValueError, match="teacher/evaluation.json is no file. Delete it"):
        report.write_report(experiment)
    (tmp_path / "teacher" / "evaluation.json").rmdir()
    write_json(tmp_path / "teacher" / "evaluation.json", {"parameters": 3})
    (tmp_path / "teacher" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="teacher/config.json is damaged"):
        report.write_report(experiment)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("size", [0, 100])
def test_damaged_samples_are_named(tmp_path, size):
    np.savez(tmp_path / "samples.npz", images=np.zeros((64, 8, 8, 1), np.uint8))
    os.truncate(tmp_path / "samples.npz", size)
    with pytest.raises(ValueError, match="samples.npz is damaged: .*run --mode=evaluate again"):
        read_samples(tmp_path)


GOOD = '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("line", [
    "[1, 2]", "3", "null", '"step"', "{}", '{"step": "1"}', '{"step": 1, "loss": [1]}', '{"step"',
    '{"step": 2, "loss": tru', "", "\0\0\0", "[" * 100_000, '{"step": 1, "loss": null}',
])  # fmt: skip
def test_a_bad_line_of_metrics_is_named_and_a_cut_off_one_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + line)  # killed as it wrote
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    path.write_text(GOOD + line + "\n" + GOOD)
    for read in (read_metrics, lambda folder: MetricsLog(folder, 1, tensorboard=False)):
        with pytest.raises(ValueError, match="metrics.jsonl, line 2 is no line of metrics: ") as e:
            read(tmp_path)
        assert len(str(e.value)) < 400
    assert path.read_text() == GOOD + line + "\n" + GOOD


# Final weights ----------------------------------------------------------------------------------

TENSORS = {
    "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(3, ml_dtypes.bfloat16),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 4)),
}


@pytest.mark.parametrize("flip", [1, 0x20, 0xFF])
def test_no_byte_of_saved_weights_changes_unnoticed(tmp_path, flip):
    path = tmp_path / "model.safetensors"
    weights.write_safetensors(path, TENSORS)
    good, expected = path.read_bytes(), weights.read_tensors(path)
    refused = 0
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= flip
        path.write_bytes(changed)
        try:
            found = weights.read_tensors(path)
        except weights.WeightFileError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert found.keys() == expected.keys()  # what changed was not of the tensors
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, strict=True)
    assert refused > 0.95 * len(good)


def test_a_flipped_byte_of_a_saved_model_is_named(tmp_path):
    params = building.create(open_experiment(tiny(), tmp_path / "run").model, 0)[1]
    config = open_experiment(tiny(), tmp_path / "run").model.described()
    weights.save_model(tmp_path, config, params)
    weights.save_raw(tmp_path, params)
    for name, which in {"model.safetensors": "ema", "raw.safetensors": "raw"}.items():
        load_network(tmp_path, params=which)
        content = bytearray((tmp_path / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged: .* is not what was saved"):
            load_network(tmp_path, params=which)


def test_weights_with_checksums_are_read_by_others_and_those_of_others_here(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.write_safetensors(path, TENSORS, {"info": "kept"})
    assert safetensors.numpy.load_file(path).keys() == TENSORS.keys()
    np.testing.assert_array_equal(
        safetensors.torch.load_file(path)["conv.weight"], TENSORS["conv.weight"]
    )
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["info"] == "kept"
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, path)
    np.testing.assert_array_equal(weights.read_tensors(path)["a"], [1, 1])


@pytest.mark.parametrize("stored, said", [
    ("{", "its checksums cannot be read"), ("3", "its checksums cannot be read"),
    ('{"a": 1}', "a is not what was saved"), ("{}", "a is not what was saved"),
    ('{"a": "0", "b": "0"}', "it has no b any more"),
])  # fmt: skip
def test_damaged_checksums_are_named(tmp_path, stored, said):
    path, tensors = tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)}
    safetensors.numpy.save_file(tensors, path, {"crc32": stored})
    with pytest.raises(weights.WeightFileError, match=f"model.safetensors is damaged: {said}"):
        weights.read_tensors(path)
