"""What a visitor of the page asks for: checked, and turned into arguments of `Imagen.sample`."""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from imagen_jax import data
from imagen_jax.config import ImagenConfig
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import UserError
from imagen_jax.pixels import to_pil
from imagen_jax.stage import Stage
from imagen_jax.types import Size
from sample import inpaint, upscale
from sample.drawing import Finish

MOST_IMAGES = 16
MOST_STEPS = 250
MOST_GUIDANCE = 20.0
MOST_CHARACTERS = 2_000  # of a prompt; longer ones are cut
MOST_PIXELS = 50_000_000  # of an uploaded image
GUIDED = 1 + 1e-6
"""Replaces guidance 1: exactly 1 is another program, which the slider must not compile."""
MOST_UPSCALED = 2**20  # pixels of an image to upscale
OVERLAP, TILE_BATCH = 0.25, 8  # of its tiles
PAINTED = 512  # pixels: minimum size of an image while a mask is painted on it

Task = Literal["text_to_image", "upscale", "inpaint", "image_to_image"]
Pixels = UInt8[np.ndarray, "h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a visitor asks for."""

    task: Task = "text_to_image"
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    cond_scale: float = 1.0
    """Of the base; the other stages have the command line's."""
    steps: tuple[int, ...]
    """One per U-Net that runs."""
    sampler: str
    image: Pixels | None = None
    """To upscale, to inpaint or to start from, of the cascade's channels."""
    mask: Bool[np.ndarray, "h w"] | None = None
    """True where an inpainted image is drawn again."""
    strength: float = 0.6
    stage: int = 2
    """Number of the U-Net that upscales."""


def checked(ask: Ask, config: ImagenConfig) -> tuple[Ask, list[str]]:
    """The request as it is drawn, and what was changed. Raises UserError for invalid values."""
    notes = []
    for name, (least, most) in {
        "number of images": (1, MOST_IMAGES),
        "seed": (0, 2**32 - 1),
        "guidance": (1, MOST_GUIDANCE),
        "strength": (0.01, 1),
    }.items():
        field = {"number of images": "count", "guidance": "cond_scale"}.get(name, name)
        value = getattr(ask, field)
        if value is None or not least <= value <= most:
            raise UserError(f"The {name} must be from {least:g} to {most:g}, not {value}.")
    if not all(1 <= steps <= MOST_STEPS for steps in ask.steps):
        raise UserError(f"Steps must be from 1 to {MOST_STEPS}, not {list(ask.steps)}.")
    if ask.sampler not in SAMPLERS:
        raise UserError(f"The sampler must be one of {', '.join(SAMPLERS)}.")
    texts = {}
    for name, title in (("prompt", "prompt"), ("negative_prompt", "negative prompt")):
        texts[name] = valid(getattr(ask, name))
        if len(texts[name]) > MOST_CHARACTERS:
            notes.append(
                f"The {title} has {len(texts[name]):,} characters; only the first "
                f"{MOST_CHARACTERS:,} are read."
            )
            texts[name] = texts[name][:MOST_CHARACTERS]
    if config.condition_on_text and not texts["prompt"]:
        raise UserError("Say what to draw: the prompt is empty.")
    if ask.task != "text_to_image":
        _check_image(ask)
    return dataclasses.replace(ask, **texts), notes


def valid(text: str) -> str:
    """The text in one line, without surrogates, which cannot be written to a file."""
    return " ".join(text.encode(errors="replace").decode().split())


def _check_image(ask: Ask) -> None:
    if ask.image is None:
        raise UserError("Choose an image first: click one of your results, or upload one.")
    if ask.task == "inpaint" and (ask.mask is None or not ask.mask.any()):
        raise UserError("Paint over the part to redraw: the mask is empty.")


class Inputs(NamedTuple):
    """Arguments of `Drawing.draw` that come from a visitor's image."""

    images: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    finish: Finish | None = None
    first: int = 1


def inputs(ask: Ask, config: ImagenConfig, last: int) -> Inputs:
    """The visitor's image, in the sizes of the stages that read it; `last` is the last to run.

    Raises UserError for a mask that does not fit the cascade's aspect ratio.
    """

    def rows(array: np.ndarray) -> np.ndarray:
        return np.repeat(array[None], ask.count, axis=0)

    if ask.task == "upscale":
        return _upscaling(ask, config.stage(ask.stage), rows)
    if ask.task == "inpaint":
        size = config.stage(last).size
        box = inpaint.find_box(ask.mask, size)
        known = inpaint.scaled(box.of(ask.image), size)
        kept = ~inpaint.scaled_mask(box.of(ask.mask), size)
        return Inputs(
            {"inpaint_images": rows(known), "inpaint_masks": rows(kept)},
            finish=lambda _, drawn: inpaint.composed(ask.image, ask.mask, box, drawn),
        )
    if ask.task == "image_to_image":
        sizes = [config.stage(number).size for number in range(1, len(config.unets) + 1)]
        large = [n == 0 or np.all(ask.image.shape[:2] >= np.array(s)) for n, s in enumerate(sizes)]
        sources = [
            rows(fitted(ask.image, size)) if enough else None
            for size, enough in zip(sizes, large, strict=True)
        ]
        return Inputs({"init_images": tuple(sources)}, {"strength": ask.strength})
    return Inputs()


def _upscaling(ask: Ask, stage: Stage, rows: Callable[[np.ndarray], np.ndarray]) -> Inputs:
    height, width = ask.image.shape[:2]
    if height * width > MOST_UPSCALED:
        raise UserError(
            f"The image has {height * width:,} pixels; at most {MOST_UPSCALED:,} are upscaled."
        )
    factor = upscale.scale_factor(stage)
    padded, tiles = upscale.plan(ask.image, stage, OVERLAP)
    return Inputs(
        {"start_image_or_video": rows(padded)},
        {
            "start_at_unet_number": stage.unet_number,
            "stop_at_unet_number": stage.unet_number,
            "tiles": tiles,
            "tile_batch": min(TILE_BATCH, len(tiles.origins)),
        },
        finish=lambda _, larger: larger[: factor * height, : factor * width],
        first=stage.unet_number,
    )


def fitted(image: Pixels, size: Size) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The image at (height, width) `size`: scaled to cover it, centre-cropped, never squashed."""
    found = ImageOps.fit(to_pil(image), size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(found).reshape(*size, image.shape[-1])


def enlarged(image: Image.Image, least: int = PAINTED) -> Image.Image:
    """The image with pixels repeated until both sides have at least `least`, for painting on it."""
    factor = max(1, -(-least // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def reduced(image: Image.Image) -> Image.Image:
    """Undoes `enlarged`, bit for bit; returns any other image as it is."""
    for factor in range(PAINTED, 1, -1):
        if image.width % factor == image.height % factor == 0:
            size = image.width // factor, image.height // factor
            small = image.resize(size, Image.Resampling.NEAREST)
            again = enlarged(small) if min(size) >= 8 else None
            if again is not None and again.size == image.size and again == image:
                return small
    return image


def painted(layers: Sequence[Image.Image], size: Size) -> Bool[np.ndarray, "h w"]:
    """True where a layer of an image editor has paint, for an image of (height, width) `size`.

    A pixel counts if half of it is painted, so that the brush's soft edge does not count.
    """
    found = np.zeros(size, bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(size[::-1], Image.Resampling.BOX)
        found |= np.asarray(alpha) >= 128
    return found


def arguments(ask: Ask, options: Mapping[str, Any], given: Inputs) -> dict[str, Any]:
    """The arguments of `Imagen.sample` that replace those in `options`, the command line's."""
    scale, steps = options["cond_scale"], options["timesteps"]
    if scale[0] != 1:
        scale = (max(ask.cond_scale, GUIDED), *scale[1:])
    steps = ask.steps + tuple(steps)[len(ask.steps) :]
    return {"cond_scale": scale, "timesteps": steps, "sampler": ask.sampler, **given.options}


def read_image(path: Path, channels: int) -> Pixels:
    """An uploaded or drawn image. Raises UserError if the file is not an image, or too large."""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
        too_large = width * height > MOST_PIXELS
    except Image.DecompressionBombError:
        too_large = True
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError("The file is not an image that can be read: send a PNG or JPEG.") from error
    if too_large:
        raise UserError(f"The image is too large: at most {MOST_PIXELS:,} pixels are read.")
    return data.read(content, channels=channels)
