"""Scenes: what is drawn is what is said, and what is held out is never trained on."""

import itertools
import pickle

import numpy as np
import pytest

from imagen_jax.data import decode, make_batches, open_source, scene_source, scenes
from imagen_jax.data.scenes import COLOURS, LEVELS, SHAPES, Content, Kind
from imagen_jax.errors import UserError


def test_training_scenes_show_nothing_that_is_held_out():
    shown = [scenes.training_content(seed) for seed in range(20_000)]
    assert shown[:200] == [scenes.training_scene(seed).content for seed in range(200)]
    pairs = {kind for content in shown for kind in (content.kind, content.other) if kind}
    assert pairs == set(itertools.product(COLOURS, SHAPES)) - set(scenes.HELDOUT_PAIRS)
    related = {(c.kind, c.relation, c.other) for c in shown if c.relation}
    counted = {(c.kind, c.count) for c in shown if not c.relation}
    held = scenes.contents("combinations")
    assert not related & {(c.kind, c.relation, c.other) for c in held}
    assert not counted & {(c.kind, c.count) for c in scenes.contents("counts")}
    # Every word that a held-out caption combines was seen.
    assert {c.count for c in shown} == {1, 2, 3, 4}
    assert {c.relation for c in shown} == {None, *scenes.RELATIONS}
    assert {c.place for c in shown} == {None, *scenes.PLACES}


def test_levels_partition_the_contents():
    every = [scenes.contents(level) for level in (None, *LEVELS)]
    assert len(set().union(*every)) == sum(map(len, every))
    training, pairs, combinations, counts = map(len, every)
    assert 0.05 < combinations / training < 0.15 and counts >= 8
    assert {kind for c in scenes.contents("counts") for kind in c.kind} > {"red", "circle"}


@pytest.mark.parametrize("level", LEVELS)
def test_heldout_scenes_are_of_their_level(level):
    held = [scenes.heldout_scene(level, seed) for seed in range(500)]
    assert {scene.content.level for scene in held} == {level}
    plain = {scene.caption for scene in held}
    assert len(plain) > 12  # sizes, places and wordings vary


def test_wordings_mean_the_same():
    content = Content(Kind("red", "circle"), relation="above", other=Kind("blue", "square"))
    rng = np.random.default_rng(0)
    wordings = {scenes.caption(content, rng) for _ in range(200)}
    assert wordings == {
        *(f"a red circle {word} a blue square" for word in ("above", "on top of", "over")),
        *(f"a blue square {word} a red circle" for word in ("below", "under", "beneath")),
    }
    assert scenes.described(Kind("orange", "cross")) == "an orange cross"
    assert scenes.described(Kind("green", "cross"), "small", 3) == "three small green crosses"


def test_a_scene_is_drawn_alike_at_every_size():
    """Antialiased: a large drawing, averaged, is the small one; colours are exact inside."""
    for seed in range(20):
        scene = scenes.training_scene(seed)
        large = scene.draw(256).reshape(32, 8, 32, 8, 3).mean((1, 3))
        assert np.abs(large - scene.draw(32)).mean() < 1.5
    circle = scenes.compose(Content(Kind("red", "circle"), size="large"), np.random.default_rng(0))
    (thing,) = circle.objects
    pixels = circle.draw(64)
    y, x = (int(64 * c) for c in thing.centre)
    assert tuple(pixels[y, x]) == COLOURS["red"] and tuple(pixels[0, 0]) == (255, 255, 255)
    covered = ((255.0 - pixels) / (255 - np.array(COLOURS["red"]))).mean((0, 1))
    np.testing.assert_allclose(covered, np.pi * (0.9 * thing.radius) ** 2, rtol=0.02)


def test_other_aspect_ratios_keep_the_shapes():
    scene = scenes.training_scene(7)
    wide, square = scene.draw((32, 48)), scene.draw(32)
    assert wide.shape == (32, 48, 3)
    ink = [(255.0 - image).sum() for image in (wide, square)]
    np.testing.assert_allclose(ink[0], ink[1], rtol=0.03)


def test_the_source_draws_at_the_size_asked_for():
    source = open_source("scenes", split="heldout")
    assert len(source) == 3000 and len(open_source("scenes", split="train")) == 1_000_000
    record = pickle.loads(pickle.dumps(source))[0]
    expected = scenes.heldout_scene("pairs", 0)
    assert record.caption == expected.caption and record.key == "scene1000000"
    np.testing.assert_array_equal(decode(record.image, image_size=16), expected.draw(16))
    assert decode(record.image, image_size=(8, 12), channels=1).shape == (8, 12, 1)
    counts = open_source("scenes:counts")
    assert counts[5].caption == scenes.heldout_scene("counts", 5).caption
    assert source.fingerprint() == open_source("scenes:heldout").fingerprint()
    assert source.fingerprint() != counts.fingerprint()
    with make_batches(counts, image_size=16, batch_size=4, seed=0) as batches:
        assert next(batches)["images"].shape == (4, 16, 16, 3)


def test_a_relation_is_a_part():
    """More scenes with it than the training set has, none of which is held out."""
    source = open_source("scenes:left-of")
    assert len(source) == len(source.split("train")) == 1_000_000
    assert len({source.key(i) for i in range(9)} | {open_source("scenes:inside").key(0)}) == 10
    for i in range(50):
        scene = scene_source.scene(int(source.rows[i]))
        assert scene.content.relation == "left of" and scene.content.level is None
    mixed = open_source(("scenes=0.5", "scenes:inside=0.5"), split="train")
    with make_batches(mixed, image_size=8, batch_size=4, seed=0, tokenize=None) as batches:
        assert next(batches)["images"].shape == (4, 8, 8, 3)
    assert len(open_source(("scenes", "scenes:inside"), split="heldout")) == 3000


def test_unknown_parts_are_refused():
    with pytest.raises(
        UserError, match="scenes:odd: no such part; choose one of train, heldout, pairs"
    ):
        open_source("scenes:odd")
