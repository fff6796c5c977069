"""Tiles cover, windows sum to one, and what agrees is blended to itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import streams, tiling
from imagen_jax.errors import UserError
from imagen_jax.tiled import Tiled


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


@pytest.mark.parametrize(("size", "batch"), [((5, 7), 1), ((23, 9), 4), ((6, 40), 3)])
def test_a_network_of_pixels_alone_is_not_changed_by_tiles(size, batch):
    """Over two rows, with an image of conditioning beside x; a network that sees its tile is."""
    x, lowres = np.random.default_rng(0).random((2, 2, *size, 3), np.float32)
    x, lowres = (jnp.stack([tiling.pad(row, (7, 8)) for row in rows]) for rows in (x, lowres))
    tiles = tiling.make_tiles(x.shape[1:3], (7, 8), (2, 3))

    def network(x, time, *, lowres_cond_img, text_cond, lowres_noise_times, key):
        return x * time[:, None, None, None] - lowres_cond_img + text_cond[:, None, None, :]

    time, text = jnp.array([0.5, 2.0]), jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    given = dict(text_cond=text, lowres_cond_img=lowres)
    wanted = network(x, time, lowres_noise_times=None, key=None, **given)
    found = Tiled(network, tiles, batch)(x, time, **given)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_padding_reflects():
    image = np.arange(12.0).reshape(2, 6, 1)
    padded = tiling.pad(image, (5, 6))[..., 0]
    np.testing.assert_array_equal(padded[:, 0], [0, 6, 0, 6, 0])


def test_tiles_that_cannot_be():
    with pytest.raises(UserError, match="smaller than a tile"):
        tiling.make_tiles((4, 9), (5, 5), (1, 1))
    with pytest.raises(UserError, match="overlap of 5 pixels must lie in 0 .. 4"):
        tiling.positions(9, 5, 5)


def test_spherical_interpolation():
    """Ends to the bit, the norm between them is theirs, equal rows stay."""
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 16, 16, 3))
    between = streams.spherical(a, b, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(between[0], a[0])
    np.testing.assert_array_equal(between[2], b[2])
    assert abs(float(between[1].std()) - 1) < 0.05
    np.testing.assert_allclose(streams.spherical(a, a, jnp.full(3, 0.3)), a, atol=1e-6)
