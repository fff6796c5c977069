"""From the settings to batches on the devices: one ahead, evaluation decoded once."""

import time

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import pipeline
from imagen_jax.distributed import Agreement
from imagen_jax.sharding import make_layout
from tests.train import support
from train.feed import Ahead, Feed
from train.settings import Data, Optimization


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    """Seven pictures, two of them held out, in batches of four."""
    folder = tmp_path_factory.mktemp("feed")
    for i in range(7):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    settings = support.settings(folder, data=(str(folder),), limit=None, heldout_fraction=0.4)
    layout = make_layout(settings.mesh, rows=settings.rows)
    sections = settings.section(Data), settings.section(Optimization)
    return Feed.open(settings.cascade(), support.CASCADE.stage(1), *sections, layout, seed=0)


def test_pictures_of_buckets_are_evaluated_and_drawn(tmp_path):
    """Though they are smaller than the stage; with smaller sets none is left out."""
    for i in range(6):
        Image.new("RGB", (10, 6), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    settings = support.settings(
        tmp_path, data=(str(tmp_path),), limit=None, heldout_fraction=0.4, buckets=("6x10",)
    )
    layout = make_layout(settings.mesh, rows=settings.rows)
    sections = settings.section(Data), settings.section(Optimization)
    feed = Feed.open(settings.cascade(), support.CASCADE.stage(1), *sections, layout, seed=0)
    assert len(feed.heldout) > 0 and not feed.left_out
    assert next(feed.evaluation(feed.heldout, 1))["images"].shape[1:] == (8, 8, 3)
    assert len(list(feed.usable(feed.train))) == len(feed.train)
    with feed.training(0) as batches:
        assert next(batches)["images"].shape == (4, 6, 10, 3)


def test_evaluation_decodes_once_and_repeats_no_picture_in_a_batch(feed, monkeypatch):
    decoded, decode = [], pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda *a, **k: decoded.append(0) or decode(*a, **k))
    held = len(feed.heldout)
    assert 0 < held < 4 <= len(feed.train)
    first = list(feed.evaluation(feed.heldout, 2))
    assert len(first) == 2 and first[0]["text_embeds"].shape[0] == held
    reds = np.asarray(first[0]["images"])[:, 0, 0, 0]
    assert sorted(reds) == sorted(30 * int(feed.heldout.key(i)[0]) for i in range(held))
    assert len(next(feed.evaluation(feed.train, 1))["images"]) == 4
    count = len(decoded)
    again = list(feed.evaluation(feed.heldout, 2))
    assert len(decoded) == count > 0
    for one, other in zip(first, again, strict=True):
        support.assert_equal(one, other)


def test_batches_come_one_ahead_in_their_order(feed):
    """And equal those made one after another; what the thread raises is raised here."""
    made = []
    text = dict(text_embeds=np.zeros((4, 2, 128), np.float32), text_masks=np.ones((4, 2), bool))

    def slow():
        for i in range(3):
            time.sleep(0.1)
            made.append(i)
            yield text | {"images": np.full((4, 8, 8, 3), i, np.uint8)}
        raise OSError("gone")

    with Ahead(feed, slow()) as ahead:
        assert int(next(ahead)["images"][0, 0, 0, 0]) == 0
        assert ahead.waited > 0.05
        deadline = time.monotonic() + 10
        while len(made) < 2 and time.monotonic() < deadline:  # made while nobody asks
            time.sleep(0.01)
        assert len(made) == 2
        assert [int(next(ahead)["images"][0, 0, 0, 0]) for _ in range(2)] == [1, 2]
        with pytest.raises(OSError, match="gone"):
            next(ahead)
    with feed.training(5) as plain, feed.training(5) as batches, Ahead(feed, batches) as ahead:
        for _ in range(3):
            support.assert_equal(
                next(ahead), feed.with_embeds(feed.put(next(plain), 4, Agreement()))
            )
