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
from liftplace_jax.evaluation.references import ReferenceFileError
from liftplace_jax.training.metrics_io import read_metrics

TESTS = Path(__file__).parent
DIGITS = "--features=digits"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, and with a finished work directory "run" whose training had a curve."""
    folder = tmp_path_factory.mktemp("evaluate")
    python(
        folder,
        "-m",
        "liftplace_jax.main",
        f"--config={TESTS / 'tiny_config.py'}",
        "--workdir=run",
        "--config.evaluation.curve_every=4",
        "--config.evaluation.curve_samples=80",
    )
    return folder


def python(folder, *arguments):
    """Standard output of Python, run in a folder on one device."""
    environment = os.environ | {
        "XLA_FLAGS": QUICK_XLA,
        "LIFTPLACE_TEST_DATA": "data",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
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
    said = run(
        "gen",
        "--workdir=run",
        "--ref=ref.npz",
        DIGITS,
        "--num_samples=100",
        "--save_npz",
        "--batch_size=48",
        "--model=lift_place seed 0",
        "--out=scores",
    )
    assert "lift_place seed 0 (ema): digit-feature Frechet distance" in said
    result = json.loads((home / "scores" / "lift_place_seed_0-ema-100.json").read_text())
    protocol = result["protocol"]
    assert protocol["reference"]["sha256"] == evaluation.load_reference(reference_file).digest
    assert protocol["reference"]["count"] == 1437
    for name, value in {
        "num_samples": 100,
        "sampler": "ddim",
        "sample_steps": 4,
        "eta": 0.0,
        "skip_type": "uniform",
        "seed": 12345,
        "params": "ema",
        "features": "digits",
        "precision": "highest",
        "dtype": "float32",
    }.items():
        assert protocol[name] == value
    assert result["num_samples"] == 100 and "jax" in result["versions"]
    # What was saved scores the same: images go through uint8 either way.
    images = np.load(home / "scores" / "lift_place_seed_0-ema-100.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (100, 8, 8, 1) and images.dtype == np.uint8
    run(
        "calc",
        "--images=scores/lift_place_seed_0-ema-100.npz",
        "--ref=ref.npz",
        DIGITS,
        "--out=again.json",
        "--batch_size=32",
    )
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
    metrics = read_metrics(home / "run" / "student" / "lift_place" / "seed0")
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
    "want uint8 images (N, H, W, C) as arr_0, found no arr_0, nor statistics as mu and sigma; it "
    "has images (24, 8, 8, 1) uint8, images_clipped (24, 8, 8, 1) uint8": (
        "calc", "--images=run/teacher/samples.npz", "--ref=ref.npz", DIGITS),
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
    text, code = io.StringIO(), 0
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        try:
            evaluate.main(["evaluate", arguments[0]])
        except SystemExit as stop:
            code = stop.code
    said.append([code, text.getvalue()])
print(json.dumps(said))
"""


def test_refused(home, reference_file):
    def files():
        return {path for path in home.rglob("*") if path.is_file()}

    before = files()
    for message, (code, error) in zip(REFUSED, attempt(home, REFUSED.values()), strict=True):
        assert code == 2 and "error: " in error and message in error
    assert files() == before


def attempt(home, commands):
    """(status, what is printed) of each of several commands."""
    return json.loads(python(home, "-c", SCRIPT, json.dumps(list(commands))))


# Whatever can be compared ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(home, reference_file):
    """Images of digits as files of many kinds: the folder that holds them."""
    folder = home / "sets"
    for name in ("grey", "colour", "there"):
        (folder / name).mkdir(parents=True)
    source = data.load_source("digits", "train", data_dir=home / "data")
    images = source.get(np.arange(200))["image"]
    few = {"arr_0": images[:80]}
    rgb = np.repeat(images[:80], 3, axis=-1)
    for index, image in enumerate(images[:80]):
        Image.fromarray(image[..., 0]).save(folder / "grey" / f"{index:02d}.png")
        Image.fromarray(rgb[index]).save(folder / "colour" / f"{index:02d}.png")
    reference = evaluation.load_reference(reference_file)
    mean, covariance = reference.statistics["features"]
    statistics = {"mu": mean, "sigma": covariance}
    files = {
        "a": few,
        "b": {"arr_0": images[80:]},
        "rgb": {"arr_0": rgb},
        "fid": statistics,
        "adm": few | statistics,
        "float": {"arr_0": images[:80] / 255.0},
        "four": {"arr_0": np.repeat(images[:80], 4, axis=-1)},
        "none": {"arr_0": images[:0]},
        "first": {"arr_0": np.moveaxis(rgb, -1, 1)},
        "flat": {"arr_0": images[:80, ..., 0]},
        "other": {"samples": images, "labels": np.arange(200)},
        "half": {"arr_0": images[:80], "mu": mean},
        "negative": statistics | {"sigma": -covariance},
        "complex": statistics | {"sigma": covariance + 1j},
        "tiny": {"arr_0": images[:5]},
    }
    for name, arrays in files.items():
        np.savez(folder / f"{name}.npz", **arrays)
    np.save(folder / "single.npy", images)
    (folder / "single.npy").rename(folder / "single.npz")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_two_sets_of_any_kind_are_compared(home, sets, reference_file):
    """Two sample files, as of the ADM evaluator; statistics; both; folders."""
    pairs = {
        "a b": "(80 images)", "grey b": "(80 images)", "a ref": "(80 images)", "a adm": "",
        "a fid": "fid.npz: statistics alone, so there is no precision, recall or KID",
        "adm adm": "", "fid fid": "(statistics of a file)",
        "rgb b": "converted to grey: all, from RGB", "colour b": "converted to grey: 80 RGB",
    }  # fmt: skip

    def path(name):
        if name == "ref":
            return "ref.npz"
        return f"sets/{name}" if name in ("grey", "colour") else f"sets/{name}.npz"

    commands = [
        ("calc", f"--images={path(a)}", f"--ref={path(b)}", DIGITS, f"--out=out/{a}-{b}.json")
        for a, b in map(str.split, pairs)
    ]
    found = {}
    for (pair, message), (code, text) in zip(pairs.items(), attempt(home, commands), strict=True):
        assert code == 0 and message in text, text
        found[pair] = json.loads((home / "out" / f"{pair.replace(' ', '-')}.json").read_text())
    extractor = evaluation.feature_extractor("digits")
    images = [np.load(sets / f"{name}.npz")["arr_0"] for name in "ab"]
    samples = [
        evaluation.reference(
            data.Source(str(i), [{"image": x} for x in images[i]], image_shape=(8, 8, 1)),
            extractor,
            batch_size=80,
            generated=True,
        )
        for i in range(2)
    ]
    expected = evaluation.score(samples[1], samples[0])
    for pair in ("a b", "grey b", "rgb b", "colour b"):
        for name in ("frechet", "kid", "precision", "recall", "density", "coverage"):
            assert found[pair][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3)
        assert (found[pair]["num_samples"], found[pair]["num_reference"]) == (80, 120)
    exact = evaluation.score(evaluation.load_reference(reference_file), samples[0])
    for pair in ("a fid", "a adm", "a ref"):
        assert found[pair]["frechet"] == pytest.approx(exact["frechet"], rel=1e-4)
    assert "precision" not in found["a fid"]
    assert found["a adm"]["precision"] == found["a adm"]["density"] == 1  # the same 80 images
    assert abs(found["adm adm"]["frechet"]) < 1e-3 and found["fid fid"]["num_samples"] is None
    assert found["a b"]["protocol"]["reference"]["file"] == "b.npz"


UNUSABLE = {
    "float": "found arr_0 of (80, 8, 8, 1), float64, nor statistics as mu and sigma; it has arr_0",
    "four": "arr_0 (80, 8, 8, 4) has images of 4 channels, want 1 (grey) or 3 (RGB)",
    "first": "(80, 3, 8, 8) has images of 8 channels, want 1 (grey) or 3 (RGB); (N, C, H, W) is an",
    "none": "arr_0 (0, 8, 8, 1) has no images", "flat": "found arr_0 of (80, 8, 8), uint8",
    "other": "it has samples (200, 8, 8, 1) uint8, labels (200,) int64",
    "half": "has no sigma, though the other of mu and sigma",
    "single": "is a single array (200, 8, 8, 1) uint8",
    "negative": "sigma has negative variances (48 of 64", "complex": "sigma has complex numbers",
    "tiny": "5 images for 64 features of 'digits'",
}  # fmt: skip


@pytest.mark.parametrize("side", ["images", "ref"])
def test_files_that_cannot_be_compared_are_refused_by_name(home, sets, side):
    other = "ref" if side == "images" else "images"
    commands = [
        ("calc", f"--{side}=sets/{name}.npz", f"--{other}=sets/a.npz", DIGITS, "--out=no.json")
        for name in UNUSABLE
    ] + [("calc", f"--{side}=sets/notes.txt", f"--{other}=sets/a.npz", DIGITS)]
    messages = {**UNUSABLE, "notes": "notes.txt is a file: want a folder of images, or an .npz"}
    for (name, message), (code, text) in zip(
        messages.items(), attempt(home, commands), strict=True
    ):
        assert code == 2 and message in text and name in text
        assert text.startswith("error: ") and text.count("\n") == 1
    assert not (home / "no.json").exists()


def test_out_is_looked_at_first_and_holds_one_result(home, sets):
    def calc(out, *more, images="a"):
        return (
            "calc",
            f"--images=sets/{images}.npz",
            "--ref=sets/b.npz",
            DIGITS,
            f"--out={out}",
            *more,
        )

    def ref(out, *more):
        return ("ref", "--data=sets/a.npz", f"--out={out}", DIGITS, *more)

    (home / "taken").write_text("{}")
    commands = {
        calc("sets/there"): "sets/there is a folder: name a file",
        calc("taken/x.json"): "taken is no folder",
        calc("sets/a.npz"): "sets/a.npz is no result of this command: choose another --out",
        calc("sets/notes.txt"): "notes.txt is no result of this command",
        calc("one.json"): "",
        calc("one.json", "--batch_size=16"): "",  # the same result again
        calc("one.json", images="rgb"): "one.json holds a result of another protocol (images: 'a.n",
        calc("one.json", "--overwrite", images="rgb"): "",
        ref("new.npz"): "",
        ref("new.npz", "--batch_size=16"): "",
        ref("new.npz", "--num_images=70"): "another protocol (count: 80 -> 70)",
        ref("sets/a.npz"): "sets/a.npz is no result of this command",
        ref("new.npz", "--num_images=70", "--overwrite"): "",
        ("gen", "--workdir=run", "--ref=ref.npz", DIGITS, "--num_samples=80", "--out=taken"):
            "taken is no folder",
    }  # fmt: skip
    for message, (code, text) in zip(commands.values(), attempt(home, commands), strict=True):
        assert code == (2 if message else 0) and message in text, text
    assert json.loads((home / "one.json").read_text())["images"] == "rgb.npz"
    assert evaluation.load_reference(home / "new.npz").info["count"] == 70
    assert (sets / "notes.txt").read_text() == "mine"


def test_a_reference_of_a_grey_folder(home, sets):
    """As the extractor takes them: of one channel."""
    commands = [
        ("ref", "--data=sets/grey", "--out=grey.npz", DIGITS),
        ("ref", "--data=sets/a.npz", "--out=a.npz", DIGITS),
        ("calc", "--images=sets/a.npz", "--ref=grey.npz", DIGITS, "--batch_size=16", "--out=1"),
    ]
    assert [code for code, _ in attempt(home, commands)] == [0, 0, 0]
    same = json.loads((home / "1").read_text())
    assert same["density"] == same["coverage"] == same["precision"] == same["recall"] == 1
    grey, arrays = (evaluation.load_reference(home / f"{name}.npz") for name in ("grey", "a"))
    np.testing.assert_allclose(grey.features, arrays.features, atol=1e-5)


# Reference files of others --------------------------------------------------------------------


def test_references_of_pytorch_fid_and_adm(tmp_path):
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    found = evaluation.load_reference(tmp_path / "fid.npz")
    assert found.features is None and found.info == {} and set(found.statistics) == {"features"}
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(
        tmp_path / "adm.npz",
        mu=mean,
        sigma=covariance,
        mu_s=np.zeros(5),
        sigma_s=np.eye(5),
        arr_0=images,
    )
    found = evaluation.load_reference(tmp_path / "adm.npz")
    rows = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    singular = np.cov(rows, rowvar=False).astype(np.float32)  # not quite positive, as stored
    np.savez(tmp_path / "float32.npz", mu=rows.mean(0), sigma=singular)
    assert evaluation.load_reference(tmp_path / "float32.npz").statistics
    assert set(found.statistics) == {"features", "spatial"}
    assert len(found.digest) == 64


def test_unusable_references(tmp_path):
    cases = {
        "has no mu and sigma; images": dict(arr_0=np.zeros((2, 4, 4, 3))),
        "mu and sigma must be (D,) and (D, D)": dict(mu=np.zeros(3), sigma=np.eye(4)),
        "sigma has non-finite values": dict(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)),
        "features (5, 3) do not fit mu": dict(
            mu=np.zeros(2), sigma=np.eye(2), features=np.zeros((5, 3))
        ),
        "meta is [1], want a JSON object": dict(
            mu=np.zeros(2), sigma=np.eye(2), meta=np.array("[1]")
        ),
        "Expecting property name": dict(mu=np.zeros(2), sigma=np.eye(2), meta=np.array("{")),
        "could not convert string": dict(mu=np.array(["a"]), sigma=np.eye(1)),
        "sigma has negative variances (1 of 2, down to -1)": dict(
            mu=np.zeros(2), sigma=np.diag([1.0, -1])
        ),
        "sigma is not symmetric": dict(mu=np.zeros(2), sigma=np.array([[1, 0.5], [0, 1]])),
        "sigma is not positive semidefinite": dict(
            mu=np.zeros(2), sigma=np.array([[1, 2.0], [2, 1]])
        ),
        "sigma_s is not positive semidefinite": dict(
            mu=np.zeros(1), sigma=np.eye(1), mu_s=np.zeros(2), sigma_s=np.array([[1, 2], [2, 1]])
        ),
        "mu has complex numbers": dict(mu=np.zeros(2) + 1j, sigma=np.eye(2)),
        "mu and sigma must be (D,) and (D, D) with one D, got (0,)": dict(
            mu=np.zeros(0), sigma=np.zeros((0, 0))
        ),
        "has no sigma_s, though the other of mu_s and sigma_s": dict(
            mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(2)
        ),
        "features has non-finite values": dict(
            mu=np.zeros(2), sigma=np.eye(2), features=np.full((9, 2), np.inf)
        ),
        "meta has count 'many'": dict(
            mu=np.zeros(2), sigma=np.eye(2), meta=np.array('{"count": "many"}')
        ),
        "it has arr_1 (2,) int64": dict(arr_1=np.arange(2)),
        "no readable .npz": dict(mu=np.array([{"a": 1}], object), sigma=np.eye(1)),
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ReferenceFileError) as error:
            evaluation.load_reference(tmp_path / "bad.npz")
        assert message in str(error.value) and "bad.npz" in str(error.value)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:50])
    with pytest.raises(ReferenceFileError, match="cut.npz: no readable .npz"):
        evaluation.load_reference(tmp_path / "cut.npz")


def test_a_reference_of_other_features_is_refused(tmp_path):
    extractor = evaluation.feature_extractor("digits")
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="the reference has 3 features, 'digits' makes 64"):
        evaluation.check_reference(evaluation.load_reference(tmp_path / "small.npz"), extractor)
    np.savez(tmp_path / "rows.npz", mu=np.zeros(64), sigma=np.eye(64), features=np.zeros((5, 64)))
    with pytest.raises(ValueError, match="has features of 5 images, 5 neighbours need more"):
        evaluation.check_reference(evaluation.load_reference(tmp_path / "rows.npz"), extractor, 5)
    evaluation.save_reference(
        tmp_path / "other.npz",
        {"features": (np.zeros(64), np.eye(64))},
        None,
        {"extractor": "inception"},
    )
    with pytest.raises(ValueError, match="made with features 'inception', the samples with 'digit"):
        evaluation.check_reference(evaluation.load_reference(tmp_path / "other.npz"), extractor)


def test_mixed_sizes_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        data.load_source("folder", "all", path=tmp_path / "empty")
    for i, size in enumerate((8, 10)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="has shape"):
        data.load_source("folder", "all", path=tmp_path)


# Images that are handled, and their prompts -----------------------------------------------------


@pytest.fixture(scope="module")
def told(home, sets):
    """Pictures with prompts: "told" (metadata.csv), "told.npz", lists, and oblong pictures."""
    images, folder = np.load(sets / "a.npz")["arr_0"], home / "told"
    folder.mkdir()
    prompts = [
        f"picture {index}, {'red cat' if index % 3 else 'two blue dogs'}" for index in range(80)
    ]
    rows = [f'{index:02d}.png,"{prompt}"' for index, prompt in enumerate(prompts)]
    for index, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{index:02d}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    (home / "table.csv").write_text("\n".join(["file_name,text", *reversed(rows)]))
    (home / "other.csv").write_text("\n".join(["file_name,text", *rows[:-1], "99.png,cat"]))
    (home / "short.csv").write_text("\n".join(["file_name,text", *rows[:-1]]))
    (home / "lines.txt").write_text("\n".join(prompts))
    (home / "few.txt").write_text("\n".join(prompts[:3]))
    (home / "oblong").mkdir()
    for index in range(70):
        size = (12 + index % 5, 20 - index % 7)
        picture = Image.fromarray(images[index, ..., 0]).resize(size)
        picture.save(home / "oblong" / f"{index:02d}.png")
    return images, prompts


HANDLED = ("--jpeg_before=90", "--resize=8", "--jpeg=75")


def test_a_clip_score_is_of_handled_pictures_and_their_own_prompts(home, told, clip_folder):
    images, prompts = told
    clip, handling = evaluation.load_clip(clip_folder), evaluation.Handling(90, 8, 75)

    def expected(prompts):
        handled = [clip.preparation.picture(handling(image)) for image in images]
        cosines = clip.cosines(np.stack(handled), clip.text_features(prompts))
        return evaluation.clip_score(np.asarray(cosines))

    common = ("--ref=ref.npz", DIGITS, f"--clip_model={clip_folder}", *HANDLED)
    commands = {
        "own": ("--images=told",), "table": ("--images=told", "--prompts=table.csv"),
        "npz": ("--images=sets/a.npz", "--prompts=lines.txt", "--batch_size=24"),
        "few": ("--images=sets/a.npz", "--prompts=few.txt", "--repeat_prompts"),
    }  # fmt: skip
    done = attempt(
        home,
        [
            ("calc", *more, *common, f"--out=out/clip-{name}.json")
            for name, more in commands.items()
        ],
    )
    for name, (code, text) in zip(commands, done, strict=True):
        assert code == 0 and "CLIP score" in text, text
        said = "its images were handled otherwise than those that fit the samples" in text
        assert said == (name == "own")  # once in a process
        result = json.loads((home / "out" / f"clip-{name}.json").read_text())
        found = expected([prompts[index % 3] for index in range(80)] if name == "few" else prompts)
        for key, value in found.items():
            assert result[key] == pytest.approx(value, abs=1e-6)
        protocol = result["protocol"]
        assert protocol["handling"] == handling.identity and not protocol["squeeze"]
        assert protocol["prompts"]["count"] == (3 if name == "few" else 80)
        assert protocol["clip_model"]["text"]["encoder"]["name"] == clip_folder.name
        assert protocol["inception_rule"] == "adm"


def test_real_images_of_any_size_are_squeezed(home, told):
    options = ("--data=oblong", DIGITS, "--split=all", *HANDLED[1:])
    commands = {
        ("ref", *options, "--squeeze", "--out=squeezed.npz"): "64 not square, squeezed",
        ("ref", *options, "--out=no.npz"): "not square: set image_size",
        ("ref", *options, "--squeeze", "--image_size=8", "--out=no.npz"): "give --squeeze with",
        ("ref", "--data=oblong", DIGITS, "--squeeze", "--out=no.npz"): "give --squeeze with",
        ("ref", *options, "--jpeg_before=75", "--out=no.npz"): "--jpeg_before is not for ref",
        ("calc", "--images=sets/a.npz", "--ref=squeezed.npz", DIGITS, *HANDLED): "(80 images)",
    }  # fmt: skip
    for message, (code, text) in zip(commands.values(), attempt(home, commands), strict=True):
        assert message in text, text
        assert code == (2 if message.startswith(("not square", "give", "--jpeg")) else 0)
    assert "handled otherwise" not in text  # the reference was handled as it should be
    found = evaluation.load_reference(home / "squeezed.npz")
    assert found.info["handling"] == {"jpeg_before": 0, "resize": 8, "jpeg": 75}
    assert found.info["squeeze"] and found.info["image_shape"] == [8, 8, 1]
    handling = evaluation.Handling(resize=8, jpeg=75)
    pictures = [
        np.asarray(Image.open(path))[..., None] for path in sorted((home / "oblong").iterdir())
    ]
    handled = np.stack([handling(picture) for picture in pictures])
    features = evaluation.feature_extractor("digits")(handled / 127.5 - 1)
    np.testing.assert_allclose(found.features, features, rtol=1e-3, atol=1e-4)


def test_prompts_that_are_of_other_images_are_refused(home, told, clip_folder):
    clip, ref = f"--clip_model={clip_folder}", "--ref=ref.npz"
    commands = {
        ("--images=told", clip, "--prompts=other.csv"): "there is no picture '99.png' in told",
        ("--images=told", clip, "--prompts=short.csv"): "79.png has no caption: short.csv does not",
        ("--images=told", clip, "--prompts=lines.txt"): "lines.txt does not say which prompt is of",
        ("--images=told", clip, "--prompts=no.csv"): "no.csv: no such file",
        ("--images=sets/grey", clip): "sets/grey has no captions",
        ("--images=sets/a.npz", clip): "sets/a.npz: its images have no names, so --prompts must be",
        ("--images=sets/a.npz", clip, "--prompts=few.txt"):
            "few.txt has 3 prompts, sets/a.npz has 80 images: they do not belong together (or say",
        ("--images=sets/tiny.npz", clip, "--prompts=lines.txt", "--repeat_prompts", "--allow_few"):
            "lines.txt has 80 prompts, sets/tiny.npz has 5 images: they do not belong together",
        ("--images=sets/fid.npz", clip): "sets/fid.npz has statistics alone: a CLIP score needs im",
        ("--images=told", "--prompts=table.csv"): "--prompts are for a CLIP score: name its --clip",
        ("--images=told", "--clip_model=nowhere"): "nowhere: no config.json of a CLIP text model",
    }  # fmt: skip
    done = attempt(home, [("calc", ref, DIGITS, "--out=no.json", *more) for more in commands])
    for message, (code, text) in zip(commands.values(), done, strict=True):
        error = text.partition("error: ")[2]  # after what is said of the folder
        assert code == 2 and message in error and error.count("\n") == 1, text
    assert not (home / "no.json").exists()


def test_flags_of_the_protocol_take_the_place_of_the_configs_fields(home):
    script = """
import json, pathlib, sys
from liftplace_jax import evaluate
from liftplace_jax.host import flags as host_flags
found = []
for arguments in json.loads(sys.argv[1]):
    for name in evaluate.flags.FLAGS:
        evaluate.flags.FLAGS[name].unparse()
    host_flags.parse_flags(["evaluate", *arguments], evaluate)
    found.append(evaluate.read_config(pathlib.Path("run")).evaluation.to_dict())
print(json.dumps(found))
"""
    given = [
        [],
        ["--protocol=bk_sdm", "--jpeg_before=0", "--resize=0"],
        ["--jpeg=90", DIGITS],
        [
            "--protocol=bk_sdm",
            DIGITS,
            "--inception_rule=adm",
            "--clip_model=c",
            "--prompts=p.txt",
            "--repeat_prompts",
        ],
    ]
    plain, two, one, four = json.loads(python(home, "-c", script, json.dumps(given)))
    off = {"jpeg_before": 0, "resize": None, "jpeg": 0, "inception_rule": "adm"}
    assert plain | off == plain and plain["features"] == "inception"
    assert two | evaluation.BK_SDM | {"jpeg_before": 0, "resize": None} == two
    assert one | off | {"jpeg": 90, "features": "digits"} == one
    told = {
        "features": "digits",
        "inception_rule": "adm",
        "clip_model": "c",
        "prompts": "p.txt",
        "repeat_prompts": True,
    }
    assert four | evaluation.BK_SDM | told == four
