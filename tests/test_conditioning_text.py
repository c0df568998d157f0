"""Texts as a condition: what is dropped, what says nothing, and what a network is handed."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liftplace_jax.conditioning import UNCONDITIONAL, Classes, Encoding, Text, check_sources

WIDTH, LENGTH = 3, 4
NULL = np.array([8, 9, 9, 9], np.int32)
IDS = np.arange(20, dtype=np.int32).reshape(5, LENGTH)
TABLE = np.random.default_rng(0).normal(size=(30, WIDTH)).astype(np.float32)
FROZEN = {"text": {"params": TABLE, "null": {"tokens": NULL}}}


def look_up(params, columns):
    return params[columns["tokens"]]


def stored(params, columns):
    assert params is None  # cached states need no encoder
    return {k: v.astype(jnp.float32) for k, v in columns.items()}


TOKENS = Encoding(
    (("tokens", (LENGTH,), "int32"),),
    look_up,
    LENGTH,
    WIDTH,
    origin=(("tokens", '{"sha256": "one"}'),),
)
STATES = Encoding(
    (("context", (LENGTH, WIDTH), "float16"), ("pooled", (2,), "float16")), stored, LENGTH, WIDTH, 2
)
TEXT = Text(WIDTH).bound(lambda pooled: TOKENS, dropout=0.5)


def test_the_condition_is_ids_and_the_network_gets_states():
    batch = {"tokens": IDS, "label": np.zeros(5)}
    states = TEXT.embed(FROZEN, TEXT.of(batch))
    np.testing.assert_array_equal(states, TABLE[IDS])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), states) == jax.tree.map(
        lambda x: (x.shape, x.dtype), TEXT.inputs(5)
    )
    null = TEXT.embed(FROZEN, TEXT.null(TEXT.of(batch)))
    np.testing.assert_array_equal(null, np.tile(TABLE[NULL], (5, 1, 1)))
    drawn = jax.vmap(TEXT.draw)(jax.random.split(jax.random.key(0), 5))
    np.testing.assert_array_equal(TEXT.embed(FROZEN, drawn), null)
    assert dict(TEXT.columns) == {"tokens": jax.ShapeDtypeStruct((LENGTH,), jnp.int32)}


def test_whole_texts_are_dropped_as_the_key_says():
    batch = {"tokens": np.tile(IDS, (200, 1))}
    condition = TEXT.drop(jax.random.key(0), TEXT.of(batch))
    states = np.asarray(TEXT.embed(FROZEN, condition))
    given, null = TABLE[batch["tokens"]], TABLE[NULL]
    is_null = (states == null).all((1, 2))
    assert (is_null | (states == given).all((1, 2))).all()  # one or the other, never a mixture
    assert 0.4 < is_null.mean() < 0.6
    again = TEXT.drop(jax.random.key(0), TEXT.of(batch))
    jax.tree.map(np.testing.assert_array_equal, condition, again)
    other = TEXT.drop(jax.random.key(1), TEXT.of(batch))
    assert (other["empty"] != condition["empty"]).any()
    never = dataclasses.replace(TEXT, dropout=0.0)
    assert not never.drop(jax.random.key(0), never.of(batch))["empty"].any()


def test_a_negative_prompt_is_another_null():
    negative = {"text": FROZEN["text"] | {"null": {"tokens": IDS[3]}}}
    null = TEXT.embed(negative, TEXT.null(TEXT.of({"tokens": IDS[:1]})))
    np.testing.assert_array_equal(null[0], TABLE[IDS[3]])


def test_cached_states_and_pooled_vectors():
    text = Text(WIDTH, pooled_width=2).bound(lambda pooled: STATES if pooled else TOKENS)
    rng = np.random.default_rng(1)
    batch = {
        "context": rng.normal(size=(6, LENGTH, WIDTH)).astype(np.float16),
        "pooled": rng.normal(size=(6, 2)).astype(np.float16),
    }
    null = {"context": np.ones((LENGTH, WIDTH), np.float16), "pooled": np.ones(2, np.float16)}
    frozen = {"text": {"null": null}}
    found = text.embed(frozen, text.of(batch))
    for name, value in batch.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32))
    shapes = jax.eval_shape(text.embed, frozen, text.of(batch))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), text.inputs(6)
    )
    nothing = text.embed(frozen, text.null(text.of(batch)))
    assert all((np.asarray(value) == 1).all() for value in nothing.values())


def test_it_is_a_constant_of_jitted_functions():
    same = Text(WIDTH).bound(lambda pooled: TOKENS, dropout=0.5)
    assert same == TEXT and hash(same) == hash(TEXT)
    assert TEXT != dataclasses.replace(TEXT, dropout=0.25) and TEXT != Text(WIDTH)
    # What is frozen is an argument, not a constant of the program.
    program = jax.jit(TEXT.embed).lower(FROZEN, TEXT.of({"tokens": IDS})).as_text()
    constants = [line for line in program.splitlines() if "stablehlo.constant" in line]
    assert not any("x3xf32>" in line or "<4xi32>" in line for line in constants), constants
    assert Text(WIDTH).inputs(2).shape == (2, 1, WIDTH)


def test_students_are_told_what_the_teacher_is():
    Text(WIDTH).check_student(Text(WIDTH))
    for student in (Text(4), Text(WIDTH, 2), UNCONDITIONAL, Classes(3, 3, 0.1)):
        with pytest.raises(ValueError, match="it takes text of (width|pooled_width)"):
            Text(WIDTH).check_student(student)
    for teacher in (UNCONDITIONAL, Classes(3, 3, 0.1)):
        with pytest.raises(ValueError, match="it has"):
            teacher.check_student(Text(WIDTH))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be set: the network is told texts"):
        Text(WIDTH).bound(None)
    with pytest.raises(ValueError, match="encoder of states of width 3, config.model takes 5"):
        Text(5).bound(lambda pooled: TOKENS)
    with pytest.raises(ValueError, match="pooled vectors of width None, config.model takes 2"):
        Text(WIDTH, 2).bound(lambda pooled: TOKENS)
    for other in (UNCONDITIONAL, Classes(3, 3, 0.1)):
        assert other.bound(None) is other
        with pytest.raises(ValueError, match="is for networks that are told texts"):
            other.bound(lambda pooled: TOKENS)


def test_data_must_have_the_tokens_of_this_tokenizer():
    def source(**changes):
        fields = {
            "name": "pictures",
            "columns": dict(TEXT.columns),
            "column_identities": {"tokens": {"sha256": "one"}},
        }
        return SimpleNamespace(**fields | changes)

    check_sources(TEXT, [source()])
    with pytest.raises(ValueError, match="pictures has no column 'tokens'"):
        check_sources(TEXT, [source(columns={})])
    message = 'column \'tokens\' was made by {"sha256": "two"}, config.text says {"sha256": "one"}'
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sources(TEXT, [source(), source(column_identities={"tokens": {"sha256": "two"}})])
