"""Does an image show what its caption says? A checker for the captions of `data.scenes`.

    found = find(image)                    # the objects: colour, shape, place, size
    verdict = judge(scene.content, found)  # which parts of the caption are right

Colours first: each pixel is white, partly covered by one of the six colours, the one with the least
squared error. An object is a connected region of pixels that its colour covers by more than half;
its holes are searched in the same way, with the object's colour as the background. Then shapes: an
object has the one of the five shapes that, drawn with the same centre and area, overlaps it most
(by the intersection over union of how much of each pixel is covered). An object that resembles none
of them has no shape. Reliable from 32 pixels on; at 16 small stars and crosses look alike.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from imagen_jax.data.scenes import (
    COLOURS,
    LARGE,
    RELATIONS,
    SHAPES,
    SMALL,
    Content,
    Kind,
    outside,
)

WORKED_AT = 64  # pixels along the shorter side, at most: larger images are downsampled
BLUR = 0.5  # standard deviation of the blur that smooths noise, in pixels
# Standard deviations of the blur of shapes that objects are compared with: sharp, and soft images.
BLURS = (0.5, 0.9)
LEAST_AREA = 0.006  # of a region, relative to the shorter side squared: half the smallest object's
LEAST_OVERLAP = 0.75  # with the shape that an object has
WHITE = np.ones(3, np.float32)
PALETTE = {name: np.array(colour, np.float32) / 255 for name, colour in COLOURS.items()}


class Found(NamedTuple):
    """One object of an image. Lengths are in units of the image's shorter side.

    `shape` is None if none of the shapes resembles it; `overlap` is that with the best one.
    `radius` is that of the circle around a shape of its area. `mask` has its pixels, with holes
    filled.
    """

    colour: str
    shape: str | None
    centre: tuple[float, float]
    radius: float
    overlap: float
    mask: Bool[np.ndarray, "h w"]

    @property
    def kind(self) -> Kind:
        return Kind(self.colour, self.shape)


class Verdict(NamedTuple):
    """Which parts of a caption an image shows. None: the caption does not mention it.

    `objects` is the share of the objects whose shape is there, `attributes` of those whose shape is
    there in its colour; `count` is whether there are as many objects as the caption names. The
    `relation` is judged between the objects of the two colours, whatever their shapes. `right` is
    for the complete caption: no object is missing, wrong or extra, and all that it says is true;
    `bound` is the same without what it says about sizes and places.
    """

    objects: float
    attributes: float
    count: bool
    relation: bool | None
    size: bool | None
    place: bool | None
    bound: bool
    right: bool


def find(image: Float[np.ndarray, "h w 3"]) -> list[Found]:
    """The objects in an image in [0, 1], on white and on each other, the largest first."""
    height, width = image.shape[:2]
    scale = min(1.0, WORKED_AT / min(height, width))
    size = round(width * scale), round(height * scale)
    channels = np.moveaxis(np.asarray(image, np.float32), -1, 0)
    channels = [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BOX)) for c in channels]
    smooth = np.stack([ndimage.gaussian_filter(c, BLUR) for c in channels], axis=-1)
    everywhere = np.ones(smooth.shape[:2], bool)
    return sorted(_on(WHITE, smooth, everywhere), key=lambda one: -one.mask.sum())


def judge(content: Content, found: Sequence[Found]) -> Verdict:
    """Which parts of `content` the objects of an image show."""
    wanted = [content.kind] * content.count + [content.other] * (content.other is not None)
    shapes = Counter(one.shape for one in found) & Counter(kind.shape for kind in wanted)
    kinds = Counter(one.kind for one in found) & Counter(wanted)
    attributes = kinds.total() / len(wanted)
    count = len(found) == len(wanted)
    relation = None
    if content.relation is not None:
        relation = _related(content, found)
    size, place = _sized(content, found), _placed(content, found)
    bound = count and attributes == 1 and relation is not False
    return Verdict(
        objects=shapes.total() / len(wanted),
        attributes=attributes,
        count=count,
        relation=relation,
        size=size,
        place=place,
        bound=bound,
        right=bound and size is not False and place is not False,
    )


def _on(
    background: Float[np.ndarray, "3"],
    image: Float[np.ndarray, "h w 3"],
    where: Bool[np.ndarray, "h w"],
) -> list[Found]:
    """The objects within `where` on a background of one colour, and those on each of them.

    Each pixel there is the background, partly covered by one colour: that with the least error.
    """
    others = [name for name, colour in PALETTE.items() if np.any(colour != background)]
    change = np.stack([PALETTE[name] - background for name in others])
    cover = np.clip((image - background) @ change.T / (change * change).sum(1), 0, 1)
    error = ((image[..., None, :] - background - cover[..., None] * change) ** 2).sum(-1)
    best = np.where(where, error.argmin(-1), -1)
    regions = []
    for number, colour in enumerate(others):
        labels, count = ndimage.label((best == number) & (cover[..., number] > 0.5))
        for label in range(1, count + 1):
            region = labels == label
            regions.append((colour, cover[..., number], region, ndimage.binary_fill_holes(region)))
    least = LEAST_AREA * min(image.shape[:2]) ** 2
    found, taken = [], np.zeros(where.shape, bool)
    for colour, covered, region, filled in sorted(regions, key=lambda one: -one[3].sum()):
        if filled.sum() < least or (filled & taken).any():
            continue
        taken |= filled
        hole = filled & ~region
        if hole.sum() >= least:
            inside = ndimage.binary_dilation(hole, np.ones((3, 3)), 2) & filled
            found += _on(PALETTE[colour], image, inside)
        mine = ndimage.binary_dilation(filled, np.ones((3, 3)), 2) & where
        mine &= filled | ~np.any([one[2] for one in regions], axis=0)
        solid = filled & ndimage.binary_dilation(hole, np.ones((3, 3)), 2)
        found.append(_describe(colour, np.where(solid, 1, covered * mine), mine, filled))
    return found


def _describe(
    colour: str,
    cover: Float[np.ndarray, "h w"],
    support: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
) -> Found:
    """An object from how much of each pixel it covers: its area is accurate to below a pixel."""
    short = min(cover.shape)
    y, x = ndimage.center_of_mass(cover)
    down, along = (np.arange(n) - centre for n, centre in zip(cover.shape, (y, x), strict=True))
    overlaps = {}
    for shape in SHAPES:
        distance = outside(shape, down[:, None], along[None], math.sqrt(cover.sum() / area(shape)))
        drawn = np.clip(0.5 - distance, 0, 1)
        for blur in BLURS:
            other = ndimage.gaussian_filter(drawn, blur) * support
            overlap = np.minimum(cover, other).sum() / np.maximum(cover, other).sum()
            overlaps[shape] = max(overlaps.get(shape, 0.0), float(overlap))
    best = max(overlaps, key=overlaps.get)
    return Found(
        colour=colour,
        shape=best if overlaps[best] >= LEAST_OVERLAP else None,
        centre=((y + 0.5) / short, (x + 0.5) / short),
        radius=math.sqrt(cover.sum() / area(best)) / short,
        overlap=overlaps[best],
        mask=mask,
    )


@functools.cache
def area(shape: str) -> float:
    """Area of a shape whose surrounding circle has radius 1."""
    axis = (np.arange(400) + 0.5) / 200 - 1
    return 4 * float((outside(shape, axis[:, None], axis[None], 1.0) < 0).mean())


def _related(content: Content, found: Sequence[Found]) -> bool:
    """Whether the largest objects of the two colours are as the relation says."""
    first, other = (
        next((one for one in found if one.colour == kind.colour), None)
        for kind in (content.kind, content.other)
    )
    if first is None or other is None:
        return False
    if content.relation == "inside":
        return bool((first.mask & other.mask).sum() > 0.9 * first.mask.sum())
    down, along = (b - a for a, b in zip(first.centre, other.centre, strict=True))
    return bool(down > abs(along) if content.relation == "above" else along > abs(down))


def _sized(content: Content, found: Sequence[Found]) -> bool | None:
    """Whether the objects of the colours for which the caption names a size have it."""
    sizes = {content.kind.colour: content.size}
    if content.other is not None:
        sizes[content.other.colour] = content.other_size
    if not any(sizes.values()):
        return None
    radii = {"small": (0, SMALL * 1.1), "large": (LARGE * 0.9, 1), None: (0, 1)}
    ranges = [(radii[sizes.get(one.colour)], one.radius) for one in found]
    return bool(found) and all(low <= radius <= high for (low, high), radius in ranges)


def _placed(content: Content, found: Sequence[Found]) -> bool | None:
    """Whether all objects are at the place, in the part of the image that it names."""
    if content.place is None:
        return None
    axis = int(content.place in ("left", "right"))
    for one in found:
        size = one.mask.shape
        share = [c * min(size) / n for c, n in zip(one.centre, size, strict=True)]
        part = share[axis] if content.place in ("top", "left") else 1 - share[axis]
        middle = all(1 / 3 < part < 2 / 3 for part in share)
        if not (middle if content.place == "middle" else part < 0.4):
            return False
    return bool(found)


class Share(NamedTuple):
    """The share of `count` that is right, with its 95 % interval (Wilson)."""

    share: int | float
    low: float
    high: float
    count: int


def verdicts(contents: Sequence[Content], images: Float[np.ndarray, "n h w 3"]) -> list[Verdict]:
    """Which parts of its caption each image shows."""
    return [judge(content, find(image)) for content, image in zip(contents, images, strict=True)]


def summary(contents: Sequence[Content], verdicts: Sequence[Verdict]) -> dict[str, Share]:
    """The verdicts on a set of images, by the fields of `Verdict`: for `objects` and `attributes`
    the share of all objects, for the others that of the images whose captions mention it."""
    shares = {}
    for field in Verdict._fields:
        values = [getattr(verdict, field) for verdict in verdicts]
        if field in ("objects", "attributes"):
            weights = [one.count + (one.other is not None) for one in contents]
        else:
            weights = [int(value is not None) for value in values]
        right = sum(w * v for w, v in zip(weights, values, strict=True) if w)
        count = sum(weights)
        shares[field] = Share(right / max(count, 1), *wilson(right, count), count)
    return shares


def by_relation(
    contents: Sequence[Content], verdicts: Sequence[Verdict]
) -> dict[str, dict[str, Share]]:
    """The summary for each relation that the captions name."""
    parts: dict[str, list[tuple[Content, Verdict]]] = {}
    for content, verdict in zip(contents, verdicts, strict=True):
        if content.relation is not None:
            parts.setdefault(content.relation, []).append((content, verdict))
    return {
        relation: summary(*zip(*parts[relation], strict=True))
        for relation in RELATIONS
        if relation in parts
    }


def wilson(right: int | float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The confidence interval of a share (Wilson 1927), by default that of 95 %."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, z * z / count
    middle = share + z2 / 2
    half = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4)
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)
