"""Shows what is in a source before it is trained on.

    python -m imagen_jax.data.inspect SRC --sizes 64 256

Prints counts, sizes, aspect ratios, caption lengths in tokens, images that cannot be read and
duplicates, and draws a labelled sheet of what the trainer sees at each size.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from imagen_jax import text
from imagen_jax.data.grid import labelled_grid
from imagen_jax.data.images import decode
from imagen_jax.data.records import Record, Source
from imagen_jax.data.sources import Opening
from imagen_jax.data.written import shown
from imagen_jax.errors import UserError, parse, run
from imagen_jax.text.tokenizer import load_tokenizer

RATIOS = (1 / 2, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 2)  # height to width
BAR_INTERVAL = 1.0  # seconds between updates of the bar
NAMED = 5
SHOWN = 8
CELL = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Opening):
    """Shows what is in a source before it is trained on."""

    source: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The source or sources, as for training's --data."""
    data: tyro.conf.Suppress[tuple[str, ...]] = ()
    sizes: tuple[int, ...] = (64,)
    """Image sizes of the stages, in pixels."""
    limit: int = 2000
    """Number of records to look at, spread over the set. 0: all."""
    out: Path = Path("inspect.png")
    """File for the sheet; what is printed is also written to a .json beside it."""

    def __post_init__(self):
        if not self.source:
            raise UserError("name a source, as for --data in training.")
        if min(self.sizes, default=0) < 1 or self.limit < 0:
            raise UserError("--sizes must be positive, and --limit 0 or more.")
        if self.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"--out {self.out}: give the name of an image file, such as sheet.png.")
        if not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: its folder does not exist.")


@dataclasses.dataclass
class Found:
    """What was found in the records."""

    heights: list[int] = dataclasses.field(default_factory=list)
    widths: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    small: Counter = dataclasses.field(default_factory=Counter)  # by the stage's size
    no_caption: int = 0
    images: Counter = dataclasses.field(default_factory=Counter)  # by hash
    captions: Counter = dataclasses.field(default_factory=Counter)


def main() -> None:
    given = parse(Settings, prog="python -m imagen_jax.data.inspect", description=__doc__)
    source = dataclasses.replace(given, data=given.source).open()
    numbers = np.arange(len(source))
    if given.limit and len(source) > given.limit:
        numbers = np.unique(np.linspace(0, len(source) - 1, given.limit).astype(int))
    numbers = numbers.tolist()
    found = look(source, numbers, given.sizes)
    report = summary(source, found, len(numbers))
    print("\n".join(lines(report)))
    rows = sheet(source, numbers, given.sizes)
    if rows:
        labelled_grid(rows, cell=CELL).save(given.out)
        print(given.out)
    given.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


def look(source: Source, numbers: Sequence[int], sizes: Sequence[int]) -> Found:
    """Reads and decodes each of the records once."""
    found, tokenizer = Found(), load_tokenizer()
    for i in tqdm(numbers, "records", unit="image", mininterval=BAR_INTERVAL):
        try:
            record = source[i]
            image = record.image
            if isinstance(image, bytes):
                found.images[hashlib.blake2b(image, digest_size=16).digest()] += 1
            decode(image, image_size=min(sizes), upsample=True)
            if not callable(image):
                height, width = source.size(i)
                found.heights.append(height)
                found.widths.append(width)
                found.small += Counter(size for size in sizes if min(height, width) < size)
        except UserError as error:
            found.unreadable[source.key(i)] = str(error)
            continue
        try:
            found.captions.update(record.captions)
            for caption in record.captions:
                found.tokens.append(len(tokenizer.encode(text.valid(caption)).ids))
        except UserError:
            found.no_caption += 1
    return found


def summary(source: Source, found: Found, looked_at: int) -> dict[str, Any]:
    """What is printed, as JSON-ready values."""
    heldout = int(source.heldout[source.rows].sum())
    about: dict[str, Any] = {
        "source": source.name,
        "records": len(source),
        "heldout": heldout,
        "train": len(source) - heldout,
        "left_out": dict(Counter(why.partition(":")[0] for why in source.left_out.values())),
        "notes": list(source.notes),
        "looked_at": looked_at,
        "unreadable": {shown(key): why for key, why in found.unreadable.items()},
        "without_caption": found.no_caption,
        "duplicate_images": sum(found.images.values()) - len(found.images),
        "repeated_captions": sum(found.captions.values()) - len(found.captions),
    }
    if found.heights:
        about["height"], about["width"] = spread(found.heights), spread(found.widths)
        about["smaller_than"] = {str(size): n for size, n in sorted(found.small.items())}
        ratios = np.log(np.array(found.heights) / np.array(found.widths))
        nearest = np.abs(ratios[:, None] - np.log(RATIOS)).argmin(1)
        about["height_to_width"] = {
            f"{ratio:.2f}": int((nearest == i).sum()) for i, ratio in enumerate(RATIOS)
        }
    if found.tokens:
        about["tokens"] = spread(found.tokens)
        about["cut_off"] = int((np.array(found.tokens) > 256).sum())
    return about


def spread(values: Sequence[int]) -> dict[str, int]:
    names = ("min", "5 %", "median", "95 %", "max")
    return {
        name: int(value)
        for name, value in zip(names, np.percentile(values, (0, 5, 50, 95, 100)), strict=True)
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    yield f"{report['source']}: {report['records']:,} records, {report['heldout']:,} held out"
    yield from report["notes"]
    for why, count in report["left_out"].items():
        yield f"left out: {count:,} {why}"
    if report["looked_at"] < report["records"]:
        yield f"of {report['looked_at']:,} records, spread over the set (--limit):"
    for name in ("height", "width"):
        if name in report:
            yield f"{name:<16}{_row(report[name])} pixels"
    for size, count in report.get("smaller_than", {}).items():
        yield f"smaller than {size}: {count:,} (left out, or --small upsample)"
    if "height_to_width" in report:
        yield f"height : width  {_row(report['height_to_width'])}"
    if "tokens" in report:
        cut = report["cut_off"]
        more = f"; {cut:,} captions are cut at 256" if cut else ""
        yield f"tokens          {_row(report['tokens'])}{more}"
    yield f"without caption {report['without_caption']:,}"
    images, captions = report["duplicate_images"], report["repeated_captions"]
    yield f"duplicates      {images:,} images, byte for byte; {captions:,} captions"
    yield f"unreadable      {len(report['unreadable']):,}"
    for key, why in list(report["unreadable"].items())[:NAMED]:
        yield f"    {key}: {why}"


def _row(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def sheet(source: Source, numbers: Sequence[int], sizes: Sequence[int]) -> list:
    """Rows of the sheet: the same images at each size, as the trainer sees them."""
    chosen: list[Record] = []
    for i in numbers[:: max(1, len(numbers) // (4 * SHOWN))]:
        try:
            record = source[i]
            decode(record.image, image_size=max(sizes))
        except UserError:
            continue
        chosen.append(record)
        if len(chosen) == SHOWN:
            break
    captions = [record.caption or "(no caption)" for record in chosen]
    return [
        (f"{size} pixels", [decode(record.image, image_size=size) for record in chosen], captions)
        for size in (sizes if chosen else ())
    ]


if __name__ == "__main__":
    run(main)
