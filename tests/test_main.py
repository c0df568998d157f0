"""The job as users run it: killed and repeated, stage by stage, and with everything wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_config
from conftest import QUICK_XLA
from safetensors.numpy import load_file, save_file

from liftplace_jax import data, main, weights
from liftplace_jax.experiment import compressing, stages
from liftplace_jax.experiment.report import FILES
from liftplace_jax.host.flags import EXIT_BAD_INPUT
from liftplace_jax.host.locks import locked
from liftplace_jax.host.versions import line, processor
from liftplace_jax.losses import output_kd_loss
from liftplace_jax.training.metrics_io import read_metrics

ROOT = Path(__file__).parent.parent
CONFIG = "--config=tests/tiny_config.py"
MAIN = ("-m", "liftplace_jax.main")
INTERRUPTED = "tests/interrupted_main.py"


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    """Prepared data of all runs here, in this process and others."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("tfds")
        patch.setenv("LIFTPLACE_TEST_DATA", str(path))
        data.load_source("digits", "train", data_dir=path)  # prepares them
        yield


@pytest.fixture(scope="module")
def start(data_dir, tmp_path_factory):
    """Starts Python at the repository's root, with one device and a shared compilation cache."""
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICK_XLA,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """The work directory of a job without interruption, one mode after the other."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start(INTERRUPTED, "none", " ".join(main.MODES[1:]), CONFIG, f"--workdir={workdir}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_table(out, f"Report: {workdir / 'report.md'}")
    return workdir


def assert_table(out, last):
    """What a command prints at its end: the table in columns, what came out, a path."""
    header, *rows, empty, conclusion, also_empty, path = out.splitlines()
    assert (empty, also_empty, path) == ("", "", last)
    assert [row.split()[0] for row in rows] == ["teacher", "lift_place"]
    assert len({len(row) for row in (header, *rows)}) == 1 and "|" not in header
    assert conclusion.startswith("lift_place reaches a Frechet distance of ")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def run(workdir, mode="all", **changes):
    """`main.run` in this process; changes are dotted fields of the tiny config."""
    config = tiny_config.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    stages.run(config, workdir, mode)


def files(folder):
    """Contents by path, with which two folders are compared."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# Interruptions --------------------------------------------------------------------------------


def test_a_job_killed_anywhere_ends_as_one_that_was_not(start, finished, tmp_path):
    workdir = tmp_path / "run"
    flags = CONFIG, f"--workdir={workdir}"

    def interrupt(name, moment, status):
        process = start(INTERRUPTED, name, moment, *flags)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, err
        assert out == ""
        return err

    err = interrupt("SIGTERM", "teacher metrics 1", main.EXIT_INTERRUPTED)
    assert err.endswith("teacher: SIGTERM at step 2: saved. The same command goes on from there.\n")
    assert (workdir / "teacher" / "checkpoints" / "2").is_dir()
    interrupt("SIGKILL", "teacher checkpoint 6", -signal.SIGKILL)
    # Training was past step 6, which was being written; that does not count.
    assert [row["step"] for row in read_metrics(workdir / "teacher")] == [1, 2, 3, 4, 5, 6, 7]
    assert not (workdir / "teacher" / "checkpoints" / "6").exists()
    assert not (workdir / "teacher" / "model.safetensors").exists()
    err = interrupt("SIGKILL", "seed0 writing 3", -signal.SIGKILL)
    assert "teacher: goes on from step 3; the checkpoint of step 6 was not finished" in err
    err = interrupt("SIGKILL", "seed0 metrics 5", -signal.SIGKILL)
    assert "seed 0: goes on from the start; the checkpoint of step 3 was not finished" in err
    assert not (workdir / "student" / "lift_place" / "seed0" / "model.safetensors").exists()
    interrupt("SIGKILL", "scored 3", -signal.SIGKILL)
    assert (workdir / "teacher" / "evaluation.json").exists()
    assert not (workdir / "student" / "lift_place" / "seed0" / "evaluation.json").exists()

    process = start(*MAIN, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_table(out, f"Report: {workdir / 'report.md'}")
    # What the earlier commands left is not made again, and that is said.
    assert [line for line in err.splitlines() if line.startswith("stage ")] == [
        "stage 1 of 5: teacher, done before",
        "stage 2 of 5: compress, done before",
        "stage 3 of 5: distill, done before",
        "stage 4 of 5: evaluate, 1 of 2 done before: teacher",
        "stage 5 of 5: report",
    ]
    assert "samples, lift_place seed 0: compiling ... 0 s" in err
    for name in ("teacher", "pruned", "student/lift_place/seed0"):
        ours, theirs = ((d / name / "model.safetensors").read_bytes() for d in (workdir, finished))
        assert ours == theirs, name
    for name in ("teacher", "student/lift_place/seed0"):
        rows = [read_metrics(folder / name) for folder in (workdir, finished)]
        assert [row["step"] for row in rows[0]] == list(range(1, 9))
        for ours, theirs in zip(*rows, strict=True):
            timing = ("seconds", "steps_per_second")
            assert {k: v for k, v in ours.items() if k not in timing} == {
                k: v for k, v in theirs.items() if k not in timing
            }
        scores = [
            json.loads((d / name / "evaluation.json").read_text()) for d in (workdir, finished)
        ]
        assert scores[0] | {"seconds": 0} == scores[1] | {"seconds": 0}
    # Nothing half-written is left; the files inside a checkpoint have random names.
    names = [
        {path if "checkpoints" not in path.parts else Path(*path.parts[:3]) for path in files(d)}
        for d in (workdir, finished)
    ]
    assert names[0] == names[1]


def test_what_computes_nothing_may_change_when_a_run_goes_on(start, finished, tmp_path):
    workdir = tmp_path / "run"
    flags = CONFIG, f"--workdir={workdir}"
    process = start(INTERRUPTED, "SIGTERM", "teacher metrics 1", *flags)
    assert process.wait(timeout=300) == main.EXIT_INTERRUPTED
    changed = (
        "--config.teacher.log_every=3",
        "--config.teacher.checkpoint_every=5",
        "--config.distill.log_every=2",
        "--config.tensorboard=true",
    )
    out, err = start(*MAIN, *flags, "--mode=teacher", *changed).communicate(timeout=300)
    assert "teacher: goes on from step 2" in err
    assert [row["step"] for row in read_metrics(workdir / "teacher")] == [1, 2, 3, 6, 8]
    assert list((workdir / "teacher").glob("events*"))
    ours, theirs = ((d / "teacher" / "model.safetensors").read_bytes() for d in (workdir, finished))
    assert ours == theirs


def test_a_second_run_says_that_all_is_done(copy, capsys):
    before = files(copy)
    run(copy)
    assert_table(capsys.readouterr().out, f"All is done: see {copy / 'report.md'}")
    for mode in ("teacher", "compress", "distill", "evaluate"):
        run(copy, mode)
    assert files(copy) == before


# The report -----------------------------------------------------------------------------------


def test_the_report_has_a_row_for_each_method_and_finite_numbers(finished):
    for name in FILES:
        assert (finished / name).stat().st_size > 100
        if name.endswith(".png"):
            assert (finished / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place"]
    assert {"liftplace_jax", "jax", "flax", "optax", "numpy"} <= set(report["versions"])

    def check(node, name=""):
        if isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                check(value, f"{name}.{key}")
        elif isinstance(node, float):
            assert math.isfinite(node), name

    check(report)
    student, score = (
        report["rows"][1],
        json.loads((finished / "student" / "lift_place" / "seed0" / "evaluation.json").read_text()),
    )
    assert student["frechet"] == score["frechet"] and student["steps"] == 8
    teacher_tensors, student_tensors = (
        weights.read_tensors(finished / name / "model.safetensors")
        for name in ("teacher", "pruned")
    )
    sizes = [sum(t.size for t in x.values()) for x in (teacher_tensors, student_tensors)]
    assert student["parameters"] == sizes[1]
    assert student["compression"] == sizes[0] / sizes[1] > 2
    for row in report["rows"]:  # which processor each evaluation comes from
        here = processor() | {"xla_flags": QUICK_XLA}
        assert here.items() <= row["versions"].items()
    text = (finished / "report.md").read_text()
    assert report["conclusion"] in text and report["made"]["command"] in text
    assert f"Made {report['made']['date']}, evaluated on {line(report['versions'])}, with" in text
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in table] == ["teacher", "lift_place"]
    assert f"{student['frechet']:.1f}" in table[1] and f"{sizes[1]:,}" in table[1]
    assert "digit-feature Frechet distance, 24 samples" in text and "smoke run" in text
    with np.load(
        finished / "student" / "lift_place" / "seed0" / "samples.npz", allow_pickle=False
    ) as samples:
        assert samples["images"].shape == (24, 8, 8, 1) and samples["images"].dtype == np.uint8


def test_a_lost_file_of_the_report_is_made_again(copy, finished, capsys):
    (copy / "groups.png").unlink()
    run(copy)
    assert_table(capsys.readouterr().out, f"Report: {copy / 'report.md'}")
    assert set(files(copy)) == set(files(finished))
    reports = [json.loads((d / "report.json").read_text()) for d in (copy, finished)]
    made = [report.pop("made") for report in reports]
    flags = [report["versions"].pop("xla_flags") for report in reports]
    assert flags[0] != flags[1]  # of this process, and of the one that made the other
    assert reports[0] == reports[1]
    assert all(re.fullmatch(r"\d{4}(-\d\d){2} \d\d:\d\d:\d\d [+-]\d{4}", m["date"]) for m in made)
    assert made[1]["command"].startswith("python") and made[1]["command"].endswith(
        f" {INTERRUPTED} none '{' '.join(main.MODES[1:])}' {CONFIG} --workdir={finished}"
    )


def test_a_damaged_report_is_named(copy):
    for text in ('{"cut o', "[]", '{"summary": []}', '{"summary": [{"method": "teacher"}]}'):
        (copy / "report.json").write_text(text)
        with pytest.raises(ValueError, match="report.json is no report .*: delete it"):
            run(copy)


# Other jobs over the same teacher -------------------------------------------------------------


def test_features_learnable_weight_bfloat16_and_fsdp_in_one_job(finished, tmp_path):
    changes = dict(
        teacher__checkpoint=str(finished / "teacher"),
        method="lift_place_feature_kd",
        distill__dtype="bfloat16",
        distill__steps=2,
        distill__weight__name="learnable",
        distill__layer_map='{"mid.block_1": "mid.block_2"}',
        mesh__fsdp=4,
        sharding_rules=((r"conv\d\.kernel", ("fsdp",)),),
    )
    for mode in ("teacher", "compress", "distill"):
        run(tmp_path / "run", mode, **changes)
    workdir = tmp_path / "run"
    ours, theirs = ((d / "teacher" / "model.safetensors").read_bytes() for d in (workdir, finished))
    assert ours == theirs
    rows = read_metrics(workdir / "student" / "lift_place_feature_kd" / "seed0")
    names = {"loss", "diffusion", "lift", "coarse", "fine", "weight", "feature_kd", "learning_rate"}
    assert len(rows) == 2 and all(names <= set(row) for row in rows)
    assert rows[0]["weight"] == pytest.approx(0.3)
    # The same student, images and noise as in float32.
    exact = read_metrics(finished / "student" / "lift_place" / "seed0")[0]
    for name in ("diffusion", "output_kd", "coarse", "fine"):
        assert rows[0][name] == pytest.approx(exact[name], rel=0.05), name
    assert rows[0]["diffusion"] != exact["diffusion"]
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(
            workdir / "student/lift_place_feature_kd/seed0/checkpoints/2/default"
        )
    assert set(saved["params"]) == {"student", "adapters", "weight_logit"}
    assert saved["params"]["weight_logit"] != np.float32(math.log(0.3 / 0.7))
    assert set(saved["params"]["adapters"]) == {"mid.block_1"}
    trained = jax.tree.leaves((saved["params"], saved["ema"]))
    assert all(leaf.dtype == np.float32 for leaf in trained)


def test_taylor_pruning_uses_the_data_in_the_teachers_precision(finished, tmp_path, monkeypatch):
    found = []

    def loss(*args):
        found.append(jax.config.jax_default_matmul_precision)
        return output_kd_loss(*args)

    monkeypatch.setattr(compressing, "output_kd_loss", loss)
    changes = dict(
        teacher__checkpoint=str(finished / "teacher"),
        compress__importance="taylor",
        teacher__precision="high",
    )
    for mode in ("teacher", "compress"):
        run(tmp_path / "run", mode, **changes)
    ours, theirs = (
        weights.read_tensors(d / "pruned" / "model.safetensors")
        for d in (tmp_path / "run", finished)
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert any((ours[name] != theirs[name]).any() for name in ours)
    assert found and set(found) == {"high"}
    said = json.loads((tmp_path / "run" / "pruned" / "layers.json").read_text())
    assert said == {"importances": {"dtype": "float32", "precision": "high"}}


# Bad input ------------------------------------------------------------------------------------


def test_refused_commands_are_one_line_and_leave_nothing(start, tmp_path):
    workdir = tmp_path / "run"
    commands = {
        (f"{CONFIG}:method=nope",): "error: config.method must be one of ['all', 'feature_kd'",
        (f"{CONFIG}:nope=1",): "error: unknown config argument 'nope'; known: ['method', 'seeds']",
        (CONFIG, "--config.teacher.nope=1"):
            "error: unknown config field in --config.teacher.nope=1: 'nope'",
        (CONFIG, "--config.teacher.step=1"):
            "error: unknown config field in --config.teacher.step=1: 'step' Did you mean \"steps\"",
        (CONFIG, "--config.seed=x"): "error: flag --config.seed=x: want a whole number, got 'x'",
        (CONFIG, "--mode=trian"): "error: flag --mode=trian: value should be one of <all|teacher|",
        ("--config=tests/missing.py",): "error: --config=tests/missing.py: there is no such file",
        (): "error: flag --config=None: Flag --config must have a value",
    }  # fmt: skip
    started = [start(*MAIN, f"--workdir={workdir}", *command) for command in commands]
    for process, message in zip(started, commands.values(), strict=True):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (EXIT_BAD_INPUT, "")
        assert err.startswith(message), err
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1
    assert not workdir.exists()


@pytest.mark.parametrize("mode, lost, message", [
    ("compress", "teacher pruned student", "teacher: run --mode=teacher first"),
    ("distill", "teacher student", "teacher: run --mode=teacher first"),
    ("distill", "pruned student", "pruned: run --mode=compress first"),
    ("evaluate", "student", "seed0: run --mode=distill first"),
    ("report", "student", "seed0: run --mode=evaluate first"),
])  # fmt: skip
def test_a_mode_names_the_one_that_comes_first(copy, mode, lost, message):
    for name in lost.split():
        shutil.rmtree(copy / name)
    with pytest.raises(ValueError, match=message):
        run(copy, mode)
    assert not any((copy / name / "config.json").exists() for name in lost.split())


def test_work_directories_of_others_are_refused_untouched(copy, tmp_path):
    before = files(copy)
    with pytest.raises(ValueError, match="made with another config") as error:
        run(copy, distill__loss__group_size=4, seed=1)
    assert "\n  distill.loss.group_size: 16 -> 4\n  seed: 0 -> 1\n" in str(error.value)
    assert files(copy) == before
    run(copy, mesh__data=4, mesh__fsdp=2)  # other hardware is no other config

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="foreign is not empty and has no config.json"):
        run(foreign)
    (foreign / "config.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="made with another config"):
        run(foreign)
    (foreign / "notes.txt").unlink()
    with pytest.raises(ValueError, match="made with another config"):
        run(foreign)
    (foreign / "config.json").write_text('{"cut o')
    with pytest.raises(ValueError, match="config.json is no config of a work directory"):
        run(foreign)
    assert list(files(foreign).values()) == [b'{"cut o']
    with pytest.raises(NotADirectoryError):
        run(foreign / "config.json")


def test_a_second_command_on_a_work_directory_is_one_line(start, copy):
    (copy / "report.md").unlink()
    before = files(copy)
    with locked(copy):
        process = start(*MAIN, CONFIG, f"--workdir={copy}")
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, len(err.splitlines())) == (EXIT_BAD_INPUT, "", 1)
    assert err.startswith(f"error: {copy} is in use by process {os.getpid()} on ")
    assert files(copy) == before


def test_a_finished_work_directory_without_its_newer_files_goes_on(copy, capsys):
    """As a version before checksums and data.json left it."""
    (copy / "data.json").unlink()
    for path in copy.rglob("*.safetensors"):
        save_file(load_file(path), path)
    (copy / "report.md").unlink()
    run(copy)
    assert_table(capsys.readouterr().out, f"Report: {copy / 'report.md'}")
    assert (copy / "data.json").exists()


def cut_weights(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def other_config(folder):
    shutil.copy(folder.parent / "pruned" / "config.json", folder / "config.json")


def other_images(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 16}))


@pytest.mark.parametrize("damage, message", [
    (cut_weights, "teacher/model.safetensors: cannot be read as weights only"),
    (other_config, r"teacher: \d+ tensors do not fit the (?s:.*)conv_in.bias.*: has shape \(8,"),
    (other_images, r"teacher is not what config.model says(?s:.*)image_size: 16 -> 8"),
    (shutil.rmtree, "teacher: (no such file|unknown kind)"),
])  # fmt: skip
def test_bad_teacher_checkpoints_are_named(copy, finished, tmp_path, damage, message):
    damage(copy / "teacher")
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        run(workdir, teacher__checkpoint=str(copy / "teacher"))
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    # Corrected, the same work directory serves.
    run(workdir, "teacher", teacher__checkpoint=str(finished / "teacher"))
    assert (workdir / "teacher" / "model.safetensors").exists()


def test_a_truncated_checkpoint_is_named(copy):
    (copy / "student" / "lift_place" / "seed0" / "model.safetensors").unlink()
    for path in (copy / "student" / "lift_place" / "seed0" / "checkpoints" / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="step 8 in .*seed0/checkpoints cannot be restored"):
        run(copy, "distill")
    assert not (copy / "student" / "lift_place" / "seed0" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (dict(data__name="no_such_data"), ValueError, "TFDS knows no data set 'no_such_data'"),
        (dict(data__test_split="tset"), ValueError, "digits has no split 'tset', only"),
        (
            dict(evaluation__neighbours=1700, evaluation__num_samples=5000),
            ValueError,
            r"config.evaluation.neighbours 1700 must be below the number of real images, 1\d+$",
        ),
    ],
)
def test_unfit_data_is_refused_before_training(tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message):
        run(tmp_path / "run", **changes)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_nan_in_the_data_is_named(tmp_path, monkeypatch):
    image = np.zeros((8, 8, 1), np.float32)
    records = [{"image": image}] * 3 + [{"image": np.full_like(image, np.nan)}]

    def source(name, split, **_):
        return data.Source(name, records, image_shape=image.shape, dtype=np.float32)

    monkeypatch.setattr(data, "load_source", source)
    with pytest.raises(ValueError, match="data set digits, example 3: image has non-finite values"):
        run(tmp_path / "run", "teacher", evaluation__neighbours=2)
    assert not (tmp_path / "run" / "teacher" / "model.safetensors").exists()
