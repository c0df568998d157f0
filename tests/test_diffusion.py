"""The Gaussian process and its samplers, against the published code's arrays and by properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import nhwc
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from liftplace_jax import weights
from liftplace_jax.diffusion import (
    SAMPLERS,
    GaussianDiffusion,
    ancestral_sample,
    beta_schedule,
    ddim_sample,
    get_sampler,
    timestep_sequence,
)
from liftplace_jax.families.unet.config import UNetConfig
from liftplace_jax.nn import building

LINEAR = GaussianDiffusion(beta_schedule("linear", 1000))
SHORT = beta_schedule("cosine", 20)


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("ddpm_diffusion")[0]


@pytest.fixture(scope="module")
def predict(golden):
    arrays, meta = golden("ddpm_unet_u16")
    model = meta["config"]["model"]
    config = UNetConfig(
        image_size=16,
        ch=model["ch"],
        ch_mult=model["ch_mult"],
        num_res_blocks=model["num_res_blocks"],
        attn_resolutions=model["attn_resolutions"],
    )
    graphdef, params = building.abstract(config)
    tensors = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    loaded = weights.from_torch(params, tensors)
    return lambda x, t: nnx.merge(graphdef, loaded)(x, t)


@pytest.mark.parametrize("name", ["linear", "quad", "const", "jsd", "sigmoid"])
def test_schedules(arrays, name):
    betas = beta_schedule(name, 1000)
    np.testing.assert_allclose(betas, arrays[f"out64/betas/{name}"], rtol=1e-12)
    found = GaussianDiffusion(betas).alphas_cumprod
    np.testing.assert_allclose(found, arrays[f"out/alphas_cumprod/{name}"], rtol=2e-4, atol=1e-6)


def test_cosine_schedule_is_nichol_and_dhariwal():
    betas = beta_schedule("cosine", 1000)
    found = np.cumprod(1 - betas)[:-1]
    s = (np.arange(1, 1000) / 1000 + 0.008) / 1.008
    expected = np.cos(s * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize("kind", ["fixedlarge", "fixedsmall"])
def test_log_variances(arrays, kind):
    # Up to the published float32 rounding of 1 - alphas_cumprod near t = 0.
    np.testing.assert_allclose(
        LINEAR.log_variance(kind), arrays[f"out/logvar/{kind}"], rtol=1e-4, atol=5e-4
    )


def test_alphas_cumprod_at_minus_one_is_the_data(arrays):
    found = LINEAR.alphas_cumprod_at(arrays["in/compute_alpha_t"])
    np.testing.assert_allclose(found, arrays["out/compute_alpha"], rtol=2e-5)
    assert LINEAR.alphas_cumprod_at(-1) == 1.0


def test_q_sample_and_loss(arrays, predict):
    x0, e, t = nhwc(arrays["in/q/x0"]), nhwc(arrays["in/q/e"]), arrays["in/q/t"]
    x_t = jax.jit(LINEAR.add_noise)(x0, t, e)
    np.testing.assert_allclose(x_t, nhwc(arrays["out/q/x_t"]), atol=1e-5)
    prediction = jax.jit(predict)(x_t, t)
    errors = jnp.sum((LINEAR.target(x0, e, t) - prediction) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(errors, arrays["out/q/noise_estimation_loss_keepdim"], rtol=1e-5)
    np.testing.assert_allclose(errors.mean(), arrays["out/q/noise_estimation_loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim10", "ddim100", "ddim10_quad", "ddim10_eta", "ddpm10"])
def test_samplers(golden, arrays, predict, name):
    case = golden("ddpm_diffusion")[1]["samplers"][name]
    options = {"steps": case["steps"], "skip_type": case["skip_type"]}
    if name == "ddim10_eta":
        options["eta"] = case["eta"]
    if name in ("ddim10_eta", "ddpm10"):
        options["noise"] = np.moveaxis(arrays["in/noise"], 2, -1)
    sampler = ancestral_sample if name == "ddpm10" else ddim_sample
    sample, path = jax.jit(
        lambda x: sampler(predict, x, LINEAR, return_trajectory=True, **options)
    )(nhwc(arrays["in/x_T"]))
    found = {
        "x_0": sample,
        "x_mid": path["x"][case["x_mid_index"] - 1],
        "x_1": path["x"][0],
        "x0_pred_first": path["x0"][0],
        "x0_pred_last": path["x0"][-1],
    }
    np.testing.assert_array_equal(sample, path["x"][-1])
    for part, value in found.items():
        expected = nhwc(arrays[f"out/{name}/{part}"])
        scale = max(np.abs(expected).max(), case["x0_absmax"])
        # The first predicted data reach 256 before ancestral sampling clips them to 1.
        tolerance = 5e-4 if (name, part) == ("ddpm10", "x0_pred_first") else 1e-4
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * scale, err_msg=part)


def test_timestep_sequences(golden):
    for case in golden("ddpm_diffusion")[1]["samplers"].values():
        found = list(timestep_sequence(1000, case["steps"], case["skip_type"]))
        expected = case["seq"]
        if isinstance(expected, dict):
            assert len(found) == expected["len"]
            assert found[:5] == expected["first"] and found[-5:] == expected["last"]
        else:
            assert found == expected


def test_ema_is_optax_incremental_update(golden, arrays):
    shadow, mu = arrays["in/ema/w0"], golden("ddpm_diffusion")[1]["ema_mu"]
    for step in (1, 2, 3):
        shadow = optax.incremental_update(arrays[f"in/ema/w{step}"], shadow, 1 - mu)
        np.testing.assert_allclose(shadow, arrays[f"out/ema/shadow{step}"], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    prediction=st.sampled_from(["epsilon", "v", "x0"]),
    t=st.integers(0, 18),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_perfect_prediction_gives_back_data_and_noise(prediction, t, seed):
    process = GaussianDiffusion(SHORT, prediction)
    x0, noise = np.random.default_rng(seed).normal(size=(2, 2, 4, 4, 1)).astype(np.float32)
    t = jnp.array([t, 18 - t])
    x_t = process.add_noise(x0, t, noise)
    target = process.target(x0, noise, t)
    np.testing.assert_allclose(process.to_x0(target, x_t, t), x0, atol=1e-4)
    np.testing.assert_allclose(process.to_epsilon(target, x_t, t), noise, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_antithetic_timesteps(batch):
    draw = jax.jit(LINEAR.antithetic_timesteps, static_argnums=1)
    t = np.asarray(draw(jax.random.key(batch), batch))
    drawn = batch // 2 + 1
    assert t.shape == (batch,) and t.min() >= 0 and t.max() < 1000
    np.testing.assert_array_equal(t[drawn:], 999 - t[: batch - drawn])


def test_antithetic_timesteps_cover_every_timestep():
    t = GaussianDiffusion(SHORT).antithetic_timesteps(jax.random.key(0), 2000)
    counts = np.bincount(t, minlength=20)
    assert len(counts) == 20 and counts.min() > 50


def exact_predict(process, x0):
    """A network that knows the data: its prediction leads to x0 from anywhere."""

    def predict(x, t):
        epsilon = GaussianDiffusion(process.betas, "x0").to_epsilon(
            jnp.broadcast_to(x0, x.shape), x, t
        )
        return process.target(jnp.broadcast_to(x0, x.shape), epsilon, t)

    return predict


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_samplers_reach_the_data_of_a_perfect_network(prediction, name, clip):
    process = GaussianDiffusion(SHORT, prediction)
    x0 = jnp.linspace(-0.9, 0.9, 16).reshape(1, 4, 4, 1)
    x_T = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
    predict = exact_predict(process, x0)
    options = {"steps": 5, "key": jax.random.key(1), "clip": clip}
    sample = get_sampler(name)(predict, x_T, process, **options)
    # PNDM extrapolates predictions, and those of v change on the way, as x0 and epsilon do not.
    tolerance = 3e-2 if (name, prediction) == ("pndm", "v") else 2e-3
    np.testing.assert_allclose(sample, jnp.broadcast_to(x0, sample.shape), atol=tolerance)


def test_keys_and_noise():
    process = GaussianDiffusion(SHORT)
    x_T = jnp.ones((2, 4, 4, 1))

    @jax.jit
    def run(key, eta_noise=None):
        return ddim_sample(
            lambda x, t: 0.1 * x, x_T, process, steps=5, eta=1.0, key=key, noise=eta_noise
        )

    first = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert np.abs(first - run(jax.random.key(1))).max() > 0.1
    noise = jax.random.normal(jax.random.key(2), (5, 2, 4, 4, 1))
    np.testing.assert_array_equal(run(None, noise), run(jax.random.key(9), noise))
    # Keys may be mapped over, and each step draws its own noise.
    mapped = jax.vmap(run)(jax.random.split(jax.random.key(3), 2))
    assert mapped.shape == (2, 2, 4, 4, 1)


def test_clipping_limits_the_predicted_data():
    process = GaussianDiffusion(SHORT)
    x_T = 3 * jnp.ones((1, 4, 4, 1))
    for name in SAMPLERS:
        sample, path = get_sampler(name)(
            lambda x, t: 0 * x,
            x_T,
            process,
            steps=4,
            clip=0.5,
            key=jax.random.key(0),
            return_trajectory=True,
        )
        assert np.abs(path["x0"]).max() <= 0.5
        np.testing.assert_allclose(sample, path["x0"][-1], atol=1e-6)


def test_ancestral_variances_differ():
    process = GaussianDiffusion(SHORT)
    x_T, noise = jnp.zeros((1, 4, 4, 1)), jnp.ones((20, 1, 4, 4, 1))
    large, small = (
        ancestral_sample(
            lambda x, t: 0 * x,
            x_T,
            process,
            steps=20,
            variance=variance,
            noise=noise,
            return_trajectory=True,
        )[1]["x"][0]
        for variance in ("fixedlarge", "fixedsmall")
    )
    expected = np.exp(0.5 * process.log_variance("fixedlarge")[-1])
    np.testing.assert_allclose(large, expected, rtol=1e-5)
    np.testing.assert_allclose(
        small, np.exp(0.5 * process.log_variance("fixedsmall")[-1]), rtol=1e-5
    )


def test_process_is_a_static_constant_of_jit():
    noised = jax.jit(GaussianDiffusion.add_noise, static_argnums=0)
    x0 = jnp.ones((2, 4, 4, 1))
    for betas in (SHORT, list(SHORT)):
        process = GaussianDiffusion(betas)
        assert hash(process) == hash(GaussianDiffusion(SHORT))
        noised(process, x0, jnp.array([0, 19]), x0)
    assert noised._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", 10), "unknown beta schedule 'cubic'; known: .*'sigmoid'"),
        (("linear", 0), "num_timesteps must be at least 1, not 0"),
        (("linear", 10, 0.1, 0.01), "beta_start <= beta_end"),
        (("linear", 10, 0.0, 0.01), "0 < beta_start"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        beta_schedule(*arguments)


def test_bad_processes():
    with pytest.raises(ValueError, match="unknown prediction 'score'; known: .*epsilon"):
        GaussianDiffusion(SHORT, "score")
    for betas in ((), (0.1, -0.1), (0.1, 1.5), (float("nan"),)):
        with pytest.raises(ValueError, match="betas must be"):
            GaussianDiffusion(betas)
    with pytest.raises(ValueError, match="unknown variance 'learned'"):
        LINEAR.log_variance("learned")
    x = jnp.ones((2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 4, 1\), x0 \(2, 4, 4, 1\)"):
        LINEAR.add_noise(x, jnp.array([1, 2]), x[:1])
    with pytest.raises(ValueError, match=r"t must have shape \(2,\).*not \(3,\)"):
        LINEAR.add_noise(x, jnp.array([1, 2, 3]), x)
    with pytest.raises(ValueError, match="prediction has shape"):
        LINEAR.to_x0(x[..., :0], x, jnp.array([1, 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 21}, r"steps must be in 1\.\.20 .*not 21"),
        ({"steps": 0}, r"steps must be in 1\.\.20"),
        ({"steps": 3}, "steps 3 must divide num_timesteps 20"),
        ({"steps": 5, "skip_type": "cubic"}, "unknown skip_type 'cubic'; known"),
        ({"steps": 5, "eta": 0.5}, "give key or noise"),
        ({"steps": 5, "eta": -1.0}, "eta -1.0 is out of range"),
        ({"steps": 5, "eta": 50.0, "key": 0}, "eta 50.0 is out of range"),
        ({"steps": 5, "eta": 1.0, "noise": np.ones((4, 1, 4, 4, 1))}, "noise must have shape"),
    ],
)
def test_bad_ddim_options(options, message):
    with pytest.raises(ValueError, match=message):
        ddim_sample(lambda x, t: x, jnp.ones((1, 4, 4, 1)), GaussianDiffusion(SHORT), **options)


def test_bad_ancestral_options():
    arguments = (lambda x, t: x, jnp.ones((1, 4, 4, 1)), GaussianDiffusion(SHORT))
    with pytest.raises(ValueError, match="give key or noise"):
        ancestral_sample(*arguments, steps=5)
    with pytest.raises(ValueError, match="unknown variance 'learned'; known"):
        ancestral_sample(*arguments, steps=5, variance="learned", key=jax.random.key(0))
    with pytest.raises(ValueError, match="unknown sampler 'euler'; known: .*'ddim'"):
        get_sampler("euler")
