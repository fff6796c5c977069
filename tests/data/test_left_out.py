"""Inputs that people have, the same in a folder and in a shard: one record never refuses a set,
nothing is passed over in silence, and a message names the file."""

import functools
import io
import itertools
import json
import os
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import make_batches, open_source, read_lines, shown
from imagen_jax.data.readers import found_captions
from imagen_jax.errors import UserError


def jpeg(value: int = 90) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), value).save(out, "jpeg")
    return out.getvalue()


def write(where, files: dict[str, bytes]):
    """The files in a folder, or, for a name that ends with .tar, in a shard."""
    if where.suffix.lower() != ".tar":
        for name, data in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(data)
        return where
    with tarfile.open(where, "w", format=tarfile.GNU_FORMAT) as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return where


@pytest.fixture(params=["folder", "x.tar"])
def place(request, tmp_path):
    return tmp_path / request.param


def usable(spec) -> tuple[dict[str, str], dict[str, str]]:
    """Stem -> caption of the records that can be trained on, and stem -> reason of the others."""
    source = open_source(spec, heldout_fraction=0.0)
    good, bad = {}, {shown(name): why for name, why in source.left_out.items()}
    for i in range(len(source)):
        name = shown(source.key(i)).removeprefix("x/").removesuffix(".jpg").removesuffix(".JPG")
        try:
            (good[name],) = source[i].captions
        except UserError as error:
            bad[name] = str(error)
    return good, bad


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"txt": b" \n"}, "empty caption"),
        ({"txt": b"\xff\xfe\xff"}, "the caption is not UTF-8"),
        ({"json": b'{"caption": "  "}'}, "empty caption"),
        ({"json": b'{"caption": "cat \\ud83d"}'}, "the caption contains half of a surrogate pair"),
        ({"json": b'{"caption": [1]}'}, "the caption is not text but int"),
        ({"json": b"[1]"}, "the .json is not an object"),
        ({"json": b'{"cap'}, "damaged .json: "),
        ({"json": b"[" * 100_000}, "damaged .json: "),
        ({}, "no caption"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_caption_leaves_out_its_record(place, beside, expected):
    files = {"a.jpg": jpeg(), "a.txt": b"good", "b.jpg": jpeg()}
    write(place, files | {f"b.{kind}": data for kind, data in beside.items()})
    good, bad = usable(place)
    assert good == {"a": "good"} and bad.keys() == {"b"}
    assert bad["b"].startswith(expected) and "\n" not in bad["b"]
    tokenize = lambda captions: np.zeros((len(captions), 1), np.int32)  # noqa: E731
    settings = dict(image_size=8, batch_size=2, seed=0, tokenize=tokenize)
    reported = {}
    source = open_source(place, heldout_fraction=0.0)
    with make_batches(source, on_skip=reported.__setitem__, **settings) as batches:
        assert all(batch["images"].shape[0] == 2 for batch in itertools.islice(batches, 3))
    assert list(reported.values()) == [bad["b"]]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("txt", "\ufeff naïve \r\n".encode()),
        ("TXT", "naïve".encode()),
        ("caption", "naïve".encode()),
        ("json", b'{"caption": " na\\u00efve\\n"}'),
    ],
)
@pytest.mark.parametrize("name", ["IMG_1", "pic 2.0 (final)", "3.5cm", "sub/v1.0"])
def test_a_caption_is_found_by_the_stem(place, name, kind, data):
    write(place, {f"{name}.JPG": jpeg(), f"{name}.{kind}": data})
    assert usable(place) == ({name: "naïve"}, {})


def test_file_names_that_are_not_utf8(place):
    name = os.fsdecode(b"caf\xe9")
    write(place, {f"{name}.jpg": jpeg(), f"{name}.txt": b"one"})
    assert usable(place) == ({"caf\\udce9": "one"}, {})
    source = open_source(place)
    assert len(source.fingerprint()) == 16
    hashed = zlib.crc32(os.fsencode(source.keys[0])) < 2**32 / 50
    assert source.heldout.tolist() == [hashed]


def test_what_is_no_record_has_its_reason(place):
    files = {
        **{"a.jpg": jpeg(), "a.txt": b"one", "a.npy": b"", "b.jpg": jpeg(), "b.txt": b"two"},
        **{"b.psd": b"", "film.mp4": b"", "old.tar.gz": b"", "lost.txt": b"no picture"},
        **{"readme.md": b"", "._a.jpg": b"not a picture", "__MACOSX/._b.jpg": b"nor this"},
    }
    write(place, files)
    good, bad = usable(place)
    assert good == {"a": "one", "b": "two"}
    reasons = {name.removeprefix("x/").removesuffix(".txt"): why for name, why in bad.items()}
    assert reasons == {
        "a.npy": "a stored embedding, but not all pictures have one",
        "b.psd": "a .psd file, which is not read",
        "film.mp4": "a .mp4 file, which is not read",
        "old.tar.gz": "a .gz archive, which must be unpacked first",
        "lost": "a caption without a picture",
    }


@pytest.mark.parametrize("kind", ["gif", "avif", "jfif", "tiff", "heic"])
def test_more_kinds_of_pictures(place, kind):
    out = io.BytesIO()
    formats = {"jfif": "jpeg", "heic": "heif"}
    Image.new("RGB", (8, 8), (200, 30, 40)).save(out, formats.get(kind, kind))
    write(place, {f"a.{kind}": out.getvalue()})
    with make_batches(open_source(place), image_size=8, batch_size=1, seed=0) as batches:
        assert np.abs(next(batches)["images"][0, 4, 4].astype(int) - (200, 30, 40)).max() < 6


def test_broken_links_and_folders_named_as_files(tmp_path):
    write(tmp_path, {"1.jpg": jpeg(), "1.txt": b"one", "2.jpg": jpeg(), "3.txt": b"three"})
    write(tmp_path, {"other/9.jpg": jpeg(), "other/9.txt": b"nine", "2.txt/x.md": b""})
    os.symlink("/nowhere/3.jpg", tmp_path / "3.jpg")
    os.symlink(tmp_path / "other", tmp_path / "again")
    assert usable(tmp_path) == (
        {"1": "one", "other/9": "nine"},
        {
            "2": "no caption",
            "3": "the .jpg cannot be read: No such file or directory",
            "again": "a link to a folder, which is not followed",
        },
    )


def test_an_error_that_may_pass_ends_the_run_and_names_the_file(tmp_path, monkeypatch):
    """Left out, the picture would be replaced by another for the rest of the run."""
    write(tmp_path, {"1.jpg": jpeg(), "1.txt": b"one"})
    source = open_source(tmp_path, heldout_fraction=0.0)

    def stale(path):
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr("imagen_jax.data.files.open_binary", stale)
    with pytest.raises(OSError, match="Stale file handle: '.*1.txt'"):
        make_batches(source, image_size=8, batch_size=1, seed=0)


FILES = {
    f"{i}.{kind}": jpeg() if kind == "jpg" else b"x" for i in range(4) for kind in ("jpg", "txt")
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Bytes of a shard of four records, and where its members start."""
    path = write(tmp_path_factory.mktemp("shard") / "a.tar", FILES)
    with tarfile.open(path) as opened:
        return path.read_bytes(), [member.offset for member in opened]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, at: data[: at[5] + 100], "is not a complete tar: no end marker at byte {5}"),
        (lambda data, at: data[: at[4]], "is not a complete tar: no end marker at byte {4}"),
        (lambda data, at: data[: at[5] - 300], "is not a complete tar: unexpected end of data"),
        (
            lambda data, at: data[: at[4]] + b"\x9b" * 512 + data[at[4] + 512 :],
            "is damaged: no valid member header at byte {4}",
        ),
        (
            lambda data, at: data[: at[4]] + bytes(512) + data[at[4] + 512 :],
            "has data at byte .*, after its end at byte {4}",
        ),
        (lambda data, at: data + data, "has data at byte {end}, after its end at byte"),
        (lambda data, at: b"\x1f\x8b" + data, r"is compressed \(gzip\): .* decompress it"),
    ],
    ids="in-header between in-data header hole two gzip".split(),
)
def test_damaged_shards_are_named(shard, tmp_path, damage, message):
    data, at = shard
    message = message.format(*at, end=len(data))
    good, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    good.write_bytes(data)
    assert len(open_source(good)) == 4
    bad.write_bytes(damage(data, at))
    for spec in (bad, tmp_path, f"{tmp_path}/*.tar"):
        with pytest.raises(UserError, match=f"bad.tar {message}") as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)


def test_all_damaged_shards_are_named_at_once(shard, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.tar").write_bytes(shard[0][:700])
    with pytest.raises(UserError, match="0.tar .*; .*1.tar .*; .*2.tar .*; and 2 more shards"):
        open_source(tmp_path)


def test_members_that_are_no_files_and_second_ones(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as shard:
        for name, data in (("./1.jpg", jpeg(10)), ("1.png", jpeg(20)), ("1.txt", b"one")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        shard.addfile(link)
    source = open_source(path)
    assert list(source.keys) == ["x/1"] and source[0].image == jpeg(10)
    assert source.left_out == {
        "x/1.png": "a second member with the same name",
        "x/2.jpg": "a link or a sparse file, which is not read",
    }


def test_a_shard_more_moves_no_record(tmp_path):
    """Also from another folder: keys are the shard's own name and the member's."""
    records = {f"{i}.jpg": b"x" for i in range(100)}
    write(tmp_path / "a", {"nothing": b""})
    write(tmp_path / "b", {"nothing": b""})
    first = write(tmp_path / "a" / "00000.tar", records)
    one = open_source(first, heldout_fraction=0.3)
    assert 10 < one.heldout.sum() < 60
    write(tmp_path / "b" / "00001.TAR", records)
    both = open_source(tmp_path, heldout_fraction=0.3)
    assert list(both.keys) == [*one.keys, *(f"00001/{i}" for i in range(100))]
    np.testing.assert_array_equal(both.heldout[:100], one.heldout)
    write(tmp_path / "b" / "00000.tar", records)
    with pytest.raises(
        UserError, match="two shards have the same name, .*a/00000.tar and .*b/00000.tar"
    ):
        open_source(tmp_path)


def test_patterns_of_shards(tmp_path):
    for name in ("x08.tar", "x09.tar", "x10.tar", "y.TAR"):
        write(tmp_path / name, {"1.jpg": jpeg()})
    for pattern, count in (("x{08..10}.tar", 3), ("{x08,x10}.tar", 2), ("?{09,10}.tar", 2)):
        assert len(open_source(f"{tmp_path}/{pattern}")) == count
    assert len(open_source(tmp_path / "y.TAR")) == 1
    with pytest.raises(UserError, match=r"there is no .*/x11.tar"):
        open_source(f"{tmp_path}/x{{08..11}}.tar")
    (tmp_path / "z.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="z.tar.gz is not a plain .tar: unpack it"):
        open_source(tmp_path / "z.tar.gz")
    assert list(open_source(tmp_path).left_out) == ["z.tar.gz"]


def test_pictures_and_shards_in_one_folder_are_refused(tmp_path):
    write(tmp_path, {"1.jpg": jpeg(), "2.jpg": jpeg()})
    write(tmp_path / "old.tar", {"9.jpg": jpeg()})
    with pytest.raises(
        UserError, match=r"contains pictures \(2: 1.jpg\) and shards \(1: old.tar\)"
    ):
        open_source(tmp_path)


def test_a_set_that_is_all_held_out_says_so(tmp_path):
    write(tmp_path, {"dog_61.jpg": jpeg(), "dog_61.txt": b"a dog"})
    with pytest.raises(UserError, match=r"no records; 1 of 1 are held out \(heldout_fraction\)"):
        make_batches(open_source(tmp_path, split="train"), image_size=8, batch_size=1, seed=0)


def test_a_fingerprint_is_of_what_is_in_the_set(tmp_path):
    files = {f"{i}.jpg": jpeg(10 * i) for i in range(5)}
    prints = {
        name: open_source(write(tmp_path / name, changed)).fingerprint()
        for name, changed in (
            ("here", files),
            ("moved", files),
            ("fewer", {name: data for name, data in files.items() if name != "4.jpg"}),
            ("others", files | {"3.jpg": jpeg(200)}),
        )
    }
    assert prints["here"] == prints["moved"]
    assert len(set(prints.values())) == 3
    assert open_source(f"{tmp_path}/here/").fingerprint() == prints["here"]


def test_equal_captions_are_all_taken(tmp_path):
    captions = {"1": b"a dog", "2": b"a cat", "3": b"a dog", "4": b"\xff"}
    write(tmp_path, {f"{n}.jpg": jpeg() for n in captions})
    write(tmp_path, {f"{n}.txt": data for n, data in captions.items()})
    source = open_source(tmp_path, heldout_fraction=0.0)
    chosen = source.with_captions(["a dog", "a cat", "a dog"])
    assert [record.key for record in chosen] == ["1.jpg", "3.jpg", "2.jpg"]
    with pytest.raises(UserError, match="the caption 0, 1, 2, 3, 4 and 7 more$"):
        source.with_captions([str(i) for i in range(12)])


def test_lists_of_captions(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeffone\r\n\r\n a cat\u2028on a mat \rthree".encode())
    assert read_lines(file) == ["one", "a cat\u2028on a mat", "three"]
    file.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(UserError, match="list.txt, line 2: not UTF-8"):
        read_lines(file)
    with pytest.raises(UserError, match="absent.txt: No such file"):
        read_lines(tmp_path / "absent.txt")


def test_captions_of_a_prepared_set():
    caption = functools.partial(found_captions, key=None)
    assert (
        caption({"caption": b"\xef\xbb\xbf a cat\n"}) == caption({"text": " a cat"}) == ("a cat",)
    )
    for value, why in ((b"\xff", "not UTF-8"), ("cat \ud83d", "half of a surrogate pair")):
        with pytest.raises(UserError, match=why):
            caption({"caption": value})


def test_metadata_is_read_as_it_was_written(tmp_path):
    members = {"1.jpg": jpeg(), "1.json": json.dumps({"caption": "x", "n": 3}).encode()}
    source = open_source(write(tmp_path / "x.tar", members))
    assert source.columns(0) == {"caption": "x", "n": 3}


def test_rows_of_one_image_without_a_caption(tmp_path):
    """An empty caption beside others is left out, in whichever row it is; alone it leaves out the
    image."""
    write(tmp_path, {f"{name}.jpg": jpeg() for name in "abc"})
    rows = [
        "file_name,caption",
        "a.jpg,a cat",
        "a.jpg,",
        "b.jpg,",
        "b.jpg,a dog",
        "c.jpg,",
        "c.jpg,",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    good, bad = usable(tmp_path)
    assert good == {"a": "a cat", "b": "a dog"} and bad == {"c": "empty caption"}
