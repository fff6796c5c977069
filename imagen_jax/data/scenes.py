"""Captioned scenes of coloured shapes, drawn from a number: no files, and an endless supply.

A scene is made in three steps. A `Content` is what a caption says: "two small green stars", "a red
circle at the top", or two objects and a relation. `compose` places objects that make it true and
words it in one of several ways; `Scene.draw` draws them, antialiased, at any size and aspect ratio.

Three kinds of contents are held out: no training scene ever shows them, so that they measure how a
model handles captions that it was never given:

    pairs          a colour and a shape never seen together            (HELDOUT_PAIRS)
    combinations   two objects, each seen, in a relation never seen    (a tenth of them)
    counts         a number of objects never seen with their kind      (a sixth of them)

Coordinates: a centre (y, x) is relative to the image's height and width, in [0, 1]; radii and
offsets are in units of the shorter side. What is true of a square image is then true of a longer
one.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from imagen_jax.types import Size, pair

COLOURS = {
    "red": (222, 44, 50),
    "orange": (255, 140, 30),
    "yellow": (250, 215, 40),
    "green": (40, 160, 70),
    "blue": (45, 100, 230),
    "purple": (145, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
# Words for the first object's relation to the second one, and for the second one's to the first.
RELATIONS = {
    "above": (("above", "on top of", "over"), ("below", "under", "beneath")),
    "left of": (("to the left of", "left of"), ("to the right of", "right of")),
    "inside": (("inside", "in"), ("around",)),
}
PLACES = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
}
SMALL, LARGE = 0.15, 0.275  # the largest radius of a small object, the smallest of a large one
SIZES_OF_TWO = (("small", None), (None, "small"), ("small", "large"), ("large", "small"))
SIZED = 0.3  # the share of captions of two objects that name a size
MARGIN, APART = 0.02, 0.05  # of the shorter side: around objects, and between those of one kind

HELDOUT_PAIRS = (("red", "triangle"), ("blue", "star"), ("green", "square"), ("yellow", "circle"))
LEVELS = ("pairs", "combinations", "counts")
TRAINED_ON = (0.25, 0.2, *[0.55 / len(RELATIONS)] * len(RELATIONS))  # single, several, related
KINDS = (*LEVELS, "seen")  # of captions to measure a model with

Relation = Literal["above", "left of", "inside"]


class Kind(NamedTuple):
    colour: str
    shape: str


@dataclass(frozen=True)
class Content:
    """What a caption says: `count` objects of one kind, or one object and its relation to another.

    Sizes are "small", "large" or None: not mentioned. `place` is that of a single object, or None.
    """

    kind: Kind
    count: int = 1
    size: str | None = None
    place: str | None = None
    relation: Relation | None = None
    other: Kind | None = None
    other_size: str | None = None

    @property
    def level(self) -> str | None:
        """The held-out level that it belongs to; None for contents to train on."""
        if self.kind in HELDOUT_PAIRS or self.other in HELDOUT_PAIRS:
            return "pairs"
        if self.relation is not None:
            shown = self.kind, self.relation, self.other
            return "combinations" if _chosen(shown, 1 / 10) else None
        return "counts" if self.count > 1 and _chosen((self.kind, self.count), 1 / 6) else None


class Thing(NamedTuple):
    """One placed object: `offset` moves its centre, in units of the shorter side."""

    kind: Kind
    centre: tuple[float, float]
    radius: float
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A caption, what it says, and objects that make it true; later ones are drawn on top."""

    caption: str
    content: Content
    objects: tuple[Thing, ...]

    def draw(self, size: int | Size) -> UInt8[np.ndarray, "h w 3"]:
        """The scene on white, at (height, width)."""
        height, width = pair(size)
        short = min(height, width)
        y, x = (np.arange(n)[:, None] + 0.5 for n in (height, width))
        image = np.full((height, width, 3), 255.0)
        for thing in self.objects:
            (down, along), (dy, dx) = thing.centre, thing.offset
            dy, dx = y - down * height - dy * short, x.T - along * width - dx * short
            distance = outside(thing.kind.shape, dy / short, dx / short, thing.radius)
            cover = np.clip(0.5 - short * distance, 0, 1)[..., None]
            image += cover * (np.array(COLOURS[thing.kind.colour]) - image)
        return np.rint(image).astype(np.uint8)


def outside(
    shape: str, y: Float[np.ndarray, "h #w"], x: Float[np.ndarray, "#h w"], radius: float
) -> Float[np.ndarray, "h w"]:
    """Distance from each point to the shape around the origin, negative inside; y points down.

    For points beyond a corner it is a lower bound. The shape fits into a circle of `radius`.
    """
    x = np.abs(x)
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return np.maximum(x, np.abs(y)) - 0.74 * radius
    if shape == "cross":
        y = np.abs(y)
        long, short = 0.95 * radius, 0.31 * radius
        return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    if shape == "triangle":  # equilateral, a corner up; centred in the circle around it
        return np.maximum(x * np.sqrt(3) / 2 - y / 2, y) - radius / 2
    # A star has five axes of symmetry: folded over them, one straight edge is left, tip to notch.
    angle = np.arctan2(x, -y) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    distance = np.hypot(x, y)
    tip = np.array([radius, 0.0])
    notch = 0.46 * radius * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    along = (notch - tip) / np.linalg.norm(notch - tip)
    return distance * (np.sin(angle) * -along[0] + np.cos(angle) * along[1]) - tip[0] * along[1]


@functools.cache
def contents(level: str | None) -> tuple[Content, ...]:
    """All contents without sizes and places: those of a held-out level, or to train on (None)."""
    kinds = [Kind(*kind) for kind in itertools.product(COLOURS, SHAPES)]
    several = [Content(kind, count) for kind in kinds for count in NUMBERS]
    related = [
        Content(kind, relation=relation, other=other)
        for kind, relation, other in itertools.product(kinds, RELATIONS, kinds)
        if kind.colour != other.colour
        and (relation != "inside" or other.shape in ("circle", "square"))
    ]
    return tuple(one for one in several + related if one.level == level)


@functools.cache
def _by_form(level: str | None) -> tuple[tuple[Content, ...], ...]:
    """The same, grouped: single objects, several of a kind, two in a relation; no empty groups."""
    forms: tuple[list[Content], ...] = ([], [], [])
    for content in contents(level):
        forms[2 if content.relation else int(content.count > 1)].append(content)
    return tuple(tuple(form) for form in forms if form)


@functools.cache
def _related(relation: Relation) -> tuple[Content, ...]:
    """The contents to train on with two objects in this relation."""
    return tuple(one for one in _by_form(None)[2] if one.relation == relation)


def compose(content: Content, rng: np.random.Generator) -> Scene:
    """Places objects that make `content` true, and words it."""
    if content.relation is None:
        objects = _place_alike(content, rng)
    elif content.relation == "inside":
        objects = _place_inside(content, rng)
    else:
        objects = _place_apart(content, rng)
    return Scene(caption(content, rng), content, objects)


def caption(content: Content, rng: np.random.Generator) -> str:
    """One of the wordings of a content."""
    every = wordings(content)
    if content.relation is not None:
        forward, backward = RELATIONS[content.relation]
        if rng.random() < 0.5:
            return every[rng.choice(len(forward))]
        return every[len(forward) + rng.choice(len(backward))]
    return every[0] if len(every) == 1 or rng.random() < 0.7 else every[1]


def wordings(content: Content) -> tuple[str, ...]:
    """All wordings of a content; with two objects, those that start with the first come first."""
    first = described(content.kind, content.size, content.count)
    if content.relation is not None:
        second = described(content.other, content.other_size)
        forward, backward = RELATIONS[content.relation]
        return (
            *(f"{first} {words} {second}" for words in forward),
            *(f"{second} {words} {first}" for words in backward),
        )
    place = "" if content.place is None else f" {PLACES[content.place]}"
    plain = first + place
    return (plain,) if content.count > 1 else (plain, f"there is {plain}")


def described(kind: Kind, size: str | None = None, count: int = 1) -> str:
    """`a small red circle`, `three crosses`."""
    plural = "" if count == 1 else "es" if kind.shape.endswith("s") else "s"
    words = (size or "", kind.colour, kind.shape + plural)
    text = " ".join(word for word in words if word)
    return f"{'an' if count == 1 and text[0] in 'aeiou' else NUMBERS[count]} {text}"


def training_scene(seed: int) -> Scene:
    """A scene to train on; none shows what is held out."""
    rng = np.random.default_rng((0, seed))
    return compose(_training_content(rng), rng)


def training_content(seed: int, sized: float = SIZED) -> Content:
    """The content of `training_scene`, without placing anything. `sized` is the share of captions
    of two objects that name a size."""
    return _training_content(np.random.default_rng((0, seed)), sized)


def _training_content(rng: np.random.Generator, sized: float = SIZED) -> Content:
    single, several, _ = _by_form(None)
    form = (single, several, *map(_related, RELATIONS))[rng.choice(5, p=TRAINED_ON)]
    return _with_sizes(form[rng.integers(len(form))], rng, sized)


def related_scene(relation: Relation, seed: int) -> Scene:
    """A scene to train on with two objects in this relation: a record of `scenes:inside` and of
    its kind, not of `scenes`."""
    rng = np.random.default_rng((2 + len(LEVELS), tuple(RELATIONS).index(relation), seed))
    return _scene_of(_related(relation), rng)


def heldout_scene(level: str, seed: int) -> Scene:
    """A scene of a held-out level, its contents in turn; those of `pairs` are single objects."""
    rng = np.random.default_rng((1 + LEVELS.index(level), seed))
    form = _by_form(level)[0]
    return compose(_with_sizes(form[seed % len(form)], rng), rng)


def examples(kind: str, count: int) -> list[Scene]:
    """The first scenes of one of `KINDS`, to measure a model with: always the same."""
    if kind == "seen":
        return [seen_scene(seed) for seed in range(count)]
    return [heldout_scene(kind, seed) for seed in range(count)]


def seen_scene(seed: int) -> Scene:
    """A scene with two objects in a combination that is trained on, to compare with the held-out
    ones; it is not itself one of the records."""
    rng = np.random.default_rng((1 + len(LEVELS), seed))
    return _scene_of(_by_form(None)[2], rng)


def _scene_of(form: Sequence[Content], rng: np.random.Generator) -> Scene:
    """A scene of one of these contents."""
    return compose(_with_sizes(form[rng.integers(len(form))], rng), rng)


def _chosen(what: object, fraction: float) -> bool:
    """A fixed choice of about `fraction` of all things, by a hash."""
    return zlib.crc32(repr(what).encode()) < fraction * 2**32


def _with_sizes(content: Content, rng: np.random.Generator, sized: float = SIZED) -> Content:
    """The content, sometimes with a size or a place."""
    if content.relation == "inside":
        return content
    if content.relation is not None:
        plain = rng.random() < 1 - sized
        size, other_size = (None, None) if plain else SIZES_OF_TWO[rng.integers(len(SIZES_OF_TWO))]
        return replace(content, size=size, other_size=other_size)
    if content.count > 1:
        return replace(content, size="small" if rng.random() < 0.25 else None)
    size = (None, None, None, "small", "large")[rng.integers(5)]
    placed = size != "large" and rng.random() < 0.5
    place = tuple(PLACES)[rng.integers(len(PLACES))] if placed else None
    return replace(content, size=size, place=place)


def every_size(content: Content) -> Iterator[Content]:
    """The content with everything that `_with_sizes` may add."""
    if content.relation == "inside":
        yield content
    elif content.relation is not None:
        for size, other in ((None, None), *SIZES_OF_TWO):
            yield replace(content, size=size, other_size=other)
    elif content.count > 1:
        yield from (replace(content, size=size) for size in (None, "small"))
    else:
        for size, place in itertools.product((None, "small", "large"), (None, *PLACES)):
            if size != "large" or place is None:
                yield replace(content, size=size, place=place)


def _place_alike(content: Content, rng: np.random.Generator) -> tuple[Thing, ...]:
    """One object, at its place if it has one, or several anywhere, apart from each other."""
    sizes = {"small": (0.12, 0.145), "large": (0.285, 0.36), None: (0.165, 0.255)}
    if content.count > 1:
        sizes = {"small": (0.11, 0.125), None: (0.14, 0.165)}
    low, high = sizes[content.size]
    while True:
        radii = rng.uniform(low, high, content.count)
        centres = rng.uniform(radii + MARGIN, 1 - radii - MARGIN, (2, content.count)).T
        if content.place == "middle":
            centres[:] = rng.uniform(0.45, 0.55, 2)
        elif content.place is not None:
            edge = rng.uniform(radii[0] + MARGIN, max(0.3, radii[0] + 2 * MARGIN))
            axis = int(content.place in ("left", "right"))
            centres[:, axis] = edge if content.place in ("top", "left") else 1 - edge
        if _are_apart(centres.tolist(), radii.tolist()):
            return tuple(map(functools.partial(_thing, content.kind), centres, radii))


def _are_apart(centres: Sequence[Sequence[float]], radii: Sequence[float]) -> bool:
    """Plain Python, as most placements are rejected and numpy takes five times as long."""
    return all(
        math.dist(centres[i], centres[j]) >= radii[i] + radii[j] + APART
        for i in range(1, len(radii))
        for j in range(i)
    )


def _place_apart(content: Content, rng: np.random.Generator) -> tuple[Thing, ...]:
    """The first above the other, or left of it, and nearly in line with it."""
    sizes = {"small": (0.12, 0.145), "large": (0.285, 0.31), None: (0.165, 0.215)}
    first, other = (rng.uniform(*sizes[size]) for size in (content.size, content.other_size))
    room = 1 - 2 * (first + other) - 3 * MARGIN  # along the relation's axis
    before, between = rng.uniform(0, 1, 2) * room / 2
    near = before + MARGIN + first
    along = near, near + first + MARGIN + between + other
    largest = max(first, other) + MARGIN
    across = np.clip(
        rng.uniform(largest, 1 - largest) + rng.uniform(-0.08, 0.08, 2), largest, 1 - largest
    )
    centres = np.stack([along, across], axis=1)
    if content.relation == "left of":
        centres = centres[:, ::-1]
    return _thing(content.kind, centres[0], first), _thing(content.other, centres[1], other)


def _place_inside(content: Content, rng: np.random.Generator) -> tuple[Thing, ...]:
    """The other object large, and the first on top of it: not small, slightly off its centre."""
    outer, inner = rng.uniform(0.4, 0.46), rng.uniform(0.165, 0.2)
    centre = rng.uniform(outer + MARGIN, 1 - outer - MARGIN, 2)
    offset = rng.uniform(-0.05, 0.05, 2)
    return _thing(content.other, centre, outer), _thing(content.kind, centre, inner, offset)


def _thing(
    kind: Kind, centre: Iterable[float], radius: float, offset: Iterable[float] = (0.0, 0.0)
) -> Thing:
    return Thing(kind, tuple(map(float, centre)), float(radius), tuple(map(float, offset)))
