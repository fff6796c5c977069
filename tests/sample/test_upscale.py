"""`python -m sample.upscale`: files of any size and kind."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagen_jax import nn, sampling, tiling
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Pipeline
from imagen_jax.streams import seed_keys
from tests.compilations import PROGRAMS, compilations
from tests.sample.conftest import pixels, recorded


def photo(path, width, height, **options):
    y, x = np.mgrid[:height, :width]
    image = np.stack([120 + 90 * np.sin(x / 9), 120 + 90 * np.cos(y / 7), 60 + x + y], -1)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, **options)
    return path


def test_sizes_and_aspects(run, command, tmp_path, caplog):
    """Twice the file's size, a tile, less than a tile and many; another seed or prompt compiles
    nothing new."""

    def draw(width, height, *more):
        image = photo(tmp_path / f"{width}x{height}.png", width, height)
        out = tmp_path / f"o{len([*tmp_path.iterdir()])}"
        command(run, "--image", image, "--steps", 2, "--out", out, *more, name="upscale")
        (path,) = out.iterdir()
        assert pixels(path).shape == (2 * height, 2 * width, 3)
        return path

    path = draw(37, 21)
    made = recorded(path)
    image, tile, tops, lefts = made["tiles"]
    assert (image, tile, len(tops), len(lefts)) == ([42, 74], [16, 16], 4, 6)
    assert made["image"] == "37x21.png" and made["start_at_unet_number"] == 2
    assert (made["command"], made["prompt"], made["size"]) == ("upscale", None, [42, 74])
    with compilations(caplog) as names:
        again = draw(37, 21)
        other = draw(37, 21, "--seed", 5, "--prompt", "x")
    assert not PROGRAMS & set(names)
    np.testing.assert_array_equal(pixels(path), pixels(again))
    assert np.abs(pixels(path) - pixels(other)).mean() > 1
    draw(8, 8)
    draw(5, 3)
    draw(40, 1)


def test_a_tile_is_drawn_as_without_tiles(run, command, tmp_path):
    """An image of the stage's own size, by `Pipeline` and by the command."""
    image = photo(tmp_path / "a.png", 8, 8)
    command(run, "--image", image, "--prompt", "x", "--steps", 3, "--out", tmp_path / "o",
            name="upscale")  # fmt: skip
    pipeline = Pipeline.load(run)
    small = pixels(image)[None].astype(np.uint8)
    given = dict(start_at_unet_number=2, start_image_or_video=small, num_inference_steps=3)
    (wanted,) = pipeline("x", seed=0, **given).images
    assert np.abs(pixels(tmp_path / "o" / "x-0.png") - np.asarray(wanted, int)).max() <= 1


def test_tiles_with_what_draws_from_noise(run):
    pipeline = Pipeline.load(run)
    tiles = tiling.make_tiles((32, 32), (16, 16), (4, 4))
    with pytest.raises(UserError, match="tiles need a single super-resolution stage"):
        pipeline("x", tiles=tiles)


def test_no_prompt_is_the_network_without_text(run):
    """A mask that is False throughout is the null text of training, guided or not."""
    pipeline = Pipeline.load(run)
    network, config = pipeline.imagen.unets[1], pipeline.config
    stage, length = config.stage(2), config.text_len
    embeds = np.ones((1, length, config.text_embed_dim), np.float32)
    masks = np.zeros((1, length), bool)
    program = sampling.Program(stage=stage, dtype=jnp.float32, guided=False, sampler="ddim")
    given = sampling.Given(
        text_embeds=embeds,
        text_masks=masks,
        previous=np.zeros((1, 8, 8, 3), np.float32),
        lowres_noise_level=np.float32(0.1),
    )
    grid = sampling.samplers.make_grid(stage.process, 2)
    keys = sampling.Randomness(keys=seed_keys([0]))
    _, found, _ = sampling.start(
        nn.params_of(network), given, keys, grid, program=program, batch_size=1
    )
    wanted = network.encode_text(embeds, masks, keep_mask=np.array([False]))
    np.testing.assert_allclose(found.text.hiddens, wanted.hiddens, rtol=1e-5)
    kept = network.encode_text(embeds, masks, keep_mask=np.array([True]))
    assert np.abs(np.asarray(kept.hiddens - wanted.hiddens)).max() > 1e-3


def test_mistakes(run, command, tmp_path):
    def message(image, *more):
        with pytest.raises(UserError) as caught:
            command(run, "--image", image, *more, "--out", tmp_path / "out", name="upscale")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return str(caught.value)

    good = photo(tmp_path / "good.png", 9, 9)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    Image.new("L", (40_000, 200)).save(tmp_path / "wide.png")
    assert "empty.png is empty" in message(tmp_path / "empty.png")
    assert "text.png: corrupt picture" in message(tmp_path / "text.png")
    wanted = "wide.png: 200x40000 pixels are more than 4,194,304 in all (--max-pixels)"
    assert wanted in message(tmp_path / "wide.png")
    assert "none.png: No such file" in message(tmp_path / "none.png")
    assert "--stage base: U-Net 1 of" in message(good, "--stage", "base")
    assert "--stage 3: the cascade of" in message(good, "--stage", 3)
    assert "is empty" in message(good, "--prompt", " ")
    assert "one text for the image, not 2" in message(good, "--prompt", "a", "--prompt", "b")


def test_kinds_of_files(run, command, tmp_path, monkeypatch):
    """Turned upright; grey of 16 bits, a palette, alpha on white and CMYK become RGB."""
    seen = []

    def generate(self, *_, per_image, **__):
        seen.append(per_image["start_image_or_video"][0])
        yield 0, [np.zeros((16, 16, 3), np.float32)]

    monkeypatch.setattr(Pipeline, "generate", generate)
    exif = Image.Exif()
    exif[0x112] = 6
    turned = Image.new("RGB", (8, 4))
    turned.paste("red", (0, 0, 2, 4))
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((8, 8), 257 * 200, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (8, 8), "blue").convert("P").save(tmp_path / "palette.png")
    for name in ("turned.png", "deep.png", "clear.png", "cmyk.jpg", "palette.png"):
        command(run, "--image", tmp_path / name, "--out", tmp_path / "o", name="upscale")
    upright, deep, clear, cmyk, palette = seen
    assert (upright[:2, :4] == (255, 0, 0)).all() and not upright[2:8, :4].any()
    assert (deep == 200).all() and (clear == 255).all() and (cmyk == 255).all()
    assert (palette == (0, 0, 255)).all()
