"""What a report claims: no more than its numbers show; and what it says they come from."""

import re
import sys

import pytest

from liftplace_jax.experiment.conclusion import conclude
from liftplace_jax.experiment.report import summarise
from liftplace_jax.host import versions as provenance


def summary(seeds=3, **scores):
    """Of the teacher, and of methods with (mean, spread) or a mean; "x_clipped" likewise."""
    teacher = {"method": "teacher", "seed": 0, "frechet": 5.0, "frechet_clipped": 5.5}
    rows = [teacher | dict(parameters=100, macs=1, compression=1.0, steps=1)]
    for method in (name for name in scores if not name.endswith("_clipped")):
        for seed in range(seeds):
            row = {"method": method, "seed": seed, "output_error": 0.01 * (seed + 1)}
            for key, name in (("frechet", method), ("frechet_clipped", f"{method}_clipped")):
                if name in scores:
                    mean, deviation = scores[name] if seeds > 1 else (scores[name], 0)
                    row[key] = mean + deviation * (seed - (seeds - 1) / 2)
            rows.append(row | dict(parameters=10, macs=1, compression=10.0, steps=1))
    return summarise(rows)


def test_the_best_method_is_compared_with_the_baseline():
    text = conclude(
        summary(
            no_kd=(221.5, 13.9),
            output_kd=(199.1, 10.8),
            lift=(152.8, 10.6),
            lift_place=(169.6, 7.1),
        )
    )
    assert text == (
        "The lowest Frechet distance, mean of 3 seeds, is that of lift: 152.8 +- 10.6 "
        "(teacher: 5.0). That is 46.3 (23%) below output_kd, 199.1 +- 10.8: "
        "3.1 times the spread over seeds."
    )
    # Without output_kd the baseline is no_kd, and of two others the next best.
    assert "below no_kd, 221.5" in conclude(summary(no_kd=(221.5, 9), a=(170, 9), b=(160, 9)))
    assert "below a, 170.0" in conclude(summary(a=(170, 9), b=(160, 9), c=(180, 9)))


def test_a_baseline_that_wins_is_named():
    text = conclude(summary(no_kd=(16.2, 1.3), output_kd=(12.1, 0.9), lift_place=(16.5, 0.4)))
    assert "is that of output_kd: 12.1 +- 0.9" in text and "4.1 (25%) below no_kd" in text
    assert "That is 4.4 (27%) below lift_place, 16.5 +- 0.4" in conclude(
        summary(output_kd=(12.1, 0.9), lift_place=(16.5, 0.4))
    )


def test_a_difference_within_the_spread_is_none():
    text = conclude(summary(output_kd=(180.0, 10.0), lift_place=(170.0, 8.0)))
    assert text.endswith("180.0 +- 10.0: within the spread over seeds, so no difference is shown.")
    assert "beyond the spread" in conclude(summary(output_kd=(3, 0), lift_place=(2, 0)))
    assert "no difference is shown" in conclude(summary(output_kd=(3, 0), lift_place=(3, 0)))


def test_one_seed_and_one_method_claim_less():
    text = conclude(summary(1, output_kd=180.0, lift_place=170.0))
    assert text.endswith("; one seed shows no spread, so this may be chance.")
    assert conclude(summary(1, lift_place=174.9)) == (
        "lift_place reaches a Frechet distance of 174.9, one seed; its teacher, 10.0 times as "
        "large, 5.0. The run has no other method to compare it with."
    )
    assert conclude(summary(lift_place=(170, 7))).startswith(
        "lift_place reaches a Frechet distance of 170.0 +- 7.0, mean of 3 seeds; its teacher"
    )


def test_clipping_that_turns_the_order_is_said():
    scores = dict(output_kd=(199, 10), lift=(153, 10), output_kd_clipped=(103.3, 6.1))
    text = conclude(summary(**scores, lift_clipped=(138, 7.5)))
    assert text.endswith(
        " With clipping output_kd has the lowest, 103.3 +- 6.1 against 138.0 +- 7.5."
    )
    assert "clipping" not in conclude(summary(**scores, lift_clipped=(90, 7.5)))


def test_without_a_distance_the_output_error_decides_or_nothing():
    rows = summary(output_kd=(1, 0), lift=(2, 0))
    for row in rows:
        row["frechet"] = row["frechet_clipped"] = None
    assert conclude(rows).startswith("The lowest output error, mean of 3 seeds, is that of ")
    for row in rows:
        row["output_error"] = None
    assert conclude(rows, few=True) == "No score was computed for the students."
    assert conclude(summary(1, lift=2.0), few=True).endswith(" this was a smoke run.")


# Provenance -----------------------------------------------------------------------------------

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu sse4_1 sse4_2 avx avx2 avx512f avx512dq avx512_vnni avx512_bf16
"""
XEON = EPYC.replace("avx512_bf16", "amx_tile").replace("AMD EPYC", "Intel(R) Xeon(R)")
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize("text, flags, level", [
    (EPYC, "", "AVX512_BF16"),
    (XEON, "", "AMX"),
    (EPYC, "--xla_cpu_max_isa=AVX2 --xla_dump_to=x", "AVX2"),
    (EPYC, "--xla_cpu_max_isa=avx512", "AVX512"),
    (EPYC, "--xla_cpu_max_isa=AMX", "AVX512_BF16"),  # no processor gains by it
    (EPYC.replace(" sse4_2", "").replace("avx", "x"), "", None),
    (GRAVITON, "", None),
    ("", "", None),
])  # fmt: skip
def test_the_widest_instructions_that_xla_uses(text, flags, level):
    assert provenance.instructions(text, flags) == level


def test_the_processor_is_named_on_any_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " --xla_cpu_max_isa=AVX2  --xla_dump_to=x ")
    monkeypatch.setenv("NPROC", "3")
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(provenance, "_CPUINFO", path)
    monkeypatch.setattr("platform.machine", lambda: "arch")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert provenance.processor() == {  # no such file
        "processor": "arch",
        "instructions": "arch",
        "threads": 3,
        "xla_flags": "--xla_cpu_max_isa=AVX2 --xla_dump_to=x",
    }
    path.write_text(EPYC)
    found = provenance.processor()
    assert provenance.line(found) == "AMD EPYC (family 26, model 2), AVX2, 3 threads"
    assert provenance.line(found | {"device": "cpu"}) == provenance.line(found)
    assert provenance.line(found | {"device": "H100"}).startswith("H100 (AMD EPYC")
    path.write_text(GRAVITON)
    assert provenance.line(provenance.processor()) == "arch 0x41 0xd40, arch, 3 threads"
    monkeypatch.delenv("NPROC")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert provenance.processor().keys() == {"processor", "instructions", "threads"}
    assert provenance.processor()["threads"] > 0


@pytest.mark.parametrize("words, script, shown", [
    (["/venv/bin/python", "-m", "liftplace_jax.main", "--config=a b.py"], "/lib/main.py",
     "python -m liftplace_jax.main '--config=a b.py'"),
    (["/venv/bin/python", "/venv/bin/liftplace", "--x"], "/venv/bin/liftplace", "liftplace --x"),
    (["/venv/bin/python3", "tests/run.py", "--x"], "tests/run.py", "python3 tests/run.py --x"),
    (["python3"], "", "python3"),
])  # fmt: skip
def test_the_command_is_said_as_it_was_typed(monkeypatch, words, script, shown):
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", [script])
    assert provenance.command() == shown


def test_versions_name_libraries_and_processor():
    found = provenance.versions()
    assert {"liftplace_jax", "jax", "flax", "optax", "numpy", "device"} <= set(found)
    assert all(re.match(r"\d", found[name]) for name in ("jax", "numpy"))
    assert provenance.processor().items() <= found.items()
