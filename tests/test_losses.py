"""What a user of the losses relies on beyond parity: degenerate input, transforms, errors."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liftplace_jax import PUBLISHED, feature_kd_loss, lift_loss, output_kd_loss, place_loss
from liftplace_jax.losses import (
    Groups,
    constant_weight,
    cosine_weight,
    error_groups,
    init_adapters,
    learnable_weight,
    lift_terms,
    linear_weight,
    mask_outliers,
    permute,
)


def draw(shape, seed=0, student_scale=0.7):
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=shape).astype(np.float32)
    noise = rng.normal(size=shape).astype(np.float32)
    return student_scale * teacher + 0.1 + 0.2 * noise, teacher


def oracle(student, teacher, group_size, eps=1e-7):
    """PLACE (pixel variant) in float64 NumPy, with plain loops."""
    batch, channels = student.shape[0], student.shape[-1]
    s = np.moveaxis(student, -1, 1).reshape(batch, channels, -1).astype(np.float64)
    t = np.moveaxis(teacher, -1, 1).reshape(batch, channels, -1).astype(np.float64)
    coarse = fine = drift = 0.0
    for b in range(batch):
        for c in range(channels):
            order = np.argsort(np.abs(t[b, c] - s[b, c]), kind="stable")
            for start in range(0, len(order), group_size):
                x, y = s[b, c, order[start:][:group_size]], t[b, c, order[start:][:group_size]]
                slope = np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + eps)
                intercept = y.mean() - slope * x.mean()
                distance = abs(slope - 1) + abs(intercept)
                coarse += len(x) * distance
                drift += len(x) * distance
                fine += np.sum((y - intercept - slope * x) ** 2)
    weight = 1 - min(1, drift / s.size)
    return (coarse + weight * fine) / batch, coarse / batch, fine / batch, weight


@pytest.mark.parametrize("shape", [(2, 16, 3), (2, 8, 6, 3), (2, 4, 4, 6, 2), (3, 7, 5, 2)])
@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_any_space_and_uneven_groups_match_oracle(shape, group_size):
    student, teacher = draw(shape)
    terms = place_loss(student, teacher, group_size=group_size)
    np.testing.assert_allclose(terms[:4], oracle(student, teacher, group_size), rtol=2e-4)


def test_uneven_last_group_does_not_leak_padding():
    """A channel of 10 in groups of 4 equals fitting 4, 4 and 2 by hand; gradients stay in place."""
    student, teacher = draw((1, 10, 1), seed=3)
    grad = jax.grad(lambda s: place_loss(s, teacher, group_size=4).loss)(student)
    eps = 1e-3
    for i in range(10):
        bump = np.zeros_like(student, np.float64)
        bump[0, i, 0] = eps
        up = oracle_detached(student + bump, student, teacher)
        down = oracle_detached(student - bump, student, teacher)
        np.testing.assert_allclose(grad[0, i, 0], (up - down) / (2 * eps), rtol=2e-2, atol=2e-2)


def oracle_detached(student, at, teacher, group_size=4, eps=1e-7):
    """The loss as a function whose derivative is the published one: order, w, and the fine term's
    fit are frozen at `at`."""
    s, a, t = (np.asarray(x, np.float64).ravel() for x in (student, at, teacher))
    order = np.argsort(np.abs(t - a), kind="stable")
    weight = oracle(at, teacher, group_size, eps)[3]
    total = 0.0
    for start in range(0, len(order), group_size):
        index = order[start : start + group_size]
        for x, y, part in ((s[index], t[index], "coarse"), (a[index], t[index], "fine")):
            slope = np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + eps)
            intercept = y.mean() - slope * x.mean()
            if part == "coarse":
                total += len(x) * (abs(slope - 1) + abs(intercept))
            else:
                total += weight * np.sum((y - intercept - slope * s[index]) ** 2)
    return total


def test_num_groups_is_the_other_way_to_say_group_size():
    student, teacher = draw((2, 8, 8, 3))
    by_count = place_loss(student, teacher, num_groups=4)
    by_size = place_loss(student, teacher, group_size=16)
    assert by_count.slope.shape == (2, 3, 4)
    np.testing.assert_array_equal(by_count.loss, by_size.loss)


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("grouping", ["error", "space"])
def test_whole_channel_group_is_lift(variant, grouping):
    student, teacher = draw((2, 8, 8, 3))
    place = place_loss(
        student,
        teacher,
        group_size=(8, 8) if grouping == "space" else 64,
        grouping=grouping,
        **PUBLISHED[variant],
    )
    lift = lift_loss(student, teacher, per="channel", **PUBLISHED[variant])
    for a, b in zip(place, lift, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def own_groups(student, teacher, count, size):
    """A user's grouping: consecutive elements of a channel, zero-padded to count groups of size."""
    mask = (np.arange(count * size) < student.shape[1]).astype(np.float32).reshape(count, size)
    pad = [(0, 0), (0, count * size - student.shape[1]), (0, 0)]
    cut = [
        np.moveaxis(np.pad(x, pad), -1, 1).reshape(len(x), -1, count, size)
        for x in (student, teacher)
    ]
    return Groups(*cut, None if mask.all() else mask)


@pytest.mark.parametrize("elements", [12, 10])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_own_grouping_gets_the_whole_loss(elements, variant):
    """Consecutive elements of one space axis are what grouping="space" makes of it."""
    student, teacher = draw((2, elements, 3))
    groups = own_groups(student, teacher, 3, 4)
    want = place_loss(student, teacher, grouping="space", group_size=4, **PUBLISHED[variant])
    for a, b in zip(lift_terms(groups, **PUBLISHED[variant]), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_own_grouping_reaches_the_student_only_and_in_float32():
    student, teacher = draw((2, 12, 3))

    def loss(student, teacher):
        cut = [jnp.moveaxis(x, -1, 1).reshape(2, 3, 3, 4) for x in (student, teacher)]
        return lift_terms(Groups(*cut, None)).loss

    half = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    assert loss(*half).dtype == jnp.float32
    to_student, to_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, teacher)
    assert (to_student != 0).all() and (to_teacher == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, m: (s[0], t[0], m), r"Groups hold .* got shape \(3, 3, 4\)"),
        (lambda s, t, m: (s, t[:1], m), "student has shape .* but teacher has"),
        (lambda s, t, m: (s, t, m[:2]), r"mask of Groups has shape \(2, 4\), expected .* \(3, 4\)"),
        (lambda s, t, m: (s.astype(int), t, m), "student must be floating point"),
    ],
)
def test_bad_groups(change, message):
    groups = own_groups(*draw((2, 10, 3)), 3, 4)
    with pytest.raises(ValueError, match=message):
        lift_terms(Groups(*change(*groups)))


def test_terms_and_weights_combine():
    student, teacher = draw((2, 8, 8, 3))
    both = place_loss(student, teacher)
    assert 0 < both.weight < 1
    np.testing.assert_allclose(both.loss, both.coarse + both.weight * both.fine, rtol=1e-6)
    assert place_loss(student, teacher, terms="coarse").loss == both.coarse
    assert place_loss(student, teacher, terms="fine").loss == both.fine
    half = place_loss(student, teacher, weight=0.5)
    np.testing.assert_allclose(half.loss, both.coarse + 0.5 * both.fine, rtol=1e-6)


def test_affine_student_has_no_fine_error():
    _, teacher = draw((2, 8, 8, 3))
    terms = place_loss((teacher - 0.5) / 2.0, teacher)
    np.testing.assert_allclose(terms.slope, 2.0, rtol=1e-3)
    np.testing.assert_allclose(terms.intercept, 0.5, rtol=1e-3)
    assert terms.fine < 1e-4


DEGENERATE = {
    "constant student": lambda t: jnp.full_like(t, 0.3),
    "zero student": jnp.zeros_like,
    "student is teacher": lambda t: t,
    "both constant": lambda t: jnp.ones_like(t),
    "huge": lambda t: 1e6 * t,
    "tiny": lambda t: 1e-12 * t,
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("variant", PUBLISHED)
def test_degenerate_points_are_finite(kind, variant):
    _, teacher = draw((2, 8, 8, 2))
    student = DEGENERATE[kind](jnp.asarray(teacher))
    teacher = jnp.ones_like(student) if kind == "both constant" else teacher
    for loss in (place_loss, lift_loss):
        terms, grad = jax.value_and_grad(
            lambda s, loss=loss: loss(s, teacher, **PUBLISHED[variant]).loss
        )(student)
        assert np.isfinite(terms) and np.isfinite(grad).all()


def test_student_equal_teacher_is_the_minimum():
    _, teacher = draw((2, 8, 8, 2))
    terms = place_loss(teacher, teacher)
    # eps 1e-7 against the variance inside a group is all that keeps the slope from 1.
    np.testing.assert_allclose(terms.slope, 1, atol=1e-5)
    assert terms.weight > 0.999 and terms.fine < 1e-6


def test_ties_are_broken_by_position():
    """With all errors equal the groups are runs of neighbours."""
    teacher = jnp.asarray(np.arange(12, dtype=np.float32).reshape(1, 12, 1))
    groups = error_groups(teacher - 1, teacher, 4)
    np.testing.assert_array_equal(groups[0, :, 0], np.repeat([0, 1, 2], 4))


def test_error_groups_follow_the_error():
    student, teacher = draw((2, 8, 8, 3))
    groups = np.asarray(error_groups(student, teacher, 16))
    error = np.square(teacher - student)
    assert groups.shape == student.shape
    for g in range(3):
        for b in range(2):
            for c in range(3):
                e, k = error[b, ..., c], groups[b, ..., c]
                assert (k == g).sum() == 16
                assert e[k == g].max() <= e[k == g + 1].min()


@pytest.mark.parametrize("loss", [place_loss, lift_loss])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_in_is_nan_out(loss, where):
    student, teacher = draw((2, 8, 8, 3))
    (student if where == "student" else teacher)[1, 2, 3, 1] = np.nan
    terms = loss(student, teacher)
    assert np.isnan(terms.loss) and np.isnan(terms.weight)
    assert np.isfinite(terms.slope[0]).all(), "other samples keep their fits"


def test_bfloat16_is_computed_in_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in draw((2, 8, 8, 3)))
    low = place_loss(student, teacher)
    high = place_loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    assert low.loss.dtype == jnp.float32
    np.testing.assert_array_equal(low.loss, high.loss)
    grad = jax.grad(lambda s: place_loss(s, teacher).loss)(student)
    assert grad.dtype == jnp.bfloat16


def test_large_offset_keeps_the_fit():
    student, teacher = draw((2, 16, 16, 1))
    near = place_loss(student, teacher)
    far = place_loss(student + np.float32(1000), teacher + np.float32(1000))
    np.testing.assert_allclose(far.slope, near.slope, atol=2e-2)


def test_no_gradient_reaches_the_teacher():
    student, teacher = draw((2, 8, 8, 3))
    for loss in (place_loss, lift_loss):
        grad = jax.grad(lambda t, loss=loss: loss(student, t).loss)(teacher)
        assert not np.any(grad)
    assert not np.any(jax.grad(lambda t: output_kd_loss(student, t))(teacher))


def test_slope_and_intercept_are_differentiable():
    """Users may build their own loss on the fits; checked against plain autodiff."""
    student, teacher = draw((2, 8, 8, 3))

    def by_hand(s):
        x, y = s - s.mean((1, 2), keepdims=True), teacher - teacher.mean((1, 2), keepdims=True)
        slope = (x * y).mean((1, 2)) / ((x * x).mean((1, 2)) + 1e-7)
        return jnp.sum(jnp.sin(slope)) + jnp.sum(
            jnp.square(teacher.mean((1, 2)) - slope * s.mean((1, 2)))
        )

    def ours(s):
        terms = lift_loss(s, teacher)
        return jnp.sum(jnp.sin(terms.slope)) + jnp.sum(jnp.square(terms.intercept))

    np.testing.assert_allclose(jax.grad(ours)(student), jax.grad(by_hand)(student), atol=1e-6)


@pytest.mark.parametrize("loss", [place_loss, partial(place_loss, group_size=10), lift_loss])
def test_vmap_equals_a_loop(loss):
    pairs = [draw((2, 8, 8, 3), seed) for seed in range(3)]
    students, teachers = (jnp.stack(x) for x in zip(*pairs, strict=True))
    value = jax.value_and_grad(lambda s, t: loss(s, t).loss)
    mapped = jax.jit(jax.vmap(value))(students, teachers)
    looped = [value(s, t) for s, t in pairs]
    np.testing.assert_allclose(mapped[0], [v for v, _ in looped], rtol=1e-5)
    np.testing.assert_allclose(mapped[1], np.stack([g for _, g in looped]), atol=1e-5)


def test_sharded_batch_equals_one_device(both_sorts):
    """Under jit the adaptive weight is over the global batch, and nothing is gathered."""
    student, teacher = draw((8, 8, 8, 3))
    value = jax.jit(jax.value_and_grad(lambda s, t: place_loss(s, t).loss))
    mesh = Mesh(jax.devices(), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    parts = jax.device_put((student, teacher), sharding)
    alone, sharded = value(student, teacher), value(*parts)
    np.testing.assert_allclose(sharded[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(sharded[1], alone[1], atol=1e-5)
    assert sharded[1].sharding.is_equivalent_to(sharding, 4)
    program = value.lower(*parts).compile().as_text()
    assert "all-gather" not in program and "all-to-all" not in program


@pytest.fixture(params=["xla", "machine code"])
def both_sorts(request, monkeypatch):
    if request.param == "machine code":
        monkeypatch.setattr(permute, "HOST_LEAST", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_machine_code_and_xla_agree(monkeypatch):
    """The same order, the same numbers, alone and under vmap."""
    pairs = [draw(shape) for shape in [(8, 8, 8, 3), (3, 7, 5, 2), (2, 12, 3)]]
    for student, teacher in pairs:
        student[0] = teacher[0]  # ties

    def values(students):
        def value(s, t):
            terms = place_loss(s, t, group_size=4)
            return terms.loss, terms

        found = []
        for s, (_, t) in zip(students, pairs, strict=True):
            one = jax.value_and_grad(value, has_aux=True)(s, t)
            mapped = jax.vmap(lambda s, t=t: value(s, t)[0])(jnp.stack([s, s]))
            found.append((one, mapped))
        return found

    results = []
    for least in (0, 10**9):
        monkeypatch.setattr(permute, "HOST_LEAST", least)
        jax.clear_caches()
        results.append(jax.jit(values)([s for s, _ in pairs]))
    jax.clear_caches()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    for ((loss, terms), _), mapped in results[0]:
        np.testing.assert_allclose(mapped, [loss, loss], rtol=1e-5)
        assert terms.loss == loss


def test_shard_map_with_axis_name():
    student, teacher = draw((8, 8, 8, 3))
    mesh = Mesh(jax.devices(), ("data",))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def mapped(s, t):
        terms = place_loss(s, t, axis_name="data")
        return jax.lax.pmean(terms.loss, "data"), terms.weight

    loss, weight = mapped(student, teacher)
    alone = place_loss(student, teacher)
    np.testing.assert_allclose(weight, alone.weight, rtol=1e-5)
    np.testing.assert_allclose(loss, alone.loss, rtol=1e-5)


def test_sort_is_not_differentiated():
    """The gradient's program sorts no more than the value's: the hand-written rule needs none."""
    student, teacher = draw((2, 8, 8, 3))

    def loss(s):
        return place_loss(s, teacher).loss

    sorts = [
        jax.jit(f).lower(student).as_text().count("stablehlo.sort")
        for f in (loss, jax.value_and_grad(loss))
    ]
    assert sorts == [1, 1]  # eight simulated devices: one sort


BAD = {
    "shapes": (dict(), (2, 8, 8, 1), r"\(2, 8, 8, 3\).*\(2, 8, 8, 1\)"),
    "group_size 0": (dict(group_size=0), None, r"group_size.*1\.\.64"),
    "group_size large": (dict(group_size=65), None, r"group_size.*1\.\.64"),
    "group_size fraction": (dict(group_size=4.0), None, "group_size.*whole"),
    "num_groups": (dict(num_groups=0), None, "num_groups"),
    "num_groups uneven": (dict(num_groups=40), None, "num_groups=40.*nearest is 32"),
    "patch": (dict(grouping="space", group_size=(9, 4)), None, "patch shape"),
    "patch rank": (dict(grouping="space", group_size=(2, 2, 2)), None, "patch shape"),
    "no square": (dict(grouping="space", group_size=12), None, "no cubic patch"),
    "norm": (dict(norm="l3"), None, "norm must be one of 'l1', 'l2'; got 'l3'"),
    "reduction": (dict(reduction="max"), None, "reduction"),
    "normalize": (dict(normalize="max"), None, "normalize"),
    "terms": (dict(terms="all"), None, "terms"),
    "weight": (dict(weight="cosine"), None, "weight must be 'adaptive'"),
    "grouping": (dict(grouping="time"), None, "grouping"),
    "eps": (dict(eps=0.0), None, "eps"),
    "coarse_scale": (dict(reduction="mean", coarse_scale=3.0), None, "coarse_scale"),
    "group_size True": (dict(group_size=True), None, "group_size.*whole number.*got True"),
    "group_size np.True_": (dict(group_size=np.True_), None, "group_size.*whole number"),
    "group_size None": (dict(group_size=None), None, "group_size.*whole number.*got None"),
    "group_size text": (dict(group_size="16"), None, "group_size.*whole number.*got '16'"),
    "group_size pair": (dict(group_size=(4, 4)), None, r"group_size.*whole number.*got \(4, 4\)"),
    "num_groups True": (dict(num_groups=True), None, "num_groups.*whole number.*got True"),
    "num_groups fraction": (dict(num_groups=4.0), None, "num_groups.*whole number.*got 4.0"),
    "patch True": (dict(grouping="space", group_size=(True, 4)), None, "patch shape.*got True"),
    "patch fraction": (dict(grouping="space", group_size=(4, 4.0)), None, "patch shape.*got 4.0"),
    "patch of one True": (dict(grouping="space", group_size=True), None, "whole number"),
    "patch text": (dict(grouping="space", group_size="ab"), None, "whole number"),
    "eps nan": (dict(eps=np.nan), None, "eps must be > 0.*nan"),
    "eps inf": (dict(eps=np.inf), None, "eps must be > 0.*inf"),
    "eps negative": (dict(eps=-1e-7), None, "eps must be > 0.*-1e-07"),
    "eps too small": (dict(eps=1e-50), None, "eps must be > 0 in float32.*1e-50"),
    "eps True": (dict(eps=True), None, "eps must be > 0.*True"),
    "eps text": (dict(eps="1e-7"), None, "eps must be > 0.*'1e-7'"),
    "weight nan": (dict(weight=np.float32(np.nan)), None, "weight.*finite and 0 or more"),
    "weight negative": (dict(weight=-0.5), None, "weight.*finite and 0 or more.*-0.5"),
    "weight True": (dict(weight=True), None, "weight must be 'adaptive' or a number.*True"),
    "weight None": (dict(weight=None), None, "weight must be 'adaptive' or a number.*None"),
    "weight array": (dict(weight=np.ones(2, np.float32)), None, "weight must be 'adaptive'"),
    "weight complex": (dict(weight=1j), None, "weight must be 'adaptive'"),
    "coarse_scale nan": (dict(coarse_scale=np.nan), None, "coarse_scale must be a number.*nan"),
    "coarse_scale True": (dict(coarse_scale=jnp.array(True)), None, "coarse_scale must be"),
    "reduction None": (dict(reduction=None), None, "reduction must be one of"),
    "norm list": (dict(norm=["l1"]), None, "norm must be one of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_named(kind):
    options, teacher_shape, message = BAD[kind]
    student, teacher = draw((2, 8, 8, 3))
    if teacher_shape:
        teacher = np.zeros(teacher_shape, np.float32)
    with pytest.raises(ValueError, match=message) as error:
        place_loss(student, teacher, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8, jnp.int32])
def test_whole_numbers_of_any_library(kind):
    student, teacher = draw((2, 8, 8, 3))
    want = place_loss(student, teacher, group_size=16).loss
    assert place_loss(student, teacher, group_size=kind(16)).loss == want
    assert place_loss(student, teacher, num_groups=kind(4)).loss == want
    by_space = partial(place_loss, student, teacher, grouping="space")
    want = by_space(group_size=(4, 4)).loss
    for patch in (kind(16), (kind(4), 4), [4, kind(4)], np.array([4, 4])):
        assert by_space(group_size=patch).loss == want
    groups = error_groups(student, teacher, kind(16))
    np.testing.assert_array_equal(groups, error_groups(student, teacher, 16))
    assert linear_weight(kind(1), kind(4)) == 0.25


def test_numbers_may_be_traced_where_they_decide_no_shape():
    student, teacher = draw((2, 8, 8, 3))

    def loss(weight, scale):
        return place_loss(student, teacher, weight=weight, coarse_scale=scale).loss

    np.testing.assert_allclose(jax.jit(loss)(1, 2.5), loss(1.0, 2.5), rtol=1e-6)
    for name in ("group_size", "num_groups", "eps"):
        with pytest.raises(ValueError, match=f"{name}.*known when the program is traced"):
            jax.jit(lambda x, name=name: place_loss(student, teacher, **{name: x}).loss)(4)
    with pytest.raises(ValueError, match="weight must be"):
        jax.jit(lambda w: place_loss(student, teacher, weight=w).loss)(np.ones(2))


def test_bad_arrays_are_named():
    for bad, message in (
        (np.zeros((2, 8, 8, 3), np.int32), "floating point, got int32"),
        (np.zeros((2, 8, 8, 3), np.complex64), "floating point, got complex64"),
        (np.zeros((2, 8, 8, 3), bool), "floating point, got bool"),
        (np.zeros((0, 8, 8, 3), np.float32), "non-empty"),
        (np.zeros((2, 0, 8, 3), np.float32), "non-empty"),
        (np.zeros((4, 3), np.float32), r"\(batch, \*space, channel\)"),
        (0.5, r"\(batch, \*space, channel\)"),
        (np.full((2, 4, 3), "x"), "student must be an array of floating-point numbers"),
    ):
        for loss in (place_loss, lift_loss, output_kd_loss, partial(error_groups, group_size=4)):
            with pytest.raises(ValueError, match=message):
                loss(bad, bad)
    with pytest.raises(ValueError, match="per must be one of"):
        lift_loss(*draw((2, 4, 4, 1)), per="pixel")
    with pytest.raises(ValueError, match="group_size must be a whole number in 1..16, got 0"):
        error_groups(*draw((2, 4, 4, 1)), 0)


def test_bad_weights_and_features_are_named():
    x = np.ones((2, 4, 6), np.float32)
    for call, message in (
        (lambda: linear_weight(1, 2.5), "total_steps must be a whole number.*2.5"),
        (lambda: cosine_weight(1, True), "total_steps must be a whole number.*True"),
        (lambda: linear_weight(np.nan, 10), "step must be a number, finite.*nan"),
        (lambda: linear_weight(1, 10, "up"), "direction must be one of 'increase', 'decrease'"),
        (lambda: constant_weight(np.nan), "value must be a number, finite.*nan"),
        (lambda: constant_weight(-1), "value must be a number, finite and 0 or more, got -1"),
        (lambda: mask_outliers(x, np.nan), "mask_sigma must be a number.*nan"),
        (lambda: mask_outliers(x, -2), "mask_sigma must be a number.*-2"),
        (lambda: mask_outliers(x[:, :1, 0], 2), "mask_sigma needs .* two values or more"),
        (lambda: mask_outliers(x.astype(int), 2), "mask_sigma needs floating-point"),
        (lambda: feature_kd_loss({"a": x}, {"a": x}, mask_sigma=0), "mask_sigma must be"),
        (lambda: feature_kd_loss({"a": x.astype(int)}, {"a": x}), "student's feature 'a'.*int32"),
        (lambda: feature_kd_loss({"a": x}, {"a": x * 1j}), "teacher's feature 'a'.*complex"),
        (lambda: feature_kd_loss({"a": x[:0]}, {"a": x[:0]}), "student's feature 'a'.*non-empty"),
        (lambda: feature_kd_loss({"a": x[0, 0]}, {"a": x[0, 0]}), r"feature 'a' must be \(batch"),
        (lambda: feature_kd_loss({"a": x}, {"a": x}, adapters={"a": x}), "must be a matrix"),
        (lambda: init_adapters(jax.random.key(0), {"a": 6}, {"b": 3}), "teacher has no channels"),
        (lambda: init_adapters(jax.random.key(0), {"a": 0}, {"a": 3}), "student's channels of 'a'"),
        (lambda: init_adapters(jax.random.key(0), {"a": 6}, {"a": 3}, scale=np.inf), "scale must"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for mask in (np.full((3, 4), 2.0), np.zeros((3, 4))):
        groups = Groups(*own_groups(*draw((2, 12, 3)), 3, 4)[:2], mask)
        with pytest.raises(ValueError, match="mask of Groups must hold 0 and 1, and a 1 in every"):
            lift_terms(groups)


def test_low_precision_under_strict_promotion():
    """A setting that large code bases switch on; all losses compute in float32, weights too."""
    dtype = jnp.bfloat16
    student, teacher = (jnp.asarray(x).astype(dtype) for x in draw((2, 5, 4, 3)))
    kernel = jnp.ones((3, 2), jnp.bfloat16)
    mask = np.ones((3, 4), bool)
    losses = {
        "place": lambda s: place_loss(s, teacher).loss,
        "place, uneven": lambda s: place_loss(s, teacher, group_size=np.int64(7)).loss,
        "place, mean": lambda s: place_loss(s, teacher, **PUBLISHED["dit"]).loss,
        "patches": lambda s: place_loss(s, teacher, grouping="space", group_size=(2, 3)).loss,
        "scaled": lambda s: place_loss(s, teacher, coarse_scale=np.float64(2)).loss,
        "lift": lambda s: lift_loss(s, teacher, weight=np.float64(0.3)).loss,
        "sample": lambda s: lift_loss(s, teacher, per="sample", weight=1).loss,
        "float32 teacher": lambda s: lift_loss(s, teacher.astype(jnp.float32)).loss,
        "cosine": lambda s: lift_loss(s, teacher, weight=cosine_weight(3, np.int64(9))).loss,
        "linear": lambda s: lift_loss(s, teacher, weight=linear_weight(jnp.int32(3), 9)).loss,
        "learnable": lambda s: lift_loss(s, teacher, weight=learnable_weight(0.3)).loss,
        "output": lambda s: output_kd_loss(s, teacher),
        "features": lambda s: feature_kd_loss({"a": s}, {"a": teacher}, mask_sigma=2),
        "adapted": lambda s: feature_kd_loss(
            {"a": s}, {"a": teacher[..., :2]}, adapters={"a": kernel}
        ),
        "own groups": lambda s: (
            lift_terms(Groups(*(x.reshape(1, 2, 15, 4)[:, :, :3] for x in (s, teacher)), mask)).loss
        ),
    }
    with jax.numpy_dtype_promotion("strict"):
        for name, loss in losses.items():
            value, gradient = jax.eval_shape(jax.value_and_grad(loss), student)
            assert value.dtype == jnp.float32, name
            assert gradient.dtype == dtype, name
            assert np.isfinite(loss(student)), name
        error_groups(student, teacher, 4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_other_low_precisions_are_computed_in_float32(dtype):
    student, teacher = (jnp.asarray(x).astype(dtype) for x in draw((2, 5, 4, 3)))
    wide = [x.astype(jnp.float32) for x in (student, teacher)]
    for loss in (place_loss, lift_loss, output_kd_loss):
        with jax.numpy_dtype_promotion("strict"):
            value = loss(student, teacher)
            gradient = jax.grad(lambda s, f=loss: jax.tree.leaves(f(s, teacher))[0])(student)
        jax.tree.map(np.testing.assert_array_equal, value, loss(*wide))
        assert gradient.dtype == dtype


@pytest.mark.parametrize("group_size, variant", [(4, "pixel"), (5, "dit"), (5, "sd")])
def test_forward_derivatives_are_the_gradients(group_size, variant, monkeypatch):
    monkeypatch.setattr(permute, "HOST_LEAST", 0)
    student, teacher = draw((2, 4, 4, 3))
    direction = draw((2, 4, 4, 3), seed=1)[1]
    for loss in (
        lambda s: place_loss(s, teacher, group_size=group_size, **PUBLISHED[variant]).loss,
        lambda s: lift_loss(s, teacher, **PUBLISHED[variant]).loss,
    ):

        @jax.jit
        def derivatives(student, direction, loss=loss):
            def back(s):
                return jnp.vdot(jax.grad(loss)(s), direction)

            def forward(s):
                return jax.jvp(loss, (s,), (direction,))[1]

            first = jnp.vdot(jax.grad(loss)(student), direction)
            also = forward(student), jax.linearize(loss, student)[1](direction)
            second = jax.jvp(back, (student,), (direction,))[1]
            also_second = [jnp.vdot(jax.grad(f)(student), direction) for f in (back, forward)]
            gradients = jax.grad(loss)(student), jax.jacfwd(loss)(student)
            return *gradients, first, also, second, also_second

        found = derivatives(student, direction)
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[3], [found[2]] * 2, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[5], [found[4]] * 2, rtol=1e-3, atol=1e-4)


def test_no_forward_derivative_by_the_teacher():
    student, teacher = draw((2, 4, 4, 3))
    for loss in (place_loss, lift_loss):
        change = jax.jvp(lambda t, loss=loss: loss(student, t).loss, (teacher,), (teacher,))[1]
        assert change == 0


def test_output_kd_reductions():
    student, teacher = draw((4, 8, 8, 3))
    squares = np.square(student - teacher)
    np.testing.assert_allclose(output_kd_loss(student, teacher), squares.sum() / 4, rtol=1e-5)
    mean = output_kd_loss(student, teacher, reduction="mean")
    np.testing.assert_allclose(mean, squares.mean(), rtol=1e-5)
    each = output_kd_loss(student, teacher, reduction="per_sample")
    np.testing.assert_allclose(each, squares.mean((1, 2, 3)), rtol=1e-5)


def test_feature_kd_layer_map_mask_and_errors():
    student, teacher = draw((2, 4, 4, 6), 1)
    value = feature_kd_loss({"a": student}, {"b": teacher}, layer_map={"a": "b"}, reduction="mean")
    np.testing.assert_allclose(value, np.mean((student - teacher) ** 2), rtol=1e-5)
    with pytest.raises(ValueError, match="teacher has no feature 'a'"):
        feature_kd_loss({"a": student}, {"b": teacher})
    with pytest.raises(ValueError, match="'a' has shape.*adapters match widths"):
        feature_kd_loss({"a": student}, {"a": teacher[..., :3]})
    adapters = init_adapters(jax.random.key(0), {"a": 6}, {"a": 3})
    assert adapters["a"].shape == (6, 3) and 0 < np.abs(adapters["a"]).max() <= 0.005
    assert feature_kd_loss({"a": student}, {"a": teacher[..., :3]}, adapters=adapters) > 0
    with pytest.raises(ValueError, match="no adapter for feature 'a'"):
        feature_kd_loss({"a": student}, {"a": teacher}, adapters={})
    with pytest.raises(ValueError, match="takes 5 channels, got 6"):
        feature_kd_loss({"a": student}, {"a": teacher}, adapters={"a": np.zeros((5, 6))})


def test_mask_outliers_matches_torch():
    x = np.random.default_rng(0).standard_t(2, size=(3, 16, 8)).astype(np.float32)
    t = torch.from_numpy(x)
    mean, std = t.mean((1, 2), keepdim=True), t.std((1, 2), keepdim=True)
    expected = t * ((t - mean).abs() < 2 * std)
    np.testing.assert_array_equal(mask_outliers(x, 2.0), expected.numpy())
    masked = feature_kd_loss({"a": x}, {"a": np.zeros_like(x)}, mask_sigma=2.0, reduction="mean")
    np.testing.assert_allclose(masked, (expected**2).mean().item(), rtol=1e-5)


def test_import_is_light():
    """`import liftplace_jax` and a small loss bring no TensorFlow, TFDS, orbax, numba or model."""
    code = (
        "import sys, numpy as np, liftplace_jax as l;"
        "x = np.ones((1, 4, 4, 1), np.float32); l.place_loss(x, x);"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'orbax', 'clu', 'torch', 'matplotlib',"
        " 'numba', 'sklearn', 'tensorboard', 'liftplace_jax.models', 'liftplace_jax.training'}"
        " & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
