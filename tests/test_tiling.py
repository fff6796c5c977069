"""Tiles cover, windows sum to one, and what agrees is blended to itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import streams, tiling
from imagen_jax.errors import UserError


@pytest.mark.parametrize("length", [7, 8, 13, 64, 101])
@pytest.mark.parametrize(("tile", "overlap"), [(7, 0), (7, 2), (7, 6), (4, 1)])
def test_positions_cover_an_axis_with_the_overlap(length, tile, overlap):
    starts = tiling.positions(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == length - tile
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= tile - overlap).all()
    assert len(starts) == max(1, -(-(length - overlap) // (tile - overlap))), "no more than needed"
    total = np.zeros(length)
    for start, window in zip(starts, tiling.windows(starts, tile, length), strict=True):
        total[start : start + tile] += window
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@pytest.mark.parametrize("size", [(5, 7), (23, 9), (6, 40)])
def test_cut_and_blended_again(size):
    """In any order, and after a nearest upsampling of every tile by 3."""
    image = np.random.default_rng(0).random((*size, 3), np.float32)
    padded = tiling.pad(image, (7, 8))
    tiles = tiling.make_tiles(padded.shape[:2], (7, 8), (2, 3))
    cut = tiling.cut(padded, tiles)
    assert len(cut) == len(tiles.origins)
    larger = [tile.repeat(3, 0).repeat(3, 1) for tile in cut]
    found = tiling.blend([*enumerate(larger)][::-1], tiles.scaled(3))
    wanted = padded.repeat(3, 0).repeat(3, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(padded[: size[0], : size[1]], image)


def test_tiles_that_cannot_be():
    with pytest.raises(UserError, match="smaller than a tile"):
        tiling.make_tiles((4, 9), (5, 5), (1, 1))
    with pytest.raises(UserError, match="overlap of 5 pixels must lie in 0 .. 4"):
        tiling.positions(9, 5, 5)


def test_tiles_share_the_noise_where_they_overlap():
    """The field is standard normal; another key has another one."""
    keys = streams.seed_keys([3, 3, 4])
    origins = jnp.array([[0, 0], [5, 9], [0, 0]])
    a, b, other = streams.normal_field(keys, origins, (64, 48, 3))
    np.testing.assert_array_equal(a[5:, 9:], b[:-5, :-9])
    assert abs(float(a.mean())) < 0.05 and abs(float(a.std()) - 1) < 0.05
    assert abs(float(jnp.corrcoef(a[1:].ravel(), a[:-1].ravel())[0, 1])) < 0.05
    assert abs(float(jnp.corrcoef(a.ravel(), other.ravel())[0, 1])) < 0.05


def test_spherical_interpolation():
    """Ends to the bit, the norm between them is theirs, equal rows stay."""
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 16, 16, 3))
    between = streams.spherical(a, b, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(between[0], a[0])
    np.testing.assert_array_equal(between[2], b[2])
    assert abs(float(between[1].std()) - 1) < 0.05
    np.testing.assert_allclose(streams.spherical(a, a, jnp.full(3, 0.3)), a, atol=1e-6)
