"""Suites scaling and input: the arithmetic of the prediction, a soak, and that they run."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from liftplace_jax.suites import input as input_suite
from liftplace_jax.suites import loading, prediction, stacks, weak_scaling
from liftplace_jax.suites.options import Options
from liftplace_jax.suites.prediction import PODS, paper_rows, predict, seconds_to_gather

CONFIGS = Path(__file__).parent.parent / "configs"
ROWS = paper_rows()


@functools.cache
def config_module(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_the_configs(name):
    data, _, ratio = name.partition(" ")
    if data == "CelebA":
        config = config_module("celeba64_unet").get_config(f"ratio={ratio}")
    elif data == "Bedroom":
        config = config_module("lsun_bedroom256_unet").get_config(f"ratio={ratio}")
    else:
        config = config_module("imagenet256_dit").get_config(f"student={name[4:]}")
    assert (ROWS[name].batch, ROWS[name].steps) == (config.distill.batch_size, config.distill.steps)


def test_times_by_hand():
    """A gigabyte: 15 of 16 parts over half of 0.8 x 200 GB/s; on GPUs, 7 of 8 parts within the
    host and 7 of 8 parts of an eighth between hosts."""
    gigabyte = 1e9
    assert seconds_to_gather(PODS["TPU v5e-16"], gigabyte) == pytest.approx(15 / 16 / 80)
    assert seconds_to_gather(PODS["TPU v5p-128"], gigabyte) == pytest.approx(63 / 64 / 480)
    assert seconds_to_gather(PODS["8 H100"], gigabyte) == pytest.approx(7 / 8 / 360)
    expected = 7 / 8 / 360 + 7 / 8 / 8 / 40
    assert seconds_to_gather(PODS["64 H100"], gigabyte) == pytest.approx(expected)


def test_a_prediction_by_hand():
    found = predict(ROWS["DiT-D14"], PODS["TPU v5e-256"])
    flops = 2 * (3 * 59_354_140_672 + 118_688_665_600)
    compute = 16 * flops / (197e12 * 0.3)
    sends = 2 * 4 * 340_457_504 * 255 / 256 / 160e9
    assert found["compute_ms"] == pytest.approx(compute * 1e3)
    assert found["dp_ms"] == pytest.approx(sends * 1e3)
    assert found["dp_mb"] == pytest.approx(2 * 4 * 340.457504 * 255 / 256)
    assert found["dp_efficiency"] == pytest.approx(compute / (compute + sends))
    assert found["dp_overlapped"] == 1
    gathered = 4 * (2 * 340.457504 + 675.129632) * 255 / 256
    assert found["fsdp_mb"] == pytest.approx(gathered)
    assert found["images_per_s_host"] == pytest.approx(8 * 16 / compute)
    at_90 = found["batch_for_90"] / 16 * compute
    assert at_90 / (at_90 + sends) == pytest.approx(0.9)


def test_efficiency_falls_with_devices_and_rises_with_overlap():
    for row in ROWS.values():
        found = [predict(row, PODS[f"{n} H100"]) for n in (8, 16, 32, 64)]
        efficiencies = [f["dp_efficiency"] for f in found]
        assert efficiencies == sorted(efficiencies, reverse=True)
        assert all(
            f[f"{w}_efficiency"] <= f[f"{w}_overlapped"] <= 1 for f in found for w in ("dp", "fsdp")
        )


def test_what_a_device_holds_by_hand():
    """Depth 12, kernels among eight: all else, the table of positions among it, is whole."""
    (row,) = [r for name, r in stacks.rows_of_students().items() if name == "SD3 depth 12"]
    whole, split, block = (
        stacks.predict_memory(row, PODS["8 H100"], way) for way in ("whole", "split", "by block")
    )
    student, teacher = 1_008_559_168, 2_028_328_000
    table = 192**2 * 1536
    assert whole["state_gb"] == pytest.approx(16e-9 * (student + table))
    assert split["state_gb"] == block["state_gb"]
    assert 16e-9 * (student / 8 + table) < block["state_gb"] < 16e-9 * (student / 7.8 + table)
    assert split["gathered_gb"] == pytest.approx(2 * whole["state_gb"] / 4 + whole["teacher_gb"])
    assert 2e-9 * teacher < whole["teacher_gb"] < 2.1e-9 * teacher + 4e-9 * table
    # Gathered: the student for each pass, and its gradient scattered; the teacher.
    moved = 7 / 8 * (3 * whole["state_gb"] / 4 + whole["teacher_gb"])
    assert block["moved_gb"] == pytest.approx(moved)


def test_students_of_sd3_fit_where_blocks_are_gathered_one_by_one():
    rows = stacks.predicted_rows()
    fits = {(r["student"], r["pod"], r["way"]): r["fits"] for r in rows}
    for name in ("SD3 depth 18", "SD3 depth 12"):
        assert [fits[name, "TPU v5e-16", way] for way in ("whole", "split", "by block")] == [
            False,
            False,
            True,
        ]
    assert all(fit for (_, pod, way), fit in fits.items() if way == "by block" or "H100" in pod)
    assert all(r["fits"] == (r["total_gb"] < 0.9 * r["memory_gb"]) for r in rows)


def test_every_number_from_outside_is_stated():
    text = json.dumps(prediction.assumptions())
    for device in prediction.DEVICES.values():
        assert device.source in text and f"{device.link / 1e9:g} GB/s" in text
    assert "30%" in text and "80%" in text


def test_memory_is_flat_over_many_batches():
    """A batch that is not let go takes 0.2 MB: 350 MB in all."""
    found = input_suite.soak(2000)
    assert found["batch_mb"] * 1800 > 350
    before = found["start_mb"] or 0
    assert max((found["end_mb"] or 0) - before, found["peak_growth_mb"]) < 60


def test_images_are_decoded_each_time_and_latents_drawn(tmp_path):
    cases = {name: source for name, source, _ in input_suite._cases(tmp_path)}
    celeba, latents = cases["JPEG 178x218, crop, to 64x64"], cases["latents 32x32x4"]
    assert len(celeba) == input_suite.LENGTH and celeba._images is None
    first, again = celeba.get([0, 1]), celeba.get([0, input_suite.FILES])
    assert first["image"].shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(first["image"][0], again["image"][1])
    drawn = latents.unpack(latents.get([3]), jax.random.key(0))
    assert drawn["image"].shape == (1, 32, 32, 4) and drawn["label"].tolist() == [3]
    assert input_suite.images_per_second(latents, 2, 1, 1) > 0
    # Each with a label; the flip of an image is one byte, that of latents is in what is read.
    assert input_suite.sent_bytes(celeba) == 64 * 64 * 3 + 4 + 1
    assert input_suite.sent_bytes(latents) == 2 * 2 * 32 * 32 * 4 + 4


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(weak_scaling.sys, "executable", "ls")
    with pytest.raises(RuntimeError, match="(?s)weak_scaling 2 failed: .*ls"):
        with weak_scaling.Worker(2, quick=False):
            raise AssertionError("it cannot start")


def test_the_command_scales_over_simulated_devices(tmp_path):
    command = [sys.executable, "-m", "liftplace_jax.benchmark", "--suite=scaling", "--quick"]
    subprocess.run([*command, "--repeats=3", f"--out={tmp_path}"], check=True)
    result = json.loads((tmp_path / "scaling.json").read_text())
    (row,) = result["rows"]
    assert (row["devices"], row["batch"]) == (2, 16)
    assert 0.9 < row["reduced_mb"] / row["parameters_mb"] < 1.01
    assert len(result["tables"]["predicted"]["rows"]) == len(ROWS) * len(PODS)
    assert (tmp_path / "scaling_costs.csv").exists()
    split, by_block = result["tables"]["stacks_compiled"]["rows"]
    assert (split["way"], by_block["way"]) == ("split", "by block")
    assert by_block["temporary_mb"] < split["temporary_mb"]
    assert by_block["arguments_mb"] == split["arguments_mb"]
    assert by_block["gathered_mb"] > split["gathered_mb"]  # the student's, once more


def test_loading_is_measured_in_processes_of_their_own(monkeypatch):
    for case in ("one device", "checkpoint"):
        monkeypatch.delitem(loading.CASES, case)
    plain, split = loading.run(Options(quick=True))["rows"]
    assert plain["size_gb"] == split["size_gb"] > 0.01
    assert plain["over_size"] > 0.8 and split["seconds"] > 0
