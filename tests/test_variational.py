"""Learned variance: bounds, samplers and guidance against the published code's DiT arrays."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nhwc
from golden_dit import golden_dit

from liftplace_jax.diffusion import (
    GaussianDiffusion,
    ancestral_sample,
    beta_schedule,
    ddim_sample,
    guided,
    p_mean_variance,
    q_posterior,
    timestep_sequence,
    vb_kd_loss,
    vb_loss,
)
from liftplace_jax.diffusion.tables import reverse_steps
from liftplace_jax.nn.network import make_apply

PROCESS = GaussianDiffusion(beta_schedule("linear", 1000), variance="learned_range")
BOUND, BOUND_KD = (jax.jit(loss, static_argnums=0) for loss in (vb_loss, vb_kd_loss))
SHORT = GaussianDiffusion(beta_schedule("cosine", 20), variance="learned_range")


def predictor(network):
    apply = make_apply(network.graphdef)
    return jax.jit(lambda x, t, labels: apply(network.params, x, t, False, None, labels)[0])


@pytest.fixture(scope="module")
def teacher(golden):
    return predictor(golden_dit(golden, "dit_d4"))


@pytest.fixture(scope="module")
def losses(golden, teacher):
    """Golden losses, and what they are functions of."""
    arrays = golden("dit_diffusion_losses")[0]
    x0, noise = nhwc(arrays["in/x_start"]), nhwc(arrays["in/noise"])
    t, labels = arrays["in/t"], arrays["in/y"]
    x_t = PROCESS.add_noise(x0, t, noise)
    student = predictor(golden_dit(golden, "dit_diffusion_losses"))
    return arrays, (x0, x_t, t), teacher(x_t, t, labels), student(x_t, t, labels)


def close(found, expected, tolerance, **options):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=tolerance * np.abs(expected).max(), **options
    )


# The bound -------------------------------------------------------------------------------------


def test_posterior_and_mean_variance(losses):
    arrays, (x0, x_t, t), prediction, _ = losses
    posterior = q_posterior(PROCESS, x0, x_t, t)
    close(posterior.mean, nhwc(arrays["out/q_posterior_mean"]), 1e-6)
    expected = arrays["out/q_posterior_log_variance_clipped"]
    close(posterior.log_variance.ravel(), expected, 1e-6)
    found, predicted = p_mean_variance(PROCESS, prediction, x_t, t, clip=1.0)
    close(found.mean, nhwc(arrays["out/p_mean_variance/mean"]), 1e-5)
    close(found.log_variance, nhwc(arrays["out/p_mean_variance/log_variance"]), 1e-5)
    # Divided by sqrt(a_t), 0.006 at t = 999.
    close(predicted, nhwc(arrays["out/p_mean_variance/pred_xstart"]), 5e-4)
    _, unclipped = p_mean_variance(PROCESS, prediction, x_t, t)
    close(jnp.clip(unclipped, -1, 1), predicted, 1e-6)
    assert np.abs(unclipped).max() > 1


def test_bounds(losses):
    arrays, data, teacher, student = losses
    bound = functools.partial(BOUND, PROCESS)
    np.testing.assert_allclose(bound(teacher, *data), arrays["out/training_losses/vb"], rtol=1e-4)
    np.testing.assert_allclose(bound(student, *data), arrays["out/kd_rep/logit/vb"], rtol=1e-4)
    found = BOUND_KD(PROCESS, student, teacher, *data)
    np.testing.assert_allclose(found, arrays["out/kd_rep/logit/vb_kd"], rtol=1e-4)
    assert list(data[2][:2]) == [0, 0]  # where both are the likelihood of the data
    np.testing.assert_array_equal(found[:2], bound(student, *data)[:2])


def test_bounds_train_the_variance_half_of_the_student_alone(losses):
    _, data, teacher, student = losses

    def total(student, teacher):
        return jnp.sum(vb_loss(PROCESS, student, *data)) + jnp.sum(
            vb_kd_loss(PROCESS, student, teacher, *data)
        )

    of_student, of_teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(student, teacher)
    mean, values = PROCESS.split(of_student)
    assert not np.any(mean) and not np.any(of_teacher)
    assert np.isfinite(values).all() and np.abs(values).max(axis=(1, 2, 3)).min() > 0


def test_a_perfect_prediction_has_no_divergence_and_bad_ones_stay_finite():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 4, 4, 4, 2)).clip(-1, 1).astype(np.float32)
    t = jnp.array([1, 5, 12, 19])
    x_t = SHORT.add_noise(x0, t, noise)
    perfect = np.concatenate([noise, -np.ones_like(noise)], axis=-1)
    np.testing.assert_allclose(BOUND(SHORT, perfect, x0, x_t, t), 0, atol=1e-4)
    bad = jnp.full((4, 4, 4, 4), 30.0).at[..., 2:].set(-2)
    total = jax.jit(jax.value_and_grad(lambda p, t: jnp.sum(vb_loss(SHORT, p, x0, x_t, t))))
    for steps in (t, jnp.zeros(4, jnp.int32)):
        loss, gradient = total(bad, steps)
        assert np.isfinite(loss) and loss > 1 and np.isfinite(gradient).all()


def test_the_likelihood_is_that_of_256_levels():
    """At t = 0: the probabilities of all grey levels add up to 1."""
    levels = jnp.linspace(-1, 1, 256)
    x0 = np.broadcast_to(levels[:, None, None, None], (256, 2, 1, 1))
    t = np.zeros(256, np.int32)
    x_t = np.full(x0.shape, 0.3, np.float32)  # the same distribution for every level
    prediction = np.concatenate([np.full(x0.shape, 0.5), np.ones(x0.shape)], axis=-1)
    bits = BOUND(SHORT, prediction.astype(np.float32), x0, x_t, t)
    np.testing.assert_allclose(jnp.sum(2.0**-bits), 1, rtol=1e-3)
    predicted = SHORT.to_x0(np.float32(prediction[:1, ..., :1]), x_t[:1], t[:1])
    assert abs(levels[bits.argmin()] - predicted[0, 0, 0, 0]) < 1 / 255 + 1e-3
    assert float(bits.max()) == pytest.approx(-math.log2(1e-12), rel=1e-3)  # no less likely


def test_bfloat16_predictions_are_taken_in_float32(losses):
    arrays, data, teacher, student = losses
    found = BOUND_KD(PROCESS, student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16), *data)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[2:], arrays["out/kd_rep/logit/vb_kd"][2:], rtol=0.1)


def test_bad_predictions():
    x, t = jnp.ones((2, 4, 4, 1)), jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"twice the data's channels.*\(2, 4, 4, 1\)"):
        vb_loss(SHORT, x, x, x, t)
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 4, 4, 2\), x_t \(2, 4, 4, 1"):
        vb_loss(SHORT, jnp.ones((2, 4, 4, 4)), x, x, t)
    with pytest.raises(ValueError, match="must have variance='learned_range'"):
        vb_loss(GaussianDiffusion(SHORT.betas), jnp.ones((2, 4, 4, 2)), x, x, t)
    with pytest.raises(ValueError, match="unknown variance 'learned'; known: .*learned_range"):
        GaussianDiffusion(SHORT.betas, variance="learned")


# Samplers --------------------------------------------------------------------------------------


def test_spaced_timesteps_and_their_tables(golden):
    arrays, meta = golden("dit_sampling")
    for name, expected in meta["space_timesteps"].items():
        if "," not in name:
            skip_type = "uniform" if name.startswith("ddim") else "spaced"
            found = timestep_sequence(1000, int(name.removeprefix("ddim")), skip_type)
            assert list(found) == expected
    for steps in (10, 50, 1000):
        t = timestep_sequence(1000, steps, "spaced")
        now = PROCESS.alphas_cumprod_at(t)
        reverse = reverse_steps(now, PROCESS.alphas_cumprod_at(np.append(-1, t[:-1])))
        tables = {
            "respaced_betas": reverse.beta,
            "alphas_cumprod": now,
            "posterior_variance": reverse.variance,
            "posterior_log_variance_clipped": reverse.log_range[0],
            "posterior_mean_coef1": reverse.of_x0,
            "posterior_mean_coef2": reverse.of_x,
        }
        for table, found in tables.items():
            if f"out64/{table}/{steps}" in arrays:
                np.testing.assert_allclose(found, arrays[f"out64/{table}/{steps}"], rtol=1e-9)


@pytest.mark.parametrize("case", [
    "ddim10/clip0", "ddim10/clip1", "ddim10/cfg1.5", "ddim50/clip0", "ddim10_eta1",
    "ancestral10",
])  # fmt: skip
def test_samplers_with_learned_variance(golden, teacher, case):
    arrays = golden("dit_sampling")[0]
    labels = jnp.asarray(arrays["in/y"])
    options = {"steps": 50 if "50" in case else 10, "skip_type": "spaced"}
    options["clip"] = 1.0 if case.endswith("clip1") else None
    if case in ("ddim10_eta1", "ancestral10"):
        options["noise"] = np.moveaxis(arrays["in/noise"], 2, -1)
    if case == "ddim10_eta1":
        options["eta"] = 1.0
    sampler = ancestral_sample if case == "ancestral10" else ddim_sample
    scale, channels = (1.5, 3) if "cfg" in case else (1, None)
    found = jax.jit(
        lambda x: sampler(guided(teacher, labels, 10, scale, channels), x, PROCESS, **options)
    )(nhwc(arrays["in/z"]))
    # The published batch is doubled outside the sampler; its second half is only carried along.
    close(found, nhwc(arrays[f"out/{case}"])[:2], 1e-4)


def test_the_learned_variance_is_between_its_bounds():
    x_T, noise = jnp.zeros((1, 4, 4, 1)), jnp.ones((20, 1, 4, 4, 1))
    lower, upper = SHORT.reverse.log_range

    def first_step(value, **options):
        def predict(x, t):
            return jnp.concatenate([0 * x, jnp.full_like(x, value)], axis=-1)

        return ancestral_sample(
            predict, x_T, SHORT, steps=20, noise=noise, return_trajectory=True, **options
        )[1]["x"]

    for value, bound in ((-1, lower), (1, upper), (0, (lower + upper) / 2)):
        path = first_step(value)
        np.testing.assert_allclose(path[0], np.exp(0.5 * bound[-1]), rtol=1e-5)
    # The last step adds nothing, whatever the network says.
    np.testing.assert_allclose(first_step(9.0, clip=0.5)[-1], 0.5, atol=1e-5)
    fixed = first_step(9.0, variance="fixedsmall")
    np.testing.assert_allclose(fixed[0], np.exp(0.5 * lower[-1]), rtol=1e-5)
    with pytest.raises(ValueError, match="known: .*'fixedlarge', 'fixedsmall', 'learned'"):
        first_step(0, variance="large")


# Guidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
def test_published_guidance(golden, teacher, scale):
    arrays = golden("dit_d4")[0]
    x, t, labels = nhwc(arrays["in/cfg/x"]), arrays["in/cfg/t"], arrays["in/cfg/y"]
    predict = guided(teacher, jnp.asarray(labels[:2]), 10, float(scale), channels=3)
    assert list(labels[2:]) == [10, 10]
    expected = nhwc(arrays[f"out/cfg/scale{scale}"])[:2]
    np.testing.assert_allclose(predict(x[:2], t[:2]), expected, atol=5e-5 * float(scale))


def test_guidance_is_that_of_the_equation():
    """Against NumPy, on a network that tells labels and samples apart; half of it is variance."""
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(3, 4, 4, 2)).astype(np.float32), jnp.array([1, 2, 3])
    labels = jnp.array([0, 1, 2])
    table = jnp.asarray(rng.normal(size=(5, 4)).astype(np.float32))
    calls = []

    def predict(x, t, labels):
        calls.append(x.shape)
        both = jnp.concatenate([x, x * x], axis=-1)
        return both * table[labels][:, None, None] * t[:, None, None, None]

    conditional, nothing = predict(x, t, labels), predict(x, t, jnp.full(3, 4))
    calls.clear()
    mean = nothing + 2.5 * (conditional - nothing)
    for channels, count in ((None, 2), (1, 1)):
        found = jax.jit(guided(predict, labels, 4, 2.5, channels))(x, t)
        expected = np.concatenate([mean[..., :count], conditional[..., count:]], axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(guided(predict, labels, 4, 1.0)(x, t), conditional)
    assert calls == [(6, 4, 4, 2), (6, 4, 4, 2), (3, 4, 4, 2)]  # each one call
    assert guided(predict, labels, None, 1.0)(x, t).shape == conditional.shape
    with pytest.raises(ValueError, match="guidance 1.5 needs a null condition"):
        guided(predict, labels, None, 1.5)
    for channels in (0, 3):
        with pytest.raises(ValueError, match=rf"must be in 1\.\.2, not {channels}"):
            guided(predict, labels, 4, 1.5, channels)(x, t)


def test_guided_samples_stay_on_the_devices_of_their_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, labels = jax.random.normal(jax.random.key(0), (16, 4, 4, 1)), jnp.arange(16) % 3

    def sample(x, labels):
        def predict(x, t, labels):
            mean = 0.1 * x * (1 + labels[:, None, None, None])
            return jnp.concatenate([mean, mean], axis=-1)

        return ddim_sample(guided(predict, labels, 3, 2.0), x, SHORT, steps=5)

    expected = jax.jit(sample)(x, labels)
    compiled = jax.jit(sample).lower(*jax.device_put((x, labels), sharded)).compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all", "permute("))
    found = compiled(*jax.device_put((x, labels), sharded))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
