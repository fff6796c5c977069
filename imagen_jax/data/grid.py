"""A page of pictures: titled rows, with a caption under each picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imagen_jax.errors import UserError
from imagen_jax.pixels import to_pil

Picture = Image.Image | np.ndarray
Row = tuple[str, Sequence[Picture], Sequence[str]]  # title, pictures, a caption for each (or none)

Font = ImageFont.FreeTypeFont

GAP = 4  # pixels
MARGIN = 12


def labelled_grid(
    rows: Sequence[Row], *, cell: int = 96, font_size: int = 12, columns: int | None = None
) -> Image.Image:
    """Titled rows of pictures on white, each picture's longer side scaled to `cell` pixels.

    Pictures keep their aspect: upsampled by nearest neighbour, downsampled with antialiasing. The
    columns are `cell` wide, and the rows under a title as high as its tallest picture. A row longer
    than `columns` continues below under the same title. Captions are wrapped to `cell`; an empty
    list leaves them out.
    """
    font = ImageFont.load_default(size=font_size)
    heading = ImageFont.load_default(size=font_size + 4)
    for title, pictures, captions in rows:
        if captions and len(captions) != len(pictures):
            raise UserError(f"{title!r}: {len(captions)} captions for {len(pictures)} pictures")
    columns = columns or max((len(pictures) for _, pictures, _ in rows), default=1)
    bands = [_band(row, cell, columns, font, heading) for row in rows]
    width = max((band.width for band in bands), default=1) + 2 * MARGIN
    page = Image.new("RGB", (width, sum(band.height for band in bands) + 2 * MARGIN), "white")
    top = MARGIN
    for band in bands:
        page.paste(band, (MARGIN, top))
        top += band.height
    return page


def _band(row: Row, cell: int, columns: int, font: Font, heading: Font) -> Image.Image:
    """One title with its pictures and captions, as a strip of the page."""
    title, pictures, captions = row
    fitted = [_fit(_on_white(picture), cell) for picture in pictures]
    cell_height = max((picture.height for picture in fitted), default=cell)
    labels = [_wrap(caption, cell, font) for caption in captions] or [""] * len(pictures)
    line = sum(font.getmetrics()) + 1
    text_height = line * max((label.count("\n") + 1 for label in labels if label), default=0)
    step = cell_height + text_height + 2 * GAP
    top = sum(heading.getmetrics()) + 2 * GAP if title else 0
    lines = -(-len(pictures) // columns)
    width = max(columns * (cell + GAP) - GAP, int(heading.getlength(title)) + 1)
    band = Image.new("RGB", (width, top + lines * step + 2 * GAP), "white")
    draw = ImageDraw.Draw(band)
    draw.text((0, 0), title, fill="black", font=heading)
    for i, (picture, label) in enumerate(zip(fitted, labels, strict=True)):
        left, upper = i % columns * (cell + GAP), top + i // columns * step
        inset = (cell - picture.width) // 2, (cell_height - picture.height) // 2
        band.paste(picture, (left + inset[0], upper + inset[1]))
        middle = left + cell / 2
        for number, words in enumerate(label.split("\n")):
            at = (middle - font.getlength(words) / 2, upper + cell_height + GAP / 2 + number * line)
            draw.text(at, words, fill="black", font=font)
    return band


def _on_white(picture: Picture) -> Image.Image:
    picture = picture if isinstance(picture, Image.Image) else to_pil(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB")


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Longer side to `cell`, aspect kept: nearest neighbour upwards, antialiased downwards."""
    scale = cell / max(picture.size)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), how)


def _wrap(caption: str, width: int, font: Font) -> str:
    """Break a caption into lines of at most `width` pixels, inside a word where necessary."""
    lines = [""]
    for word in caption.split():
        while word:
            line = f"{lines[-1]} {word}".strip()
            if font.getlength(line) <= width:
                lines[-1], word = line, ""
            elif lines[-1]:
                lines.append("")
            else:
                fits = max(1, sum(font.getlength(word[: n + 1]) <= width for n in range(len(word))))
                lines[-1], word = word[:fits], word[fits:]
                if word:
                    lines.append("")
    return "\n".join(lines)
