"""Output of the sampling commands: images with their recipes, contact sheets, progress bars."""

import importlib.metadata
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from imagen_jax.data import labelled_grid
from imagen_jax.errors import UserError
from imagen_jax.pixels import to_pil

CELLS = (128, 256)  # pixels: the smallest and the largest image of a grid
COLUMNS = 8
CAPTION = 120  # characters of a prompt that a grid shows
RECIPE = "imagen_jax"
"""Name of the PNG chunk with the recipe as JSON."""
Format = Literal["png", "jpeg", "webp", "gif"]
SAVE_OPTIONS = {"png": {}, "jpeg": {"quality": 95}, "webp": {"lossless": True}}
Sign = Callable[[bytes, Format], bytes]
"""sign(file, format) -> the file with a signature."""
Pixels = Float[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w c"]


def free_path(folder: epath.Path, prompt: str | None, seed: int, format: Format) -> epath.Path:
    """`a-red-apple-7.png`, or `a-red-apple-7-2.png` if that is taken, and so on."""
    slug = re.sub(r"[\W_]+", "-", (prompt or "").lower()).strip("-")[:40].rstrip("-")
    stem = "-".join(filter(None, (slug, str(seed))))
    names = (f"{stem}-{number}" if number > 1 else stem for number in itertools.count(1))
    paths = (folder / f"{name}.{format}" for name in names)
    return next(path for path in paths if not path.exists())


def read_file(path: Path) -> bytes:
    """Raises UserError, with the file's name, if it is missing or empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from error
    if not data:
        raise UserError(f"{path} is empty.")
    return data


def check_finite(image: Pixels, name: str) -> None:
    """Raises UserError for values that are not finite, which would give a black image."""
    bad = np.count_nonzero(~np.isfinite(image))
    if bad:
        raise UserError(
            f"{name}: {bad:,} of its {image.size:,} values are NaN or infinite; it is not written. "
            "--dtype float32 may help, or a checkpoint of an earlier step."
        )


def write_image(
    path: epath.Path,
    image: Pixels,
    recipe: Mapping[str, Any] | None,
    format: Format = "png",
    *,
    sign: Sign | None = None,
) -> Image.Image:
    """Writes an 8-bit image file with its recipe, unless that is None; signed by `sign`.

    A PNG has it as JSON in the chunk `imagen_jax`, and as one line in `parameters`, where other
    programs look for it; JPEG and WebP in the EXIF fields ImageDescription and UserComment.
    Returns the image, reduced to at most the size that a grid shows.
    """
    picture, options = to_pil(image), dict(SAVE_OPTIONS[format])
    if recipe is not None and format == "png":
        options["pnginfo"] = info = PngInfo()
        info.add_itxt("parameters", parameters(recipe))
        info.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    elif recipe is not None:
        options["exif"] = exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(recipe)
        comment = b"UNICODE\0" + parameters(recipe).encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    _save(path, picture, format, sign=sign, **options)
    picture.thumbnail((CELLS[1], CELLS[1]))
    return picture


def write_animation(
    path: epath.Path,
    frames: Sequence[Image.Image],
    recipe: Mapping[str, Any] | None,
    fps: float,
    *,
    sign: Sign | None = None,
) -> None:
    """Writes a looping GIF or WebP, by the file name. A GIF has its recipe as a JSON comment, a
    WebP as images do."""
    format, options = path.suffix.removeprefix("."), {}
    if recipe is not None and format == "gif":
        options["comment"] = json.dumps(recipe).encode()
    elif recipe is not None:
        options["exif"] = exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(recipe)
    options |= SAVE_OPTIONS.get(format, {})
    first, *others = frames
    _save(
        path, first, format, sign=sign, save_all=True, append_images=others, loop=0,
        duration=round(1000 / fps), **options,
    )  # fmt: skip


def parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe as other programs write it: the prompts, then `Steps: 20, Sampler: ...`.

    It has the base's settings if they differ by stage; the JSON beside it has all.
    """
    lines = [recipe["prompt"] or ""]
    if recipe.get("negative_prompt"):
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    height, width = recipe["size"]
    fields = {
        "Steps": recipe["timesteps"][0],
        "Sampler": recipe["sampler"],
        "CFG scale": recipe["cond_scale"][0],
        "Seed": recipe["seed"],
        "Size": f"{width}x{height}",
        "Model hash": recipe["model_hash"],
        "Model": recipe["checkpoint"],
        "Version": f"imagen-jax {recipe['version']}",
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in fields.items())])


def read_recipe(path: epath.Path) -> dict[str, Any]:
    """The recipe in an image file. Raises UserError if there is none."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            text = picture.getexif().get(ExifTags.Base.ImageDescription)
            text = getattr(picture, "text", {}).get(RECIPE, text)
            text = picture.info.get("comment") if picture.format == "GIF" else text
        return dict(json.loads(text))
    except (OSError, TypeError, ValueError) as error:
        why = error.strerror if getattr(error, "strerror", None) else "it has no imagen-jax recipe"
        raise UserError(f"{path}: {why}.") from error


def _save(
    path: epath.Path,
    picture: Image.Image,
    format: Format = "png",
    *,
    sign: Sign | None = None,
    **options: Any,
) -> None:
    """Saves in one write, as object stores need. For JPEG, transparency becomes RGB on white."""
    if format == "jpeg" and picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    file = io.BytesIO()
    picture.save(file, format, **options)
    data = file.getvalue()
    path.write_bytes(data if sign is None else sign(data, format))


def write_grid(
    path: epath.Path,
    images: Sequence[Image.Image],
    prompts: Sequence[str] | None,
    *,
    per_prompt: int = 1,
) -> None:
    """Writes all images on a page with the prompts below them.

    Several images of one prompt are in one row, with the prompt below the first.
    """
    cell = int(np.clip(max(images[0].size), *CELLS))
    labels = [p if len(p) <= CAPTION else p[: CAPTION - 1] + "…" for p in prompts or ()]
    rows = [("", images, labels)]
    if labels and per_prompt > 1:
        rows = [
            ("", images[i * per_prompt :][:per_prompt], [label] + [""] * (per_prompt - 1))
            for i, label in enumerate(labels)
        ]
    longest = max(len(row[1]) for row in rows)
    _save(path, labelled_grid(rows, cell=cell, columns=min(COLUMNS, longest)))


def version() -> str:
    try:
        return importlib.metadata.version("imagen-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
