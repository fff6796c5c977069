"""Decoding: every kind of image becomes the right pixels, or one line that says why not."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile

from imagen_jax.data import check, decode, labelled_grid
from imagen_jax.data.records import stored_size
from imagen_jax.errors import UserError
from imagen_jax.pixels import to_pil, to_uint8


def encode(picture: Image.Image, kind: str = "png", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def flat(mode: str, colour, size=(10, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def claims(height: int, width: int) -> bytes:
    """A small PNG whose header says that it has this size."""
    data = bytearray(encode(flat("L", 0)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_a_header_says_too_much():
    """Also where the size alone is asked for, as by --where and --buckets: nothing is decoded."""
    assert stored_size(claims(30, 20)) == (30, 20)
    for read in (stored_size, functools.partial(decode, image_size=4)):
        with pytest.raises(UserError, match="too large: at most 178,956,970 pixels are read"):
            read(claims(20_000, 20_000))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_stored_size_is_the_upright_one(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(flat("RGB", 0, (12, 8)), kind, exif=exif)
    assert stored_size(data) == ((12, 8) if orientation == 6 else (8, 12))
    assert decode(data, image_size=stored_size(data)).shape[:2] == stored_size(data)


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
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: bright on the right
    image = decode(encode(Image.fromarray(pixels), exif=exif), image_size=8)
    np.testing.assert_array_equal(image, np.rot90(pixels, -1))


def test_the_centre_is_cropped_and_shrinking_antialiases():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    np.testing.assert_array_equal(decode(encode(Image.fromarray(wide)), image_size=8), 200)
    checks = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    small = decode(encode(Image.fromarray(checks)), image_size=8, channels=1)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127.5).max() < 6


def box(image: np.ndarray) -> tuple[int, int, int, int]:
    """top, bottom, left, right of what is darker than grey."""
    rows, columns = np.nonzero(image.mean(-1) < 128)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (120, 120), (100, 60)], ids=str)
@pytest.mark.parametrize("target", [(24, 40), (40, 24)], ids=str)
def test_an_image_of_any_aspect_is_cropped_at_the_centre_undistorted(size, target):
    """A circle in the middle stays a circle, scaled like the axis that limits the crop."""
    picture = Image.new("RGB", size, "white")
    (x, y), radius = (size[0] / 2, size[1] / 2), 15
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill="black")
    image = decode(encode(picture), image_size=target)
    assert image.shape == (*target, 3)
    top, bottom, left, right = box(image)
    diameter = 2 * radius * max(target[0] / size[1], target[1] / size[0])
    assert abs((bottom - top) - (right - left)) <= 1 and abs(bottom - top - diameter) <= 1.5
    assert abs(top - (target[0] - bottom)) <= 1 and abs(left - (target[1] - right)) <= 1


def test_the_crop_keeps_all_of_the_axis_that_limits_it():
    """Without resizing the crop is exact: (24, 40) out of 24x60 and out of 50x40."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    np.testing.assert_array_equal(decode(pixels[:24], image_size=(24, 40)), pixels[:24, 10:50])
    np.testing.assert_array_equal(decode(pixels[:, :40], image_size=(24, 40)), pixels[13:37, :40])


def test_one_integer_means_a_square():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 61, 3), np.uint8)
    np.testing.assert_array_equal(
        decode(pixels, image_size=24), decode(pixels, image_size=(24, 24))
    )


@pytest.mark.parametrize(("height", "width"), [(23, 100), (100, 39), (40, 24)])
def test_an_image_smaller_in_one_axis_is_refused_with_its_size(height, width):
    message = f"smaller than 24x40 pixels (height x width): {height}x{width}"
    for data in (encode(flat("RGB", 0, (width, height)), kind) for kind in ("png", "jpeg")):
        with pytest.raises(ValueError) as caught:
            decode(data, image_size=(24, 40))
        assert str(caught.value) == message


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 127 * (x + y) / width], -1).astype(np.uint8)


def test_large_jpeg_is_decoded_reduced_but_alike():
    image = decode(encode(Image.fromarray(smooth(512, 512)), "jpeg", quality=95), image_size=32)
    exact = decode(smooth(512, 512), image_size=32)
    assert np.abs(image.astype(int) - exact).mean() < 2


@pytest.mark.parametrize("kind", ["jpeg", "tiff", "png"])
@pytest.mark.parametrize("target", [(32, 64), (64, 32)], ids=str)
def test_the_orientation_precedes_the_size(kind, target, monkeypatch):
    """A file stored on its side is measured upright; a JPEG is reduced as far as twice allows."""
    upright = smooth(256, 512) if target == (32, 64) else smooth(512, 256)
    reduced = []

    def draft(self, mode, size, original=JpegImageFile.draft):
        original(self, mode, size)
        reduced.append(self.size)

    monkeypatch.setattr(JpegImageFile, "draft", draft)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees counter-clockwise
    data = encode(Image.fromarray(np.rot90(upright).copy()), kind, exif=exif)
    image = decode(data, image_size=target)
    assert np.abs(image.astype(int) - decode(upright, image_size=target)).mean() < 2
    assert reduced == ([(2 * target[0], 2 * target[1])] if kind == "jpeg" else [])
    with pytest.raises(ValueError, match="^smaller than"):
        decode(data, image_size=upright.shape[1::-1])
    check(data, image_size=upright.shape[:2])
    with pytest.raises(ValueError, match="^smaller than"):
        check(data, image_size=upright.shape[1::-1])


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
        (claims(40_000, 40_000), 3, "too large: at most 178,956,970 pixels are read"),
        (encode(flat("RGB", 0, (40, 5))), 3, "smaller than 8x8 pixels .*: 5x40"),
        (encode(flat("F", 0.5), "tiff"), 3, "mode F have no fixed range"),
        (encode(flat("RGB", 0)), 2, "channels must be 1, 3 or 4, got 2"),
        (np.zeros((9, 9, 2), np.uint8), 3, "c = 1, 3 or 4, got"),
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
    grey = to_pil(np.full((3, 5, 1), 0.5))
    assert (grey.size, grey.mode, grey.getpixel((0, 0))) == ((5, 3), "L", 128)


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


@pytest.mark.parametrize(("size", "shown"), [((16, 32), (32, 64)), ((32, 16), (64, 32))], ids=str)
def test_labelled_grid_keeps_the_aspect(size, shown):
    """Every pixel becomes a square of 2x2; a row is no higher than its tallest picture."""
    picture = np.random.default_rng(0).integers(0, 200, (*size, 3), np.uint8)
    page = labelled_grid([("", [picture] * 2, ["one", "two"])], cell=64)
    tile = picture[..., 0].repeat(2, axis=0).repeat(2, axis=1)
    assert tile.shape == shown
    places = np.lib.stride_tricks.sliding_window_view(np.asarray(page)[..., 0], shown)
    assert (places == tile).all((-1, -2)).sum() == 2
    square = labelled_grid([("", [picture[:16, :16]] * 2, ["one", "two"])], cell=64)
    assert page.width == square.width and square.height - page.height == 64 - shown[0]
