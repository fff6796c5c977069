"""Measures how sampling settings affect quality: a table, and a page with curves and a sheet.

    python -m evaluate.report --checkpoint RUN --html report.html
    python -m evaluate.report --checkpoint RUN --inception FILE   # FID too

The cascade must have been trained on `--data scenes`. Starting from the given settings
(`--cond-scale`, `--steps`, `--sampler`), one is varied at a time: the guidance weight of the base,
the steps of the base, the sampler. Every row draws the same captions from the same seeds, and its
images are judged as in `evaluate.composition`. With `--inception` each row also has the FID of its
images against true scenes of the same captions; with so few images it is comparable only within
the table.
"""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import commands
from commands.sampling import NotAFlag, open_pipeline
from evaluate import composition, score
from imagen_jax import run_config, storage
from imagen_jax.data import labelled_grid
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import UserError, parse
from imagen_jax.metrics import fid
from imagen_jax.metrics.composition import Share
from imagen_jax.pixels import to_uint8

SHOWN = 4  # images per kind and row on the sheet
WIDTH, HEIGHT, EDGE = 560, 280, 44  # of a curve, in pixels
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#7f8c8d")

Row = tuple[str, str, dict[str, composition.Measured], float | None]  # what varies, its value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(composition.Settings):
    """Measures how guidance, steps and samplers affect what a cascade draws."""

    num_images: int = 50
    """Images of each kind and row."""
    weights_of_guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Guidance weights of the base to try."""
    numbers_of_steps: tuple[int, ...] = (5, 10, 20, 40)
    """Numbers of steps of the base to try."""
    samplers: tuple[Literal[*SAMPLERS], ...] = ("dpm++2m", "dpm++3m", "ddim", "heun", "ancestral")
    """Samplers to try, of all U-Nets."""
    inception: Path | None = None
    """Weights of the Inception network, as in evaluate.score, to compute FID."""
    html: Path | None = None
    """File for the page. Default: report.html in the run's evaluation folder."""
    out: NotAFlag[Path | None] = None

    @property
    def samplers_given(self) -> tuple[str | None, ...]:
        return (self.sampler, *self.samplers)


def main() -> None:
    given = parse(Settings, prog="python -m evaluate.report", description=__doc__)
    config = run_config.read(given.run)
    if not config.condition_on_text or config.channels != 3:
        raise UserError(f"{given.run}: needs a cascade with captions and three channels.")
    page = storage.folder(given.html or given.run / "evaluation" / "report.html")
    storage.check_writable(page.parent)
    pipeline = open_pipeline(given, print, given.unet_numbers(config))
    network = None if given.inception is None else score.compiled(given.inception)
    rows = []
    for name, value, changed in variations(given, given.options(config)):
        print(f"{name} {value}:")
        measured = composition.judged(pipeline, changed, changed.options(config))
        rows.append(
            (name, value, measured, None if network is None else distance(measured, network))
        )
        print(composition.table(measured))
    text = table(rows)
    print(text)
    page.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(page, render(given, rows))
    about = [{"varied": n, "value": v, "fid": d, "right": right(m)} for n, v, m, d in rows]
    storage.write_text(page.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    print(page)


def variations(given: Settings, options: dict[str, Any]) -> list[tuple[str, str, Settings]]:
    """What varies, its value, and the settings: those of the other U-Nets stay as they are."""
    scales, steps = (np.ravel(options[name]).tolist() for name in ("cond_scale", "timesteps"))
    found: list[tuple[str, str, Settings]] = []
    for weight in given.weights_of_guidance:
        changed = dataclasses.replace(given, cond_scale=(weight, *scales[1:]))
        found.append(("guidance", f"{weight:g}", changed))
    for count in given.numbers_of_steps:
        changed = dataclasses.replace(given, steps=(count, *steps[1:]))
        found.append(("steps", str(count), changed))
    for name in given.samplers:
        found.append(("sampler", name, dataclasses.replace(given, sampler=name)))
    return found


def distance(measured: dict[str, composition.Measured], network: Callable) -> float:
    """FID between the drawn images and true scenes of the same captions."""
    drawn = (image for one in measured.values() for image in one.images)
    true = (scene.draw(one.images.shape[1:3]) for one in measured.values() for scene in one.scenes)
    pairs = (map(to_uint8, drawn), true)
    one, two = (fid.statistics([score.features_of(images, network, 32)]) for images in pairs)
    return fid.fid(one, two)


def right(measured: dict[str, composition.Measured]) -> dict[str, Share]:
    return {level: one.summary["right"] for level, one in measured.items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown: the share of images that are completely right, by kind of caption."""
    levels = list(rows[0][2])
    heads = ["", *levels] + (["FID"] if rows[0][3] is not None else [])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, value, measured, found in rows:
        shares = right(measured).values()
        cells = [f"{100 * s.share:.0f} % ({100 * s.low:.0f}-{100 * s.high:.0f})" for s in shares]
        cells += [] if found is None else [f"{found:.1f}"]
        lines.append(f"| {name} {value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(given: Settings, rows: Sequence[Row]) -> str:
    """The page, complete in one file."""
    title = f"Effect of sampling settings: {html.escape(str(given.checkpoint))}"
    parts = [f"<h1>{title}</h1>", f"<p>{given.num_images} images per kind and row; seed "]
    parts.append(f"{given.seed}. Bars: 95 % intervals of the share that is completely right.</p>")
    for name in dict.fromkeys(row[0] for row in rows):
        chosen = [row for row in rows if row[0] == name]
        parts += [f"<h2>By {name}</h2>", curve(chosen)]
        if chosen[0][3] is not None and name == "guidance":
            parts += ["<h2>FID against composition, by guidance</h2>", trade_off(chosen)]
        parts += [table_html(chosen), sheet(chosen)]
    style = "body{font:15px sans-serif;margin:2em;max-width:60em}td,th{padding:.2em .8em}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style>{''.join(parts)}</html>\n"
    )


def table_html(rows: Sequence[Row]) -> str:
    head, _, *body = (
        [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
        for line in table(rows).splitlines()
    )
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in line) for line in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def curve(rows: Sequence[Row]) -> str:
    """The shares with their intervals, one line per kind of caption."""
    values = [value for _, value, _, _ in rows]
    at = np.linspace(EDGE + 20, WIDTH - 150, len(rows))
    drawn = []
    for level, colour in zip(rows[0][2], COLOURS, strict=False):
        shares = [right(measured)[level] for _, _, measured, _ in rows]
        points = [(x, height(share.share)) for x, share in zip(at, shares, strict=True)]
        drawn.append(line(points, colour))
        drawn += [
            f'<path d="M{x:.0f} {height(s.low):.0f}V{height(s.high):.0f}" stroke="{colour}"/>'
            for x, s in zip(at, shares, strict=True)
        ]
        drawn.append(words(WIDTH - 140, points[-1][1] + 4, level, colour))
    drawn += [words(x - 10, HEIGHT - 8, value) for x, value in zip(at, values, strict=True)]
    drawn += [words(0, height(share) + 4, f"{100 * share:.0f} %") for share in (0, 0.5, 1)]
    return svg(drawn)


def trade_off(rows: Sequence[Row]) -> str:
    """FID (x axis) and the mean share that is completely right (y axis) per guidance weight."""
    found = [row[3] for row in rows]
    low, high = min(found), max(found)
    span = max(high - low, 1e-9)
    points = [
        (
            EDGE + 20 + (row[3] - low) / span * (WIDTH - 2 * EDGE - 60),
            height(np.mean([share.share for share in right(row[2]).values()])),
        )
        for row in rows
    ]
    drawn = [line(points, COLOURS[0])]
    drawn += [words(x + 5, y - 5, row[1]) for (x, y), row in zip(points, rows, strict=True)]
    drawn += [
        words(EDGE, HEIGHT - 8, f"FID {low:.0f}"),
        words(WIDTH - 90, HEIGHT - 8, f"{high:.0f}"),
    ]
    drawn += [words(0, height(share) + 4, f"{100 * share:.0f} %") for share in (0, 0.5, 1)]
    return svg(drawn)


def height(share: float) -> float:
    return HEIGHT - EDGE - share * (HEIGHT - EDGE - 16)


def line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>' for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'


def words(x: float, y: float, text: str, colour: str = "#333") -> str:
    text = html.escape(text)
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="12" fill="{colour}">{text}</text>'


def svg(parts: Sequence[str]) -> str:
    frame = f'<path d="M{EDGE} 16V{HEIGHT - EDGE}H{WIDTH - 10}" fill="none" stroke="#999"/>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}">{frame}{"".join(parts)}</svg>'


def sheet(rows: Sequence[Row]) -> str:
    """The first captions of each kind, drawn by each row, below what they should look like."""
    first = rows[0][2]
    scenes = [scene for one in first.values() for scene in one.scenes[:SHOWN]]
    size = next(iter(first.values())).images.shape[1:3]
    captions = [scene.caption for scene in scenes]
    lines: list[Any] = [("true", [scene.draw(size) for scene in scenes], captions)]
    for name, value, measured, _ in rows:
        drawn = [image for one in measured.values() for image in one.images[:SHOWN]]
        lines.append((f"{name} {value}", drawn, []))
    file = io.BytesIO()
    labelled_grid(lines, cell=64, font_size=9).save(file, format="png")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


if __name__ == "__main__":
    commands.run(main)
