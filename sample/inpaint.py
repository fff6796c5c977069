"""Redraws a part of an image, guided by a prompt; the rest keeps the file's exact pixels.

    python -m sample.inpaint --checkpoint RUN --image photo.png --mask mask.png --prompt "a hat"

The mask is an image of the same size: white is redrawn, black is kept. The cascade works on the
largest crop of its own aspect ratio that contains the white part, scaled to the cascade's size; the
result is scaled back to the file's resolution. Every step is repeated, adding noise again in
between, so that the new part fits the old (RePaint, Lugmayr et al. 2022): `--resample-times`.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from PIL import Image

import commands
from imagen_jax import data
from imagen_jax.errors import UserError, parse
from imagen_jax.pixels import to_pil, to_uint8
from imagen_jax.types import Size
from sample import outputs, settings
from sample.drawing import Drawing, read_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Redraws a part of an image, guided by a prompt."""

    image: Path
    """The image to inpaint."""
    mask: Path
    """Image of the same size: white is redrawn, black is kept."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What the image shows afterwards. Repeat the flag for more prompts."""
    num_images_per_prompt: int = 1
    """Images per prompt, or in total for a cascade without captions."""
    resample_times: int | None = None
    """How often each step is repeated; the time grows with it. 0: once, with the known part free of
    noise, as DeepFloyd IF does it. Default: 5, or 0 for DeepFloyd IF."""

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "num_images_per_prompt")


class Box(NamedTuple):
    """A crop of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def main() -> None:
    given = parse(Settings, prog="python -m sample.inpaint", description=__doc__)
    drawing = Drawing.open("inpaint", given)
    stage = drawing.config.stage(drawing.options["stop_at_unet_number"])
    image, again = read_image_and_mask(given.image, given.mask, stage.channels)
    box = find_box(again, stage.size)
    known = scaled(box.of(image), stage.size)
    kept = ~scaled_mask(box.of(again), stage.size)
    prompts = read_prompts(given, drawing.config)
    jobs = drawing.jobs(prompts, given.num_images_per_prompt)
    rows = {
        "inpaint_images": np.repeat(known[None], len(jobs), axis=0),
        "inpaint_masks": np.repeat(kept[None], len(jobs), axis=0),
    }

    def finish(_: int, drawn: np.ndarray) -> np.ndarray:
        return composed(image, again, box, drawn)

    drawn = drawing.draw(
        jobs,
        images=rows,
        finish=finish,
        record={"image": given.image.name, "mask": given.mask.name},
        inpaint_resample_times=given.resample_times,
    )
    drawing.report(list(drawn), prompts, given.num_images_per_prompt)


def read_image_and_mask(image: Path, mask: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (h, w, c), and bool (h, w), True where it is to be redrawn.

    Raises UserError for files that are not images of one size, or a mask without white.
    """
    pixels = read(image, channels)
    again = read(mask, 1)[..., 0] >= 128
    if again.shape != pixels.shape[:2]:
        found, wanted = ("{} x {}".format(*a.shape) for a in (again, pixels))
        raise UserError(f"{mask} is {found} pixels (height x width), but {image} is {wanted}.")
    if not again.any():
        raise UserError(f"{mask} has no white part: there is nothing to redraw.")
    return pixels, again


def read(path: Path, channels: int) -> np.ndarray:
    try:
        return data.read(outputs.read_file(path), channels=channels)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"{path}: {message}") from error


def find_box(again: np.ndarray, size: Size) -> Box:
    """The largest crop with the aspect ratio of `size`, placed to contain all of `again`, near its
    middle.

    Raises UserError if `again` does not fit into such a crop.
    """
    height, width = again.shape
    scale = min(height / size[0], width / size[1])
    extent = min(height, round(size[0] * scale)), min(width, round(size[1] * scale))
    corner = []
    for axis in (0, 1):
        (places,) = np.nonzero(again.any(axis=1 - axis))
        first, last = int(places[0]), int(places[-1]) + 1
        if last - first > extent[axis]:
            raise UserError(
                f"the mask's white part is {last - first} pixels {('high', 'wide')[axis]}; the "
                f"largest crop of {size[0]} : {size[1]} (height : width) has {extent[axis]}."
            )
        middle = (first + last - extent[axis]) // 2
        corner.append(min(max(middle, 0), again.shape[axis] - extent[axis]))
    return Box(*corner, *extent)


def scaled(pixels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (h, w, c) at another size, antialiased."""
    picture = to_pil(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(*size, pixels.shape[-1])


def scaled_mask(again: np.ndarray, size: Size) -> np.ndarray:
    """True for every pixel that covers any True one."""
    picture = Image.fromarray(again.astype(np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BOX)) > 0


def composed(image: np.ndarray, again: np.ndarray, box: Box, drawn: np.ndarray) -> np.ndarray:
    """The image as uint8, with `drawn` where `again` is True."""
    found = image.copy()
    fitted = scaled(to_uint8(drawn), (box.height, box.width))
    box.of(found)[box.of(again)] = fitted[box.of(again)]
    return found


if __name__ == "__main__":
    commands.run(main)
