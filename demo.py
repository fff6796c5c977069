"""The demo behind `make demo`: a small cascade learns 64 captioned pictures and draws them.

Trains both stages on the CPU, samples every caption it was shown and, in a separate row, a few
new combinations, and writes everything beside the real pictures as runs/demo/demo.png. Stopped by
Ctrl-C, it resumes when started again.
"""

import argparse
import dataclasses
import time
from importlib import resources
from pathlib import Path

import numpy as np

import commands
from commands.sampling import progress_bars
from imagen_jax import Pipeline
from imagen_jax.data import NEW_COMBINATIONS, decode, demo_captions, labelled_grid, open_source
from imagen_jax.presets import RECIPES
from imagen_jax.streams import image_seeds
from train import loop
from train.settings import Settings

SEED = 0
COND_SCALE = (2.0, 1.0)  # guidance weights of base and super-resolution
BATCH_SIZE = 35  # pictures drawn at once
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    base, super_res = RECIPES["demo"]
    parser.add_argument("--base-steps", type=int, default=base.steps)
    parser.add_argument("--super-res-steps", type=int, default=super_res.steps)
    args = parser.parse_args()

    began = time.monotonic()
    for number, steps in ((1, args.base_steps), (2, args.super_res_steps)):
        if not loop.run(settings(args.workdir, number, steps), number):
            print("`make demo` resumes from there.")
            return
    captions = demo_captions()
    drawn = draw(args.workdir, [*captions, *NEW_COMBINATIONS])
    real = real_pictures(captions, drawn.shape[1])
    right = nearest(drawn[: len(captions)], real) == np.arange(len(captions))
    path = args.workdir / "demo.png"
    show(path, captions, real, drawn)
    print(
        f"{right.sum()} of {len(captions)} drawn pictures are nearer to their own real picture "
        f"than to any other. {(time.monotonic() - began) / 60:.1f} minutes."
    )
    print(f"Look at {path}")


def settings(workdir: Path, number: int, steps: int) -> Settings:
    """The recipe of the preset, down a cosine."""
    captions = resources.files("imagen_jax.data").joinpath("bundled/demo_captions.txt")
    return Settings(
        preset="demo",
        workdir=workdir,
        resume=True,
        captions_from=Path(str(captions)),
        **dataclasses.asdict(RECIPES["demo"][number - 1]) | dict(steps=steps),
        cosine_decay_max_steps=steps,
        seed=SEED,
        log_every=50,
        eval_every=steps,
        save_every=500,
        sample_every=0,
        keep=1,
    )


def draw(workdir: Path, prompts: list[str]) -> np.ndarray:
    """One picture a prompt, (n, 32, 32, 3) in [0, 1]: what `python -m sample.text_to_image
    --cond-scale 2 1` draws from them."""
    pipeline = Pipeline.load(workdir)
    embeddings = pipeline.encode(prompts, batch_size=len(prompts))
    images = pipeline.generate(
        embeddings,
        seeds=image_seeds(SEED, len(prompts)),
        batch_size=BATCH_SIZE,
        cond_scale=COND_SCALE,
        progress=progress_bars,
    )
    return np.stack([image for _, image in images])


def real_pictures(captions: list[str], size: int) -> np.ndarray:
    source = open_source("bundled", split="train").with_captions(captions)
    return np.stack([decode(record.image, image_size=size) for record in source]) / np.float32(255)


def nearest(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """For each drawn picture the index of the real one at the smallest mean squared distance."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (drawn, real))
    distances = (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)
    return distances.argmin(1)


def show(path: Path, captions: list[str], real: np.ndarray, drawn: np.ndarray) -> None:
    rows = []
    for i in range(0, len(captions), COLUMNS):
        part = slice(i, i + COLUMNS)
        rows += [("real", list(real[part]), []), ("drawn", list(drawn[part]), captions[part])]
    rows.append(("new, nothing claimed", list(drawn[len(captions) :]), list(NEW_COMBINATIONS)))
    labelled_grid(rows).save(path)


if __name__ == "__main__":
    commands.run(main)
