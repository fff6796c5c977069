"""Draws variations of an image, guided by a prompt.

    python -m sample.image_to_image --checkpoint RUN --image photo.jpg --prompt "a cat"
    python -m sample.image_to_image --checkpoint RUN --image a.png --prompt "a cat" \\
        --strength 0.3 --num-images-per-prompt 4

The image is cropped to the cascade's aspect ratio, noised, and denoised (SDEdit, Meng et al. 2022).
`--strength` is the fraction of the steps that are run: near 0 hardly anything changes, at 1 nothing
is left of the image. Stages larger than the image invent their own details.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

import commands
from imagen_jax.data import TooSmall, decode
from imagen_jax.errors import UserError, parse
from sample import outputs, settings
from sample.drawing import Drawing, read_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Draws variations of an image, guided by a prompt."""

    image: Path
    """The image to start from."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw. Repeat the flag for more prompts."""
    strength: float = 0.6
    """How much to change the image: above 0, at most 1."""
    num_images_per_prompt: int = 1
    """Images per prompt, or in total for a cascade without captions."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise UserError(f"--strength {self.strength:g} must be above 0 and at most 1.")

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "num_images_per_prompt")


def main() -> None:
    given = parse(Settings, prog="python -m sample.image_to_image", description=__doc__)
    drawing = Drawing.open("image_to_image", given)
    prompts = read_prompts(given, drawing.config)
    each = given.num_images_per_prompt
    jobs = drawing.jobs(prompts, each)
    starts = tuple(
        None if image is None else np.repeat(image[None], len(jobs), axis=0)
        for image in sources(given.image, drawing)
    )
    record = {"image": given.image.name, "strength": given.strength}
    drawn = drawing.draw(
        jobs, images={"init_images": starts}, record=record, strength=given.strength
    )
    drawing.report(list(drawn), prompts, each)


def sources(path: Path, drawing: Drawing) -> list[np.ndarray | None]:
    """The image as uint8 (h, w, c) at every stage's size; None for stages larger than it.

    Raises UserError for a file that is not an image, or is smaller than the first stage.
    """
    data = outputs.read_file(path)
    found = []
    for number in range(1, len(drawing.config.unets) + 1):
        stage = drawing.config.stage(number)
        try:
            found.append(decode(data, image_size=stage.size, channels=stage.channels))
        except TooSmall as error:
            if number == 1:
                raise UserError(f"{path}: {error}") from error
            found.append(None)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return found


if __name__ == "__main__":
    commands.run(main)
