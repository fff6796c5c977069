"""Draws one prompt under several settings, on one labelled sheet.

    python -m sample.grid --checkpoint RUN --prompt "red apple" --cond-scale 1 3 5 --steps 5 10 20
    python -m sample.grid --checkpoint RUN --prompt "red apple" --sampler ddim heun --steps 5 20

Give one or two of --sampler, --cond-scale and --steps several values: the first of them makes the
rows, the second the columns. A value applies to every U-Net, as in sample.text_to_image, and all
cells have the same seed, so that they differ only by the settings.
"""

import dataclasses
import itertools
import json
from typing import Any, Literal

import numpy as np
import tyro

import commands
from commands.sampling import NotAFlag, progress_bars
from imagen_jax.data import labelled_grid
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import UserError, parse
from sample import outputs, settings
from sample.drawing import Drawing, Job, read_prompts

AXES = ("sampler", "cond_scale", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Draws one prompt under several settings, on one labelled sheet."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw, one text."""
    sampler: tuple[Literal["cascade", *SAMPLERS], ...] = ()
    """Samplers to compare, or the one to use. Default: that of sample.text_to_image."""
    cond_scale: tuple[float, ...] | None = None
    """Guidance weights to compare, or the one to use; 1 is unguided."""
    steps: tuple[int, ...] | None = None
    """Numbers of denoising steps to compare, or the one to use."""
    format: Literal["png"] = "png"
    """File format of the sheet."""
    save_stages: NotAFlag[bool] = False

    @property
    def samplers_given(self) -> tuple[str | None, ...]:
        return self.sampler


def main() -> None:
    given = parse(Settings, prog="python -m sample.grid", description=__doc__)
    rows, columns = axes(given)
    chosen = [[cell(given, row | column) for column in columns] for row in rows]
    drawing = Drawing.open("grid", chosen[0][0])
    prompts = read_prompts(given, drawing.config)
    if prompts is not None and len(prompts) > 1:
        raise UserError(f"--prompt: give one text for all cells, not {len(prompts)}.")
    job = Job(
        seed=given.seed,
        prompt=prompts[0] if prompts else None,
        negative_prompt=given.negative_prompt,
    )
    options = [[one.options(drawing.config) for one in row] for row in chosen]
    images = draw_cells(drawing, job, options)
    recipe = drawing.recipe() | dataclasses.asdict(job) | {"rows": rows, "columns": columns}
    recipe["size"] = list(images[0][0].shape[:2])
    write(drawing, images, rows, columns, recipe)


def axes(given: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Values of the rows and of the columns. Raises UserError if no setting varies, or three do."""
    several = [name for name in AXES if len(getattr(given, name) or ()) > 1]
    if not 1 <= len(several) <= 2:
        flags = ", ".join(map(commands.flag, AXES))
        raise UserError(f"one or two of {flags} must have several values; {len(several)} have.")
    found = [[{name: value} for value in getattr(given, name)] for name in several]
    return ([{}], found[0]) if len(found) == 1 else (found[0], found[1])


def cell(given: Settings, values: dict[str, Any]) -> settings.Settings:
    """The settings of a cell, as sample.text_to_image takes them."""
    common = {
        field.name: getattr(given, field.name) for field in dataclasses.fields(settings.Settings)
    }
    common["sampler"] = given.sampler[0] if given.sampler else None
    for name, value in values.items():
        common[name] = value if name == "sampler" else (value,)
    if common["sampler"] != "ddim":  # --eta is only for the cells with ddim
        common["eta"] = 0.0
    return settings.Settings(**common)


def draw_cells(
    drawing: Drawing, job: Job, options: list[list[dict[str, Any]]]
) -> list[list[np.ndarray]]:
    """One image per cell, with the same text and seed."""
    embeddings, negatives = drawing.encode([job])

    def draw(own: dict[str, Any]) -> np.ndarray:
        ((_, image),) = drawing.pipeline.generate(
            embeddings,
            negatives=negatives,
            seeds=[job.seed],
            progress=progress_bars,
            batch_size=1,
            **own,
        )
        outputs.check_finite(image, f"the image of {own['timesteps'][0]} steps")
        return drawing.safe(image)

    return [[draw(own) for own in row] for row in options]


def label(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def write(
    drawing: Drawing,
    images: list[list[np.ndarray]],
    rows: list[dict[str, Any]],
    columns: list[dict[str, Any]],
    recipe: dict[str, Any],
) -> None:
    """Writes the sheet: each row is titled with its value, each cell with its column's."""
    labels = [label(column) for column in columns]
    side = int(np.clip(max(images[0][0].shape[:2]), *outputs.CELLS))
    titled = [(label(row), cells, labels) for row, cells in zip(rows, images, strict=True)]
    sheet = np.asarray(labelled_grid(titled, cell=side, columns=len(columns)))
    path = outputs.free_path(drawing.folder, recipe["prompt"], recipe["seed"], "png")
    drawing.folder.mkdir(parents=True, exist_ok=True)
    outputs.write_image(path, sheet, recipe if drawing.given.metadata else None, sign=drawing.sign)
    if drawing.given.json:
        print(json.dumps({"file": str(path)} | recipe, ensure_ascii=False), flush=True)
    count = len(list(itertools.chain(*images)))
    drawing.say(f"{count} images on one sheet: {path}")
    drawing.report_hooks()


if __name__ == "__main__":
    commands.run(main)
