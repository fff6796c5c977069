"""`python -m sample.text_to_image` as a user runs it, on a tiny cascade with random weights."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

import commands
import imagen_jax
from imagen_jax import checkpoint, nn
from imagen_jax.config import NullUnetConfig
from imagen_jax.diffusion.samplers import make_grid
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Pipeline
from imagen_jax.pixels import to_pil
from imagen_jax.presets import PRESETS
from imagen_jax.streams import image_seeds
from sample import outputs, text_to_image
from tests.sample.conftest import cascade, pixels, recorded, save_run

ROOT = Path(__file__).parents[2]
FEW = ("--steps", "3", "2")
BASE = ("--stop-at-unet-number", "base", "--steps", "3")


def named(slug: str, place: int = 0, seed: int = 0) -> str:
    """The file of the image at a place of a command."""
    return f"{slug}-{image_seeds(seed, place + 1)[place]}.png"


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_as_a_user_runs_it(run, tmp_path):
    """Pictures, what stands in them, the grid, the demo encoder's note; no warning anywhere."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    words = ["--checkpoint", str(run), "--prompt", "A red apple!", "--prompt", "zwei Äpfel", *FEW]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sample.text_to_image", *words],
        cwd=ROOT,
        env=os.environ | cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = run / "samples" / "text_to_image"
    for number in (1, 2):
        note = f"has no averaged weights (ema) for U-Net {number}: its online weights are used."
        assert done.stdout.count(note) == 1
    assert "demo encoder" in done.stdout and f"2 images in {folder}" in done.stdout
    assert "1-2 of 2, U-Net 1:" in done.stderr and "3/3" in done.stderr
    names = [named("a-red-apple"), named("zwei-äpfel", 1)]
    assert set(written(folder)) == {*names, "grid-0.png"}
    for index, prompt in enumerate(("A red apple!", "zwei Äpfel")):
        with Image.open(folder / names[index]) as picture:
            assert (picture.size, picture.mode) == ((16, 16), "RGB")
            first, last = picture.text["parameters"].split("\n")
        assert first == prompt and last.startswith("Steps: 3, Sampler: dpm++2m, CFG scale: 3.0, Se")
        assert "Size: 16x16, Model hash: " in last
        made = recorded(folder / names[index])
        assert made["seed"] == image_seeds(0, 2)[index] and made["prompt"] == prompt
        assert made["weights"] == dict(unet1="online", unet2="online")
        assert made["checkpoint_steps"] == {"unet1": 7, "unet2": 7}
        assert made["timesteps"] == [3, 2] and made["cond_scale"] == [3, 1]
        assert made["version"] and made["text_encoder_name"] == "demo"
    grid = pixels(folder / "grid-0.png")
    assert grid.shape[1] > 2 * 128 and (grid.min(-1) == 0).any(), "two cells, black letters"


def test_the_seed_decides(run, command, tmp_path):
    for seed, folder in ((1, "a"), (1, "again"), (2, "b")):
        command(run, "--prompt", "x", "--seed", seed, *FEW, "--out", tmp_path / folder)
    assert written(tmp_path / "a") == written(tmp_path / "again")
    difference = pixels(tmp_path / "a" / "x-1.png") - pixels(tmp_path / "b" / "x-2.png")
    assert np.abs(difference).mean() > 10


def test_batches_have_one_shape_and_pictures_noises_of_their_own(run, command, tmp_path, capsys):
    """Three in batches of two: the last is filled up. No picture depends on the size of batches,
    its own seed repeats it alone, and one prompt drawn several times gives different pictures."""
    three = ("--prompt", "x", "--num-images-per-prompt", 3, *BASE)
    for size in (2, 3):
        command(run, *three, "--batch-size", size, "--out", tmp_path / str(size))
        shown = ("images 1-2 of 3", "image 3 of 3") if size == 2 else ("images 1-3 of 3",)
        bars = capsys.readouterr().err
        assert all(label in bars for label in shown)
    small, large = (
        [pixels(tmp_path / str(size) / named("x", i)) for i in range(3)] for size in (2, 3)
    )
    assert set(written(tmp_path / "2")) == {*(named("x", i) for i in range(3)), "grid-0.png"}
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(small, large, strict=True))
    seed = recorded(tmp_path / "2" / named("x", 2))["seed"]
    command(run, "--prompt", "x", "--seed", seed, *BASE, "--out", tmp_path / "alone")
    assert np.abs(pixels(tmp_path / "alone" / f"x-{seed}.png") - small[2]).max() <= 1
    command(run, *three, "--mesh", "2x1", "--out", tmp_path / "mesh")
    assert np.abs(pixels(tmp_path / "mesh" / named("x", 2)) - small[2]).max() <= 1
    for pair in ((small[0], small[1]), (small[0], small[2]), (small[1], small[2])):
        assert np.abs(pair[0] - pair[1]).mean() > 10
    with Image.open(tmp_path / "2" / "grid-0.png") as grid:
        assert grid.width > 3 * 128, "pictures of one prompt side by side"


def test_options_a_stage(run, command, tmp_path, capsys):
    """The base alone, its options given for all U-Nets, for those that run, or once."""
    base = ("--prompt", "x", *BASE[:2])
    changed = {
        "once": ("--steps", 3, "--cond-scale", 2),
        "all": ("--steps", 3, 5, "--cond-scale", 2, 1),
        "scale": ("--steps", 3, "--cond-scale", 4),
        "ancestral": ("--steps", 3, "--cond-scale", 2, "--sampler", "ancestral"),
        "online": ("--steps", 3, "--cond-scale", 2, "--weights", "online"),
    }
    for name, options in changed.items():
        command(run, *base, *options, "--out", tmp_path / name)
    assert "U-Net 2" not in capsys.readouterr().err
    picture = {name: pixels(tmp_path / name / "x-0.png") for name in changed}
    assert picture["once"].shape == (8, 8, 3)
    for same in ("all", "online"):  # nothing but `params` is saved here
        np.testing.assert_array_equal(picture[same], picture["once"])
    for other in ("scale", "ancestral"):
        assert np.abs(picture[other] - picture["once"]).mean() > 1
    made = recorded(tmp_path / "once" / "x-0.png")
    assert made["stop_at_unet_number"] == 1 and made["checkpoint_steps"] == {"unet1": 7}


def test_what_is_read_is_said_and_recorded(run, command, tmp_path, capsys):
    """An incomplete step is passed over; the average is taken where there is one."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    params = nn.params_of(imagen_jax.load(run).unets[0])
    with checkpoint.Writer(copy, 1) as writer:
        for step in (8, 9):
            writer.save(step, {"params": params, "ema": params}, {})
    (copy / "unet1" / "9" / checkpoint.MARKER).unlink()
    command(copy, "--prompt", "x", *BASE, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "step 9 is not complete (it has no commit marker); step 8 is used." in out
    assert "online" not in out
    made = recorded(tmp_path / "out" / "x-0.png")
    assert (made["checkpoint_steps"], made["weights"]) == ({"unet1": 8}, {"unet1": "ema"})


def test_no_picture_is_written_of_values_that_are_not_finite(run, command, tmp_path, monkeypatch):
    def generate(*_, **__):
        yield 0, [np.ones((8, 8, 3), np.float32)]
        yield 1, [np.full((8, 8, 3), np.nan, np.float32)]

    monkeypatch.setattr(Pipeline, "generate", generate)
    message = named("x", 1) + ", drawn by U-Net 1: 192 of its 192 values are NaN or infinite"
    with pytest.raises(UserError, match=message):
        command(run, "--prompt", "x", "--num-images-per-prompt", 2, *BASE, "--out", tmp_path / "o")
    assert [*written(tmp_path / "o")] == ["x-0.png"]
    with pytest.raises(UserError, match="not finite"):
        to_pil(np.full((8, 8, 3), np.inf, np.float32))


def test_prompts_from_a_file_and_a_long_one(run, command, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \r\n")
    long = "word " * 30
    latin = os.fsdecode("é".encode("latin-1"))  # an argument that is not UTF-8
    arguments = ("--prompt", long, "--prompt", latin, "--prompts-from", tmp_path / "prompts.txt")
    command(run, *arguments, *BASE, "--out", tmp_path / "out")
    seeds = image_seeds(0, 4)
    long_name = "-".join(["word"] * 8)
    names = [f"{long_name}-{seeds[0]}", f"{seeds[1]}", f"one-{seeds[2]}", f"two-{seeds[3]}"]
    assert set(written(tmp_path / "out")) == {f"{name}.png" for name in (*names, "grid-0")}
    out, err = capsys.readouterr()
    assert "prompt 2 is not UTF-8; it is read as '\N{REPLACEMENT CHARACTER}'" in err
    assert (
        "cut off: it has more than the 16 tokens that the cascade reads. Left out: 'word word"
        in out
    )


def test_without_captions(command, tmp_path):
    plain = dataclasses.replace(cascade(), condition_on_text=False)
    run = save_run(tmp_path / "plain", plain, (1,))
    command(run, "--num-images-per-prompt", 2, *BASE)
    folder = run / "samples" / "text_to_image"
    assert set(written(folder)) == {"0.png", f"{image_seeds(0, 2)[1]}.png", "grid-0.png"}
    assert recorded(folder / "0.png")["prompt"] is None
    for mistake in (("--prompt", "x"), ("--cond-scale", 3)):
        with pytest.raises(ValueError, match="captions"):
            command(run, *mistake)


def test_ctrl_c_keeps_what_is_written(run, command, tmp_path, monkeypatch, request):
    write = outputs.write_image

    def interrupted(*arguments, **options):
        made = write(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(outputs, "write_image", interrupted)
    # A shell starts background jobs with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    prompts = ("--prompt", "x", "--prompt", "y", "--batch-size", 1)
    with pytest.raises(SystemExit, match=r"stopped: \d of 2 images are in"):
        command(run, *prompts, *BASE, "--out", tmp_path)
    assert [*written(tmp_path)] == ["x-0.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to draw"),
        (("--prompt", "a", "--prompt", " "), "prompt 2 of 2 is empty"),
        (("--prompts-from", os.devnull), "contains no prompts"),
        (("--prompts-from", "absent.txt"), "absent.txt: No such file"),
        (("--prompt", "a", "--steps", 1, 2, 3), "--steps has 3 values: give one, or one for each"),
        (("--prompt", "a", "--stop-at-unet-number", 3), "has 2 U-Nets"),
        (("--prompt", "a", "--stop-at-unet-number", "sr"), "'sr' is not a stage"),
        (("--prompt", "a", "--t5", "nowhere/t5"), "nowhere/t5"),
    ],
)
def test_a_mistake_is_named_and_nothing_written(run, command, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        command(run, *arguments, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["text_to_image", "image_to_image", "upscale", "interpolate"])
def test_a_folder_that_cannot_be_is_named_before_anything_is_drawn(
    run, command, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(Pipeline, "generate", None)
    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    given = ("--image", image) if name in ("image_to_image", "upscale") else ()
    with pytest.raises(UserError, match="image.png is a file, so no folder can be created there"):
        prompts = ("--prompt", "x") * (2 if name == "interpolate" else 1)
        command(run, *given, *prompts, "--out", image / "deeper", name=name)
    with pytest.raises(UserError, match="no permission to write there"):
        monkeypatch.setattr(os, "access", lambda *_: False)
        command(run, *given, *prompts, "--out", tmp_path / "new", name=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--steps", "3", "0"), "--steps 3 0: must be at least 1"),
        (("--seed", "-1"), "--seed -1 must lie in"),
        (("--eta", "0.5"), "--eta 0.5 applies only to --sampler ddim"),
    ],
)
def test_a_number_out_of_range(arguments, message, run, command):
    with pytest.raises(UserError, match=message):
        command(run, "--prompt", "a", *arguments)


def test_names_of_diffusers(run, command, tmp_path):
    names = ("--guidance-scale", 2, 1, "--num-inference-steps", 2, 1)
    command(run, "--prompt", "a", *names, "--out", tmp_path)
    recipe = recorded(tmp_path / "a-0.png")
    assert recipe["cond_scale"] == [2, 1] and recipe["timesteps"] == [2, 1]


def test_an_untrained_stage(run, command, tmp_path):
    """Named with its run, the command that trains it and the way round; then the way round."""
    half = tmp_path / "half"
    shutil.copytree(run, half, ignore=shutil.ignore_patterns("unet2", "samples"))
    with pytest.raises(ValueError) as caught:
        command(half, "--prompt", "a", *FEW)
    for part in (
        f"U-Net 2 of {half} has no weights",
        f"python -m train.super_res --unet-number 2 --workdir {half}",
        "--stop-at-unet-number 1",
    ):
        assert part in str(caught.value)
    assert not (half / "samples").exists()
    command(half, "--prompt", "a", *BASE)
    shutil.rmtree(half / "unet1")
    with pytest.raises(ValueError, match="U-Net 1 .* python -m train.base --workdir"):
        command(half, "--prompt", "a")


def test_a_cascade_that_only_enlarges(command, tmp_path):
    config = cascade()
    config = dataclasses.replace(config, unets=(NullUnetConfig(), config.unets[1]))
    run = save_run(tmp_path / "enlarger", config, ())
    with pytest.raises(ValueError, match="cannot draw them from text"):
        command(run, "--prompt", "a")


def test_an_encoder_of_another_width(run, command, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    data = json.loads((run / "config.json").read_text())
    data["imagen"]["text_embed_dim"] = 64
    (other / "config.json").write_text(json.dumps(data))
    (other / "unet1").symlink_to(run / "unet1")
    with pytest.raises(ValueError, match="embeddings of width 128, .* text_embed_dim = 64"):
        command(other, "--prompt", "a", "--stop-at-unet-number", 1)


def test_no_run_directory_is_one_line_and_a_status(tmp_path, monkeypatch):
    """Through `commands.run`, as the command goes."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    (tmp_path / "empty").mkdir()
    for folder in ("missing", "empty"):
        arguments = ["", "--checkpoint", str(tmp_path / folder), "--prompt", "a"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as caught:
            commands.run(text_to_image.main)
        assert str(caught.value).startswith("error: ") and "no config.json" in str(caught.value)
        assert "\n" not in str(caught.value)


# ---- recipes


def test_a_full_disk_is_one_line_and_leaves_what_is_written(run, tmp_path, monkeypatch):
    """It fills up with the second image."""
    save, saved = outputs._save, []

    def full(path, *arguments, **options):
        if saved:
            raise OSError(28, "No space left on device", str(path))
        saved.append(path)
        save(path, *arguments, **options)

    monkeypatch.setattr(outputs, "_save", full)
    monkeypatch.setattr(commands, "keep_writers_logs", list)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    words = ("--checkpoint", run, "--prompt", "x", "--num-images-per-prompt", 2, "--steps", 1)
    monkeypatch.setattr(sys, "argv", ["", *map(str, (*words, "--out", tmp_path))])
    with pytest.raises(SystemExit, match="error: .*No space left on device: .*x-.*png"):
        commands.run(text_to_image.main)
    (path,) = tmp_path.iterdir()
    assert [path] == [Path(one) for one in saved] and pixels(path).shape == (16, 16, 3)


def test_from_image_repeats_it_to_the_bit(run, command, tmp_path):
    """Alone, an image of a batch; and it is refused by another cascade."""
    chosen = ("--guidance-schedule", "cosine", "--guidance-rescale", 0.5, "--negative-prompt", "y")
    command(
        run, "--prompt", "x", "--num-images-per-prompt", 3, *FEW, *chosen, "--seed", 3,
        "--cond-scale", 4, 1, "--sampler", "dpm++2m-sde", "--out", tmp_path / "a",
    )  # fmt: skip
    name = named("x", 2, seed=3)
    again = ("--from-image", tmp_path / "a" / name, "--out", tmp_path / "b")
    command(run, *again)
    assert written(tmp_path / "b") == {name: (tmp_path / "a" / name).read_bytes()}
    other = save_run(tmp_path / "other", cascade())
    with pytest.raises(UserError, match=r"was drawn by tiny, model hash \w+; that of .*other is"):
        command(other, *again)
    for more in (("--prompt", "z"), ("--seed", 9), ("--cond-scale", 5), ("--steps", 2)):
        with pytest.raises(UserError, match=f"already sets {more[0]}: leave it out"):
            command(run, *again, *more)
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    for file, why in (("plain.png", "it has no imagen-jax recipe"), ("none.png", "No such file")):
        with pytest.raises(UserError, match=f"{file}: {why}"):
            command(run, "--from-image", tmp_path / file)


@pytest.mark.parametrize("preset", ["imagen", "paper", "scenes"])
@pytest.mark.parametrize("sampler", [None, "cascade", "ddim"])
def test_a_recipe_decides_what_is_drawn_again(preset, sampler, tmp_path):
    """The reference's own sampler and noise levels too."""
    config = PRESETS[preset]()
    first = text_to_image.Settings(checkpoint=tmp_path, sampler=sampler, seed=4)
    options = first.options(config)
    recipe = json.loads(json.dumps(options)) | {
        **dict(command="text_to_image", seed=4, prompt="x", negative_prompt="", dtype="float32"),
        **dict(batch_size=1, model_hash="", checkpoint="", weights={"unet1": "ema"}),
    }
    given = text_to_image.Settings(checkpoint=tmp_path, from_image=tmp_path / "x.png")
    again = text_to_image.with_recipe(given, recipe)
    assert again.options(config) == options and again.seed == 4
    assert make_grid(config.stage(1).process, 9, spacing=options["spacing"]).num_steps == 9


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats_carry_the_recipe(run, command, tmp_path, format):
    command(run, "--prompt", "Ein Äpfelchen", *BASE, "--format", format, "--out", tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.suffix == f".{format}"
    recipe = outputs.read_recipe(epath.Path(path))
    assert recipe["prompt"] == "Ein Äpfelchen" and recipe["size"] == [8, 8]
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == outputs.parameters(recipe)


def test_json_and_no_metadata_and_stages(run, command, tmp_path, capsys):
    flags = ("--json", "--no-metadata", "--save-stages", "--out", tmp_path)
    for place in ("x-0.png", "x-0-2.png"):  # a file is not replaced
        command(run, "--prompt", "x", *FEW, *flags)
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["file"] == str(tmp_path / place)
    sizes = {"x-0.png": 16, "x-0-2.png": 16, "x-0-unet1.png": 8, "x-0-2-unet1.png": 8}
    assert set(written(tmp_path)) == set(sizes)
    for name, size in sizes.items():
        with Image.open(tmp_path / name) as image:
            assert image.size == (size, size) and not image.text
