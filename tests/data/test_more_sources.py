"""Tables, datasets of other libraries, remote files and mixtures: what each makes of real files."""

import csv
import functools
import http.server
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import (
    array_records,
    choosing,
    make_batches,
    open_source,
    sources,
    tar_index,
)
from imagen_jax.data.order import Order
from imagen_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def png(value: int, size=(8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, "png")
    return out.getvalue()


def shard(path, records: dict[str, bytes]) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in records.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if path is not None:
        path.write_bytes(out.getvalue())
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three pictures, 0.png to 2.png."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


ROWS = [
    {"file_name": "1.png", "text": "one", "score": 5.5},
    {"file_name": "0.png", "text": "nought", "score": 2},
    {"file_name": "1.png", "text": "another one", "score": 7},
]


def write_table(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)) + "\nno JSON\n[1]\n")
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
            file.write("2.png\r\n")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(folder, kind):
    """The rows of one path are captions of one image; a damaged row is left out by its line."""
    table = folder / f"captions.{kind}"
    write_table(table)
    source = open_source(table)
    assert [(r.key, r.image, r.captions) for r in source] == [
        ("1.png", png(1), ("one", "another one")),
        ("0.png", png(0), ("nought",)),
    ]
    assert float(source.columns(1)["score"]) == 2
    assert source.captions(0) == ("one", "another one")
    left_out = {"csv": {"line 5": "not 3 fields"}, "parquet": {}}
    left_out["tsv"] = left_out["csv"]
    left_out["jsonl"] = {"line 4": "not a JSON object", "line 5": "not a JSON object"}
    assert source.left_out == left_out[kind]
    keyed = open_source(table, caption_key="score", image_key="file_name")
    if kind in ("csv", "tsv"):
        assert keyed.captions(1) == ("2",)
    for options, message in (
        (dict(image_key="img"), "no column 'img'; it has file_name, text, score"),
        (dict(caption_key="caption"), "no column 'caption'; it has"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(table, **options)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_a_table(folder, kind):
    write_table(folder / f"metadata.{kind}")
    source = open_source(folder)
    assert [record.captions for record in source] == [("one", "another one"), ("nought",)]
    assert source.left_out["2.png"] == f"not in metadata.{kind}"
    (folder / "metadata.tsv").write_text("x")
    with pytest.raises(UserError, match=r"contains metadata\.\w+ and metadata\.\w+: name one"):
        open_source(folder)


def test_tables_that_are_none(tmp_path):
    cases = {
        "a.csv": (b"", "contains no rows"),
        "b.csv": (b"x,y\n1,2\n", "no column of images .*; it has x, y; see --image-key"),
        "c.jsonl": (
            b'{"image": "https://host/1.jpg"}\n',
            "contains image URLs: download the images",
        ),
        "d.csv": (b"image,text\n,none\n", "names no images"),
        "e.csv": (b"image,text\n1.png,caf\xe9\n", "e.csv, line 2: not UTF-8"),
        "f.parquet": (b"PAR1 no", "is not Parquet"),
        "g.csv": (b'image,text\n"1.png,x\n', "g.csv, line 1: unexpected end of data"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            open_source(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_images_inside_a_table(tmp_path):
    import pyarrow
    from pyarrow import parquet

    image = {"path": "image.png"}  # of all alike, as some datasets have it
    rows = [{"image": image | {"bytes": png(i)}, "caption": f"c{i}"} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = open_source(tmp_path / "train.parquet")
    assert [(r.key, r.image, r.caption) for r in source][2] == ("row 3", png(2), "c2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dataset of the Hugging Face library with two splits, as it saves it."""
    import datasets

    features = datasets.Features(
        picture=datasets.Image(), label=datasets.ClassLabel(names=["red_fox", "owl"])
    )

    def part(count):
        values = dict(
            picture=[{"bytes": png(i), "path": None} for i in range(count)],
            label=[i % 2 for i in range(count)],
        )
        return datasets.Dataset.from_dict(values, features=features)

    where = tmp_path_factory.mktemp("hf") / "saved"
    datasets.DatasetDict(train=part(5), validation=part(2)).save_to_disk(where)
    return where


def test_hugging_face_datasets(saved):
    source = open_source(f"hf:{saved}", template="a photo of a {label}")
    assert len(source) == 7 and source.heldout.tolist() == [False] * 5 + [True] * 2
    record = source[1]
    assert (record.key, record.image, record.caption) == ("train/1", png(1), "a photo of a owl")
    assert source.captions(5) == ("a photo of a red fox",)
    assert len(open_source(f"hf:{saved}:validation")) == 2
    for options, message in (
        (dict(spec=f"hf:{saved}:test"), "no split 'test'; it has train, validation"),
        (dict(spec=f"hf:{saved}", image_key="img"), "no column 'img'; it has picture, label"),
        (dict(spec=f"hf:{saved.parent}/none"), "hf:.*none: "),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_source(**options)
        assert "\n" not in str(caught.value)


def test_a_hugging_face_image_folder(folder):
    """Files as their ImageFolder has them, read by their library."""
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": f"no {i}"}) for i in range(3))
    )
    source = open_source(f"hf:{folder}")
    assert {record.caption: record.image for record in source} == {
        f"no {i}": png(i) for i in range(3)
    }


def test_array_record_files(tmp_path):
    """Files that tensorflow-datasets wrote: records are serialised tf.train.Examples."""
    command = [sys.executable, "-m", "imagen_jax.data.tfds_bundled", "--data-dir", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    files = f"{tmp_path}/imagen_bundled/1.0.0/imagen_bundled-heldout.array_record*"
    (path,) = Path("/").glob(files.lstrip("/"))
    plain = path.with_name("heldout.array_record")
    path.rename(plain)
    source = open_source(plain)
    bundled = open_source("bundled", split="heldout")
    assert {r.caption: r.image for r in source} == {r.caption: r.image for r in bundled}
    with pytest.raises(
        UserError, match=r"no image feature \(it has .*caption.*\); see --image-key"
    ):
        open_source(plain, image_key="img")
    plain.write_bytes(b"junk")
    with pytest.raises(UserError, match="heldout.array_record cannot be read"):
        open_source(plain)


def test_every_kind_of_feature_of_an_example():
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    floats = field(2, field(1, np.array([0.5, -2], "<f4").tobytes()))
    numbers = field(3, field(1, b"\x01\xac\x02" + b"\xff" * 9 + b"\x01"))
    words = field(1, field(1, b"a") + field(1, b"b"))
    entries = [(b"f", floats), (b"i", numbers), (b"s", words)]
    example = field(
        1, b"".join(field(1, field(1, name) + field(2, value)) for name, value in entries)
    )
    assert array_records.parse(example) == {"f": [0.5, -2], "i": [1, 300, -1], "s": [b"a", b"b"]}
    for damaged in (example[:-3], b"\x0b", b"\x0a\xff"):
        with pytest.raises(UserError, match="damaged: "):
            array_records.parse(damaged)


class Ranges(http.server.BaseHTTPRequestHandler):
    """A file server with ranges, as object stores have them."""

    files: dict[str, bytes] = {}

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2] or len(data) - 1)) if found else (0, len(data))
        part = data[first : last + 1]
        self.send_response(206 if found else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if found:
            end = first + len(part) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_and_tables_on_a_server(address):
    records = {f"{i}.{kind}": png(i) if kind == "png" else f"no {i}".encode()
               for i in range(5) for kind in ("png", "txt")}  # fmt: skip
    table = b"image,caption\n%s/1.png,from a table\n" % b"sub"
    Ranges.files = {
        "/00000.tar": shard(None, records),
        "/list.csv": table,
        "/sub/1.png": png(1),
    }
    source = open_source(f"{address}/{{00000..00000}}.tar")
    assert [(r.key, r.caption, r.image) for r in source][3] == ("00000/3", "no 3", png(3))
    (record,) = open_source(f"{address}/list.csv")
    assert record.caption == "from a table" and record.image == png(1)
    with pytest.raises(UserError, match="none.tar"):
        open_source(f"{address}/none.tar")


def test_a_folder_and_shards_in_an_object_store():
    store = fsspec.filesystem("memory")
    store.pipe("/set/b/1.png", png(1))
    store.pipe("/set/b/1.txt", b"one\nuno")
    store.pipe("/set/b/.hidden.png", png(9))
    (record,) = open_source("memory://set/b")
    assert record.captions == ("one", "uno") and record.image == png(1)
    store.pipe("/tars/00000.tar", shard(None, {"1.png": png(1), "1.txt": b"one"}))
    store.pipe("/tars/00001.tar", shard(None, {"2.png": png(2), "2.txt": b"two"}))
    for spec in ("memory://tars", "memory://tars/*.tar"):
        assert [record.caption for record in open_source(spec)] == ["one", "two"]


def test_several_captions_take_turns(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"{i} a\n\n {i} b \n{i} c\n")
    drawn = Counter()

    def tokenize(captions):
        drawn.update(captions)
        return np.zeros((len(captions), 1), np.int32)

    settings = dict(image_size=8, batch_size=3, seed=0, tokenize=tokenize)
    source = open_source(folder, heldout_fraction=0.0)
    with make_batches(source, **settings) as batches:
        for _ in range(60):
            next(batches)
    assert drawn.keys() == {f"{i} {letter}" for i in range(3) for letter in "abc"}
    assert min(drawn.values()) > 8
    seen = []
    settings["tokenize"] = lambda captions: seen.append(captions) or np.zeros((3, 1), np.int32)
    for start, count in ((0, 6), (3, 3)):
        with make_batches(source, start_step=start, **settings) as batches:
            for _ in range(count):
                next(batches)
    assert seen[3:6] == seen[6:]


def test_captions_of_class_folders(tmp_path):
    for i, name in enumerate(("red_fox", "owl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(i))
    (tmp_path / "0.png").write_bytes(png(9))
    source = open_source(tmp_path, template="a {label}")
    captions = {record.key: record.caption for record in source}
    assert captions == {"0.png": None, "red_fox/1.png": "a red fox", "owl/1.png": "a owl"}
    with pytest.raises(UserError, match="no 'label' for its caption"):
        source.captions(0)
    other = open_source(tmp_path, template="a {lable}")
    with (
        pytest.raises(UserError, match="no 'lable' for its caption, only label"),
        make_batches(
            other.take(1), batch_size=1, image_size=16, seed=0, tokenize=lambda captions: captions
        ) as batches,
    ):
        next(batches)
    for template, message in (("a photo", "must name a column"), ("a {", "--template 'a {'")):
        with pytest.raises(UserError, match=message):
            open_source(tmp_path, template=template)


def test_conditions(tmp_path):
    sizes = [(8, 8), (16, 8), (32, 32), (64, 48)]
    records = {}
    for i, size in enumerate(sizes):
        records[f"{i}.png"] = png(i, size)
        records[f"{i}.txt"] = b"x" * (i + 1)
        records[f"{i}.json"] = json.dumps(
            {"aesthetic": 4 + i, "lang": "en" if i else "de"}
        ).encode()
    shard(tmp_path / "a.tar", records)

    def kept(*conditions):
        source = open_source(tmp_path / "a.tar", where=conditions)
        assert source.notes[0].endswith(f"records have {' and '.join(conditions)}")
        return [int(source.key(i)[2:]) for i in range(len(source))]

    assert kept("aesthetic > 5") == [2, 3]
    assert kept("width >= 16", "height >= 32") == [2, 3]
    assert kept("height >= 16") == [2, 3]
    assert kept("lang == en", "caption_length<4") == [1, 2]
    assert kept("lang != en") == [0]
    for condition, message in (
        ("aesthetic", "write COLUMN >= VALUE"),
        ("score > 1", "no record has a column 'score'; the columns are aesthetic, lang, width"),
        ("aesthetic > 99", "none of 4 records has aesthetic > 99"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "a.tar", where=[condition])
    assert not choosing.Condition.parse("a >= 1").holds("words")
    assert choosing.Condition.parse("a == en").holds(b"en")
    assert not choosing.Condition.parse("a > en").holds(3)


def test_a_mixture_has_its_shares(tmp_path):
    """Each set keeps its own held-out part, and its own order."""
    for name, count, value in (("a", 40, 10), ("b", 5, 200)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.png").write_bytes(png(value + i // 2))
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}")
    specs = [f"{tmp_path}/a=0.75", f"{tmp_path}/b=0.25"]
    alone = open_source(tmp_path / "a", heldout_fraction=0.2)
    source = open_source(specs, heldout_fraction=0.2)
    assert len(source) == 45
    np.testing.assert_array_equal(source.heldout[:40], alone.heldout)
    assert [source[i].caption for i in (0, 44)] == [alone[0].caption, "b4"]
    train = source.split("train")
    settings = dict(image_size=8, batch_size=16, seed=3)
    with make_batches(train, **settings) as batches:
        seen = [batch["images"][:, 0, 0, 0] for batch in itertools.islice(batches, 20)]
    share = np.mean(np.concatenate(seen) < 100)
    assert 0.72 < share < 0.78
    with make_batches(train, start_step=7, **settings) as batches:
        np.testing.assert_array_equal(next(batches)["images"][:, 0, 0, 0], seen[7])
    for rows in (range(5), range(5, 16)):  # of two processes
        with make_batches(train, start_step=7, rows=rows, **settings) as batches:
            np.testing.assert_array_equal(next(batches)["images"][:, 0, 0, 0], seen[7][rows])
    first = np.concatenate(seen[:3])
    a_keys = int((~alone.heldout).sum())
    values = [v for v in np.concatenate(seen) if v < 100][:a_keys]
    assert max(Counter(values).values()) <= 2 and len(first) == 48
    assert len(source.take(3)) == 6
    for weights, message in (("0", "must be positive"), ("nan", "no source")):
        with pytest.raises(UserError, match=message):
            open_source([specs[0], f"{tmp_path}/b={weights}"])


class TestIndices:
    """What is kept of the headers of shards."""

    @pytest.fixture(autouse=True)
    def kept(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(tar_index, "KEPT_AFTER", 0.0)
        self.read = []
        one = tar_index._read_one
        monkeypatch.setattr(
            tar_index, "_read_one", lambda p: self.read.append(Path(p).name) or one(p)
        )
        self.folder = tmp_path / "set"
        self.folder.mkdir()
        for i in range(3):
            self.write(i, 4)

    def write(self, number: int, count: int) -> None:
        records = {f"{j}.png": png(10 * number + j) for j in range(count)}
        records |= {f"{j}.txt": f"{number} {j}".encode() for j in range(count)} | {"x.psd": b"1"}
        shard(self.folder / f"{number:05}.tar", records)

    def contents(self):
        source = open_source(self.folder)
        return [(r.key, r.caption, r.image) for r in source], source.left_out, source.fingerprint()

    def test_an_index_is_read_once(self):
        first = self.contents()
        assert len(self.read) == 3 and len(first[0]) == 12 and len(first[1]) == 3
        assert self.contents() == first and len(self.read) == 3

    def test_what_changed_is_read_again(self):
        self.contents()
        self.read.clear()
        self.write(1, 6)
        self.write(3, 2)
        found = self.contents()
        assert self.read == ["00001.tar", "00003.tar"] and len(found[0]) == 16
        monotone = [key for key, *_ in found[0]]
        assert monotone == sorted(monotone)

    def test_a_shard_that_changes_under_a_run_is_noticed(self):
        source = open_source(self.folder)
        self.write(1, 5)
        (self.folder / "00002.tar").unlink()
        assert source[0].caption == "0 0"
        for row, why in ((4, "has changed since it was opened"), (8, "cannot be read: No such")):
            with pytest.raises(UserError, match=f"its shard {why}"):
                source[row]

    def test_few_damaged_shards_are_left_out_in_part(self):
        for i in range(40):
            self.write(i, 2)
        path = self.folder / "00007.tar"
        path.write_bytes(path.read_bytes()[:-10_000])
        source = open_source(self.folder)
        (why,) = (why for name, why in source.left_out.items() if name.endswith("00007.tar"))
        assert why.startswith(
            "a damaged shard, of which only the start is used: it is not a complete"
        )
        assert 78 <= len(source) <= 80 and all(record.image for record in source)

    def test_several_processes_find_the_same(self, monkeypatch):
        alone = self.contents()[0]
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder.parent / "other"))
        monkeypatch.setattr(tar_index, "IN_PROCESSES", 0)
        assert self.contents()[0] == alone


def test_damaged_records_end_a_run_only_when_they_are_many(tmp_path):
    """1 % are replaced, counted and named; a third are too many."""
    names = {}
    for i in range(300):
        (tmp_path / f"{i:03}.png").write_bytes(b"" if i % 100 == 7 else png(i % 250))
    source = open_source(tmp_path, heldout_fraction=0.0)
    settings = dict(image_size=8, batch_size=20, seed=0, on_skip=names.__setitem__)
    with make_batches(source, **settings) as batches:
        assert all(len(batch["images"]) == 20 for batch in itertools.islice(batches, 30))
    assert sorted(names) == ["007.png", "107.png", "207.png"]
    for i in range(0, 300, 3):
        (tmp_path / f"{i:03}.png").write_bytes(b"\x89PNG broken")
    expected = r"of \d+ records are damaged, more than 5 % \(--max-damaged\); the first: \d+.png: c"
    with (
        make_batches(source, **settings) as batches,
        pytest.raises(UserError, match=expected),
    ):
        for _ in range(30):
            next(batches)


def test_names_that_point_elsewhere_write_nothing(tmp_path):
    """Nothing is unpacked: a member's name is a name."""
    home = tmp_path / "home"
    home.mkdir()
    names = ["../up", "/abs/olute", "a\nb", "naïve\u202e", "x" * 90]
    shard(home / "a.tar", {f"{name}.png": png(1) for name in names})
    source = open_source(home / "a.tar")
    assert len(source) == 5 and all(record.image == png(1) for record in source)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "home"]


@functools.cache
def p3() -> bytes:
    """An ICC profile of Display P3: its primaries, and a gamma of 2.2."""
    from PIL import ImageCms

    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {"rXYZ": (0.51512, 0.2412, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189),
                 "bXYZ": (0.1571, 0.06657, 0.78407)}  # fmt: skip
    count = int.from_bytes(srgb[128:132], "big")
    for i in range(count):
        entry = 132 + 12 * i
        name, at = (
            srgb[entry : entry + 4].decode(),
            int.from_bytes(srgb[entry + 4 : entry + 8], "big"),
        )
        if name in primaries:
            fixed = [round(x * 65536) & 0xFFFFFFFF for x in primaries[name]]
            srgb[at + 8 : at + 20] = b"".join(x.to_bytes(4, "big") for x in fixed)
    return bytes(srgb).replace("sRGB".encode("utf-16-be"), "P3xx".encode("utf-16-be"))


def test_colours_of_other_profiles_become_srgb(tmp_path):
    """(40, 160, 60) in Display P3 is (0, 163, 40) in sRGB."""
    for name, mode in (("a", "RGB"), ("b", "RGBA")):
        picture = Image.new("RGB", (8, 8), (40, 160, 60)).convert(mode)
        picture.save(tmp_path / f"{name}.png", icc_profile=p3())
    Image.new("RGB", (8, 8), (40, 160, 60)).save(tmp_path / "c.png", icc_profile=b"not a profile")
    source = open_source(tmp_path, heldout_fraction=0.0)
    settings = dict(image_size=8, batch_size=3, seed=0, shuffle=False)
    with make_batches(source, **settings) as batches:
        seen = next(batches)["images"][:, 4, 4].astype(int)
    assert np.abs(seen[:2] - (0, 163, 40)).max() <= 3
    assert seen[2].tolist() == [40, 160, 60]


def test_crops_upsampling_and_buckets(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(40, 40), (30, 60), (60, 30), (6, 6)]
    for i in range(40):
        pixels = rng.integers(0, 255, (*shapes[i % 4], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    source = open_source(tmp_path, heldout_fraction=0.0)
    settings = dict(batch_size=4, seed=1, on_skip=lambda *_: None)
    buckets = [(8, 8), (8, 16), (16, 8)]
    with make_batches(source, image_size=8, buckets=buckets, upsample=True, **settings) as batches:
        seen = [batch["images"] for batch in itertools.islice(batches, 40)]
    shares = Counter(images.shape[1:3] for images in seen)
    assert shares == {(8, 8): 20, (8, 16): 10, (16, 8): 10}
    for step in (5, 23):
        with make_batches(
            source, image_size=8, buckets=buckets, upsample=True, start_step=step, **settings
        ) as batches:
            np.testing.assert_array_equal(next(batches)["images"], seen[step])
        for rows in (range(1), range(1, 4)):  # of two processes
            with make_batches(
                source, image_size=8, buckets=buckets, upsample=True, start_step=step, rows=rows,
                **settings,
            ) as batches:  # fmt: skip
                np.testing.assert_array_equal(next(batches)["images"], seen[step][rows])
    wide = source.take(2)
    moving = {}
    for crop in ("center", "random"):
        with make_batches(wide, image_size=16, crop=crop, shuffle=False, **settings) as batches:
            taken = [next(batches)["images"][1::2] for _ in range(10)]
        moving[crop] = len({image.tobytes() for images in taken for image in images})
    assert moving["center"] == 1 and moving["random"] > 8


def test_sets_keep_their_weights_in_buckets(tmp_path):
    """Most of a set that weighs little is of one size."""
    for name, count, size in (("a", 5, (20, 10)), ("b", 95, (10, 20))):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", size, (i, i, i)).save(tmp_path / name / f"{i:02}.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b" / "wide.png")
    specs = [f"{tmp_path}/a=0.9", f"{tmp_path}/b=0.1"]
    source = open_source(specs, heldout_fraction=0.0)
    taken = Order.of(source, [(8, 16), (16, 8)], batch_size=4, seed=0, shuffle=True)
    rows = [taken(step)[1](row) for step in range(500) for row in (0, 3)]
    parts = source.parts[source.rows[rows]]
    assert abs(np.mean(parts == 0) - 0.9) < 0.02


def test_an_image_is_too_small_for_one_bucket_alone(tmp_path):
    """The first bucket fits no image of this set, and says nothing of the others."""
    for i in range(6):
        Image.new("RGB", (20, 10), (i, i, i)).save(tmp_path / f"{i}.png")
    source = open_source(tmp_path, heldout_fraction=0.0)
    left_out = {}
    with make_batches(
        source, image_size=8, buckets=[(16, 8), (8, 16)], batch_size=6, seed=0,
        on_skip=left_out.__setitem__,
    ) as batches:  # fmt: skip
        images = next(batches)["images"]
    assert images.shape == (6, 8, 16, 3) and len(np.unique(images)) == 6 and not left_out


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("width > 100 and height > 100", "give each condition as a separate argument"),
        ("caption_length > 3, width > 2", "give each condition as a separate argument"),
        ("width >  ", "write COLUMN >= VALUE"),
        ("width > wide", "'wide' is not a number"),
    ],
)
def test_conditions_that_would_keep_everything(tmp_path, condition, message):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, where=[condition])


def test_several_data_on_a_command_line():
    assert sources.gathered(["--data", "A=1", "B", "--x", "1", "--data=C"]) == [
        *("--x", "1", "--data", "A=1", "B", "C")
    ]
    assert sources.gathered(["--x", "1"]) == ["--x", "1"]


def test_what_img2dataset_writes():
    """A real output of img2dataset 1.47 (`--output_format webdataset`): of eight addresses six
    pictures, whose `.parquet` and `_stats.json` beside the shard are none of ours to read."""
    source = open_source(str(Path(__file__).parent / "img2dataset"), heldout_fraction=0.0)
    assert sorted(source.keys) == [f"00000/{i:09}" for i in range(6)] and not source.left_out
    rows = {source.key(i): i for i in range(6)}
    record = source[rows["00000/000000001"]]
    assert record.captions == ("three yellow stars",)
    assert source.size(rows["00000/000000001"]) == (48, 64)
    columns = source.columns(rows["00000/000000001"])
    assert columns["status"] == "success" and columns["original_width"] == 64
    assert len(choosing.where(source, ["width > 48"])) == 3
    with make_batches(source, image_size=32, batch_size=6, seed=0) as batches:
        images = next(batches)["images"]
    assert images.shape == (6, 32, 32, 3) and images.std() > 10
