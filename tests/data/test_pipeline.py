"""Batches are a function of seed and step, whatever the threads, workers, rows and bad pictures."""

import io
import itertools
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import decode, make_batches, open_source

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def tokenize(captions: list[str]) -> np.ndarray:
    """Each caption's number, in a row of 3."""
    return np.array([[int(caption.split()[-1]), 0, 0] for caption in captions], np.int32)


def write_picture(folder, i: int, *, size: int = 12, caption: str | None = "number {}"):
    out = io.BytesIO()
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0] = i
    pixels[:, : size // 2, 1] = 255  # bright on the left
    Image.fromarray(pixels).save(out, "png")
    (folder / f"{i:02d}.png").write_bytes(out.getvalue())
    if caption is not None:
        (folder / f"{i:02d}.txt").write_text(caption.format(i))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        write_picture(folder, i)
    return folder


def batches(folder, count: int, **options) -> list[dict[str, np.ndarray]]:
    settings = dict(image_size=8, batch_size=4, seed=3, tokenize=tokenize) | options
    source = open_source(folder, heldout_fraction=0.0)
    with make_batches(source, **settings) as stream:
        return list(itertools.islice(stream, count))


def numbers(stream: list[dict[str, np.ndarray]]) -> list[list[int]]:
    return [batch["images"][:, 0, 0, 0].tolist() for batch in stream]


def assert_same(ours: list[dict], theirs: list[dict]):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_keep_the_contract(pictures):
    for batch in batches(pictures, 2):
        assert batch["images"].shape == (4, 8, 8, 3) and batch["images"].dtype == np.uint8
        assert batch["tokens"].dtype == np.int32
        np.testing.assert_array_equal(batch["tokens"][:, 0], batch["images"][:, 0, 0, 0])
    assert batches(pictures, 1, tokenize=None)[0].keys() == {"images"}


def test_images_that_are_not_square(tmp_path):
    for i in range(3):
        write_picture(tmp_path, i, size=48)
    settings = dict(image_size=(24, 40), batch_size=3, shuffle=False)
    (batch,) = batches(tmp_path, 1, **settings)
    assert batch["images"].shape == (3, 24, 40, 3)
    for i, image in enumerate(batch["images"]):
        stored = (tmp_path / f"{i:02d}.png").read_bytes()
        np.testing.assert_array_equal(image, decode(stored, image_size=(24, 40)))
    (flipped,) = batches(tmp_path, 1, flip=True, **settings | dict(batch_size=24))
    left, right = (flipped["images"][:, 12, x, 1] > 128 for x in (0, -1))
    assert (left != right).all() and 4 < right.sum() < 20


def test_the_cache_is_used_where_all_images_fit(pictures, monkeypatch):
    """10 images of 6x10 in three channels are 1,800 bytes."""
    decoded = []
    count = lambda *args, **kwargs: decoded.append(0) or decode(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("imagen_jax.data.pipeline.decode", count)
    for cache_bytes, fits in ((1800, True), (1799, False)):
        decoded.clear()
        batches(pictures, 3, image_size=(6, 10), batch_size=10, cache_bytes=cache_bytes, threads=1)
        assert (len(decoded) == 10) == fits


def test_every_epoch_is_another_permutation(pictures):
    seen = sum(numbers(batches(pictures, 5)), [])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] != list(range(10))
    assert numbers(batches(pictures, 5, seed=4)) != numbers(batches(pictures, 5))
    plain = sum(numbers(batches(pictures, 5, shuffle=False)), [])
    assert plain == list(range(10)) * 2


def test_resumed_equals_uninterrupted(pictures):
    whole = batches(pictures, 7, flip=True)
    assert_same(batches(pictures, 4, flip=True, start_step=3), whole[3:])


@pytest.mark.parametrize("change", [dict(threads=1), dict(threads=7), dict(cache_bytes=0)], ids=str)
def test_threads_and_cache_change_nothing(pictures, change):
    assert_same(batches(pictures, 6, flip=True, **change), batches(pictures, 6, flip=True))


def test_rows_are_parts_of_the_global_batch(pictures):
    whole = batches(pictures, 5, flip=True)
    for rows in ([0, 1], [2, 3], [3], [0, 2]):
        parts = batches(pictures, 5, flip=True, rows=rows)
        assert_same(parts, [{k: v[rows] for k, v in batch.items()} for batch in whole])


@pytest.mark.slow
def test_worker_processes_change_nothing(pictures, tmp_path):
    """As a script with a command line of its own, which absl has not parsed; bad pictures too."""
    write_picture(tmp_path, 0)
    write_picture(tmp_path, 1, size=4)
    write_picture(tmp_path, 2)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import itertools, sys
            from imagen_jax.data import make_batches, open_source
            if __name__ == "__main__":
                for folder in sys.argv[1:]:
                    runs = []
                    for workers in (0, 2):
                        source = open_source(folder, heldout_fraction=0.0)
                        settings = dict(image_size=8, batch_size=4, seed=3, flip=True)
                        skipped = {}
                        settings["on_skip"] = skipped.__setitem__
                        with make_batches(source, workers=workers, **settings) as stream:
                            images = [b["images"].tobytes() for b in itertools.islice(stream, 6)]
                            runs.append((images, skipped))
                    left_open = make_batches(source, workers=1, **settings)
                    next(left_open)
                    assert runs[0] == runs[1], folder
                    print(runs[0][1])
            """
        )
    )
    command = [sys.executable, str(script), str(pictures), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "{}" and "01.png" in done.stdout.splitlines()[1]
    assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr


def test_flip_mirrors_about_half(pictures):
    flipped = [batch["images"] for batch in batches(pictures, 20, flip=True)]
    mirrored = np.concatenate(flipped)[:, 0, 0, 1] == 0
    assert 20 < mirrored.sum() < 60


def test_bad_records_are_skipped_counted_and_named(tmp_path, caplog):
    for i in range(8):
        write_picture(tmp_path, i)
    write_picture(tmp_path, 1, size=4)
    (tmp_path / "02.png").write_bytes(b"no picture")
    write_picture(tmp_path, 4, caption=" \n")
    (tmp_path / "05.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "07.txt").unlink()
    source = open_source(tmp_path, heldout_fraction=0.0)
    settings = dict(image_size=8, batch_size=4, seed=0, shuffle=False)
    with caplog.at_level(logging.WARNING, "imagen_jax"):
        with make_batches(source, tokenize=tokenize, **settings) as stream:
            seen = numbers([next(stream) for _ in range(4)])
    assert seen == [[0, 3, 3, 3], [6, 6, 6, 0]] * 2
    assert dict(record.args for record in caplog.records) == {
        "01.png": "smaller than 8x8 pixels (height x width): 4x4",
        "02.png": "corrupt picture: no known format",
        "04.png": "empty caption",
        "05.png": "the caption is not UTF-8",
        "07.png": "no caption",
    }
    assert len(caplog.records) == 5
    reported = []
    skip = lambda key, reason: reported.append(key)  # noqa: E731
    with make_batches(source, on_skip=skip, **settings) as stream:
        assert numbers([next(stream), next(stream)]) == [[0, 3, 3, 3], [4, 6, 6, 7]]
    assert reported == ["01.png", "02.png", "05.png"]


def test_skipping_is_the_same_after_a_resume(tmp_path):
    for i in range(9):
        write_picture(tmp_path, i, size=4 if i % 3 == 0 else 12)
    assert_same(batches(tmp_path, 3, start_step=4), batches(tmp_path, 7)[4:])


def test_stored_embeddings_replace_captions(tmp_path):
    for i in range(3):
        write_picture(tmp_path, i)
        np.save(tmp_path / f"{i:02d}.npy", np.full((i + 2, 5), i, np.float16))
    (batch,) = batches(tmp_path, 1, batch_size=3, shuffle=False, text_len=3)
    assert batch.keys() == {"images", "text_embeds", "text_masks"}
    assert batch["text_embeds"].shape == (3, 3, 5) and batch["text_embeds"].dtype == np.float32
    assert batch["text_masks"].tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert (batch["text_embeds"].sum((1, 2)) == [0, 15, 30]).all()
    np.save(tmp_path / "01.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"different widths in one set: \[4, 5\]"):
        batches(tmp_path, 1, batch_size=3, shuffle=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(image_size=64),
            "none of 10 records can be used; the first: 00.png: smaller than 64x64 .*: 12x12",
        ),
        (dict(channels=2), "channels must be 1, 3 or 4, got 2"),
        (
            dict(image_size=(8, 13)),
            "none of 10 records can be used; the first: 00.png: smaller than 8x13 .*: 12x12",
        ),
        (dict(image_size=(8, 0)), "image_size must be at least 1x1, got 8x0"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(seed=-1), "seed must be in"),
        (dict(start_step=-1), "start_step and workers must be >= 0"),
        (dict(rows=[3, 4]), r"rows must be a non-empty subset of 0..3; got \[3, 4\]"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(pictures, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        batches(pictures, 1, **options)
    assert "\n" not in str(caught.value)


def test_an_empty_split_says_so(pictures):
    empty = open_source(pictures, split="heldout", heldout_fraction=0.0)
    with pytest.raises(ValueError, match=r"\(heldout\): no records; 0 of 10 are held out"):
        make_batches(empty, image_size=8, batch_size=4, seed=0)


def test_closing_leaves_no_threads(pictures):
    before = threading.active_count()
    batches(pictures, 3)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
