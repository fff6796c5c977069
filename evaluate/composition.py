"""Measures how well a cascade composes: draws captions about coloured shapes, judges each object.

    python -m evaluate.composition --checkpoint RUN

The cascade must have been trained on `--data scenes`, which never shows three kinds of captions:
new pairs of colour and shape, new combinations of two objects and a relation, new counts. The
fourth kind, `seen`, has combinations from the training set in new places.
`imagen_jax.metrics.composition` judges the images by fixed rules, without a network.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from etils import epath

import commands
from commands.sampling import Sampling, open_pipeline, progress_bars
from imagen_jax import run_config, storage
from imagen_jax.data import labelled_grid, scenes
from imagen_jax.errors import UserError, parse
from imagen_jax.metrics import composition
from imagen_jax.pipeline import Pipeline, repeated
from imagen_jax.streams import image_seeds

SHOWN, COLUMNS = 16, 8  # images of a level on the sheet
HEADS = {
    "right": "all right",
    "bound": "but size, place",
    "objects": "shape",
    "attributes": "and colour",
    "count": "number",
    "relation": "relation",
    "size": "size",
    "place": "place",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """Measures how a cascade trained on scenes draws captions that it was never shown."""

    levels: tuple[Literal[scenes.KINDS], ...] = scenes.KINDS
    """Kinds of captions to draw."""
    num_images: int = 200
    """Images per kind of caption."""
    batch_size: int = 64
    """Images drawn at once. This does not change the images: each has its own seed."""
    out: Path | None = None
    """Folder for composition.json and composition.png. Default: evaluation in the run directory."""

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "num_images")


class Measured(NamedTuple):
    """The scenes of a level, the images drawn for them (n, h, w, 3), and the verdicts."""

    scenes: list[scenes.Scene]
    images: np.ndarray
    verdicts: list[composition.Verdict]

    @property
    def summary(self) -> dict[str, composition.Share]:
        return composition.summary([scene.content for scene in self.scenes], self.verdicts)

    @property
    def by_relation(self) -> dict[str, dict[str, composition.Share]]:
        """The summary for each relation that the captions name."""
        return composition.by_relation([scene.content for scene in self.scenes], self.verdicts)


def main() -> None:
    measure(parse(Settings, prog="python -m evaluate.composition", description=__doc__))


def measure(given: Settings) -> dict[str, Measured]:
    """Draws and judges, by level; prints a table, and writes it with a sheet of images."""
    config = run_config.read(given.run)
    if not config.condition_on_text or config.channels != 3:
        raise UserError(f"{given.run}: needs a cascade with captions and three channels.")
    options, numbers = given.options(config), given.unet_numbers(config)
    pipeline = open_pipeline(given, print, numbers)
    folder = storage.folder(given.out or given.run / "evaluation")
    storage.check_writable(folder)
    measured = judged(pipeline, given, options)
    print(table(measured))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "composition.json", measured, given, options, pipeline)
    rows = [row for level, one in measured.items() for row in sheet_rows(level, one)]
    with (folder / "composition.png").open("wb") as file:
        labelled_grid(rows).save(file, format="PNG")
    print(f"{folder / 'composition.json'}; the images: {folder / 'composition.png'}")
    return measured


def judged(pipeline: Pipeline, given: Settings, options: dict) -> dict[str, Measured]:
    """Draws and judges, by level."""
    measured = {}
    for level in dict.fromkeys(given.levels):
        chosen = scenes.examples(level, given.num_images)
        images = draw(pipeline, chosen, given, options, level)
        verdicts = composition.verdicts([scene.content for scene in chosen], images)
        measured[level] = Measured(chosen, images, verdicts)
    return measured


def draw(
    pipeline: Pipeline, chosen: list[scenes.Scene], given: Settings, options: dict, level: str
) -> np.ndarray:
    """One image per scene, (n, h, w, 3) in [0, 1]; their seeds depend on the level too."""
    captions = [scene.caption for scene in chosen]
    first, of = scenes.KINDS.index(level), len(scenes.KINDS)
    seeds = image_seeds(given.seed, of * len(chosen))[first::of]
    negatives = None
    if given.negative_prompt:
        one = pipeline.encode_negative([given.negative_prompt])
        negatives = repeated(one, len(captions))
    drawn = pipeline.generate(
        pipeline.encode(captions, batch_size=given.batch_size),
        seeds=seeds,
        negatives=negatives,
        batch_size=given.batch_size,
        progress=progress_bars,
        **options,
    )
    return np.stack([image for _, image in drawn])


def table(measured: dict[str, Measured]) -> str:
    """Percentages, for levels and relations within them; `right` is shown with its interval."""
    lines = [["captions", "images", *HEADS.values()]]
    for level, one in measured.items():
        parts = {f"  {relation}": shares for relation, shares in one.by_relation.items()}
        lines += [row(name, shares) for name, shares in ({level: one.summary} | parts).items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def row(name: str, shares: dict[str, composition.Share]) -> list[str]:
    """The cells of a line of the table."""
    right, *others = (shares[field] for field in HEADS)
    interval = f"{100 * right.share:.0f} % ({100 * right.low:.0f}-{100 * right.high:.0f})"
    cells = [f"{100 * one.share:.0f} %" if one.count else "-" for one in others]
    return [name, str(right.count), interval, *cells]


def sheet_rows(level: str, measured: Measured) -> list[tuple]:
    """Rows of the sheet: a true image of each caption, and the drawn one, right or wrong."""
    rows = []
    for i in range(0, min(SHOWN, len(measured.scenes)), COLUMNS):
        chosen, images, verdicts = (part[i : i + COLUMNS] for part in measured)
        true = [scene.draw(images.shape[1:3]) for scene in chosen]
        labels = [
            f"{'right' if verdict.right else 'WRONG'}: {scene.caption}"
            for scene, verdict in zip(chosen, verdicts, strict=True)
        ]
        rows.append((f"{level}: true", true, []))
        rows.append(("drawn", list(images), labels))
    return rows


def write(
    path: epath.Path,
    measured: dict[str, Measured],
    given: Settings,
    options: dict,
    pipeline: Pipeline,
) -> None:
    """Writes the results and what they were measured with."""

    def plain(shares: dict[str, composition.Share]) -> dict[str, dict]:
        return {field: share._asdict() for field, share in shares.items()}

    data = {
        "checkpoint": str(given.checkpoint),
        "checkpoint_steps": {f"unet{n}": read.step for n, read in pipeline.choices.items()},
        "weights": {f"unet{n}": read.weights for n, read in pipeline.choices.items()},
        "seed": given.seed,
        "options": options | {"negative_prompt": given.negative_prompt},
        "levels": {level: plain(one.summary) for level, one in measured.items()},
        "relations": {
            level: {relation: plain(shares) for relation, shares in one.by_relation.items()}
            for level, one in measured.items()
            if one.by_relation
        },
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    commands.run(main)
