"""The benchmark's parts: that suites run, and that what they compare is the same thing."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from liftplace_jax.suites import grouping, losses, torch_losses
from liftplace_jax.suites.options import Options
from liftplace_jax.suites.timing import time_side_by_side


@pytest.mark.parametrize("name, group_size", [("mse", None), ("lift", None), ("place", 16)])
def test_the_torch_peer_computes_the_same(name, group_size):
    arrays = losses.draw((2, 8, 8, 3))
    ours = losses.our_loss(name, group_size)(*map(jnp.asarray, arrays))
    tensors = (torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in arrays)
    theirs = torch_losses.LOSSES[name](*tensors, group_size=group_size)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-4)


def test_all_ways_to_the_sums_agree():
    """Without ties they are exact alternatives."""
    student, teacher = map(jnp.asarray, losses.draw((2, 8, 8, 3)))
    expected = grouping.pair_sort(student, teacher)
    assert expected.shape == (5, 2, 3, 4)
    for way in grouping.WAYS.values():
        np.testing.assert_allclose(way(student, teacher), expected, rtol=1e-4, atol=1e-4)


def test_timing_is_of_the_call():
    calls = {"a": lambda: sum(range(1000)), "b": lambda: None}
    times = time_side_by_side(calls, 5)
    assert times.keys() == calls.keys()
    assert all(0 <= t.low <= t.median <= t.high for t in times.values())


def test_command_writes_json_and_table(tmp_path):
    command = [sys.executable, "-m", "liftplace_jax.benchmark", "--suite=losses", "--quick"]
    subprocess.run([*command, "--repeats=3", f"--out={tmp_path}"], check=True)
    result = json.loads((tmp_path / "losses.json").read_text())
    assert {row["loss"] for row in result["rows"]} == {"mse", "lift", "place"}
    assert all(float(row["ratio"]) > 0 for row in result["rows"])
    assert result["command"].startswith("python -m liftplace_jax.benchmark --suite=losses")
    assert (tmp_path / "losses.md").read_text().count("\n| 4x16x16x3 ") == len(result["rows"])


def test_works_without_torch(monkeypatch):
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: None)
    result = losses.run(Options(quick=True, repeats=3))
    assert all(row["ratio"] == "-" for row in result["rows"])
    assert "PyTorch is not installed: no ratios." in result["notes"]
