"""Large images as overlapping tiles: where they are, and the windows that blend them.

Each axis has its own tiles; windows over them sum to one at every pixel, so that tiles that agree
blend to exactly what they agree on:

    image = sum over tiles of window x tile,    sum of the windows = 1                       (1)

A window is a raised cosine over its tile, sin^2(pi (i + 1/2) / n), divided by the sum of all: it
vanishes smoothly at the tile's border, where a network sees least of the surroundings.

The network is applied to tiles of one large sample, and its outputs are blended at every step
(MultiDiffusion, Bar-Tal et al. 2023), in tiled.py. Blending finished tiles is cheaper to compile,
and was measured first: on the demo cascade, tiles that shared all noise still differed by 54 of 255
levels where they overlapped, and bands of colour were clearly visible. Blending at every step gives
one trajectory, one noise and one dynamic threshold.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from imagen_jax.errors import UserError
from imagen_jax.types import Size


class Tiles(NamedTuple):
    """Tiles of one size over an image: a row of the grid for each of `tops`, a column for each of
    `lefts`."""

    image: Size
    tile: Size
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def origins(self) -> Shaped[np.ndarray, "n 2"]:
        """Row and column of each tile's first pixel, row by row."""
        return np.array([(top, left) for top in self.tops for left in self.lefts], np.int32)

    def scaled(self, factor: int) -> "Tiles":
        """The same tiles over an image that is `factor` times larger."""

        def times(numbers: Sequence[int]) -> tuple[int, ...]:
            return tuple(factor * number for number in numbers)

        return Tiles(times(self.image), times(self.tile), times(self.tops), times(self.lefts))


def make_tiles(image: Size, tile: Size, overlap: Size) -> Tiles:
    """Tiles that cover an image and overlap by at least `overlap`.

    All sizes are (height, width). Raises UserError for an image smaller than a tile.
    """
    if image[0] < tile[0] or image[1] < tile[1]:
        raise UserError(f"an image of {image} is smaller than a tile of {tile}: pad it first.")
    return Tiles(
        image, tile, *(positions(*axis) for axis in zip(image, tile, overlap, strict=True))
    )


def positions(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """First pixels of the tiles along one axis: the fewest that overlap enough, evenly spaced."""
    if not 0 <= overlap < tile:
        raise UserError(f"an overlap of {overlap} pixels must lie in 0 .. {tile - 1}.")
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    # Rounded down: two neighbours are then never farther apart than the mean distance, rounded up.
    return tuple(i * (length - tile) // max(count - 1, 1) for i in range(count))


def windows(starts: Sequence[int], tile: int, length: int) -> Float[np.ndarray, "n tile"]:
    """The windows of one axis; they sum to one at every pixel (1)."""
    cosine = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + tile] += cosine
    return np.stack([cosine / total[start : start + tile] for start in starts])


def pad(image: Shaped[np.ndarray, "h w c"], least: Size) -> Shaped[np.ndarray, "h2 w2 c"]:
    """The image padded by reflection, below and to the right, to at least (height, width)."""
    missing = (max(0, wanted - has) for wanted, has in zip(least, image.shape[:2], strict=True))
    return np.pad(image, [*((0, more) for more in missing), (0, 0)], mode="reflect")
