"""The checker of scenes: right on what is right, wrong on what is wrong."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from imagen_jax.data import scenes
from imagen_jax.data.scenes import COLOURS, LEVELS, SHAPES, Content, Kind
from imagen_jax.metrics import composition

COUNT = 240
RED, BLUE = Kind("red", "circle"), Kind("blue", "square")


def examples(count: int = COUNT) -> list[scenes.Scene]:
    """A quarter of each: training, and the three levels held out."""
    held = [scenes.heldout_scene(level, i) for level in LEVELS for i in range(count // 4)]
    return [scenes.training_scene(i) for i in range(count // 4)] + held


def judged(scene: scenes.Scene, image: np.ndarray, content: Content | None = None):
    return composition.judge(content or scene.content, composition.find(image))


@pytest.mark.parametrize("size", [32, 64, (32, 48), 160])
@pytest.mark.parametrize("noise, blur", [(0, 0), (0.05, 0.7)])
def test_real_scenes_are_right(size, noise, blur):
    rng = np.random.default_rng(0)
    right = 0
    for scene in examples():
        image = ndimage.gaussian_filter(scene.draw(size) / 255, (blur, blur, 0))
        image = np.clip(image + noise * rng.standard_normal(image.shape), 0, 1)
        right += judged(scene, image).right
    assert right >= 0.99 * COUNT


def test_objects_are_found_where_they_are():
    for scene in examples(80):
        found = composition.find(scene.draw(64) / 255)
        assert len(found) == len(scene.objects)
        for thing in scene.objects:
            place = np.add(thing.centre, thing.offset)
            one = min(found, key=lambda one: np.hypot(*(np.array(one.centre) - place)))
            assert one.kind == thing.kind
            np.testing.assert_allclose(one.centre, place, atol=0.01)
            np.testing.assert_allclose(one.radius, thing.radius, rtol=0.06)


def changed(scene: scenes.Scene, rng: np.random.Generator) -> dict[str, Content]:
    """Contents that are not those of the scene, by the verdict that must be wrong."""
    content = scene.content
    other_colour = rng.choice([c for c in COLOURS if c != content.kind.colour])
    other_shape = rng.choice([s for s in SHAPES if s != content.kind.shape])
    wrong = {
        "attributes": replace(content, kind=content.kind._replace(colour=str(other_colour))),
        "objects": replace(content, kind=content.kind._replace(shape=str(other_shape))),
    }
    if content.relation is None:
        wrong["count"] = replace(content, count=content.count % 4 + 1)
    else:
        wrong["relation"] = replace(content, kind=content.other, other=content.kind)
    if content.place is not None:
        opposite = dict(top="bottom", bottom="top", left="right", right="left", middle="top")
        wrong["place"] = replace(content, place=opposite[content.place])
    if content.size is not None:
        wrong["size"] = replace(content, size="large" if content.size == "small" else "small")
    return wrong


def test_wrong_scenes_are_wrong():
    rng, seen = np.random.default_rng(0), set()
    for scene in examples():
        found = composition.find(scene.draw(32) / 255)
        for field, content in changed(scene, rng).items():
            verdict = composition.judge(content, found)
            assert not verdict.right and getattr(verdict, field) < 1, (scene.caption, content)
            assert verdict.bound == (field in ("place", "size")), (scene.caption, content)
            seen.add(field)
    assert seen == {"attributes", "objects", "count", "relation", "place", "size"}


def test_an_object_too_many_is_wrong_and_the_wrong_object_bound_is_seen():
    content = Content(RED, relation="left of", other=BLUE)
    scene = scenes.compose(content, np.random.default_rng(0))
    swapped = replace(content, kind=Kind("blue", "circle"), other=Kind("red", "square"))
    verdict = judged(scene, scene.draw(32) / 255, swapped)
    assert verdict.objects == 1 and verdict.attributes == 0 and verdict.relation is False
    alone = replace(scene, objects=scene.objects[:1])
    assert judged(alone, alone.draw(32) / 255) == composition.Verdict(
        objects=0.5,
        attributes=0.5,
        count=False,
        relation=False,
        size=None,
        place=None,
        bound=False,
        right=False,
    )
    third = scenes.Thing(Kind("green", "star"), (0.85, 0.85), 0.12)
    more = replace(scene, objects=(*scene.objects, third))
    verdict = judged(more, more.draw(32) / 255)
    assert verdict.attributes == 1 and not verdict.count and not verdict.right


def test_what_is_no_shape_has_none():
    image = np.ones((32, 32, 3))
    image[14:17, 2:30] = np.array(COLOURS["red"]) / 255  # a bar
    (bar,) = composition.find(image)
    assert bar.colour == "red" and bar.shape is None
    for flat in (np.ones((32, 32, 3)), np.full((32, 32, 3), 0.8)):
        assert composition.find(flat) == []
    noise = np.random.default_rng(0).uniform(size=(32, 32, 3))
    assert not composition.judge(Content(RED), composition.find(noise)).right


def test_an_interval_of_a_share():
    """Wilson's, against the values of a table (Brown, Cai and DasGupta 2001)."""
    np.testing.assert_allclose(composition.wilson(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(composition.wilson(5, 10), (0.2366, 0.7634), atol=1e-4)
    np.testing.assert_allclose(composition.wilson(90, 100), (0.8256, 0.9448), atol=1e-4)
