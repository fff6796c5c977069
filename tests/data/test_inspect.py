"""`python -m imagen_jax.data.inspect`: what it counts, on a folder with some of everything."""

import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data import inspect
from imagen_jax.errors import UserError


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
    inspect.main()


def test_what_is_in_a_folder(tmp_path, monkeypatch, capsys):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    sizes = {"tall": (40, 20), "wide": (20, 40), "square": (32, 32), "small": (8, 8)}
    for name, (height, width) in sizes.items():
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(f"a {name} picture")
    (data / "again.png").write_bytes((data / "square.png").read_bytes())
    (data / "again.txt").write_text("a square picture")
    Image.new("RGB", (32, 32)).save(data / "nameless.png")
    (data / "cut.png").write_bytes((data / "tall.png").read_bytes()[:300])
    (data / "cut.txt").write_text("cut off")
    (data / "drawing.svg").write_text("<svg/>")
    out = tmp_path / "sheet.png"
    run(monkeypatch, data, "--sizes", 16, "--out", out, "--heldout-fraction", 0)
    printed = capsys.readouterr().out
    for line in (
        "7 records, 0 held out",
        "left out: 1 a .svg file, which is not read",
        "smaller than 16: 1",
        "without caption 1",
        "duplicates      1 images, byte for byte; 1 captions",
        "unreadable      1",
        "cut.png: corrupt picture",
    ):
        assert line in printed, printed
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["records"] == 7
    with Image.open(out) as sheet:
        assert sheet.width >= 5 * inspect.CELL


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "name a source"),
        (("bundled", "--sizes", 0), "--sizes must be positive"),
        (("bundled", "--out", "sheet"), "--out sheet: give the name of an image file"),
        (("bundled", "--out", "nowhere/sheet.png"), "its folder does not exist"),
    ],
)
def test_mistakes(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)
