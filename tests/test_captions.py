"""Captions of folders and of TFDS: what is read, what is said, what is refused."""

import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from liftplace_jax.data import load_source
from liftplace_jax.data.captions import RecordCaptions, digest, record_captions

TEXTS = {"a.png": "a red ball", "b.png": "two cats, one dog", "c/d.png": 'the word "no"'}


def pictures(folder, names=TEXTS):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (9, 9, 9)).save(path)
    return folder


def csv_of(rows, header="file_name,text"):
    return "".join(f"{line}\n" for line in [header, *rows])


def json_lines(texts):
    return "".join(
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n"
        for name, text in texts.items()
    )


def quoted(texts):
    return csv_of('{},"{}"'.format(name, text.replace('"', '""')) for name, text in texts.items())


def write(folder, kind, texts):
    """Captions in one of the three forms."""
    if kind == "txt":
        for name, text in texts.items():
            (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    elif kind == "csv":
        (folder / "metadata.csv").write_text(quoted(texts), encoding="utf-8")
    else:
        (folder / "metadata.jsonl").write_text(json_lines(texts), encoding="utf-8")


def load(folder, split="all"):
    return load_source("folder", split, path=folder)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_folder_has_captions_in_three_forms(tmp_path, capfd, kind):
    write(pictures(tmp_path), kind, TEXTS)
    source = load(tmp_path)
    assert source.captions == [TEXTS[name] for name in sorted(TEXTS)]
    said = capfd.readouterr().err
    where = {"csv": "metadata.csv", "jsonl": "metadata.jsonl", "txt": "3 .txt files beside them"}
    assert f"captions in {where[kind]}" in said and "left out: 1 of" not in said
    assert digest(source.captions) == digest(load(tmp_path).captions)
    write(tmp_path, kind, TEXTS | {"a.png": "a blue ball"})
    assert digest(load(tmp_path).captions) != digest(source.captions)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_white_space_marks_and_scripts(tmp_path, kind):
    given = {"a.png": " two\n lines\tand  more ", "b.png": "Zürich, 東京 🗼", "c/d.png": "a\u2028b"}
    write(pictures(tmp_path), kind, given)
    file = {"csv": "metadata.csv", "jsonl": "metadata.jsonl", "txt": "b.txt"}[kind]
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + (tmp_path / file).read_bytes())
    assert load(tmp_path).captions == ["two lines and more", "Zürich, 東京 🗼", "a b"]


def test_metadata_of_all_splits_is_read(tmp_path):
    pictures(tmp_path, ["train/a.png", "test/a.png", "test/b.png"])
    texts = {"train/a.png": "one", "./test/a.png": "two", "test//b.png": "three"}
    write(tmp_path, "jsonl", texts)
    assert load(tmp_path, "train").captions == ["one"]
    assert load(tmp_path, "test").captions == ["two", "three"]
    write(tmp_path / "test", "csv", {"a.png": "own a", "b.png": "own b"})
    assert load(tmp_path, "test").captions == ["own a", "own b"]


def test_empty_and_long_captions_are_counted(tmp_path, capfd):
    texts = {"a.png": "", "b.png": "x" * 10_000, "c/d.png": "  \n"}
    for kind in ("txt", "csv"):
        write(pictures(tmp_path), kind, texts)
        capfd.readouterr()
        source = load(tmp_path)
        assert source.captions == ["", "x" * 10_000, ""]
        assert "2 empty (the first is a.png); 1 longer than 1,000 characters, of which a " in (
            capfd.readouterr().err
        )


def test_what_is_not_read_is_said(tmp_path, capfd):
    write(pictures(tmp_path), "txt", TEXTS)
    rows = [f'{name},7,"{i}",x' for i, name in enumerate(TEXTS)]
    (tmp_path / "metadata.csv").write_text(csv_of(rows, "file_name,width,text,height"))
    assert load(tmp_path).captions == ["0", "1", "2"]
    said = capfd.readouterr().err
    assert "left out: 3 of .txt (a.txt)" in said and "columns not read: height, width" in said


def test_a_folder_without_captions_is_as_before(tmp_path, capfd):
    source = load(pictures(tmp_path, ["a.png"]))
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match="has no captions: neither metadata.csv, metadata.jsonl"):
        source.captions  # noqa: B018


BAD_METADATA = [
    ("csv", csv_of(["a.png,x"]).encode(), r"b.png has no caption: metadata.csv does not name it "
     r"\(and 1 others have none\)"),
    ("csv", quoted(TEXTS | {"e.png": "x", "f.png": "y"}).encode(),
     r"line 5: there is no picture 'e.png' in .* \(nor of 1 others"),
    ("csv", csv_of(["a.png,x", "b.png,y", "./a.png,z"]).encode(), "lines 2 and 4 both are of 'a.p"),
    ("csv", csv_of(["a.png,x", ",y"]).encode(), "line 3: file_name is empty"),
    ("csv", csv_of(["a.png,x", "b.png,y, and z"]).encode(), "line 3: has 3 fields, the header has"),
    ("csv", csv_of(["a.png,x", "../b.png,y"]).encode(), "line 3: file_name '../b.png' is outside"),
    ("csv", csv_of(["/etc/a.png,x"]).encode(), "line 2: file_name '/etc/a.png' is outside"),
    ("csv", csv_of(["c/../../a.png,x"]).encode(), "line 2: file_name 'c/../../a.png' is outside"),
    ("csv", csv_of(["a.png,caf\xe9"]).encode("latin-1"), "line 2: byte 0xe9 is no UTF-8"),
    ("csv", csv_of(["a.png,x"]).encode("utf-16"), "line 1: byte 0xff is no UTF-8"),
    ("csv", csv_of(["a.png;x"], "file_name;text").encode(), "the header is 'file_name;text'; it m"),
    ("csv", csv_of([], "file_name,caption").encode(), "it must have file_name and text, once each"),
    ("csv", csv_of([], "file_name,text,text").encode(), "it must have file_name and text, once ea"),
    ("csv", b"", "line 1: the header is ''"),
    ("csv", csv_of(['a.png,"never closed', "b.png,y"]).encode(), "line 2: unexpected end of data"),
    ("csv", csv_of(["a.png," + "x" * 140_000]).encode(), "line 2: field larger than field limit"),
    ("jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"}\n', "line 2: text is"),
    ("jsonl", b'{"file_name": "a.png", "text": null}', "line 1: text is None, no text"),
    ("jsonl", b'{"file_name": ["a.png"], "text": "x"}', r"line 1: file_name is \['a.png'\]"),
    ("jsonl", b'\n{"file_name": "a.png", "text": "x"', "line 2, column 35: Expecting"),
    ("jsonl", b'["a.png", "x"]', "line 1: it is no JSON object but a list"),
    ("jsonl", b'{"file_name": "a.png", "text": "x", "text": "y"}', "the key 'text' is there"),
    ("jsonl", json_lines({"a.png": "x" * 140_000}).encode(), "line 1: the caption has 140,000"),
    ("jsonl", b'{"file_name": "a.png", "text": "\\ud83d"}', "line 1: the caption '.ud83d' has"),
    ("jsonl", b'{"file_name": "a.png", "text": "\xff"}', "line 1: byte 0xff is no UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize("kind, content, message", BAD_METADATA)
def test_bad_metadata_is_refused_in_one_line(tmp_path, kind, content, message):
    file = pictures(tmp_path) / f"metadata.{kind}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path).captions  # noqa: B018
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def broken_texts(folder):
    """Functions that break the captions of `folder`, and the messages."""
    return [
        (lambda: (folder / "a.txt").write_bytes(b"fine\ncaf\xe9"), "a.txt: line 2: byte 0xe9"),
        (lambda: (folder / "b.txt").unlink(), "b.png has no caption: no b.txt beside it: add it"),
        (lambda: (folder / "a.txt").write_text("x" * 600_000), "a.txt: it has 600,000 bytes"),
        (lambda: ((folder / "a.txt").unlink(), os.mkfifo(folder / "a.txt")), "it is no regular"),
        (lambda: ((folder / "a.txt").unlink(), (folder / "a.txt").mkdir()), "it is no regular"),
        (
            lambda: Image.new("L", (4, 4)).save(folder / "a.jpg"),
            "may be the caption of a.jpg or of a.png: rename one",
        ),
    ]


@pytest.mark.parametrize("case", range(6))
def test_bad_texts_are_refused_in_one_line(tmp_path, case):
    write(pictures(tmp_path), "txt", TEXTS)
    spoil, message = broken_texts(tmp_path)[case]
    spoil()
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path).captions  # noqa: B018
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_two_files_of_metadata_are_refused(tmp_path):
    for kind in ("csv", "jsonl"):
        write(pictures(tmp_path), kind, TEXTS)
    source = load(tmp_path)  # whoever wants no captions is not bothered
    with pytest.raises(ValueError, match="has both metadata.csv and metadata.jsonl: keep one"):
        source.captions  # noqa: B018


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Four pictures whose captions are one feature or another."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name)
        for name in ("caption", "several", "dictionaries", "words", "none")
    ]

    def _info(self):
        text = tfds.features.Text()
        extra = {
            "caption": {"caption": text},
            "several": {"captions": tfds.features.Sequence(text)},
            "dictionaries": {"captions": tfds.features.Sequence({"id": np.int32, "text": text})},
            "words": {"text": tfds.features.Tensor(shape=(2,), dtype=np.int32)},
            "none": {},
        }[self.builder_config.name]
        image = {"image": tfds.features.Image(shape=(4, 4, 3))}
        features = tfds.features.FeaturesDict(image | extra)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, text in enumerate(("ein Bär", "zwei ", "", "vier")):
            extra = {
                "caption": {"caption": text},
                "several": {"captions": [text, "another"]},
                "dictionaries": {"captions": [{"id": 1, "text": text}] if text else []},
                "words": {"text": [1, 2]},
                "none": {},
            }[self.builder_config.name]
            yield index, {"image": np.full((4, 4, 3), index, np.uint8)} | extra


@pytest.mark.parametrize("kind", ["caption", "several", "dictionaries", "words", "none"])
def test_captions_of_tfds(tmp_path, kind):
    builder = Captioned(data_dir=tmp_path, config=kind)
    builder.download_and_prepare(file_format="array_record")
    found = record_captions("it", builder, "train")
    if kind in ("words", "none"):
        assert found is None
        return
    order = [int(r["image"][0, 0, 0]) for r in builder.as_data_source("train")]
    assert list(found) == [("ein Bär", "zwei", "", "vier")[index] for index in order]
    assert found[1:3] == [found[1], found[2]] and found[-1] == found[3] and len(found) == 4


def test_broken_captions_of_tfds_are_named():
    captions = RecordCaptions("it (train)", "text", [{"text": b"good"}, {"text": b"caf\xe9"}])
    assert captions[0] == "good"
    with pytest.raises(ValueError, match=r"data set it \(train\), example 1: caption: line 1"):
        captions[1]
