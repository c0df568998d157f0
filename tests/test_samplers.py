"""Samplers of Stable Diffusion and of flows: diffusers' schedulers, stored and run live."""

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import nhwc
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from ml_collections import ConfigDict

from liftplace_jax.diffusion import (
    SAMPLERS,
    Flow,
    GaussianDiffusion,
    beta_schedule,
    flow_sample,
    get_sampler,
    timestep_sequence,
)
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.families.unet.config import UNetConfig

BETAS = beta_schedule("scaled_linear", 1000, 0.00085, 0.012)
EPSILON, V = GaussianDiffusion(BETAS), GaussianDiffusion(BETAS, "v")
STABLE = dict(skip_type="leading", steps_offset=1)
OF_STABLE = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    timestep_spacing="leading",
)
START = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
NETWORK = {
    np: lambda x, t: 0.6 * x + 0.3 * np.sin(3 * x + t / 150),
    jnp: lambda x, t: 0.6 * x + 0.3 * jnp.sin(3 * x + t[:, None, None, None] / 150),
}


@pytest.fixture(scope="module")
def stored(golden):
    return golden("peer_schedulers")


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def diffusers_sample(scheduler, steps):
    """What a scheduler makes of START with the deterministic network; and its timesteps."""
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(START)
    for t in scheduler.timesteps:
        prediction = NETWORK[np](x.numpy().astype(np.float64), float(t)).astype(np.float32)
        x = scheduler.step(torch.from_numpy(prediction), t, x).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


def our_sample(sample, process, **options):
    """Ours, and the timesteps that the network saw."""
    seen = []

    def predict(x, t):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
        return NETWORK[jnp](x, t.astype(jnp.float32))

    result = jax.jit(lambda x: sample(predict, x, process, **options))(START)
    jax.effects_barrier()
    return result, np.array(seen)


def replay(outputs):
    """A network that says what is in a list, call after call; for samplers run without jit."""
    calls = iter(outputs)
    return lambda x, t: jnp.asarray(nhwc(next(calls)))


def test_the_process_of_stable_diffusion(stored):
    arrays, _ = stored
    found = EPSILON.alphas_cumprod
    np.testing.assert_allclose(found, arrays["out/alphas_cumprod_scaled_linear"], rtol=1e-5)
    x0, noise, t = nhwc(arrays["in/sample"]), nhwc(arrays["in/noise"]), arrays["in/t"]
    x_t = EPSILON.add_noise(x0, t, noise)
    np.testing.assert_allclose(x_t, nhwc(arrays["out/add_noise"]), atol=5e-6)
    np.testing.assert_allclose(EPSILON.target(x0, noise, t), noise)
    velocity = V.target(x0, noise, t)
    np.testing.assert_allclose(velocity, nhwc(arrays["out/velocity"]), atol=5e-6)
    np.testing.assert_allclose(V.to_x0(velocity, x_t, t), x0, atol=1e-5)


@pytest.mark.parametrize("process, kind", [(EPSILON, "epsilon"), (V, "v_prediction")])
@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_stored_samples_of_diffusers(stored, name, process, kind):
    arrays, meta = stored
    with jax.disable_jit():
        sample = get_sampler(name)(
            replay(arrays["in/model_out"]),
            nhwc(arrays["in/sample"]),
            process,
            steps=10,
            set_alpha_to_one=False,
            **STABLE,
        )
    close(sample, nhwc(arrays[f"out/{name}_{kind}/final"]))
    steps = len(meta["results"][f"{name}_{kind}"]["timesteps"])
    fields = ConfigDict(dict(sampler=name, sample_steps=10, **STABLE))
    assert process.sampling(fields) == {"evaluations": steps}


def test_stored_samples_of_flows(stored):
    arrays, meta = stored
    flow = Flow(shift=3.0)
    for name, steps in (("flow_match_euler", 10), ("flow_match_28", 28)):
        levels = flow.levels(steps, "diffusers")
        np.testing.assert_allclose(levels, meta["results"][name]["sigmas"], atol=1e-6)
        np.testing.assert_allclose(
            levels[:-1] * 1000, meta["results"][name]["timesteps"], rtol=1e-6
        )
    with jax.disable_jit():
        sample = flow_sample(
            replay(arrays["in/model_out"]),
            nhwc(arrays["in/sample"]),
            flow,
            steps=10,
            skip_type="diffusers",
        )
    close(sample, nhwc(arrays["out/flow_match_euler/final"]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name, peer, steps, changes", [
    ("ddim", DDIMScheduler, 7, {}),
    ("ddim", DDIMScheduler, 50, {"set_alpha_to_one": True}),
    ("ddim", DDIMScheduler, 30, {"timestep_spacing": "trailing"}),
    ("ddim", DDIMScheduler, 12, {"timestep_spacing": "linspace"}),
    ("pndm", PNDMScheduler, 25, {}),
    ("pndm", PNDMScheduler, 3, {"set_alpha_to_one": True}),
    ("pndm", PNDMScheduler, 2, {}),
    ("pndm", PNDMScheduler, 30, {"timestep_spacing": "trailing"}),
    ("pndm", PNDMScheduler, 6, {"timestep_spacing": "linspace"}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, 25, {}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, 2, {}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, 14, {"timestep_spacing": "trailing"}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, 20, {"timestep_spacing": "linspace"}),
])  # fmt: skip
def test_samplers_are_those_of_diffusers(name, peer, steps, changes, prediction):
    fields = OF_STABLE | {"prediction_type": prediction} | changes
    options = dict(STABLE, set_alpha_to_one=fields.get("set_alpha_to_one", False))
    if "timestep_spacing" in changes:
        options = options | {"skip_type": changes["timestep_spacing"], "steps_offset": 0}
    if peer is DPMSolverMultistepScheduler:
        del options["set_alpha_to_one"]
    else:
        fields.setdefault("set_alpha_to_one", False)
    more = {PNDMScheduler: {"skip_prk_steps": True}, DDIMScheduler: {"clip_sample": False}}
    expected, timesteps = diffusers_sample(peer(**fields, **more.get(peer, {})), steps)
    process = EPSILON if prediction == "epsilon" else V
    sample, seen = our_sample(get_sampler(name), process, steps=steps, **options)
    np.testing.assert_array_equal(seen, timesteps)
    close(sample, expected, 1e-4)


def test_pndm_evaluates_as_often_as_stable_diffusion_does(stored):
    _, meta = stored
    fields = ConfigDict(dict(sampler="pndm", sample_steps=25, **STABLE))
    assert EPSILON.sampling(fields) == {"evaluations": 26}
    _, seen = our_sample(get_sampler("pndm"), EPSILON, steps=25, **STABLE)
    assert list(seen) == meta["results"]["pndm_25_timesteps"]
    assert list(seen[:4]) == [961, 921, 921, 881]
    for name, count in {"ddim": 25, "dpmpp_2m": 25}.items():
        fields.sampler = name
        assert EPSILON.sampling(fields) == {"evaluations": count}


@pytest.mark.parametrize(
    "method, peer",
    [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)],
)
@pytest.mark.parametrize("shift, steps", [(1.0, 9), (3.0, 28), (3.0, 1)])
def test_flows_are_sampled_as_by_diffusers(method, peer, shift, steps):
    expected, timesteps = diffusers_sample(peer(shift=shift), steps)
    flow = Flow(shift=shift)
    options = dict(steps=steps, skip_type="diffusers", method=method)
    sample, seen = our_sample(flow_sample, flow, **options)
    np.testing.assert_allclose(seen, timesteps, rtol=1e-6)
    close(sample, expected)
    fields = ConfigDict(dict(sampler=method, sample_steps=steps, skip_type="diffusers"))
    evaluations = 2 * steps - 1 if method == "heun" else steps
    assert flow.sampling(fields) == {"evaluations": evaluations, "shift": shift}


def scheduler_of(process, **fields):
    """diffusers' scheduler of a process and a sampler, none of whose fields it passes over."""
    usual = dict(skip_type="uniform", steps_offset=0, set_alpha_to_one=True, eta=0.0)
    described = process.scheduler(ConfigDict(usual | fields))
    peer = getattr(diffusers, described["_class_name"])
    config = {key: value for key, value in described.items() if key != "_class_name"}
    made, unknown = peer.from_config(config, return_unused_kwargs=True)
    assert not unknown
    written = json.loads(made.to_json_string())
    assert not process.misfits(described) and not process.misfits(written)
    return made


@pytest.mark.parametrize(
    "fields",
    [
        dict(sampler="pndm", set_alpha_to_one=False, **STABLE),
        dict(sampler="ddim", set_alpha_to_one=False, **STABLE),
        dict(sampler="ddim"),
        dict(sampler="ddim", skip_type="trailing"),
        dict(sampler="dpmpp_2m", **STABLE),
        dict(sampler="dpmpp_2m", skip_type="linspace"),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
@pytest.mark.parametrize(
    "process",
    [
        V,
        GaussianDiffusion(beta_schedule("cosine", 1000), "x0"),
        GaussianDiffusion(beta_schedule("sigmoid", 1000)),
    ],
    ids=["v", "x0-cosine", "sigmoid"],
)
def test_schedulers_that_are_written_sample_as_we_do(process, fields):
    if fields["sampler"] == "pndm" and process.prediction == "x0":
        with pytest.raises(ValueError, match="does not know networks that predict x0"):
            scheduler_of(process, **fields)
        return
    scheduler = scheduler_of(process, **fields)
    np.testing.assert_allclose(scheduler.alphas_cumprod, process.alphas_cumprod, rtol=1e-4)
    expected, _ = diffusers_sample(scheduler, 10)
    usual = dict(skip_type="uniform", steps_offset=0, set_alpha_to_one=True, eta=0.0)
    sampler = process.sampler(ConfigDict(usual | fields | {"sample_steps": 10}))
    sample = jax.jit(lambda x: sampler(lambda x, t: NETWORK[jnp](x, t.astype(jnp.float32)), x))
    close(sample(START), expected, 1e-4)


def test_schedulers_of_other_processes():
    scheduler = scheduler_of(
        GaussianDiffusion(BETAS, variance="learned_range"), sampler="ancestral"
    )
    assert scheduler.config.variance_type == "learned_range"
    for sampler in ("euler", "heun"):
        assert scheduler_of(Flow(shift=3.0), sampler=sampler).config.shift == 3.0
    with pytest.raises(ValueError, match="skip_type 'quad': no scheduler of diffusers has it"):
        scheduler_of(EPSILON, sampler="ddim", skip_type="quad")
    with pytest.raises(ValueError, match="unknown sampler 'euler'"):
        scheduler_of(EPSILON, sampler="euler")
    with pytest.raises(ValueError, match="unknown sampler 'ddim'"):
        scheduler_of(Flow(), sampler="ddim")


@pytest.mark.parametrize("process, scheduler, message", [
    (EPSILON, OF_STABLE | {"prediction_type": "v_prediction"},
     r"prediction_type 'v_prediction' \('v'\), config.process.prediction is 'epsilon': set conf"),
    (V, OF_STABLE, r"prediction_type 'epsilon' \('epsilon'\), config.process.prediction is 'v'"),
    (EPSILON, OF_STABLE | {"prediction_type": ["v"]}, "prediction_type .*v"),
    (EPSILON, {}, "beta_schedule 'linear', beta_start 0.0001, beta_end 0.02: its betas differ"),
    (EPSILON, OF_STABLE | {"beta_end": 0.0121}, "beta_end 0.0121: its betas differ"),
    (EPSILON, OF_STABLE | {"beta_schedule": "laplace"}, "beta_schedule 'laplace'"),
    (EPSILON, OF_STABLE | {"trained_betas": [0.1, 0.2]}, "trained_betas: its betas differ"),
    (EPSILON, OF_STABLE | {"beta_start": "little"}, "beta_start 'little'"),
    (EPSILON, OF_STABLE | {"num_train_timesteps": 999}, "999, config.process.num_timesteps is 10"),
    (EPSILON, OF_STABLE | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    (EPSILON, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of a flow: .*kind=flow"),
    (EPSILON, OF_STABLE | {"use_flow_sigmas": True}, "is of a flow"),
    (Flow(), {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' is of a Gaussian process"),
    (Flow(num_timesteps=20), {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "timesteps 1000"),
])  # fmt: skip
def test_schedulers_of_another_training_are_told(process, scheduler, message):
    (misfit,) = process.misfits(scheduler)
    assert re.search(message, misfit), misfit


@pytest.mark.parametrize("name, options, message", [
    ("ddim", dict(steps=1000, **STABLE), "steps_offset 1 with 1000 steps leads to timestep 1000"),
    ("pndm", dict(steps=5, skip_type="trailing", steps_offset=1), "steps_offset 1 is for skip_typ"),
    ("dpmpp_2m", dict(steps=1000, skip_type="leading"), r"steps must be in 1\.\.999"),
    ("dpmpp_2m", dict(steps=500, skip_type="quad"), "500 steps of skip_type 'quad' visit a times"),
    ("ancestral", dict(steps=5, skip_type="leading"), "'leading' is not for ancestral sampling"),
    ("pndm", dict(steps=5, skip_type="karras"), "unknown skip_type 'karras'; known"),
])  # fmt: skip
def test_spacings_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_sampler(name)(lambda x, t: x, START, EPSILON, **options)


def test_uniform_is_leading_without_offset():
    for steps in (1, 10, 1000):
        np.testing.assert_array_equal(
            timestep_sequence(1000, steps, "leading"), timestep_sequence(1000, steps)
        )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_flow_that_is_straight_is_followed_exactly(method, steps):
    data = jnp.linspace(-0.9, 0.9, 16).reshape(1, 4, 4, 1)
    flow = Flow(shift=2.0)

    def predict(x, t):
        return (x - data) / (t / 1000)[:, None, None, None]

    for clip in (None, 1.0):
        sample = flow_sample(predict, START[..., :1], flow, steps=steps, method=method, clip=clip)
        np.testing.assert_allclose(sample, jnp.broadcast_to(data, sample.shape), atol=1e-5)
    sample, path = flow_sample(
        predict, START[..., :1], flow, steps=steps, method=method, clip=0.5, return_trajectory=True
    )
    assert np.abs(path["x0"]).max() <= 0.5
    np.testing.assert_allclose(sample, path["x0"][-1], atol=1e-6)


@pytest.mark.parametrize(
    "process, names",
    [(EPSILON, SAMPLERS), (GaussianDiffusion(BETAS, "x0"), SAMPLERS), (Flow(), Flow.samplers)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sampler_is_one_scan_of_keys(process, names, dtype):
    """Images are functions of their keys, in any batch, and one scan is compiled."""
    model = UNetConfig(8, ch=8, ch_mult=(1,), num_groups=4)
    for name in names:
        fields = ConfigDict(
            dict(
                sampler=name,
                sample_steps=4,
                skip_type="uniform",
                eta=0.0,
                guidance=1.0,
                guidance_channels=None,
                dtype=dtype,
                precision="highest",
            )
        )
        traced = []

        def apply(params, x, t, *_, traced=traced):
            traced.append(t.dtype)
            prediction = params * x * jnp.cos(t.astype(jnp.float32) / 500)[:, None, None, None]
            return prediction.astype(dtype), {}

        sample = jax.jit(make_sampler(fields, process, model, apply))
        keys = jax.random.split(jax.random.key(0), 3)
        images = sample(0.1, keys)
        assert len(traced) == 1 and images.shape == (3, *model.shape)
        assert images.dtype == jnp.float32
        np.testing.assert_allclose(sample(0.1, keys[1:]), images[1:], atol=1e-6)
