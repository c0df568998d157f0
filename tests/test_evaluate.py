"""The verbs ref, gen and calc, reference files, and the Frechet curve of a training run."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import QUICK_XLA
from PIL import Image

from liftplace_jax import data, evaluation
from liftplace_jax.evaluation.references import ReferenceError
from liftplace_jax.training.metrics_io import read_metrics

TESTS = Path(__file__).parent
DIGITS = "--features=digits"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, and with a finished work directory "run" whose training had a curve."""
    folder = tmp_path_factory.mktemp("evaluate")
    python(
        folder, "-m", "liftplace_jax.main", f"--config={TESTS / 'tiny_config.py'}", "--workdir=run",
        "--config.evaluation.curve_every=4", "--config.evaluation.curve_samples=80",
    )  # fmt: skip
    return folder


def python(folder, *arguments):
    """Standard output of Python, run in a folder on one device."""
    environment = os.environ | {
        "XLA_FLAGS": QUICK_XLA,
        "LIFTPLACE_TEST_DATA": "data",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(home):
    """Runs a verb in `home`; returns its standard output."""
    return functools.partial(python, home, "-m", "liftplace_jax.evaluate")


@pytest.fixture(scope="module")
def reference_file(home, run):
    said = run("ref", "--data=digits", "--data_dir=data", DIGITS, "--out=ref.npz")
    assert "ref.npz: 1,437 images of digits (train), digits features" in said
    return home / "ref.npz"


def test_a_reference_has_the_statistics_of_its_images(home, reference_file):
    found = evaluation.load_reference(reference_file)
    images = data.load_source("digits", "train", data_dir=home / "data").get(np.arange(1437))
    features = np.asarray(evaluation.feature_extractor("digits")(images["image"] / 127.5 - 1))
    mean, covariance = found.statistics["features"]
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), rtol=1e-4, atol=1e-5)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(covariance, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.features, features, rtol=1e-3, atol=1e-4)
    assert found.info["extractor"] == "digits" and found.info["count"] == 1437


def test_generated_samples_are_scored_with_their_protocol(home, run, reference_file):
    said = run("gen", "--workdir=run", "--ref=ref.npz", DIGITS, "--num_samples=100", "--save_npz",
               "--batch_size=48", "--model=lift_place seed 0", "--out=scores")  # fmt: skip
    assert "lift_place seed 0 (ema): digit-feature Frechet distance" in said
    result = json.loads((home / "scores" / "lift_place_seed_0-ema-100.json").read_text())
    protocol = result["protocol"]
    assert protocol["reference"]["sha256"] == evaluation.load_reference(reference_file).digest
    assert protocol["reference"]["count"] == 1437
    for name, value in {"num_samples": 100, "sampler": "ddim", "sample_steps": 4, "eta": 0.0,
                        "skip_type": "uniform", "seed": 12345, "params": "ema",
                        "features": "digits", "precision": "float32"}.items():  # fmt: skip
        assert protocol[name] == value
    assert result["num_samples"] == 100 and "jax" in result["versions"]
    # What was saved scores the same: images go through uint8 either way.
    images = np.load(home / "scores" / "lift_place_seed_0-ema-100.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (100, 8, 8, 1) and images.dtype == np.uint8
    run("calc", "--images=scores/lift_place_seed_0-ema-100.npz", "--ref=ref.npz", DIGITS,
        "--out=again.json", "--batch_size=32")  # fmt: skip
    again = json.loads((home / "again.json").read_text())
    for name in ("frechet", "precision", "recall", "kid"):
        assert again[name] == pytest.approx(result[name], rel=1e-3, abs=1e-4)
    assert again["protocol"]["reference"]["sha256"] == protocol["reference"]["sha256"]


def test_raw_parameters_are_others_than_the_averaged_ones(home, run, reference_file):
    options = ("--workdir=run", "--ref=ref.npz", DIGITS, "--num_samples=80", "--model=teacher")
    run("gen", *options, "--params=raw")
    run("gen", *options)
    raw, ema = (
        json.loads((home / "run" / "evaluations" / f"teacher-{params}-80.json").read_text())
        for params in ("raw", "ema")
    )
    assert raw["protocol"]["params"] == "raw" and ema["protocol"]["params"] == "ema"
    assert raw["frechet"] != ema["frechet"]


def test_a_curve_of_frechet_distances_is_logged(home):
    metrics = read_metrics(home / "run" / "student")
    values = {m["step"]: m["frechet_float32"] for m in metrics if "frechet_float32" in m}
    assert sorted(values) == [4, 8] and all(value > 0 for value in values.values())


def test_the_curve_is_the_distance_that_is_reported(home, reference_file):
    """In float32, from the same moments; a reference file gives the same as its images."""
    extractor = evaluation.feature_extractor("digits")
    source = data.load_source("digits", "train", data_dir=home / "data")
    real = evaluation.reference(source, extractor, batch_size=64)
    few = evaluation.reference(source, extractor, batch_size=64, limit=200)
    exact = evaluation.score(real, few)["frechet"]
    for other in (real, evaluation.load_reference(reference_file)):
        value = jax.jit(evaluation.frechet_distance_in_graph)(
            evaluation.moments_of(other), few.moments
        )
        assert float(value) == pytest.approx(exact, rel=1e-3)
        assert evaluation.score(other, few)["frechet"] == pytest.approx(exact, rel=1e-4)


REFUSED = {
    "want one of the verbs ref, gen, calc, got ['fid']": ("fid",),
    "ref needs --data": ("ref", "--out=x.npz"),
    "--save_npz is not for ref": ("ref", "--data=digits", "--out=x.npz", "--save_npz"),
    "--out must be an .npz file in a folder that exists": ("ref", "--data=digits", "--out=x.json"),
    "features 'inception' need the weights of the FID Inception network": (
        "ref", "--data=digits", "--data_dir=data", "--out=x.npz"),
    "nothing is no work directory": ("gen", "--workdir=nothing", "--ref=ref.npz", DIGITS),
    "--model=lift seed 9: run has ['teacher', 'lift_place seed 0']": (
        "gen", "--workdir=run", "--ref=ref.npz", DIGITS, "--model=lift seed 9"),
    "there.npz: no such file; make one with": (
        "gen", "--workdir=run", "--ref=there.npz", DIGITS, "--num_samples=80"),
    "40 images for 64 features of 'digits': take more, or --allow_few": (
        "gen", "--workdir=run", "--ref=ref.npz", DIGITS, "--num_samples=40", "--model=teacher"),
    "there is no folder nowhere": ("calc", "--images=nowhere", "--ref=ref.npz", DIGITS),
    "want uint8 images (N, H, W, C) as arr_0, found no arr_0": (
        "calc", "--images=ref.npz", "--ref=ref.npz", DIGITS),
}  # fmt: skip


# One process for all of them: it takes seconds to start.
SCRIPT = """
import contextlib, io, json, sys
from liftplace_jax import evaluate
from liftplace_jax.host import flags as host_flags
said = []
for arguments in json.loads(sys.argv[1]):
    evaluate.flags.FLAGS.unparse_flags()
    for name in evaluate.flags.FLAGS:
        evaluate.flags.FLAGS[name].unparse()
    host_flags.parse_flags(["evaluate", *arguments[1:]], evaluate)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            evaluate.main(["evaluate", arguments[0]])
        except SystemExit as stop:
            said.append([stop.code, stderr.getvalue()])
print(json.dumps(said))
"""


def test_refused(home, reference_file):
    def files():
        return {path for path in home.rglob("*") if path.is_file()}

    before = files()
    said = python(home, "-c", SCRIPT, json.dumps(list(REFUSED.values())))
    for message, (code, error) in zip(REFUSED, json.loads(said), strict=True):
        assert code == 2 and "error: " in error and message in error
    assert files() == before


# Reference files of others --------------------------------------------------------------------


def test_references_of_pytorch_fid_and_adm(tmp_path):
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    found = evaluation.load_reference(tmp_path / "fid.npz")
    assert found.features is None and found.info == {} and set(found.statistics) == {"features"}
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=np.zeros(5), sigma_s=np.eye(5),
             arr_0=images)  # fmt: skip
    found = evaluation.load_reference(tmp_path / "adm.npz")
    assert set(found.statistics) == {"features", "spatial"}
    assert len(found.digest) == 64


def test_unusable_references(tmp_path):
    cases = {
        "has no mu and sigma; images": dict(arr_0=np.zeros((2, 4, 4, 3))),
        "mu and sigma must be (D,) and (D, D)": dict(mu=np.zeros(3), sigma=np.eye(4)),
        "sigma has non-finite values": dict(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)),
        "features (5, 3) do not fit mu": dict(
            mu=np.zeros(2), sigma=np.eye(2), features=np.zeros((5, 3))),
        "meta is [1], want a JSON object": dict(
            mu=np.zeros(2), sigma=np.eye(2), meta=np.array("[1]")),
        "Expecting property name": dict(mu=np.zeros(2), sigma=np.eye(2), meta=np.array("{")),
        "could not convert string": dict(mu=np.array(["a"]), sigma=np.eye(1)),
        "no readable .npz": dict(mu=np.array([{"a": 1}], object), sigma=np.eye(1)),
    }  # fmt: skip
    for message, arrays in cases.items():
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ReferenceError) as error:
            evaluation.load_reference(tmp_path / "bad.npz")
        assert message in str(error.value) and "bad.npz" in str(error.value)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:50])
    with pytest.raises(ReferenceError, match="cut.npz: no readable .npz"):
        evaluation.load_reference(tmp_path / "cut.npz")


def test_a_reference_of_other_features_is_refused(tmp_path):
    extractor = evaluation.feature_extractor("digits")
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="the reference has 3 features, 'digits' makes 64"):
        evaluation.check_reference(evaluation.load_reference(tmp_path / "small.npz"), extractor)
    evaluation.save_reference(
        tmp_path / "other.npz", {"features": (np.zeros(64), np.eye(64))}, None,
        {"extractor": "inception"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="made with features 'inception', the samples with 'digit"):
        evaluation.check_reference(evaluation.load_reference(tmp_path / "other.npz"), extractor)


def test_mixed_sizes_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        data.load_source("folder", "all", path=tmp_path / "empty")
    for i, size in enumerate((8, 10)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{i}.png")
    source = data.load_source("folder", "all", path=tmp_path)
    with pytest.raises(ValueError, match="has shape"):
        source.get(np.arange(2))
