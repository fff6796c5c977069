"""Animations between prompts, and sheets of settings."""

import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.pipeline import Embeddings
from imagen_jax.streams import image_seeds
from sample import grid, interpolate
from tests.compilations import PROGRAMS, compilations
from tests.sample.conftest import pixels

PROMPTS = ("--prompt", "red apple", "--prompt", "a pear", "--steps", 3, 2)


def frames(path) -> list[np.ndarray]:
    with Image.open(path) as file:
        found = []
        for number in range(file.n_frames):
            file.seek(number)
            found.append(np.asarray(file.convert("RGB")).astype(int))
    return found


def test_an_animation_goes_from_one_prompt_to_the_next(run, command, tmp_path, capsys):
    """Its ends are the images of the prompts alone, and it moves in steps smaller than between
    them; other seeds and prompts compile nothing."""
    arguments = (*PROMPTS, "--frames", 9, "--format", "webp", "--save-frames", "--json")
    command(run, *arguments, "--out", tmp_path, name="interpolate")
    (line,) = capsys.readouterr().out.splitlines()
    recipe = json.loads(line)
    assert recipe["prompts"] == ["red apple", "a pear"] and recipe["seeds"] == image_seeds(0, 2)
    found = frames(recipe["file"])
    stills = sorted(tmp_path.glob("*-frame-*.png"), key=lambda path: int(path.stem.split("-")[-1]))
    assert len(found) == len(stills) == 9
    for frame, still in zip(found, stills, strict=True):
        np.testing.assert_array_equal(frame, pixels(still))
    for prompt, seed, end in zip(recipe["prompts"], recipe["seeds"], (0, -1), strict=True):
        out = tmp_path / str(end)
        command(run, "--prompt", prompt, "--seed", seed, *PROMPTS[4:], "--out", out)
        (path,) = out.iterdir()
        assert np.abs(pixels(path) - found[end]).max() <= 1
    steps = [np.abs(a - b).mean() for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) < np.abs(found[0] - found[-1]).mean()


def test_a_gif_and_nothing_compiled_again(run, command, tmp_path, caplog):
    few = ("--frames", 4, "--steps", 2, "--fps", 5)
    command(run, *PROMPTS[:4], *few, "--out", tmp_path, name="interpolate")
    with compilations(caplog) as names:
        other = ("--prompt", "b", "--prompt", "c", "--seed", 4)
        command(run, *other, *few, "--out", tmp_path, name="interpolate")
    assert not PROGRAMS & set(names)
    with Image.open(tmp_path / "red-apple-a-pear-0.gif") as file:
        assert (file.n_frames, file.info["duration"], file.info["loop"]) == (4, 200, 0)


def test_places_and_embeddings_between():
    before, mix = interpolate.places(3, 5)
    assert before.tolist() == [0, 0, 1, 1, 1] and mix.tolist() == [0, 0.5, 0, 0.5, 1]
    embeds = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((3, 2, 1), np.float32)
    masks = np.array([[True, False], [True, True], [True, False]])
    found = interpolate.between(Embeddings(embeds, masks), before, mix)
    assert found.embeds[:, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2]
    assert found.masks[:, 1].tolist() == [False, True, True, True, False]


def test_eta_is_of_the_cells_that_draw_with_ddim(tmp_path):
    given = dict(checkpoint=tmp_path, sampler=("ddim", "heun"), steps=(5, 10), eta=0.5)
    rows, _ = grid.axes(grid.Settings(**given))
    assert [grid.cell(grid.Settings(**given), row).eta for row in rows] == [0.5, 0]
    with pytest.raises(UserError, match=r"--eta 0.5 applies only to --sampler ddim"):
        grid.Settings(**given | dict(sampler=("heun",)))


def test_a_sheet_of_settings(run, command, tmp_path, caplog):
    """Numbers of two settings: three columns, two rows, one program for guided cells each stage."""
    few = ("--prompt", "x", "--cond-scale", 2, 5, "--steps", 1, 2, 3)
    command(run, *few, "--out", tmp_path, name="grid")
    with compilations(caplog) as names:
        command(run, *few, "--seed", 5, "--out", tmp_path, name="grid")
    assert not PROGRAMS & set(names)
    with Image.open(tmp_path / "x-0.png") as sheet:
        recipe = json.loads(sheet.text["imagen_jax"])
        assert sheet.width > 3 * 128 and sheet.height > 2 * 128
    assert recipe["rows"] == [{"cond_scale": 2.0}, {"cond_scale": 5.0}]
    assert recipe["columns"] == [{"steps": 1}, {"steps": 2}, {"steps": 3}]
    assert np.abs(pixels(tmp_path / "x-0.png") - pixels(tmp_path / "x-5.png")).mean() > 1


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("interpolate", ("--prompt", "a"), "give two or more"),
        ("interpolate", (*PROMPTS, "--frames", 1), "--frames 1: must be at least 2"),
        ("interpolate", (*PROMPTS, "--c2pa", "a", "b"), "--c2pa a: No such file"),
        ("grid", ("--prompt", "a"), "one or two of --sampler, --cond-scale, --steps must have"),
        (
            "grid",
            ("--prompt", "a", "--prompt", "b", "--steps", 1, 2),
            "give one text for all cells, not 2",
        ),
    ],
)
def test_mistakes(run, command, tmp_path, name, arguments, message):
    with pytest.raises(UserError, match=message):
        command(run, *arguments, "--out", tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()
