"""Kernel distance, Inception Score and the ADM evaluator's precision and recall."""

import numpy as np
import pytest

from liftplace_jax.evaluation.metrics import inception_score, kernel_distance, precision_recall

PRDC = ("precision", "recall", "density", "coverage")


def test_kernel_distance(golden):
    arrays, meta = golden("eval_metrics")
    first, second = (arrays[f"in/generic/features_{i}"][:500] for i in (1, 2))
    found = kernel_distance(first, second, subset_size=500, subsets=1)
    expected = meta["results"]["kid_generic_first_n"]["kernel_inception_distance_mean"]
    np.testing.assert_allclose(found["kid"], expected, rtol=1e-5)
    assert found["kid_std"] == 0


def test_subsets_of_the_kernel_distance(golden):
    """Unbiased: the mean over subsets is near the value of all rows; equal sets are near zero."""
    arrays, _ = golden("eval_metrics")
    first, second = (arrays[f"in/generic/features_{i}"][:500] for i in (1, 2))
    whole = kernel_distance(first, second, subset_size=500, subsets=1)["kid"]
    parts = kernel_distance(first, second, subset_size=100, subsets=200)
    assert abs(parts["kid"] - whole) < 4 * parts["kid_std"] / np.sqrt(200)
    assert parts == kernel_distance(first, second, subset_size=100, subsets=200)
    assert parts != kernel_distance(first, second, subset_size=100, subsets=200, seed=1)
    same = kernel_distance(first[:250], first[250:], subset_size=100, subsets=200)
    assert abs(same["kid"]) < 0.1 * whole


@pytest.mark.parametrize("split_size", [5000, 250, 300])
def test_inception_score_is_that_of_the_adm_evaluator(golden, split_size):
    arrays, meta = golden("eval_metrics")
    expected = meta["results"]["inception_score_adm"]["split_size -> IS"][str(split_size)]
    found = inception_score(arrays["in/is/logits"], split_size=split_size)
    np.testing.assert_allclose(found["inception_score"], expected, rtol=1e-5)


def test_inception_score_is_that_of_torch_fidelity(golden):
    arrays, meta = golden("eval_metrics")
    expected = meta["results"]["inception_score_torch_fidelity_10_splits_noshuffle"]
    found = inception_score(arrays["in/is/logits"], split_size=100)
    np.testing.assert_allclose(found["inception_score"], expected["inception_score_mean"], 1e-5)
    np.testing.assert_allclose(found["inception_score_std"], expected["inception_score_std"], 1e-5)


def test_inception_score_of_certain_and_uncertain_classifiers():
    assert inception_score(np.zeros((20, 10)))["inception_score"] == pytest.approx(1)
    certain = np.where(np.eye(10), 1e4, -1e4)  # softmax without overflow
    assert inception_score(certain)["inception_score"] == pytest.approx(10)


@pytest.mark.parametrize("case, factor", [("unit", 1), ("large", 64)])
def test_precision_recall_is_that_of_the_adm_evaluator(golden, case, factor):
    arrays, meta = golden("eval_metrics")
    real, fake = (arrays[f"in/pr/unit/{side}"] * factor for side in ("real", "fake"))
    found = precision_recall(real, fake, k=3)
    expected = meta["results"]["precision_recall"][case]["adm_k3_exact_float64"]
    for name, value in expected.items():
        assert abs(found[name] - value) <= 0.002


@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("copies", [1, 8])
def test_neighbours_do_not_depend_on_rounding(golden, offset, copies):
    """A set and itself, in features as another batch size makes them: last bits differ."""
    arrays, _ = golden("eval_metrics")
    rows = (arrays["in/pr/unit/real"][:200] + offset).astype(np.float32)
    rows = np.concatenate([rows] * copies)  # 8 copies: balls of k = 5 are points
    rng, expected = np.random.default_rng(0), dict.fromkeys(PRDC, float(copies == 1))
    assert precision_recall(rows, rows) == expected
    scale = np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(rows.shape[1])
    for _ in range(3):
        noisy = [
            (rows + 1e-7 * scale * rng.normal(size=rows.shape)).astype(np.float32) for _ in range(2)
        ]
        assert precision_recall(*noisy) == expected
        assert precision_recall(rows, noisy[0]) == precision_recall(noisy[0], rows) == expected
    line = np.arange(50.0)[:, None]  # neighbours lie on the surface: in its ball is each alone
    assert precision_recall(line, line, k=1) == dict.fromkeys(PRDC, 1.0)


def test_kernel_distance_does_not_depend_on_rounding(golden):
    arrays, _ = golden("eval_metrics")
    rows = arrays["in/generic/features_1"][:200]
    noise = 1e-7 * np.random.default_rng(0).normal(size=rows.shape)
    others = rows, (rows * (1 + noise)).astype(rows.dtype)
    kids = [kernel_distance(rows, x, subset_size=100, subsets=5)["kid"] for x in others]
    assert kids[0] == pytest.approx(kids[1], abs=1e-5)


def test_bad_input():
    features = np.zeros((10, 4))
    with pytest.raises(ValueError, match=r"features must be \(N, D\) and \(M, D\)"):
        kernel_distance(features, np.zeros((10, 5)))
    with pytest.raises(ValueError, match="got 10 real and 10 generated"):
        kernel_distance(features, features)
    with pytest.raises(ValueError, match="split_size >= 1"):
        inception_score(features, split_size=0)
