"""Upsamples an image of any size with a super-resolution stage of a cascade.

    python -m sample.upscale --checkpoint RUN --image photo.jpg
    python -m sample.upscale --checkpoint RUN --image photo.jpg --prompt "a cat" --stage sr256
    python -m sample.upscale --checkpoint RUN --image old.png --lowres-sample-noise-level 0.4

The stage multiplies height and width by its own factor, 4 for 64 -> 256 pixels. An image larger
than the stage was trained on is drawn in overlapping tiles, blended at every step. With little
noise (`--lowres-sample-noise-level`) the result stays close to the image; more noise repairs and
invents more.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

import commands
from imagen_jax import run_config, tiling
from imagen_jax.config import ImagenConfig
from imagen_jax.data import read
from imagen_jax.errors import UserError, parse
from imagen_jax.stage import Stage
from sample import outputs, settings
from sample.drawing import Drawing, Job, read_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Upsamples an image of any size with a super-resolution stage of a cascade."""

    image: Path
    """The image to upsample."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What the image shows, one text. Default: no text."""
    stage: str | None = None
    """The U-Net that upsamples: 2, 3 or sr256, sr1024. Default: the cascade's last."""
    overlap: float = 0.25
    """Minimum overlap of neighbouring tiles, as a fraction of a tile, 0 to 0.75; more is slower."""
    max_pixels: int = 2**22
    """Refuses images of more pixels than this."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.overlap <= 0.75:
            raise UserError(f"--overlap {self.overlap:g} must lie in 0 .. 0.75.")
        if len(self.prompt) > 1:
            raise UserError(f"--prompt: one text for the image, not {len(self.prompt)}.")
        if self.stop_at_unet_number is not None and self.stage is not None:
            raise UserError("--stage and --stop-at-unet-number: give --stage alone.")

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "max_pixels")


def main() -> None:
    given = parse(Settings, prog="python -m sample.upscale", description=__doc__)
    config = run_config.read(given.run)
    number = stage_number(given, config)
    given = dataclasses.replace(given, stage=None, stop_at_unet_number=str(number))
    stage = config.stage(number)
    image = read_image(given, stage)
    factor = scale_factor(stage)
    padded, tiles = plan(image, stage, given.overlap)
    drawing = Drawing.open("upscale", given, first=number)
    prompt = given.prompt and read_prompts(given, config)
    job = Job(
        seed=given.seed,
        prompt=prompt[0] if prompt else None,
        negative_prompt=given.negative_prompt,
    )
    height, width = (factor * side for side in image.shape[:2])
    (drawn,) = drawing.draw(
        [job],
        images={"start_image_or_video": padded[None]},
        finish=lambda _, larger: larger[:height, :width],
        record={"image": given.image.name},
        pad_to=1,
        start_at_unet_number=number,
        tiles=tiles,
        tile_batch=min(given.batch_size, len(tiles.origins)),
    )
    before = f"{image.shape[1]}x{image.shape[0]}"
    drawing.say(f"{before} -> {width}x{height} pixels: {drawn.path}")


def stage_number(given: Settings, config: ImagenConfig) -> int:
    """The number of the stage. Raises UserError for one that does not upsample."""
    wanted, count = given.stage or given.stop_at_unet_number, len(config.unets)
    number = count if wanted is None else commands.stage_number(wanted)
    if number > count:
        raise UserError(f"--stage {wanted}: the cascade of {given.run} has {count} U-Nets.")
    if config.stage(number).lowres is None:
        raise UserError(
            f"--stage {wanted or number}: U-Net {number} of {given.run} draws from noise; "
            "choose a super-resolution stage, 2 or a later one."
        )
    return number


def read_image(given: Settings, stage: Stage) -> np.ndarray:
    """The image file as uint8 (h, w, c). Raises UserError, with the file's name."""
    data = outputs.read_file(given.image)
    try:
        return read(data, channels=stage.channels, max_pixels=given.max_pixels)
    except UserError as error:
        more = " (--max-pixels)" if "in all" in str(error) else ""
        raise UserError(f"{given.image}: {error}{more}") from error


def scale_factor(stage: Stage) -> int:
    """The stage's upsampling factor. Raises UserError unless it is an integer."""
    ratios = {large / small for large, small in zip(stage.size, stage.lowres.size, strict=True)}
    (ratio, *others) = ratios
    if others or ratio != int(ratio):
        raise UserError(
            f"U-Net {stage.unet_number} upsamples by {sorted(ratios)}, not by one integer."
        )
    return int(ratio)


def plan(image: np.ndarray, stage: Stage, overlap: float) -> tuple[np.ndarray, tiling.Tiles]:
    """The image, padded to at least one tile, and the tiles of the upsampled image."""
    factor, tile = scale_factor(stage), stage.lowres.size
    padded = tiling.pad(image, tile)
    overlap = tuple(round(side * overlap) for side in tile)
    return padded, tiling.make_tiles(padded.shape[:2], tile, overlap).scaled(factor)


if __name__ == "__main__":
    commands.run(main)
