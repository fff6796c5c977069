"""Variations of a file."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from tests.compilations import PROGRAMS, compilations
from tests.sample.conftest import pixels, recorded


def test_strength(run, command, tmp_path, caplog):
    """The stronger, the further from the file, with one compiled program; a stage larger than the
    file draws freely."""
    gradient = np.tile(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "large.png")
    Image.fromarray(gradient[8:20, 8:20]).save(tmp_path / "small.png")
    start = np.asarray(
        Image.open(tmp_path / "large.png").resize((24, 16), Image.Resampling.BICUBIC)
    )[:, 4:20].astype(int)
    distances, compiled = [], []
    for strength in (0.1, 0.5, 1.0):
        out = tmp_path / str(strength)
        with compilations(caplog) as names:
            command(
                run, "--image", tmp_path / "large.png", "--prompt", "x", "--strength", strength,
                "--seed", int(10 * strength), "--steps", 10, "--out", out, name="image_to_image",
            )  # fmt: skip
        compiled.append(PROGRAMS & set(names))
        (path,) = out.glob("x-*.png")
        found = pixels(path)
        assert found.shape == (16, 16, 3) and recorded(path)["strength"] == strength
        distances.append(np.abs(found - start).mean())
    assert compiled[1:] == [set(), set()]
    assert distances[0] < distances[1] < distances[2]
    command(
        run, "--image", tmp_path / "small.png", "--prompt", "x", "--steps", 3,
        "--num-images-per-prompt", 2, "--out", tmp_path / "small", name="image_to_image",
    )  # fmt: skip
    assert len([*(tmp_path / "small").iterdir()]) == 3


def test_mistakes(run, command, tmp_path):
    def message(image, *more):
        with pytest.raises(UserError) as caught:
            command(run, "--image", image, "--prompt", "x", *more, name="image_to_image")
        return str(caught.value)

    Image.new("RGB", (7, 30)).save(tmp_path / "thin.png")
    assert "thin.png: smaller than 8x8 pixels (height x width): 30x7" in message(
        tmp_path / "thin.png"
    )
    assert "none.png: No such file" in message(tmp_path / "none.png")
    wanted = "--strength 0 must be above 0 and at most 1"
    assert wanted in message(tmp_path / "thin.png", "--strength", 0)
