"""Token ids, against those that transformers made of the same folders."""

import json
import re
import sys

import numpy as np
import pytest
from transformers import CLIPTokenizer

from liftplace_jax.encoders.tokenizer import load_tokenizer, train_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
FOLDERS = ("sd1", "sd21", "sd3_2", "config_alone", "bare")


@pytest.fixture(scope="module")
def known(golden):
    """A vocabulary of CLIP's layout, one of T5's kind, texts and ids; see meta["what"]."""
    return golden("tokenizer_ids")[1]


def write_clip(folder, known, files, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    contents = (
        {"vocab.json": {token: number for number, token in enumerate(known["vocab"])}}
        | files
        | changes
    )
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    lines = ["#version: 0.2", *known["merges"]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def case(known, name):
    return next(case for case in known["clip"] if case["name"] == name)


# Ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_clip_ids(tmp_path, known, name):
    found = case(known, name)
    tokenizer = load_tokenizer(write_clip(tmp_path, known, found["files"]))
    assert tokenizer.length == found["length"] and tokenizer.vocab_size == len(known["vocab"])
    ids = tokenizer.encode(known["texts"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, found["ids"])


def test_what_the_cases_are_for(tmp_path, known):
    """That they would notice: the pad token, "!" in a text, a cut text keeps its end."""
    sd1, sd21 = (
        load_tokenizer(write_clip(tmp_path / name, known, case(known, name)["files"]))
        for name in ("sd1", "sd21")
    )
    end = known["vocab"].index(END)
    assert sd21.pad_id == 0 and sd1.pad_id == end and known["vocab"][0] == "!"
    one, two = sd1.encode(["a!", ""]), sd21.encode(["a!", ""])
    assert one[0, 2] == known["vocab"].index("!</w>") and two[0, 2] == 0
    assert list(one[1, 1:4]) == 3 * [end] and list(two[1, 1:4]) == [end, 0, 0]
    long = sd1.encode(["x" * 10_000, "the red house " * 40])
    assert (long[:, -1] == end).all() and (long[:, :-1] != end).all()
    assert len({t.identity["sha256"] for t in (sd1, sd21)}) == 2
    assert sd1.encode([]).shape == (0, 77)


def test_t5_ids(tmp_path, known):
    for name, content in known["t5"]["files"].items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id == 0
    np.testing.assert_array_equal(tokenizer.encode(known["texts"]), known["t5"]["ids"])
    assert load_tokenizer(tmp_path, length=8).encode(["a photo of a cat"]).shape == (1, 8)


@pytest.mark.parametrize("name", ["sd1", "sd21", "sd3_2"])
def test_a_tokenizer_json_of_transformers_gives_the_same_ids(tmp_path, known, name):
    found = case(known, name)
    folder = write_clip(tmp_path / "two_files", known, found["files"])
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "one_file")
    assert (tmp_path / "one_file" / "tokenizer.json").exists()
    tokenizer = load_tokenizer(tmp_path / "one_file")
    np.testing.assert_array_equal(tokenizer.encode(known["texts"]), found["ids"])
    assert tokenizer.identity["sha256"] == load_tokenizer(folder).identity["sha256"]


def test_a_vocabulary_of_ones_own(tmp_path, known):
    captions = ["red apple", "green apple", "woman running: light skin tone", "caf\u00e9"] * 4
    tokenizer = train_tokenizer(tmp_path / "tokenizer", captions, 540, length=12)
    assert tokenizer.length == 12 and 514 < tokenizer.vocab_size <= 540
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [*known["texts"], *captions]
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    np.testing.assert_array_equal(tokenizer.encode(texts), wanted)
    # Three words of 3, 2 and 4 bytes: none is unknown, which would be the end token.
    ids = tokenizer.encode(["\u732b \u00df \U0001f600"])[0]
    assert list(ids).index(tokenizer.vocab_size - 1) == 1 + 9
    again = train_tokenizer(tmp_path / "again" / "tokenizer", captions, 540, length=12)
    assert again.identity == tokenizer.identity
    with pytest.raises(ValueError, match="vocab_size must be at least 514, got 513"):
        train_tokenizer(tmp_path / "few", captions, 513)
    assert not (tmp_path / "few").exists()


# Lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "most", "length"),
    [
        (20, None, 20),
        (20, 16, 16),
        (1e30, None, 77),
        (10**30, 16, 16),
        (0, None, 77),
        (20.0, 77, 20),
        ("long", 12, 12),
        (None, None, 77),
        (-1, 9, 9),
        (70_000, 16, 16),
    ],
)
def test_lengths(tmp_path, known, said, most, length):
    folder = write_clip(tmp_path, known, {"tokenizer_config.json": {"model_max_length": said}})
    tokenizer = load_tokenizer(folder, most=most)
    assert tokenizer.length == length and tokenizer.encode(["a cat", ""]).shape == (2, length)


def test_a_length_without_room_for_words(tmp_path, known):
    with pytest.raises(ValueError, match="2 tokens are too few, 2 of them are special"):
        load_tokenizer(write_clip(tmp_path, known, {}), length=2)


# What cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "caption 1 is no text but None"),
        (b"cat", "caption 1 is no text but b'cat'"),
        ("bad \udce9", "caption 1, .* has what is no character"),
        (3.5, "caption 1 is no text but 3.5"),
    ],
)
def test_texts_that_are_none(tmp_path, known, text, message):
    tokenizer = load_tokenizer(write_clip(tmp_path, known, {}))
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(["fine", text])


def spoil(name, content):
    def change(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("merges.txt", None), "merges.txt: no such file"),
        (spoil("merges.txt", "a b c\n"), "merges.txt, line 1: 'a b c' are not two tokens"),
        (spoil("merges.txt", b"\xff\xfe\xfa"), "merges.txt: is no text in UTF-8"),
        (spoil("merges.txt", "qq zz\n"), "merges.txt does not fit vocab.json"),
        (spoil("vocab.json", "{}"), "vocab.json: has no '<|startoftext|>', the bos_token"),
        (spoil("vocab.json", '{"a": "b"}'), "vocab.json: 'a' has no whole number as its id"),
        (spoil("vocab.json", None), 'nor vocab.json and merges.txt, there or in "tokenizer"'),
        (spoil("tokenizer.json", "{}"), "tokenizer.json: is no tokenizer"),
        (spoil("tokenizer.json", ""), "tokenizer.json: it is empty"),
        (spoil("special_tokens_map.json", "["), "special_tokens_map.json: cannot be read"),
        (
            spoil("special_tokens_map.json", '{"pad_token": "[PAD]"}'),
            "the pad_token '[PAD]' is not in the vocabulary",
        ),
        (spoil("special_tokens_map.json", '{"pad_token": 3}'), "pad_token 3 is no token"),
        (
            spoil("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}'),
            "are of a 'GPT2Tokenizer', and read as CLIP's alone",
        ),
        (spoil("tokenizer_config.json", '{"padding_side": "up"}'), "padding_side 'up'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, known, change, message):
    change(write_clip(tmp_path, known, {}))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_folder_of_a_pipeline(tmp_path, known):
    write_clip(tmp_path / "tokenizer", known, {})
    write_clip(tmp_path / "tokenizer_2", known, case(known, "sd21")["files"])
    assert load_tokenizer(tmp_path).pad_id == known["vocab"].index(END)
    assert load_tokenizer(tmp_path, "tokenizer_2").pad_id == 0
    with pytest.raises(ValueError, match="tokenizer_3: no tokenizer.json"):
        load_tokenizer(tmp_path, "tokenizer_3")
    (tmp_path / "tokenizer_3").mkdir()
    (tmp_path / "tokenizer_3" / "spiece.model").write_bytes(b"model")
    with pytest.raises(ValueError, match="tokenizer_3: has spiece.model alone"):
        load_tokenizer(tmp_path, "tokenizer_3")


def test_a_missing_library_says_what_to_install(tmp_path, known, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'liftplace_jax\[text\]'"):
        load_tokenizer(write_clip(tmp_path, known, {}))
