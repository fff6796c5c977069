"""How close samplers come to the exact solution on the demo's cascade, by number of steps.

    make demo-emoji
    python -m benchmarks.samplers --checkpoint runs/emoji --sheet docs/samplers.png

Both stages draw the training captions, with the demo's guidance. A sampler that draws no noise has
one limit per image, given the initial noise: the solution of the probability flow, computed here by
`dpm++3m` with 1,000 steps. The table shows the root mean square distance to it, in levels of 255,
and for all samplers the share of images that are nearest to the picture of their own caption. The
second stage upsamples the solution of the first. Columns are evaluations of the network, so `heun`
has half as many steps.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

import commands
import demo
from imagen_jax.data import demo_captions, labelled_grid
from imagen_jax.pipeline import Embeddings, Pipeline
from imagen_jax.streams import image_seeds

EVALUATIONS = (5, 8, 10, 15, 20, 30, 50, 100)
METHODS = (
    ("ancestral", "t"),
    ("dpm++2m-sde", "log_snr"),
    ("ddim", "t"),
    ("ddim", "log_snr"),
    ("heun", "karras"),
    ("dpm++2m", "t"),
    ("dpm++2m", "log_snr"),
    ("dpm++2m", "karras"),
    ("dpm++3m", "t"),
    ("dpm++3m", "log_snr"),
)
RANDOM = ("ancestral", "dpm++2m-sde")
SOLUTION = dict(sampler="dpm++3m", spacing="log_snr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Measures samplers on a trained demo."""

    checkpoint: Path = Path("runs/emoji")
    """Run directory of the demo."""
    captions: int = 32
    """Number of images that each cell averages."""
    solution_steps: int = 1000
    sheet: Path | None = None
    """PNG sheet of the first captions at every number of evaluations."""


def main() -> None:
    given = tyro.cli(Settings, description=__doc__)
    pipeline = Pipeline.load(given.checkpoint)
    captions = demo_captions()[: given.captions]
    embeddings = pipeline.encode(captions)
    previous, rows = None, []
    for number, size in enumerate(pipeline.config.image_sizes, 1):
        real = demo.real_pictures(demo_captions(), size)

        def draw(steps, number=number, previous=previous, **settings):
            return sample(pipeline, embeddings, number, steps, previous, **settings)

        solution = draw(given.solution_steps, **SOLUTION)
        print(f"\nStage {number}, {size} pixels, {len(captions)} images\n")
        print("| sampler | spacing |" + "".join(f" {n} |" for n in EVALUATIONS))
        print("|---|---|" + "---|" * len(EVALUATIONS))
        for sampler, spacing in METHODS:
            cells, drawn = [], {}
            for n in EVALUATIONS:
                steps = (n + 1) // 2 if sampler == "heun" else n
                drawn[n] = draw(steps, sampler=sampler, spacing=spacing)
                cells.append(cell(drawn[n], solution, real, sampler))
            print(f"| `{sampler}` | {spacing} | " + " | ".join(cells) + " |", flush=True)
            shown = [drawn[n][0] for n in EVALUATIONS]
            rows.append(
                (f"stage {number}: {sampler}, {spacing}", shown, list(map(str, EVALUATIONS)))
            )
        right = np.mean(demo.nearest(solution, real) == np.arange(len(captions)))
        print(f"\nThe solution: {100 * right:.0f} % nearest to their own.")
        rows.append((f"stage {number}: the solution", list(solution[: len(EVALUATIONS)]), []))
        previous = solution
    if given.sheet is not None:
        labelled_grid(rows, cell=64).save(given.sheet)


def sample(
    pipeline: Pipeline,
    embeddings: Embeddings,
    number: int,
    steps: int,
    previous: np.ndarray | None,
    **settings,
) -> np.ndarray:
    """Images of one stage, the same noise for every setting."""
    count = len(embeddings.embeds)
    images = pipeline.generate(
        embeddings,
        seeds=image_seeds(demo.SEED, count),
        batch_size=count,
        per_image={} if previous is None else {"start_image_or_video": previous},
        start_at_unet_number=number,
        stop_at_unet_number=number,
        timesteps=steps,
        cond_scale=demo.COND_SCALE,
        **settings,
    )
    return np.stack([image for _, image in images])


def cell(drawn: np.ndarray, solution: np.ndarray, real: np.ndarray, sampler: str) -> str:
    """`3.1, 97 %`: the distance in levels of 255, and the images nearest to their own picture."""
    right = np.mean(demo.nearest(drawn, real) == np.arange(len(drawn)))
    share = f"{100 * right:.0f} %"
    if sampler in RANDOM:
        return share
    return f"{255 * np.sqrt(np.mean((drawn - solution) ** 2)):.1f}, {share}"


if __name__ == "__main__":
    commands.run(main)
