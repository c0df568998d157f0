"""Columns: what examples carry beside their images, from a source to the network's condition."""

import contextlib
import itertools

import jax
import numpy as np
import pytest

from liftplace_jax.conditioning import UNCONDITIONAL, Classes, check_sources
from liftplace_jax.data import Column, Source, eval_batches, train_batches

TOKENS = np.random.default_rng(0).integers(0, 99, (10, 7)).astype(np.int32)


def numbers(count=10):
    """A source whose image i is filled with i."""
    records = [{"image": np.full((2, 2, 1), i, np.uint8), "label": i % 3} for i in range(count)]
    return Source("numbers", records, image_shape=(2, 2, 1), num_classes=3)


def told(**columns):
    """A conditioning that needs columns."""

    class Told(type(UNCONDITIONAL)):
        pass

    result = Told()
    result.columns = columns
    return result


def test_batches_hand_on_every_column():
    states = np.random.default_rng(1).normal(size=(10, 3, 2)).astype(np.float16)
    source = numbers().with_column("tokens", Column.of(TOKENS))
    source = source.with_column(
        "text", Column(jax.ShapeDtypeStruct((3, 2), np.float16), lambda i: states[i])
    )
    assert {name: (spec.shape, spec.dtype) for name, spec in source.columns.items()} == {
        "label": ((), np.int32),
        "tokens": ((7,), np.int32),
        "text": ((3, 2), np.float16),
    }
    with contextlib.closing(train_batches(source, batch_size=4, seed=3, flip=True)) as batches:
        seen = list(itertools.islice(batches, 4))
    plain = train_batches(numbers(), batch_size=4, seed=3, flip=True)
    for batch, other in zip(seen, plain, strict=False):
        index = np.array([np.argwhere((TOKENS == x).all(1))[0, 0] for x in batch["tokens"]])
        np.testing.assert_array_equal(batch["text"], states[index])
        np.testing.assert_array_equal(batch["label"], index % 3)
        for name in other:  # columns change nothing else
            np.testing.assert_array_equal(batch[name], other[name])
    plain.close()
    for batch in eval_batches(source, batch_size=4):
        assert batch["text"].dtype == np.float16
        np.testing.assert_array_equal(batch["tokens"], TOKENS[batch["index"]])


def test_a_source_stays_what_it_is_where_another_gets_a_column():
    source = numbers()
    other = source.with_column("tokens", Column.of(TOKENS))
    assert list(source.columns) == ["label"] and "tokens" not in source.get([1])
    assert len(other) == 10 and other.name == source.name
    assert other.fingerprint() == source.fingerprint() == {"images": 10}
    named = source.with_column("tokens", Column.of(TOKENS, {"tokenizer": "x"}))
    assert named.fingerprint() == {"images": 10, "columns": {"tokens": {"tokenizer": "x"}}}


@pytest.mark.parametrize("name", ["label", "tokens", "image", "moments", "mirrored", "mask"])
def test_a_name_is_given_once(name):
    source = numbers().with_column("tokens", Column.of(TOKENS))
    with pytest.raises(ValueError, match=f"numbers has {name!r} already"):
        source.with_column(name, Column.of(TOKENS))


@pytest.mark.parametrize("values", [TOKENS[:, :3], TOKENS.astype(np.int64)])
def test_values_that_are_not_what_a_column_says_are_refused(values):
    spec = jax.ShapeDtypeStruct((7,), np.int32)
    source = numbers().with_column("tokens", Column(spec, lambda indices: values[indices]))
    message = r"numbers, column 'tokens': it has values \(2, .\) of int.., want \(2, 7\) of int32"
    with pytest.raises(ValueError, match=message):
        next(eval_batches(source, batch_size=2))


def test_a_missing_column_is_refused_by_name():
    wanted = jax.ShapeDtypeStruct((7,), np.int32)
    with pytest.raises(ValueError, match="numbers has no column 'tokens', which .*it has label"):
        check_sources(told(tokens=wanted), [numbers()])
    source = numbers().with_column("tokens", Column.of(TOKENS[:, :5]))
    message = r"has a column 'tokens' of \(5,\) int32, config.model is told \(7,\) int32"
    with pytest.raises(ValueError, match=message):
        check_sources(told(tokens=wanted), [source])
    fitting = numbers().with_column("tokens", Column.of(TOKENS))
    check_sources(told(tokens=wanted), [fitting])
    check_sources(Classes(3, None, 0.0), [fitting])
    with pytest.raises(ValueError, match="numbers has 3 classes, config.model.num_classes is 4"):
        check_sources(Classes(4, None, 0.0), [fitting])
