"""webdataset's tar files: what is read, what is said, what is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from liftplace_jax.data import load_source

RNG = np.random.default_rng(0)
PIXELS = {f"{n:03d}": RNG.integers(0, 255, (6, 6, 3), np.uint8) for n in range(5)}


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def examples(names, **more):
    for name in names:
        yield f"{name}.png", png(PIXELS[name])
        yield f"{name}.txt", f"the picture {name}".encode()
        for suffix, content in more.items():
            yield f"{name}.{suffix}", content


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "data" / "00001.tar", examples(["003", "004"]))
    write_tar(tmp_path / "data" / "00000.tar", examples(["000", "001", "002"], cls=b"1"))
    return tmp_path / "data"


def load(folder, split="train"):
    return load_source("folder", split, path=folder)


def test_images_and_captions_in_order(shards, capfd):
    source = load(shards)
    found = source.get(np.array([4, 0, 2, 3]))["image"]
    np.testing.assert_array_equal(found, [PIXELS[n] for n in ("004", "000", "002", "003")])
    assert list(source.captions) == [f"the picture {name}" for name in PIXELS]
    assert "5 images; no subfolder for a split" in (said := capfd.readouterr().err)
    assert "left out: 3 of .cls" in said


def test_json_captions_and_splits(tmp_path):
    for split in ("train", "test"):
        content = json.dumps({"caption": f"of {split}", "url": "x"}).encode()
        members = [("a/b.c.jpg.png", png(PIXELS["000"])), ("a/b.json", content)]
        write_tar(tmp_path / split / "one.tar", members)
    assert list(load(tmp_path, "test").captions) == ["of test"]


def test_txt_comes_before_json(tmp_path):
    members = [*examples(["000"]), ("000.json", b'{"caption": "another"}')]
    write_tar(tmp_path / "one.tar", members)
    assert list(load(tmp_path).captions) == ["the picture 000"]


def test_a_changed_shard_is_told_from_the_old_one(shards):
    before = load(shards).fingerprint()
    write_tar(shards / "00001.tar", examples(["003"]))
    assert load(shards).fingerprint() != before


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"no picture")], r"cannot read image .*one.tar/a.png: it is of no format"),
        ([("a.png", b"")], "one.tar/a.png: it is empty"),
        ([("a.png", png(PIXELS["000"])), ("a.jpg", b"x")], "a has another image"),
        ([("a.png", png(PIXELS["000"])), ("b.png", b"x"), ("a.txt", b"x")], "a comes twice"),
        ([("a.txt", b"x")], "no images .* in the tar files"),
    ],
)
def test_bad_members_are_named(tmp_path, members, message):
    write_tar(tmp_path / "one.tar", members)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("000.txt", b"\xff", "one.tar/000.txt: line 1: byte 0xff is no UTF-8"),
        ("000.json", b"{}", r"000.json: it must have one of \['caption', 'text'\]"),
        ("000.json", b"[1", "cannot read caption .*000.json"),
        ("001.txt", b"x", "one.tar/000.png has no caption, .txt or .json beside it"),
    ],
)
def test_bad_captions_are_named(tmp_path, name, content, message):
    write_tar(tmp_path / "one.tar", [("000.png", png(PIXELS["000"])), (name, content)])
    with pytest.raises(ValueError, match=message):
        load(tmp_path).captions  # noqa: B018


def test_damaged_packed_and_mixed_folders(tmp_path):
    write_tar(tmp_path / "one.tar", examples(["000"]))
    content = (tmp_path / "one.tar").read_bytes()
    (tmp_path / "one.tar").write_bytes(content[:600])
    with pytest.raises(ValueError, match="one.tar"):
        load(tmp_path)
    (tmp_path / "one.tar").write_bytes(b"\1" * 2000)
    with pytest.raises(ValueError, match="cannot read tar file .*one.tar"):
        load(tmp_path)
    (tmp_path / "two.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="two.tar.gz is packed: unpack it"):
        load(tmp_path)
    (tmp_path / "two.tar.gz").rename(tmp_path / "two.png")
    with pytest.raises(ValueError, match=r"tar files and images \(two.png\)"):
        load(tmp_path)


def test_links_are_left_out(tmp_path, capfd):
    write_tar(tmp_path / "one.tar", examples(["000"]))
    with tarfile.open(tmp_path / "one.tar", "a") as tar:
        info = tarfile.TarInfo("001.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert len(load(tmp_path)) == 1
    assert "1 of links and the like" in capfd.readouterr().err
