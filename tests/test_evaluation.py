"""Evaluation: Frechet distance, neighbours, the digit features, and scores of whole samplers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from sklearn.neighbors import NearestNeighbors

from liftplace_jax.data import Source, eval_batches, load_source
from liftplace_jax.evaluation import (
    Extractor,
    collect,
    covariance,
    feature_extractor,
    frechet_distance,
    frechet_distance_in_graph,
    frechet_from_moments,
    make_digit_features,
    moments_merge,
    moments_update,
    moments_zero,
    output_error,
    precision_recall,
    reference,
    score,
    to_uint8,
)
from liftplace_jax.evaluation.features import digit_logits

CASES = ["generic", "same", "rank_deficient", "near_singular", "sparse_relu", "dead_features"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    return {split: load_source("digits", split, data_dir=data_dir) for split in ("train", "test")}


@pytest.fixture
def batch_sharding():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def moments_of(features, batch=128, fill=0.0):
    """Moments of (N, D) features in padded batches; the padding holds `fill`."""
    moments, update = moments_zero(features.shape[1]), jax.jit(moments_update)
    for start in range(0, len(features), batch):
        rows = features[start : start + batch]
        padded = np.full((batch, features.shape[1]), fill, np.float32)
        padded[: len(rows)] = rows
        moments = update(moments, padded, np.arange(batch) < len(rows))
    return moments


# Frechet distance


@pytest.mark.parametrize("case", CASES)
def test_frechet_reproduces_the_published_evaluators(golden, case):
    arrays, meta = golden("eval_metrics")
    statistics = [arrays[f"out64/{case}/{name}"] for name in ("mu_1", "sigma_1", "mu_2", "sigma_2")]
    expected = meta["results"][case]["fid_pytorch_fid"]
    atol = 1e-6 if case == "same" else 0
    np.testing.assert_allclose(frechet_distance(*statistics), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_frechet_from_features(golden, case):
    arrays, meta = golden("eval_metrics")
    expected = meta["results"][case]["fid_pytorch_fid"]
    a, b = (moments_of(arrays[f"in/{case}/features_{i}"]) for i in (1, 2))
    few = case == "rank_deficient"
    # float32 moments of a singular covariance are that much less certain.
    rtol, scale = (1e-4, 1e-3) if few else (1e-6, 1e-4)
    result = frechet_from_moments(a, b, allow_few=few)
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(jax.jit(frechet_distance_in_graph)(a, b), expected, scale, scale)


def test_frechet_matches_the_matrix_square_root():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)) + i for i in range(2)]
    (mu1, s1), (mu2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in sets)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    np.testing.assert_allclose(frechet_distance(mu1, s1, mu2, s2), expected, rtol=1e-9)


@pytest.mark.parametrize("offset", [0, 1e4, -1e6])
def test_moments_far_from_zero(offset):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(1000, 6)) * [1, 2, 3, 4, 5, 6] + offset).astype(np.float32)
    moments = moments_of(features, batch=96, fill=np.nan)
    assert moments.count == 1000
    exact = features.astype(np.float64)
    expected = np.cov(exact, rowvar=False)
    np.testing.assert_allclose(covariance(moments), expected, rtol=1e-5, atol=1e-5)
    mean = np.asarray(moments.shift, np.float64) + moments.mean
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("batch", [7, 64, 500])
def test_moments_do_not_depend_on_the_batch_size(batch):
    features = np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32)
    one, other = moments_of(features, 300), moments_of(features, batch)
    np.testing.assert_allclose(covariance(one), covariance(other), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-6)


def test_merged_moments_are_those_of_the_union():
    features = np.random.default_rng(2).normal(size=(200, 4)).astype(np.float32) + 50
    parts = jax.vmap(moments_update, (None, 0, None))(
        moments_zero(4), features.reshape(4, 50, 4), jnp.ones(50, bool)
    )
    merged = moments_zero(4)
    for index in range(4):
        merged = moments_merge(merged, jax.tree.map(lambda leaf, i=index: leaf[i], parts))
    merged = moments_merge(merged, moments_zero(4))
    assert merged.count == 200
    np.testing.assert_allclose(covariance(merged), np.cov(features.T), rtol=1e-5, atol=1e-5)


def test_moments_of_a_sharded_batch_are_global(batch_sharding):
    features = np.random.default_rng(3).normal(size=(64, 4)).astype(np.float32)
    mask = np.arange(64) < 61
    sharded = jax.jit(moments_update)(
        moments_zero(4), *jax.device_put((features, mask), batch_sharding)
    )
    assert sharded.count == 61
    np.testing.assert_allclose(covariance(sharded), np.cov(features[:61].T), rtol=1e-5, atol=1e-6)


def test_frechet_bad_input():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="sigma2 has non-finite"):
        frechet_distance(mu, sigma, mu, sigma * np.nan)
    for message, bad in {
        "sigma1 has negative variances": np.diag([1, 1, -1.0]),
        "sigma1 is not symmetric": np.eye(3) + np.eye(3, k=1),
        "sigma1 has complex numbers": sigma + 1j,
        "not positive semidefinite": np.eye(3) + 2 * (np.eye(3, k=2) + np.eye(3, k=-2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            frechet_distance(mu, bad, mu, sigma)
        with pytest.raises(ValueError, match=message.replace("1", "2")):
            frechet_distance(mu, sigma, mu, bad)
    with pytest.raises(ValueError, match="feature dimensions differ: 3 and 4"):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    many, few = moments_of(features), moments_of(features[:7])
    with pytest.raises(ValueError, match="7 samples for 8 feature dimensions.*allow_few"):
        frechet_from_moments(many, few)
    assert frechet_from_moments(many, few, allow_few=True) > 0
    with pytest.raises(ValueError, match="1 samples"):
        frechet_from_moments(many, moments_of(features[:1]), allow_few=True)
    with pytest.raises(ValueError, match="dimensions differ: 8 and 5"):
        frechet_from_moments(many, moments_of(features[:, :5]))
    with pytest.raises(ValueError, match="non-finite"):
        frechet_from_moments(many, moments_of(np.where(features > 1, np.nan, features)))
    with pytest.raises(ValueError, match=r"features \(20, 8\) do not fit"):
        moments_update(moments_zero(5), features, np.ones(20, bool))
    with pytest.raises(ValueError, match=r"mask \(3,\)"):
        moments_update(moments_zero(8), features, np.ones(3, bool))


# Precision, recall, density, coverage


@pytest.mark.parametrize("case, factor", [("unit", 1), ("large", 64)])
def test_precision_recall_reproduces_prdc(golden, case, factor):
    arrays, meta = golden("eval_metrics")
    expected = meta["results"]["precision_recall"][case]
    sets = [arrays[f"in/pr/unit/{name}"] * factor for name in ("real", "fake")]
    result = precision_recall(*sets, k=5)
    for name, value in expected["prdc_k5"].items():
        np.testing.assert_allclose(result[name], value, rtol=2e-3 * (name == "density"), atol=2e-3)
    three = precision_recall(*sets, k=3)
    for name, value in expected["adm_k3_exact_float64"].items():
        np.testing.assert_allclose(three[name], value, atol=2e-3)


@pytest.mark.parametrize("offset", [0, 300])
@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_matches_scikit_learn(k, offset):
    rng = np.random.default_rng(k)
    real = (rng.normal(size=(90, 6)) + offset).astype(np.float32)
    fake = (rng.normal(size=(70, 6)) * 0.8 + 0.5 + offset).astype(np.float32)

    def radii(features):
        model = NearestNeighbors(n_neighbors=k).fit(features.astype(np.float64))
        return model.kneighbors()[0][:, -1]  # without the point itself

    distances = np.linalg.norm(real[:, None].astype(np.float64) - fake[None], axis=-1)
    inside = distances < radii(real)[:, None]
    result = precision_recall(real, fake, k=k)
    expected = {
        "precision": inside.any(0).mean(),
        "recall": (distances < radii(fake)).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }
    assert result == pytest.approx(expected, abs=1e-9)


def test_precision_recall_bad_input():
    rows = np.zeros((5, 3))
    with pytest.raises(ValueError, match="k = 5 neighbours need .* 6 real and 5 generated"):
        precision_recall(np.zeros((6, 3)), rows)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        precision_recall(rows, rows[:, :2], k=2)
    with pytest.raises(ValueError, match="generated features have non-finite"):
        precision_recall(rows, rows + np.inf, k=2)


# Features


def test_digit_classifier_has_its_stated_accuracy(digits):
    extractor = feature_extractor("digits")
    correct, count = make_digit_features.accuracy(extractor.params, digits["test"])
    assert extractor.info["test_correct"] == f"{correct}/{count}"
    assert float(extractor.info["test_accuracy"]) == round(correct / count, 4) >= 0.98
    assert "Inception" not in extractor.label


def test_extractor_is_a_pure_function_of_images():
    extractor = feature_extractor("digits")
    assert extractor is feature_extractor("digits")
    images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 1), minval=-1)
    features = extractor(images)
    assert features.shape == (5, extractor.dim) and features.dtype == jnp.float32
    single = jax.jit(jax.vmap(lambda image: extractor(image[None])[0]))(images)
    np.testing.assert_allclose(features, single, atol=1e-5)


def test_digit_classifier_against_torch():
    import torch

    params = feature_extractor("digits").params
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    x = torch.tensor(np.moveaxis(images, -1, 1))
    tensors = {name: torch.tensor(value) for name, value in params.items()}
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    for name in ("conv1", "conv2"):
        kernel = tensors[f"{name}.kernel"].permute(3, 2, 0, 1)
        x = gelu(torch.nn.functional.conv2d(x, kernel, tensors[f"{name}.bias"], padding=1))
    x = torch.nn.functional.avg_pool2d(x, 2).permute(0, 2, 3, 1).reshape(3, -1)
    x = gelu(x @ tensors["hidden.kernel"] + tensors["hidden.bias"])
    expected = x @ tensors["classes.kernel"] + tensors["classes.bias"]
    np.testing.assert_allclose(digit_logits(params, images), expected.numpy(), atol=1e-4)


def test_unknown_extractor():
    with pytest.raises(ValueError, match=r"extractor 'inception9', known: \['digits"):
        feature_extractor("inception9")


def test_make_digit_features_writes_a_usable_file(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(make_digit_features, "load_source", lambda name, split, **_: digits[split])
    short = functools.partial(make_digit_features.train, steps=25)
    monkeypatch.setattr(make_digit_features, "train", short)
    outputs = [tmp_path / name for name in ("one", "two")]
    for output in outputs:
        make_digit_features.main(["--output", str(output)])
    assert sorted(tmp_path.iterdir()) == sorted(outputs)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with safe_open(outputs[0], "numpy") as file:
        assert float(json.loads(file.metadata()["info"])["test_accuracy"]) > 0.6


# Whole evaluations


def blobs(params, keys):
    """A toy sampler: noise, smoothed and shifted."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys)
    return params["scale"] * (noise + jnp.roll(noise, 1, 1)) + params["shift"]


PARAMS = {"scale": jnp.float32(0.4), "shift": jnp.float32(-0.3)}


def test_uint8_round_trip():
    pixels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_uint8(pixels.astype(np.float32) / 127.5 - 1), pixels)
    values = jnp.array([-7.0, -1, 1, 7, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])
    assert to_uint8(values).tolist() == [0, 0, 255, 255, 0, 1]


def test_samples_depend_neither_on_batch_size_nor_on_devices(batch_sharding):
    extractor = feature_extractor("digits")
    draw = functools.partial(collect, blobs, PARAMS, 100, extractor=extractor, seed=3)
    done = []
    base = draw(batch_size=100, keep_images=30, progress=done.append)
    assert done == [100]
    assert base.features.shape == (100, 64) and base.moments.count == 100
    assert base.images.shape == (30, 8, 8, 1) and base.images.dtype == np.uint8
    for other in (
        draw(batch_size=24, keep_images=30),
        draw(batch_size=256, keep_images=30),
        draw(batch_size=24, keep_images=30, sharding=batch_sharding),
    ):
        assert other.moments.count == 100
        assert np.array_equal(base.images, other.images)
        np.testing.assert_allclose(base.features, other.features, atol=1e-5)
        scale = np.abs(base.moments.m2).max()
        np.testing.assert_allclose(base.moments.m2, other.moments.m2, atol=1e-5 * scale)
    other_seed = draw(batch_size=100, keep_images=30, seed=4)
    assert not np.array_equal(base.images, other_seed.images)


def test_collected_moments_are_those_of_the_saved_images():
    extractor = feature_extractor("digits")
    samples = collect(blobs, PARAMS, 70, batch_size=32, extractor=extractor, seed=0, keep_images=70)
    source = Source("saved", [{"image": i} for i in samples.images], image_shape=(8, 8, 1))
    real = reference(source, extractor, batch_size=64)
    np.testing.assert_allclose(real.features, samples.features, atol=1e-5)
    result = score(real, samples)
    assert abs(result["frechet"]) < 1e-3
    assert result["precision"] == result["recall"] == result["coverage"] == 1


def test_samples_without_features_are_the_same_and_cannot_be_scored(batch_sharding):
    options = dict(batch_size=24, seed=3, keep_images=30)
    done = []
    bare = collect(blobs, PARAMS, 40, extractor=None, progress=done.append, **options)
    assert done == [24, 40] and bare.features.shape == (40, 0) and bare.extractor is None
    digits = collect(blobs, PARAMS, 40, extractor=feature_extractor("digits"), **options)
    eight = collect(blobs, PARAMS, 40, extractor=None, sharding=batch_sharding, **options)
    assert np.array_equal(bare.images, digits.images)
    assert np.array_equal(bare.images, eight.images)
    with pytest.raises(ValueError, match="without features cannot be compared: name an extractor"):
        score(bare, digits)
    with pytest.raises(ValueError, match="without features cannot be compared"):
        score(digits, bare)

    def broken(params, keys):
        return blobs(params, keys).at[5].set(jnp.nan)

    with pytest.raises(ValueError, match="image 5 or its features have non-finite values"):
        collect(broken, PARAMS, 40, extractor=None, **options)


def test_one_compilation_serves_changing_parameters():
    traces, once = [], None

    def sampler(params, keys):
        traces.append(1)
        return blobs(params, keys)

    for scale in (0.1, 0.2):
        params = {**PARAMS, "scale": jnp.float32(scale)}
        collect(sampler, params, 40, batch_size=20, extractor=feature_extractor("digits"), seed=0)
        once = once or len(traces)
    assert len(traces) == once


def test_reference_on_eight_devices(digits, batch_sharding):
    extractor = feature_extractor("digits")
    one = reference(digits["test"], extractor, batch_size=128, limit=301, keep_images=2)
    eight = reference(digits["test"], extractor, batch_size=64, limit=301, sharding=batch_sharding)
    assert one.moments.count == eight.moments.count == 301 and one.images.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(one.features, eight.features, atol=1e-5)
    assert abs(frechet_from_moments(one.moments, eight.moments)) < 1e-3


def test_saved_samples_keep_all_rows_and_logits_as_drawn_ones_do(digits, monkeypatch):
    monkeypatch.setattr("liftplace_jax.evaluation.samples.REFERENCE_ROWS", 50)

    def apply(params, images):
        return {"features": images.reshape(-1, 64), "logits": images[:, 0, :, 0]}

    extractor = dataclasses.replace(feature_extractor("digits"), apply=apply)
    options = {"batch_size": 40, "limit": 90}
    real = reference(digits["test"], extractor, **options)
    saved = reference(digits["test"], extractor, **options, generated=True)
    assert real.features.shape == (50, 64) and saved.features.shape == (90, 64)
    assert real.logits is None and saved.logits.shape == (90, 8)
    np.testing.assert_array_equal(saved.features[:50], real.features)
    assert score(saved, saved, allow_few=True)["inception_score"] > 1


def test_real_digits_score_well_and_noise_does_not(digits):
    extractor = feature_extractor("digits")
    images = digits["train"].get(np.arange(1437))["image"]

    def half(start):
        records = [{"image": image} for image in images[start::2]]
        return reference(Source("half", records, image_shape=(8, 8, 1)), extractor, batch_size=256)

    real = half(0)
    good = score(real, half(1))
    bad = score(real, collect(blobs, PARAMS, 256, batch_size=256, extractor=extractor, seed=0))
    assert good["label"] == "digit-feature Frechet distance" and good["num_samples"] == 718
    assert bad["frechet"] > 20 * good["frechet"]
    assert good["precision"] > 0.85 and good["recall"] > 0.85 and good["coverage"] > 0.9
    assert bad["precision"] < 0.2


def test_collect_bad_input(batch_sharding):
    extractor = feature_extractor("digits")
    draw = functools.partial(collect, extractor=extractor, seed=0)

    def broken(bad_key, keys):
        return jnp.where((keys == bad_key)[:, None, None, None], jnp.nan, blobs(PARAMS, keys))

    with pytest.raises(ValueError, match="image 11 or its features have non-finite"):
        draw(broken, jax.random.fold_in(jax.random.key(0), 11), 16, batch_size=8)
    with pytest.raises(ValueError, match="batch_size 12 is not a multiple of its 8 shards"):
        draw(blobs, PARAMS, 16, batch_size=12, sharding=batch_sharding)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        draw(blobs, PARAMS, 16, batch_size=0)
    with pytest.raises(ValueError, match="num_samples must be positive"):
        draw(blobs, PARAMS, 0, batch_size=8)
    with pytest.raises(ValueError, match=r"images are \(4, 8, 1\).*'digits' takes \(8, 8, 1\)"):
        draw(lambda params, keys: blobs(PARAMS, keys)[:, :4], None, 8, batch_size=8)


def test_score_bad_input():
    extractor = feature_extractor("digits")
    few = collect(blobs, PARAMS, 40, batch_size=40, extractor=extractor, seed=0)
    with pytest.raises(ValueError, match="40 samples for 64 feature dimensions"):
        score(few, few)
    assert score(few, few, allow_few=True)["num_samples"] == 40
    other = dataclasses.replace(few, extractor=dataclasses.replace(extractor, name="mine"))
    with pytest.raises(ValueError, match="'digits' and 'mine'"):
        score(few, other)


def test_an_extractor_of_ones_own():
    extractor = Extractor(
        name="corners",
        label="corner Frechet distance",
        dim=2,
        image_shape=(2, 2, 1),
        apply=lambda weight, images: weight * images.reshape(-1, 4)[:, ::3],
        params=np.float32(2),
        info={},
    )
    samples = collect(
        lambda params, keys: jax.vmap(lambda key: jax.random.uniform(key, (2, 2, 1)))(keys),
        None,
        500,
        batch_size=50,
        extractor=extractor,
        seed=0,
    )
    np.testing.assert_allclose(samples.features.mean(0), 1, atol=0.1)
    np.testing.assert_allclose(np.diag(covariance(samples.moments)), 4 / 12, rtol=0.1)
    assert score(samples, samples)["label"] == "corner Frechet distance"


# Teacher and student


def noising(images, levels, noise):
    level = levels[:, None, None, None]
    return (1 - level) * images + level * noise, jnp.floor(levels * 1000).astype(jnp.int32)


def test_output_error_is_a_mean_over_elements_examples_and_levels(digits, batch_sharding):
    seen = []

    def teacher(noisy, t, batch):
        seen.append(np.asarray(t))
        return 2 * noisy

    def student(noisy, t, batch):
        return 2 * noisy + ((t / 1000) + batch["label"])[:, None, None, None]

    run = functools.partial(output_error, teacher, student, noising, digits["test"], seed=0)
    result = run(batch_size=90)
    t = np.concatenate(seen)
    labels = digits["test"].get(np.arange(360))["label"]
    errors = (t / 1000 + labels) ** 2
    assert result["output_error"] == pytest.approx(errors.mean(), rel=1e-5)
    for quarter in range(4):
        here = t // 250 == quarter
        assert here.sum() == 90
        error = result[f"output_error_q{quarter + 1}"]
        assert error == pytest.approx(errors[here].mean(), rel=1e-5)
    assert result["num_examples"] == 360
    assert run(batch_size=100) == pytest.approx(result, rel=1e-6)
    assert run(batch_size=104, sharding=batch_sharding) == pytest.approx(result, rel=1e-6)
    assert run(batch_size=90, seed=1)["output_error"] != result["output_error"]
    assert np.isnan(run(batch_size=4, limit=3)["output_error_q4"])


def test_output_error_bad_input(digits):
    def teacher(noisy, t, labels):
        return noisy

    run = functools.partial(output_error, teacher, source=digits["test"], batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"teacher predicts \(8, 8, 8, 1\), student \(8, 8, 8\)"):
        run(lambda noisy, t, labels: noisy[..., 0], noising)
    with pytest.raises(ValueError, match="non-finite"):
        run(lambda noisy, t, labels: noisy * jnp.nan, noising)
    assert run(teacher, noising)["output_error"] == 0


def test_evaluation_batches_feed_the_classifier(digits):
    params = feature_extractor("digits").params
    batch = next(eval_batches(digits["test"], batch_size=64))
    images = digits["test"].unpack(batch)["image"]
    predicted = np.argmax(jax.jit(digit_logits)(params, images), -1)
    assert np.mean(predicted == batch["label"]) > 0.9
