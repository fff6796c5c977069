"""Decoding: every kind of picture ends as the right pixels, or as one line that says why not."""

import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import decode, grid, labelled_grid, to_pil, to_uint8


def encode(picture: Image.Image, kind: str = "png", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def flat(mode: str, colour, size=(10, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


TRANSPARENT_PALETTE = flat("P", 1)
TRANSPARENT_PALETTE.putpalette([0, 0, 0, 200, 100, 50])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(flat("RGB", (200, 100, 50))), (200, 100, 50)),
        (encode(flat("RGBA", (255, 0, 0, 0))), (255, 255, 255)),
        (encode(flat("RGBA", (0, 0, 0, 51))), (204, 204, 204)),
        (encode(flat("LA", (0, 51))), (204, 204, 204)),
        (encode(TRANSPARENT_PALETTE), (200, 100, 50)),
        (encode(TRANSPARENT_PALETTE, transparency=1), (255, 255, 255)),
        (encode(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        (encode(flat("L", 77)), (77, 77, 77)),
        (encode(flat("1", 1)), (255, 255, 255)),
        (encode(flat("I;16", 257 * 90)), (90, 90, 90)),
        (encode(flat("CMYK", (0, 255, 255, 0)), "tiff"), (255, 0, 0)),
        (encode(flat("RGB", (9, 9, 9)), "bmp"), (9, 9, 9)),
    ],
    ids="rgb alpha half grey-alpha palette palette-alpha key grey bit 16-bit cmyk bmp".split(),
)
def test_every_mode_becomes_rgb(data, expected):
    image = decode(data, image_size=4)
    assert image.shape == (4, 4, 3)
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), (4, 4, 3)))


def test_one_and_four_channels():
    half = encode(flat("RGBA", (10, 20, 30, 128)))
    np.testing.assert_array_equal(
        decode(half, image_size=8, channels=4)[0, 0], np.uint8((10, 20, 30, 128))
    )
    assert decode(encode(flat("L", 77)), image_size=8, channels=1)[0, 0, 0] == 77
    assert decode(encode(flat("RGBA", (0, 0, 0, 0))), image_size=8, channels=1)[0, 0, 0] == 255
    np.testing.assert_array_equal(
        decode(encode(flat("L", 77)), image_size=8, channels=4)[0, 0], np.uint8((77, 77, 77, 255))
    )


def test_exif_orientation_is_applied():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: bright on the right
    image = decode(encode(Image.fromarray(pixels), exif=exif), image_size=8)
    np.testing.assert_array_equal(image, np.rot90(pixels, -1))


def test_the_centre_is_cut_and_shrinking_antialiases():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    np.testing.assert_array_equal(decode(encode(Image.fromarray(wide)), image_size=8), 200)
    checks = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    small = decode(encode(Image.fromarray(checks)), image_size=8, channels=1)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127.5).max() < 6


def test_large_jpeg_is_decoded_reduced_but_alike():
    y, x = np.mgrid[:512, :512]
    smooth = np.stack([x / 2, y / 2, (x + y) / 4], -1).astype(np.uint8)
    image = decode(encode(Image.fromarray(smooth), "jpeg", quality=95), image_size=32)
    exact = decode(smooth, image_size=32)
    assert np.abs(image.astype(int) - exact).mean() < 2


def test_pixels_are_accepted_as_they_are():
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    np.testing.assert_array_equal(decode(pixels, image_size=8), pixels)
    np.testing.assert_array_equal(
        decode(pixels[..., :1], image_size=8, channels=1), pixels[..., :1]
    )


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (b"no picture", 3, "corrupt picture: no known format"),
        (b"", 3, "corrupt picture"),
        (encode(flat("RGB", 0, (64, 64)), "jpeg")[:-40], 3, "corrupt picture"),
        (encode(Image.effect_noise((64, 64), 90))[:-900], 3, "corrupt picture"),
        (encode(flat("RGB", 0, (40, 5))), 3, "picture of 40x5 pixels is smaller than 8"),
        (encode(flat("F", 0.5), "tiff"), 3, "mode F have no fixed range"),
        (encode(flat("RGB", 0)), 2, "channels must be 1, 3 or 4, got 2"),
        (np.zeros((9, 9, 2), np.uint8), 3, "1, 3 or 4 channels, got 2"),
        (np.zeros((9, 9, 3), np.float32), 3, "must be uint8"),
    ],
)
def test_what_cannot_be_used_says_so_in_one_line(data, channels, message):
    with pytest.raises(ValueError, match=message) as caught:
        decode(data, image_size=8, channels=channels)
    assert "\n" not in str(caught.value)


def test_floats_round_trip_through_uint8():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / np.float32(255)), levels)
    np.testing.assert_array_equal(to_uint8(np.float32([-1, 2])), np.uint8([0, 255]))
    assert to_pil(np.zeros((3, 5, 1))).size == (5, 3)


def test_grid_holds_every_picture_at_its_place():
    images = np.stack([np.full((5, 7, 3), 40 * (i + 1), np.uint8) for i in range(5)])
    page = np.asarray(grid(images, columns=3))
    assert page.shape == (2 * 5 + 4, 3 * 7 + 2 * 4, 3)
    for i in range(5):
        top, left = i // 3 * 9, i % 3 * 11
        np.testing.assert_array_equal(page[top : top + 5, left : left + 7], images[i])
    assert (page[9:, 22:] == 255).all()
    np.testing.assert_array_equal(page, np.asarray(grid(images / np.float32(255), columns=3)))


def test_labelled_grid_shows_pictures_by_nearest_neighbour_and_wraps_captions():
    checks = np.kron([[1, 0], [0, 1]], np.ones((1, 1)))[..., None] * np.ones(3)
    rows = [
        ("shown", [checks, to_pil(checks)], ["a short one", "one " * 12]),
        ("new", [checks], []),
    ]
    page = np.asarray(labelled_grid(rows, cell=32))
    tile = to_uint8(np.kron(checks[..., 0], np.ones((16, 16))))
    places = np.lib.stride_tricks.sliding_window_view(page[..., 0], (32, 32))
    assert (places == tile).all((-1, -2)).sum() == 3
    taller = labelled_grid(rows, cell=32, columns=1)
    assert taller.height > page.shape[0] and taller.width < page.shape[1]
    with pytest.raises(ValueError, match="'shown': 1 captions for 2 pictures"):
        labelled_grid([("shown", [checks, checks], ["one"])])
