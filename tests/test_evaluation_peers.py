"""Features and scores against pytorch-fid and torch-fidelity, on the same weights and images."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from test_inception import generated
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from liftplace_jax.evaluation import (
    feature_extractor,
    frechet_distance,
    frechet_from_moments,
    inception_score,
    kernel_distance,
    moments_update,
    moments_zero,
)
from liftplace_jax.suites import evaluation, torch_inception
from liftplace_jax.suites.options import Options

SHAPES = ((6, 32, 32, 3), (2, 300, 310, 3))


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """Tensors by name, and the .pth file that holds them."""
    _, meta = golden("inception_fid")
    tensors = generated(meta["shapes"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    return tensors, path


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for shape in SHAPES]


def ours(name, path, images):
    extractor = feature_extractor(name, weights=path)
    found = [jax.jit(extractor.apply)(extractor.params, x / np.float32(127.5) - 1) for x in images]
    return {kind: np.concatenate([np.asarray(f[kind]) for f in found]) for kind in found[0]}


def nchw(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_features_are_those_of_pytorch_fid(weights, images):
    tensors, path = weights
    network = torch_inception.pytorch_fid_network(tensors)
    with torch.inference_mode():
        expected = [network(nchw(x).float() / 255)[0][..., 0, 0].numpy() for x in images]
    found = ours("inception_pytorch_fid", path, images)["features"]
    assert_close(found, np.concatenate(expected))


def test_features_are_those_of_torch_fidelity(weights, images):
    _, path = weights
    network = FeatureExtractorInceptionV3(
        "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1).flatten(1))
    )
    with torch.inference_mode():
        pool, logits = map(torch.cat, zip(*(network(nchw(x)) for x in images), strict=True))
    found = ours("inception", path, images)
    assert_close(found["features"], pool.numpy())
    assert_close(found["logits"], logits.numpy())
    assert_close(found["spatial"], torch.cat(spatial).numpy())


@pytest.fixture(scope="module")
def features():
    """Two sets of correlated features, (300, 64) float32, as a ReLU leaves them."""
    rng = np.random.default_rng(0)
    mix, bias = rng.normal(size=(64, 64)) / 8, rng.normal(size=64)
    rows = [np.maximum(rng.normal(size=(300, 64)) @ mix * s + bias, 0) for s in (1, 1.3)]
    return [x.astype(np.float32) for x in rows]


def test_frechet_distance_of_moments(features):
    import pytorch_fid.fid_score

    found = []
    for rows in features:
        moments, update = moments_zero(64), jax.jit(moments_update)
        for part in np.split(rows, 3):
            moments = update(moments, part, np.ones(100, bool))
        found.append(moments)
    found = frechet_from_moments(*found)
    statistics = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in features]
    expected = pytorch_fid.fid_score.calculate_frechet_distance(*statistics[0], *statistics[1])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    peer = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in features]
    expected = fid_statistics_to_metric(*peer, verbose=False)["frechet_inception_distance"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_frechet_distance_of_singular_covariances(features):
    """Fewer samples than dimensions, and features that are always zero."""
    rows = [np.pad(x[:40], ((0, 0), (0, 4))) for x in features]
    statistics = [(x.mean(0), np.cov(x, rowvar=False)) for x in rows]
    peer = [fid_features_to_statistics(torch.from_numpy(x)) for x in rows]
    expected = fid_statistics_to_metric(*peer, verbose=False)["frechet_inception_distance"]
    found = frechet_distance(*statistics[0], *statistics[1])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(frechet_distance(*statistics[0], *statistics[0])) < 1e-4 * expected


def test_kernel_distance(features):
    expected = kid_features_to_metric(
        *map(torch.from_numpy, features), kid_subsets=1, kid_subset_size=300, verbose=False
    )
    found = kernel_distance(*features, subset_size=300, subsets=1)
    np.testing.assert_allclose(found["kid"], expected["kernel_inception_distance_mean"], rtol=1e-4)


def test_inception_score(features):
    expected = isc_features_to_metric(torch.from_numpy(features[0]), splits=3, shuffle=False)
    found = inception_score(features[0], split_size=100)
    for name in ("inception_score", "inception_score_std"):
        key = name if name.endswith("std") else f"{name}_mean"
        np.testing.assert_allclose(found[name], expected[key], rtol=1e-5)


def test_suite_compares_the_same_features_and_distances(tmp_path):
    command = [sys.executable, "-m", "liftplace_jax.benchmark", "--suite=evaluation", "--quick"]
    subprocess.run([*command, "--repeats=3", f"--out={tmp_path}"], check=True, timeout=600)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    (features,), (solve,) = result["rows"], result["tables"]["solve"]["rows"]
    assert features["difference"] < 1e-4 and solve["difference"] < 1e-4
    assert features["ours_per_second"] > 0 and features["ratio"] > 0 and solve["ratio"] > 0
    assert "\n| 2x64x64x3 | " in (tmp_path / "evaluation.md").read_text()


def test_suite_without_the_peer(monkeypatch):
    """What it measures is not of interest here, so nothing heavy is."""
    monkeypatch.setattr(torch_inception.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluation, "_measure_features", lambda batch, repeats, peer: {"p": peer})
    result = evaluation.run(Options(quick=True, repeats=3))
    assert result["rows"] == [{"p": False}]
    assert any("no ratio of features" in note for note in result["notes"])
