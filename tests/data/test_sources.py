"""Sources: what was written is what is read, the held-out part is fixed, mistakes get one line."""

import functools
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import NEW_COMBINATIONS, decode, demo_captions, open_source
from imagen_jax.data.readers import found_captions

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def png(value: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(out, "png")
    return out.getvalue()


def write_shard(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def bundled():
    return open_source("bundled")


def test_bundled_set_is_complete_and_small(bundled):
    assert len(bundled) == 1376
    records = list(bundled)
    captions = [record.caption for record in records]
    assert len(set(captions)) == 1376 and all(captions)
    size = sum(os.path.getsize(path) for path in bundled.read.paths)
    assert size <= 8e6
    for record in records[::50]:
        assert decode(record.image, image_size=128)[[0, 0, -1, -1], [0, -1, 0, -1]].mean() > 240


def test_bundled_split_is_pinned(bundled):
    train, heldout = bundled.split("train"), bundled.split("heldout")
    assert (len(train), len(heldout)) == (1281, 95)
    captions = "\n".join(sorted(record.caption for record in heldout))
    assert zlib.crc32(captions.encode()) == 4196122843


def test_demo_captions_are_training_pictures_and_new_combinations_are_not(bundled):
    chosen = bundled.split("train").with_captions(demo_captions())
    assert len(set(demo_captions())) == len(chosen) == 64
    assert [record.caption for record in chosen] == demo_captions()
    assert not {record.caption for record in bundled} & set(NEW_COMBINATIONS)
    small = np.stack([decode(r.image, image_size=16) for r in chosen]).reshape(64, -1) / 255
    apart = np.sqrt(((small[:, None] - small[None]) ** 2).mean(-1)) + np.eye(64)
    assert apart.min() > 0.12
    with pytest.raises(ValueError, match="no picture with the caption purple cow"):
        chosen.with_captions(["key", "purple cow"])


def test_views(bundled):
    assert open_source("bundled", split="train", limit=3).name == "bundled (train)"
    first = open_source("bundled", split="heldout", limit=3)
    assert [first.key(i) for i in range(3)] == [bundled.split("heldout")[i].key for i in range(3)]
    assert pickle.loads(pickle.dumps(first))[2].image == first[2].image
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        bundled.take(0)


def test_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b/one.two.JPG").write_bytes(b"1")
    (tmp_path / "b/one.two.txt").write_bytes("\ufeff naïve \n".encode())
    (tmp_path / "a.webp").write_bytes(b"2")
    (tmp_path / ".hidden/c.png").write_bytes(b"3")
    (tmp_path / "notes.txt").write_text("not a caption")
    source = open_source(tmp_path)
    assert [tuple(record)[:4] for record in source] == [
        ("a.webp", b"2", None, None),
        ("b/one.two.JPG", b"1", "naïve", None),
    ]


def test_tar_shards_are_read_at_random(tmp_path):
    for shard in range(2):
        members = {}
        for i in range(3):
            members[f"{i:09d}.png"] = png(10 * shard + i)
            members[f"{i:09d}.json"] = json.dumps({"caption": f"json {i}"}).encode()
            if i != 1:
                members[f"{i:09d}.txt"] = f"text {i}\n".encode()
        members["000000009.txt"] = b"a caption whose picture failed"
        write_shard(tmp_path / f"{shard:05d}.tar", members)
    one = open_source(tmp_path / "00001.tar")
    assert one[2].key == "00001/000000002" and one[2].image == png(12)
    assert [record.caption for record in one] == ["text 0", "json 1", "text 2"]
    for spec in (tmp_path, f"{tmp_path}/*.tar"):
        both = open_source(spec)
        assert len(both) == 6
        assert pickle.loads(pickle.dumps(both))[4] == both[4] == one[1]


def test_stored_embeddings_count_if_every_record_has_one(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.png").write_bytes(png(1))
        np.save(tmp_path / f"{name}.npy", np.full((2, 3), value, np.float16))
    source = open_source(tmp_path)
    assert source.has_embeds and source[1].embeds.tolist() == [[2.0] * 3] * 2
    write_shard(
        tmp_path / "s.tar",
        {
            f"{n}.{kind}": (tmp_path / f"{n}.{kind}").read_bytes()
            for n in "ab"
            for kind in ("png", "npy")
        },
    )
    shard = open_source(tmp_path / "s.tar")
    assert shard.has_embeds and shard[1].embeds.tolist() == source[1].embeds.tolist()
    (tmp_path / "s.tar").unlink()
    (tmp_path / "b.npy").unlink()
    assert not open_source(tmp_path).has_embeds and open_source(tmp_path)[0].embeds is None


def test_heldout_records_stay_when_others_come(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03d}.png").write_bytes(b"x")
    before = {r.key for r in open_source(tmp_path, split="heldout", heldout_fraction=0.1)}
    assert 8 <= len(before) <= 35
    for i in range(200):
        (tmp_path / f"more{i:03d}.png").write_bytes(b"x")
    source = open_source(tmp_path, heldout_fraction=0.1)
    after = {record.key for record in source.split("heldout")}
    assert {key for key in after if not key.startswith("more")} == before
    assert len(source.split("train")) == 400 - len(after)
    assert len(open_source(tmp_path, split="heldout", heldout_fraction=0.0)) == 0


def test_tfds_end_to_end_without_tensorflow(tmp_path, bundled):
    """Prepare as a user does, in another process; then read the set by its name."""
    command = [sys.executable, "-m", "imagen_jax.data.tfds_bundled", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "tfds:imagen_bundled is in" in done.stdout
    source = open_source("tfds:imagen_bundled", data_dir=tmp_path)
    for split in ("train", "heldout"):
        ours = {record.caption: record.image for record in bundled.split(split)}
        theirs = {record.caption: record.image for record in source.split(split)}
        assert ours == theirs
    assert "tensorflow" not in sys.modules
    again = pickle.loads(pickle.dumps(source.split("heldout")))
    assert again[3].key == "imagen_bundled/heldout/3"
    assert again[3].caption == source.split("heldout")[3].caption
    part = open_source("tfds:imagen_bundled:1.0.0:heldout", data_dir=tmp_path)
    assert len(part) == 95 and 0 <= len(part.split("heldout")) < 10
    folder = f"tfds:{tmp_path}/imagen_bundled/1.0.0"
    assert len(open_source(folder)) == 1376
    with pytest.raises(ValueError, match="tfds:imagen_bundled: cannot read split 'tset'"):
        open_source("tfds:imagen_bundled:tset", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tfds:no_such_set: no prepared data set of this name in"):
        open_source("tfds:no_such_set", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tfds:mnist: not prepared in"):
        open_source("tfds:mnist", data_dir=tmp_path)


def test_tfds_captions_of_every_shape():
    caption = functools.partial(found_captions, key=None)
    nested = {"captions": {"id": [1, 2], "text": [b"first ", b"second"]}}
    assert caption(nested) == ("first", "second")
    assert caption({"captions": [{"text": "first"}, {"text": "second"}]}) == ("first", "second")
    assert caption({"text": np.array([b"first"], object)}) == ("first",)
    assert caption({"caption": "a", "text": b"b"}) == ("a",)
    assert caption({"captions": []}) == caption({"label": 3}) == ()


def test_mistakes_get_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "none.tar", {"a.txt": b"no picture"})
    write_shard(tmp_path / "cut.tar", {"a.png": bytes(3000), "b.png": bytes(3000)})
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 300)
    cases = {
        tmp_path / "missing": "no source '.*missing': give 'bundled', 'scenes', a folder",
        tmp_path / "*.zip": "no source",
        "cifar10": "no source 'cifar10'",
        "tfds:": "does not name a set",
        tmp_path / "empty": "no pictures .* in the folder .*empty",
        tmp_path / "none.tar": "no pictures .* in .*none.tar",
        tmp_path / "cut.tar": "cut.tar is not a complete tar: unexpected end of data",
        tmp_path / "junk.tar": "junk.tar is not a complete tar",
    }
    for spec, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.png").write_bytes(b"x")
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"heldout_fraction must be in \[0, 1\), got 1.5"):
        open_source(tmp_path, heldout_fraction=1.5)
