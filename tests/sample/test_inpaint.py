"""Inpainting a file: what is kept is kept to the bit, what is white is new."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from sample import inpaint
from tests.compilations import PROGRAMS, compilations
from tests.sample.conftest import pixels, recorded

RANDOM = np.random.default_rng(0)
STEPS = ("--prompt", "x", "--steps", 2, "--resample-times", 2)


def files(folder, height, width, white):
    """An image of noise, and a mask that is white in (top, bottom, left, right)."""
    image, mask = folder / "image.png", folder / "mask.png"
    Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8)).save(image)
    top, bottom, left, right = white
    again = np.zeros((height, width), np.uint8)
    again[top:bottom, left:right] = 255
    Image.fromarray(again).save(mask)
    return ("--image", image, "--mask", mask), again > 0


@pytest.mark.parametrize("height, width", [(16, 16), (40, 70), (23, 9)])
def test_the_rest_keeps_its_pixels(run, command, tmp_path, height, width):
    """In files of the cascade's size, larger ones of another aspect, and smaller ones."""
    white = (height // 4, height // 2, width // 2, width - 2)
    arguments, again = files(tmp_path, height, width, white)
    command(run, *arguments, *STEPS, "--out", tmp_path / "out", name="inpaint")
    path = tmp_path / "out" / "x-0.png"
    found, before = pixels(path), pixels(tmp_path / "image.png")
    np.testing.assert_array_equal(found[~again], before[~again])
    assert np.abs(found - before)[again].mean() > 20
    recipe = recorded(path)
    assert recipe["image"] == "image.png" and recipe["size"] == [height, width]


def test_another_image_mask_or_number_compiles_nothing(run, command, tmp_path, caplog):
    first, _ = files(tmp_path, 16, 16, (4, 8, 4, 8))
    command(run, *first, *STEPS, "--out", tmp_path / "out", name="inpaint")
    other, _ = files(tmp_path, 30, 41, (0, 9, 20, 30))
    more = ("--prompt", "y", "--steps", 3, "--resample-times", 1, "--seed", 4, "--cond-scale", 5, 1)
    with compilations(caplog) as names:
        command(run, *other, *more, "--out", tmp_path / "out", name="inpaint")
    assert not PROGRAMS & set(names)


def test_the_cut_holds_the_mask():
    again = np.zeros((30, 100), bool)
    again[3:9, 85:97] = True
    assert inpaint.find_box(again, (16, 16)) == inpaint.Box(0, 70, 30, 30)
    again[:] = False
    again[0, 50] = True
    assert inpaint.find_box(again, (8, 16)) == inpaint.Box(0, 20, 30, 60)
    again[:, 10:60] = True
    with pytest.raises(UserError, match="50 pixels wide; the largest crop of 16 : 16 .* has 30"):
        inpaint.find_box(again, (16, 16))


def test_any_white_below_a_pixel_makes_it_new():
    again = np.zeros((64, 64), bool)
    again[21, 40] = True
    found = inpaint.scaled_mask(again, (16, 16))
    assert found.sum() == 1 and found[5, 10]


def test_mistakes(run, command, tmp_path):
    arguments, _ = files(tmp_path, 16, 16, (0, 0, 0, 0))

    def message(*more):
        with pytest.raises(UserError) as caught:
            command(run, *arguments, *STEPS, *more, "--out", tmp_path / "out", name="inpaint")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return str(caught.value)

    assert "mask.png has no white part: there is nothing to redraw" in message()
    Image.new("L", (16, 20), "white").save(tmp_path / "tall.png")
    assert "tall.png is 20 x 16 pixels (height x width), but " in message(
        "--mask", tmp_path / "tall.png"
    )
    (tmp_path / "empty.png").touch()
    assert "empty.png is empty" in message("--image", tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello")
    assert "text.png: corrupt picture: no known" in message("--image", tmp_path / "text.png")
    assert "none.png: No such file" in message("--mask", tmp_path / "none.png")
