"""Output of the sampling commands: PNGs with their settings, a contact sheet, progress bars."""

import contextlib
import importlib.metadata
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from imagen_jax.data import labelled_grid
from imagen_jax.errors import UserError
from imagen_jax.pixels import to_pil
from imagen_jax.sampling import Progress

CELLS = (128, 256)  # pixels: the smallest and the largest picture of a grid
COLUMNS = 8
CAPTION = 120  # characters of a prompt that a grid shows


def file_name(index: int, prompt: str | None) -> str:
    """`007-a-red-apple.png`"""
    slug = re.sub(r"[\W_]+", "-", (prompt or "").lower()).strip("-")[:40].rstrip("-")
    return "-".join(filter(None, (f"{index:03d}", slug))) + ".png"


def check_finite(image: Float[np.ndarray, "h w c"], name: str) -> None:
    """Raises UserError, in place of a black picture, for values that are not finite."""
    bad = np.count_nonzero(~np.isfinite(image))
    if bad:
        raise UserError(
            f"{name}: {bad:,} of its {image.size:,} values are NaN or infinite; it is not written. "
            "--dtype float32 may help, or a checkpoint of an earlier step."
        )


def write_picture(
    path: epath.Path,
    image: Float[np.ndarray, "h w c"],
    *,
    prompt: str | None,
    settings: Mapping[str, Any],
) -> Image.Image:
    """An 8-bit PNG with the text chunks `prompt` and `imagen_jax`, the settings as JSON.

    Returns the picture at most as large as a grid shows it.
    """
    info = PngInfo()
    if prompt is not None:
        info.add_text("prompt", prompt)
    info.add_text("imagen_jax", json.dumps({"version": version()} | dict(settings)))
    picture = to_pil(image)
    _save(path, picture, pnginfo=info)
    picture.thumbnail((CELLS[1], CELLS[1]))
    return picture


def _save(path: epath.Path, picture: Image.Image, **options: Any) -> None:
    """A PNG at once, as object stores take it."""
    file = io.BytesIO()
    picture.save(file, "png", **options)
    path.write_bytes(file.getvalue())


def write_grid(
    path: epath.Path,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str] | None,
    *,
    per_prompt: int = 1,
) -> None:
    """All pictures on a page with the prompts below them.

    Several of one prompt stand in rows of their own, the prompt below the first.
    """
    cell = int(np.clip(max(pictures[0].size), *CELLS))
    labels = [p if len(p) <= CAPTION else p[: CAPTION - 1] + "…" for p in prompts or ()]
    rows = [("", pictures, labels)]
    if labels and per_prompt > 1:
        rows = [
            ("", pictures[i * per_prompt :][:per_prompt], [label] + [""] * (per_prompt - 1))
            for i, label in enumerate(labels)
        ]
    longest = max(len(row[1]) for row in rows)
    _save(path, labelled_grid(rows, cell=cell, columns=min(COLUMNS, longest)))


@contextlib.contextmanager
def progress_bars(indices: np.ndarray, count: int) -> Iterator[Progress]:
    """The `progress` of `Imagen.sample` as one bar a stage, with the time left.

    `indices` are those of the batch's pictures, of `count` in all.
    """
    first, last = indices[0] + 1, indices[-1] + 1
    label = f"picture {last} of {count}" if first == last else f"pictures {first}-{last} of {count}"
    with contextlib.ExitStack() as stack:
        bars: dict[int, tqdm] = {}

        def progress(unet_number: int, done: int, steps: int) -> None:
            if unet_number not in bars:
                bar = tqdm(total=steps, desc=f"{label}, U-Net {unet_number}", leave=False)
                bars[unet_number] = stack.enter_context(bar)
            bars[unet_number].update(done - bars[unet_number].n)
            if done == steps:
                bars[unet_number].refresh()  # the last update may come too soon to be shown

        yield progress


def version() -> str:
    try:
        return importlib.metadata.version("imagen-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
