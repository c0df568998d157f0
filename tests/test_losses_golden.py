"""The losses against arrays made by running the published PyTorch code, sorted by machine code.

`test_losses.py` runs XLA's own sort and compares the two.
"""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, nhwc

from liftplace_jax import PUBLISHED, feature_kd_loss, lift_loss, output_kd_loss, place_loss
from liftplace_jax.losses import cosine_weight, learnable_weight, linear_weight

GRAD_TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("machine_code")


def cases(name, prefix):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        found = [c for c in json.loads(str(file["meta"]))["cases"] if c["id"].startswith(prefix)]
    assert found
    return found


def by_regime(name, prefix):
    """One parametrised test per regime: few names, every case inside."""
    groups = {}
    for case in cases(name, prefix):
        groups.setdefault(case["input"].split("/")[1], []).append(case)
    return [pytest.param(v, id=f"{prefix}-{k}") for k, v in groups.items()]


def pair(golden, case):
    inputs, _ = golden("losses_inputs")
    return tuple(nhwc(inputs[f"in/{case['input']}/{side}"]) for side in ("student", "teacher"))


def check(golden, name, case, loss_fn, identical_atol, identical_rtol=0.0):
    """Compares loss, gradient, fits and weight of one case; `loss_fn(s, t) -> (loss, terms)`."""
    arrays, _ = golden(name)
    out = {k: arrays.get(f"out/{case['id']}/{k}") for k in ("loss", "grad", "slope", "w")}
    out["intercept"] = arrays.get(f"out/{case['id']}/intercept")
    student, teacher = pair(golden, case)
    # Not jitted: hundreds of cases share the compiled primitives, and jit is tested elsewhere.
    (loss, terms), grad = jax.value_and_grad(lambda s: loss_fn(s, teacher), has_aux=True)(student)
    if case["input"].endswith("identical"):
        np.testing.assert_allclose(loss, out["loss"], rtol=identical_rtol, atol=identical_atol)
        assert np.isfinite(grad).all()
        return
    np.testing.assert_allclose(loss, out["loss"], rtol=1e-5, err_msg=case["id"])
    if out["grad"] is not None:
        expected = nhwc(out["grad"])
        error = np.abs(grad - expected).max()
        assert error <= GRAD_TOLERANCE * np.abs(expected).max(), (case["id"], error)
    for key in ("slope", "intercept"):
        if out[key] is not None:
            mine = np.asarray(getattr(terms, key)).ravel()
            np.testing.assert_allclose(mine, out[key].ravel(), rtol=1e-4, atol=1e-5)
    if out["w"] is not None and case.get("mode", "full") == "full":
        np.testing.assert_allclose(terms.weight, out["w"], atol=1e-5)


def knobs(case, variant):
    mode = case.get("mode", "full")
    return dict(PUBLISHED[variant]) | {
        "norm": "l2" if case["use_l2"] else "l1",
        "eps": case["eps"],
        "terms": mode if mode in ("coarse", "fine") else "both",
        "weight": 0.0 if mode == "nocurr" else "adaptive",
    }


@pytest.mark.parametrize("group", by_regime("losses_ddpm", "ddpm_place"))
def test_pixel_place(golden, group):
    for case in group:
        if case.get("tie_order_dependent"):
            continue  # the published order of ties is arbitrary; ours is tested elsewhere

        def loss_fn(s, t, case=case):
            terms = place_loss(s, t, group_size=case["patch_size"], **knobs(case, "pixel"))
            return terms.loss, terms

        check(golden, "losses_ddpm", case, loss_fn, identical_atol=2e-3)


def test_pixel_place_stable_ties(golden):
    """Where ties matter, the result is that of the published formula with a stable sort."""
    tied = [c for c in cases("losses_ddpm", "ddpm_place") if c.get("tie_order_dependent")]
    assert tied
    for case in tied:
        student, teacher = pair(golden, case)
        terms = place_loss(student, teacher, group_size=case["patch_size"], **knobs(case, "pixel"))
        np.testing.assert_allclose(terms.loss, case["loss_with_stable_sort"], rtol=1e-5)


@pytest.mark.parametrize("group", by_regime("losses_ddpm", "ddpm_lift"))
def test_pixel_lift(golden, group):
    for case in group:

        def loss_fn(s, t, case=case):
            # The published function scales the coarse term by a free argument of that name.
            scale = case["patch_size"] * (s.shape[-1] if case["lift_mode"] == "sample" else 1)
            options = knobs(case, "pixel") | {"normalize": "sum", "coarse_scale": scale}
            terms = lift_loss(s, t, per=case["lift_mode"], **options)
            return terms.loss, terms

        check(golden, "losses_ddpm", case, loss_fn, identical_atol=2e-3)


@pytest.mark.parametrize("group", by_regime("losses_ddpm", "ddpm_spatial"))
def test_pixel_spatial(golden, group):
    for case in group:

        def loss_fn(s, t, case=case):
            patch = (case["patch_size"],) * 2
            options = knobs(case, "dit") | {"norm": "l1"}  # both published branches are L1
            terms = place_loss(s, t, grouping="space", group_size=patch, **options)
            # Published: the sum over the batch; the coarse term alone times the patch's pixels.
            coarse = case["patch_size"] ** 2 * terms.coarse
            return len(s) * (coarse + terms.weight * terms.fine), terms

        check(golden, "losses_ddpm", case, loss_fn, identical_atol=1e-8, identical_rtol=5e-2)


@pytest.mark.parametrize("group", by_regime("losses_dit", "dit_place"))
def test_dit_place(golden, group):
    for case in group:

        def loss_fn(s, t, case=case):
            terms = place_loss(s, t, group_size=case["patch_size"], **knobs(case, "dit"))
            return terms.loss, terms

        check(golden, "losses_dit", case, loss_fn, identical_atol=1e-6)
        student, teacher = pair(golden, case)
        options = knobs(case, "dit") | {"reduction": "per_sample"}
        terms = place_loss(student, teacher, group_size=case["patch_size"], **options)
        expected = golden("losses_dit")[0][f"out/{case['id']}/kd_per_sample"]
        np.testing.assert_allclose(terms.loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", by_regime("losses_dit", "dit_spatial"))
def test_dit_spatial(golden, group):
    for case in group:

        def loss_fn(s, t, case=case):
            patch = (case["patch_size"],) * 2
            terms = place_loss(s, t, grouping="space", group_size=patch, **knobs(case, "dit"))
            return terms.loss, terms

        check(golden, "losses_dit", case, loss_fn, identical_atol=1e-9, identical_rtol=5e-2)


@pytest.mark.parametrize("group", by_regime("losses_sd", "sd_place"))
def test_sd_place(golden, group):
    for case in group:

        def loss_fn(s, t, case=case):
            terms = place_loss(s, t, group_size=case["group_size"], **knobs(case, "sd"))
            return terms.loss, terms

        check(golden, "losses_sd", case, loss_fn, identical_atol=1e-6)


@pytest.mark.parametrize("case", cases("losses_ddpm_schedules", "ddpm_abl"), ids=lambda c: c["id"])
def test_weight_schedules(golden, case):
    mode = case["mode"]
    step = [case.get("global_step", 0), case.get("total_steps_used", 1)]
    if mode == "learnable":
        return check_learnable(golden, case)
    weight = {
        "True": lambda: "adaptive",
        "False": lambda: 1.0,
        "cosine": lambda: cosine_weight(*step, case["direction"]),
        "linear": lambda: linear_weight(*step, case["direction"]),
    }[mode]()

    def loss_fn(s, t):
        options = knobs(case, "pixel") | {"weight": weight, "normalize": "sum"}
        terms = place_loss(s, t, group_size=case["patch_size"], **options | {"terms": "both"})
        return terms.loss, terms

    check(golden, "losses_ddpm_schedules", case, loss_fn, identical_atol=0)
    arrays, _ = golden("losses_ddpm_schedules")
    expected = arrays.get(f"out/{case['id']}/w")
    if expected is not None:
        terms = loss_fn(*pair(golden, case))[1]
        np.testing.assert_allclose(terms.weight, expected, atol=1e-5)


def check_learnable(golden, case):
    arrays, _ = golden("losses_ddpm_schedules")
    out = {k: arrays[f"out/{case['id']}/{k}"] for k in ("loss", "grad", "logit", "grad_logit", "w")}
    student, teacher = pair(golden, case)

    def loss_fn(s, logit):
        options = knobs(case, "pixel") | {"weight": learnable_weight(logit), "terms": "both"}
        return place_loss(s, teacher, group_size=case["patch_size"], **options).loss

    loss, (grad, grad_logit) = jax.value_and_grad(loss_fn, (0, 1))(student, out["logit"])
    np.testing.assert_allclose(learnable_weight(out["logit"]), out["w"], rtol=1e-6)
    np.testing.assert_allclose(loss, out["loss"], rtol=1e-5)
    np.testing.assert_allclose(grad_logit, out["grad_logit"], rtol=1e-5)
    expected = nhwc(out["grad"])
    assert np.abs(grad - expected).max() <= GRAD_TOLERANCE * np.abs(expected).max()


def test_schedule_tables():
    table = json.loads((GOLDEN / "loss_schedules.json").read_text())
    for name, schedule in (("cosine_schedule", cosine_weight), ("linear_schedule", linear_weight)):
        for step, total, direction, expected in table[name]:
            np.testing.assert_allclose(schedule(step, total, direction), expected, atol=1e-6)


def test_fitnet(golden):
    """FitNet value and gradients, and the published weighting of the combined losses."""
    arrays, meta = golden("ddpm_fitnet")
    names = meta["feature_order"]
    side = {
        s: {name: nhwc(arrays[f"in/{s}_feat/{i:02d}"]) for i, name in enumerate(names)}
        for s in ("s", "t")
    }
    adapters = {
        name: arrays[f"param/adapters.{i}.weight"][:, :, 0, 0].T for i, name in enumerate(names)
    }

    def loss_fn(features, kernels):
        return feature_kd_loss(features, side["t"], adapters=kernels)

    loss, (grad_s, grad_a) = jax.value_and_grad(loss_fn, (0, 1))(side["s"], adapters)
    call = meta["kd_values"]["distill_loss_call"]
    np.testing.assert_allclose(loss * call["fitnet"]["lamb"], call["fitnet"]["value"], rtol=1e-5)
    for i, name in enumerate(names):
        expected = arrays[f"out/grad_adapter/{i:02d}"][:, :, 0, 0].T
        assert np.abs(grad_a[name] - expected).max() <= 1e-4 * np.abs(expected).max()
        key = f"out/grad_s_feat/{i:02d}"
        if key in arrays:
            expected = nhwc(arrays[key])
            assert np.abs(grad_s[name] - expected).max() <= 1e-4 * np.abs(expected).max()

    student, teacher = nhwc(arrays["in/student_out"]), nhwc(arrays["in/teacher_out"])
    output = output_kd_loss(student, teacher)
    np.testing.assert_allclose(output, meta["kd_values"]["teacher_student_distance"], rtol=1e-5)
    np.testing.assert_allclose(
        output * call["logit_fitnet"]["lamb"] + 1e-6 * loss,
        call["logit_fitnet"]["value"],
        rtol=1e-5,
    )
    place = place_loss(student, teacher, group_size=16, **PUBLISHED["pixel"]).loss
    np.testing.assert_allclose(place, meta["kd_values"]["LIFT_PLACE_p16_L1"], rtol=1e-5)
    np.testing.assert_allclose(place + 1e-6 * loss, call["LIFT_PLACE_fitnet"]["value"], rtol=1e-5)
