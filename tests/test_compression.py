"""The suites "sizes" and "compression": exact counts, measurements, failures, quality, files."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import tiny_config
from conftest import GOLDEN
from matplotlib.image import imread
from ml_collections import ConfigDict

from liftplace_jax.experiment.configuration import default_config
from liftplace_jax.experiment.report import collect_rows, summarise
from liftplace_jax.experiment.stages import open_experiment
from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.families.unet.channels import pruned_config
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.families.unet.published import PUBLISHED_UNETS
from liftplace_jax.host.files import write_json
from liftplace_jax.nn import building
from liftplace_jax.suites import capacity_gap, compression, measuring, sizes
from liftplace_jax.suites.options import Options
from liftplace_jax.suites.peaks import PEAK_FLOPS, peak_fraction
from liftplace_jax.suites.quality import quality_measure, read_quality
from liftplace_jax.suites.writing import write

ROOT = Path(__file__).parent.parent


def benchmark(*flags):
    """Runs the command at the repository's root, on one device."""
    return subprocess.run(
        [sys.executable, "-m", "liftplace_jax.benchmark", *flags],
        cwd=ROOT,
        timeout=600,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )


# Sizes ------------------------------------------------------------------------------------------


def test_sizes_are_the_published_to_the_unit():
    facts = json.loads((GOLDEN / "ddpm_facts.json").read_text())
    result = sizes.run(Options())
    found = {(r["data"], r["ratio"]): (r["parameters"], r["macs"]) for r in result["rows"]}
    assert len(found) == 20
    for name, model in facts["models"].items():
        assert found[name, 0.0] == (model["total_params"], model["macs"])
        for ratio, student in model["pruned"].items():
            assert found[name, float(ratio)] == (student["total_params"], student["macs"])
    assert found["celeba", 0.0] == (78_700_803, 23_922_959_232)
    students = [found["celeba", ratio][0] for ratio in (0.5, 0.7, 0.9)]
    assert students == [19_714_179, 9_252_711, 1_312_076]
    printed = {
        (row["model"], float(row["sparsity"])): (row["paper_params"], row["paper_macs"])
        for row in facts["paper_comparison"]
    }
    assert sizes.PAPER == printed


def test_sizes_of_stable_diffusion_are_the_published():
    facts = json.loads((GOLDEN / "sd_facts.json").read_text())["models"]
    names = {"SD-2.1-base (teacher)": "sd-2.1-base", "SD-1.4 (teacher)": "sd-1.4"}
    for file in facts:
        version, _, name = file.partition("/")
        kind = "channels-" if name.startswith("C_") else ""
        names.setdefault(file, f"bk-{version[:2]}-{kind}{name.partition('_')[2]}")
    rows = {row["model"]: row for row in sizes.run(Options())["tables"]["sd_unet"]["rows"]}
    printed = {}
    for file, name in names.items():
        if file == "v1/bk_extreme":  # the published file is that of tiny
            continue
        row, fact = rows[name], facts[file]
        assert (row["parameters"], row["macs"]) == (fact["total_params"], fact["macs_thop_unet"])
        if fact["paper_macs_params"]:
            printed[name] = tuple(fact["paper_macs_params"][::-1])
    assert len(rows) == 17 and sizes.PAPER_SD_UNETS == printed


def test_published_architectures_are_those_of_the_golden_facts():
    facts = json.loads((GOLDEN / "ddpm_facts.json").read_text())["models"]
    assert PUBLISHED_UNETS.keys() == facts.keys()
    for name, config in PUBLISHED_UNETS.items():
        wanted = facts[name]["config"]["model"]
        for field in ("ch", "num_res_blocks", "dropout", "resamp_with_conv", "in_channels"):
            assert getattr(config, field) == wanted[field]
        assert config.ch_mult == tuple(wanted["ch_mult"])
        assert config.attn_resolutions == tuple(wanted["attn_resolutions"])
        assert config.image_size == facts[name]["config"]["data"]["image_size"]


@pytest.mark.parametrize("resamp_with_conv", [True, False])
def test_counted_parameters_are_those_of_the_model(resamp_with_conv):
    config = UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        ch=16,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(4,),
        num_groups=4,
        resamp_with_conv=resamp_with_conv,
    )
    for c in (config, pruned_config(config, 0.5)):
        assert config_parameters(c) == building.count_parameters(building.abstract(c)[1])


def test_sizes_command(tmp_path):
    process = benchmark("--suite=sizes", f"--out={tmp_path}")
    assert process.returncode == 0, process.stderr
    assert "| celeba | 0.9 | 1,312,076 | 768,237,695 | 60.0 | 1.3M | 0.8G |" in process.stdout
    assert (tmp_path / "sizes.md").read_text() in process.stdout
    with (tmp_path / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {k: "" if v is None else str(v) for k, v in row.items()}
        for row in json.loads((tmp_path / "sizes.json").read_text())["rows"]
    ]


# Work directories -------------------------------------------------------------------------------


def make_workdir(folder, ratio, seeds=(0, 1), *, frechet=10.0, changes=()):
    """A finished work directory of two methods, but for weights' values and pictures."""
    config = tiny_config.get_config("method=all")
    config.seeds, config.compress.ratio = seeds, ratio
    for field, value in dict(changes).items():
        room, name = field.split(".")
        config[room][name] = value
    experiment = open_experiment(config, folder)
    students = pruned_config(experiment.model, ratio)
    folders = [(experiment.teacher_folder, experiment.model, {"frechet": 2.0})]
    for run in experiment.runs:
        result = {"frechet": frechet + run.seed, "output_error": 0.1 * frechet}
        folders.append((run.folder, students, result))
    protocol = {"num_samples": config.evaluation.num_samples, "batch_size": 1}
    for path, model, result in folders:
        common = {"parameters": config_parameters(model), "label": "x", "protocol": protocol}
        write_json(path / "config.json", model.described())
        write_json(path / "evaluation.json", common | result)
    rows = collect_rows(experiment)
    write_json(folder / "report.json", {"rows": rows, "summary": summarise(rows)})
    return folder


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    return [make_workdir(root / "half", 0.5), make_workdir(root / "most", 0.75, frechet=40.0)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    config = tiny_config.get_config()
    config.distill.batch_size = config.evaluation.batch_size = 8
    return open_experiment(config, tmp_path_factory.mktemp("experiment") / "run")


def test_quality_is_the_mean_over_seeds_with_its_spread(workdirs, experiment):
    rows = read_quality(workdirs, experiment.model, experiment.config.compress)
    assert quality_measure(rows) == "frechet"
    teacher, *students = rows
    assert (teacher["method"], teacher["frechet"], teacher["seeds"]) == ("teacher", 2.0, 1)
    assert [row["ratio"] for row in students] == [0.5] * 6 + [0.75] * 6
    for row in students:
        mean = {0.5: 10.5, 0.75: 40.5}[row["ratio"]]
        assert row["frechet"] == mean and row["seeds"] == 2
        np.testing.assert_allclose(row["frechet_spread"], np.std([0, 1], ddof=1))
        assert row["output_error_spread"] == 0


def test_without_frechet_quality_is_the_output_error(workdirs, experiment, tmp_path):
    folder = shutil.copytree(workdirs[0], tmp_path / "copy")
    report = json.loads((folder / "report.json").read_text())
    for row in report["rows"]:
        row["frechet"] = None
    write_json(folder / "report.json", report)
    rows = read_quality([folder], experiment.model, experiment.config.compress)
    assert quality_measure(rows) == "output_error"
    assert all("frechet" not in row for row in rows)


def test_unfit_work_directories_are_refused_by_name(workdirs, experiment, tmp_path):
    teacher = experiment.model

    def refused(*folders, match, normalisation="published", teacher=teacher):
        fields = ConfigDict({**experiment.config.compress, "normalisation": normalisation})
        with pytest.raises(ValueError, match=match):
            read_quality(folders, teacher, fields)

    other = UNetConfig.from_dict(teacher.to_dict() | {"dropout": 0.0})
    refused(workdirs[0], teacher=other, match="teacher of .*half is another.*dropout: 0.0 -> 0.1")
    refused(
        workdirs[0],
        normalisation="adapted",
        match="no_kd of .*half is another network.*min_channels_per_group: 2 -> 1",
    )
    again = make_workdir(tmp_path / "again", 0.5, seeds=(1, 2))
    refused(*workdirs, again, match="half and .*again both have a student no_kd of ratio 0.5 and")
    few = make_workdir(tmp_path / "few", 0.25, changes={"evaluation.num_samples": 8})
    refused(*workdirs, few, match="half and .*few were evaluated in different ways.* 24.* 8")
    (again / "report.json").write_text("{")
    refused(again, match="again.report.json is damaged")
    (again / "report.json").unlink()
    refused(again, match="again has no report.json: it is no finished work directory")


# Compression ------------------------------------------------------------------------------------


def test_measured_network(experiment):
    config = pruned_config(experiment.model, 0.5)
    found = measuring.measure_network(experiment, config, quick=True, repeats=3)
    saved = experiment.workdir / "checkpoint" / "model.safetensors"
    assert found["checkpoint_mb"] == saved.stat().st_size / 1e6
    assert found["checkpoint_mb"] > config_parameters(config) * 4e-6
    assert found["evaluation_ms"] > 0 and found["image_ms"] > 0
    # 2 x MACs x steps x images/s, whatever the clock said.
    macs = count_macs(config)
    np.testing.assert_allclose(found["tflops"], 2e-12 * macs * 4 * found["images_per_s"])
    assert found["of_peak"] is None, "a CPU's peak is not known"


def test_measured_training(experiment):
    student, teacher = (
        measuring.random_network(c)
        for c in (pruned_config(experiment.model, 0.5), experiment.model)
    )
    found = measuring.measure_training(experiment, "output_kd", student, teacher, repeats=3)
    np.testing.assert_allclose(found["examples_per_s"], 8e3 / found["step_ms"])
    # Student four times (parameters, their average, Adam's two moments), and the teacher.
    arrays = 4 * 4 * building.count_parameters(student.params)
    arrays += 4 * building.count_parameters(teacher.params)
    assert arrays < found["memory_mb"] * 1e6 < 10 * arrays
    assert found["device_peak_mb"] is None, "a CPU does not tell"
    for leaf in jax.tree.leaves((student.params, teacher.params)):
        assert not leaf.is_deleted()


def test_a_quick_run_takes_few_steps_that_divide_the_process(experiment):
    assert measuring.timed_steps(experiment, quick=False) == 4
    assert measuring.timed_steps(experiment, quick=True) == 4


def test_what_fails_is_a_row_that_says_so(monkeypatch, tmp_path, workdirs):
    """A method out of memory, a network that fails, a ratio that cannot be."""

    def network(experiment, config, quick, repeats):
        if dict(config.widths)["temb.dense.0"] < 16:
            raise ValueError("too narrow")
        return {"evaluation_ms": 1.0, "image_ms": 4.0, "images_per_s": 9.0}

    def training(experiment, method, student, teacher, repeats):
        if method == "lift":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 1 GB\nlong story")
        return {"step_ms": 2.0, "memory_mb": 3.0}

    monkeypatch.setattr(compression, "measure_network", network)
    monkeypatch.setattr(compression, "measure_training", training)
    options = Options(
        config=tiny_config.get_config(), ratios=(0.5, 1.5), workdirs=tuple(workdirs), batch_size=16
    )
    result = compression.run(options)
    status = {row["ratio"]: row["status"] for row in result["rows"]}
    assert list(status) == [0.0, 0.5, 0.75, 1.5], "those of the work directories are measured too"
    assert status[0.0] == status[0.5] == "ok" and status[0.75] == "failed: too narrow"
    assert status[1.5] == "failed: ratio must be in [0, 1), got 1.5"
    rows = result["tables"]["training"]["rows"]
    assert len(rows) == 1 + 2 * 6
    for row in rows:
        if row["method"] == "lift":
            assert row["status"] == "out of memory: RESOURCE_EXHAUSTED: Out of memory: 1 GB"
        else:
            assert row["status"] == "ok" and row["step_ms"] == 2.0
    joined = result["tables"]["quality"]["rows"]
    assert [row["evaluation_ms"] for row in joined] == [1.0] * 7 + [None] * 6
    assert joined[1]["parameters"] == result["rows"][1]["parameters"]
    text = write(tmp_path, result | {"command": "c", "machine": {}})
    assert "| 1.5 | - | - | - |" in text and "| out of memory: RESOURCE" in text
    stem = "compression_tiny"
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        f"{stem}.json",
        f"{stem}.md",
        f"{stem}.csv",
        f"{stem}_training.csv",
        f"{stem}_quality.csv",
        f"{stem}_cost.png",
        f"{stem}_cost.svg",
        f"{stem}_pareto.png",
        f"{stem}_pareto.svg",
    }
    for kind in ("cost", "pareto"):
        assert f"({stem}_{kind}.png)" in text
        assert imread(tmp_path / f"{stem}_{kind}.png").std() > 0.02
        ElementTree.parse(tmp_path / f"{stem}_{kind}.svg")
    with (tmp_path / f"{stem}_quality.csv").open() as file:
        assert [row["frechet"] for row in csv.DictReader(file)][:2] == ["2.0", "10.5"]


def test_compression_command(tmp_path):
    process = benchmark(
        "--suite=compression",
        "--config=tests/tiny_config.py",
        "--quick",
        "--repeats=3",
        "--ratios=0.99",
        f"--out={tmp_path}",
    )
    assert process.returncode == 0, process.stderr
    assert "ratio 0: no_kd" in process.stderr, "progress"
    result = json.loads((tmp_path / "compression_tiny.json").read_text())
    status = [row["status"] for row in result["rows"]]
    assert status[0] == "ok" and status[1].startswith("failed: ratio 0.99 leaves none of the")
    (row,) = result["tables"]["training"]["rows"]
    assert (row["ratio"], row["method"], row["status"]) == (0.0, "no_kd", "ok")
    assert row["step_ms"] > 0 and result["rows"][0]["images_per_s"] > 0
    assert result["machine"]["devices"] == 1 and "figures" not in result


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--suite=compression",), "--suite=compression needs --config"),
        (("--suite=sizes", "--ratios=0.5"), "--ratios is not for --suite=sizes"),
        (("--suite=nothing",), "flag --suite=nothing"),
        (("--suite=compression", "--config=tests/tiny_config.py", "--ratios=half"),
         "--ratios must be numbers such as 0,0.5,0.9, got 'half'"),
        (("--suite=compression", "--config=tests/tiny_config.py", "--workdirs=nowhere/*"),
         "--workdirs: no directory matches 'nowhere/*'"),
    ],
)  # fmt: skip
def test_refused_commands_are_one_line(flags, message, tmp_path):
    process = benchmark(*flags, f"--out={tmp_path / 'out'}")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ") and message in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "suite, field", [(compression, "compress.ratio"), (capacity_gap, "model.ch")]
)
def test_a_suite_asks_for_the_fields_that_it_varies(suite, field, tmp_path):
    options = Options(config=default_config("dit"), workdir=tmp_path / "runs")
    with pytest.raises(ValueError, match=rf"varies config.{field}, .* a 'dit' has no such field"):
        suite.run(options)
    assert not options.workdir.exists()


def test_peaks():
    assert peak_fraction(494.5e12 * 8, "NVIDIA H100 80GB HBM3", 8) == 0.5
    assert peak_fraction(1.0, "some device", 1) is None
    named = ("TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "NVIDIA H200")
    assert PEAK_FLOPS.keys() >= set(named)
