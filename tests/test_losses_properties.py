"""Laws that the losses obey for any input; hypothesis looks for one that breaks them."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_losses import draw, oracle

from liftplace_jax import PUBLISHED, lift_loss, place_loss

# Few shapes, so that compiled primitives are shared between examples.
SHAPES = st.sampled_from([(2, 4, 4, 2), (1, 12, 1), (2, 5, 3, 1)])
SEEDS = st.integers(0, 2**16)
GROUPS = st.sampled_from([2, 4, 5])
few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(SHAPES, SEEDS, GROUPS)
def test_permuting_space_changes_nothing(shape, seed, group_size):
    student, teacher = draw(shape, seed)
    order = np.random.default_rng(seed).permutation(int(np.prod(shape[1:-1])))

    def permuted(x):
        rows = x.reshape(shape[0], -1, shape[-1])
        return rows[:, order].reshape(shape)

    here = place_loss(student, teacher, group_size=group_size)
    there = place_loss(permuted(student), permuted(teacher), group_size=group_size)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@few
@given(SHAPES, SEEDS, st.floats(0.1, 100))
def test_scaling_both(shape, seed, scale):
    """t, s -> c t, c s: slopes stay, intercepts scale by c, the fine term by c^2."""
    student, teacher = draw(shape, seed)
    options = dict(group_size=4, eps=1e-12)
    here = place_loss(student, teacher, **options)
    there = place_loss(np.float32(scale) * student, np.float32(scale) * teacher, **options)
    np.testing.assert_allclose(there.slope, here.slope, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(there.intercept / scale, here.intercept, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(there.fine, scale**2 * here.fine, rtol=1e-3, atol=scale**2 * 1e-4)


@few
@given(SHAPES, SEEDS, st.sampled_from(sorted(PUBLISHED)))
def test_one_group_is_lift_per_channel(shape, seed, variant):
    student, teacher = draw(shape, seed)
    size = int(np.prod(shape[1:-1]))
    place = place_loss(student, teacher, group_size=size, **PUBLISHED[variant])
    lift = lift_loss(student, teacher, **PUBLISHED[variant])
    for a, b in zip(place, lift, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@few
@given(SHAPES, SEEDS, st.floats(0.2, 5), st.floats(-3, 3))
def test_affine_teacher_is_fitted_exactly(shape, seed, slope, intercept):
    student, _ = draw(shape, seed)
    terms = place_loss(student, np.float32(slope) * student + np.float32(intercept), group_size=4)
    spread = np.sort(student.reshape(shape[0], -1, shape[-1]), axis=1)
    assume((np.diff(spread, axis=1) > 1e-3).all())  # nearly equal values determine no slope
    np.testing.assert_allclose(terms.slope, slope, rtol=2e-2)
    np.testing.assert_allclose(terms.intercept, intercept, atol=5e-2)
    assert terms.fine < 1e-3 * (1 + slope**2 + intercept**2)


@few
@given(SHAPES, SEEDS, st.floats(-6, 4), GROUPS)
def test_float32_against_float64_oracle(shape, seed, exponent, group_size):
    """Magnitudes from 1e-6 to 1e4, relative to the size of the terms."""
    student, teacher = (np.float32(10.0**exponent) * x for x in draw(shape, seed))
    terms = place_loss(student, teacher, group_size=group_size)
    expected = oracle(student, teacher, group_size)
    np.testing.assert_allclose(terms.coarse, expected[1], rtol=1e-3)
    np.testing.assert_allclose(terms.fine, expected[2], rtol=1e-3, atol=1e-6 * (teacher**2).sum())
    np.testing.assert_allclose(terms.weight, expected[3], atol=1e-3)


@few
@given(SEEDS, st.floats(-1e3, 1e3))
def test_large_offset_keeps_the_fit(seed, offset):
    student, teacher = draw((2, 16, 16, 1), seed)
    near = place_loss(student, teacher, group_size=64)
    far = place_loss(student + np.float32(offset), teacher + np.float32(offset), group_size=64)
    np.testing.assert_allclose(far.slope, near.slope, atol=2e-2)


@few
@given(SHAPES, SEEDS, GROUPS, st.sampled_from(["l1", "l2"]), st.sampled_from(["mean", "sum"]))
def test_coarse_gradient_is_the_numerical_one(shape, seed, group_size, norm, normalize):
    """In float64, along a random direction; the order does not change on so small a step."""
    student, teacher = (x.astype(np.float64) for x in draw(shape, seed))
    direction = np.random.default_rng(seed + 1).normal(size=shape)
    step = 1e-7
    with jax.enable_x64(True):

        def loss(s):
            return place_loss(
                s, teacher, group_size=group_size, terms="coarse", norm=norm, normalize=normalize
            ).loss

        up, down = loss(student + step * direction), loss(student - step * direction)
        slope = float(np.sum(jax.grad(loss)(student) * direction))
        value = float(loss(student))
    numerical = float(up - down) / (2 * step)
    assert slope == pytest.approx(numerical, rel=2e-3, abs=1e-5 * max(1.0, abs(value)))
