"""The demo behind `make demo`, and a second one: small cascades that train on a CPU.

`scenes`: an encoder learns to read captions of coloured shapes, and three stages (8 -> 16 -> 32
pixels) learn to draw them. The stages train side by side, each on its own core, because networks
this small are slower on two. They never see a red triangle, a tenth of all combinations of two
objects, or some numbers of some objects (imagen_jax/data/scenes.py). At the end they draw these,
and the images are judged (docs/quality.md). With --long the second stage first trains only on
objects inside others, in RUN/inside: these are the hardest to see and take the most steps, and from
all scenes they are learned too late.

`bundled`: two stages, 16 -> 32 pixels, memorise 64 captioned emoji. Every caption is drawn beside
the real pictures, and a few new combinations in a separate row.

Either writes RUN/demo.png.

After Ctrl-C, the same command resumes.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import commands
from commands.sampling import progress_bars
from evaluate import composition
from imagen_jax import Pipeline, text
from imagen_jax.data import (
    NEW_COMBINATIONS,
    decode,
    demo_captions,
    labelled_grid,
    open_source,
    scenes,
)
from imagen_jax.errors import UserError
from imagen_jax.presets import RECIPES
from imagen_jax.streams import image_seeds
from train import log, loop, text_encoder
from train.settings import Settings

SEED = 0
COND_SCALE = {"bundled": (2.0, 1.0), "scenes": (2.0, 3.0, 1.0)}  # guidance, by U-Net
PRESET = {"bundled": "demo", "scenes": "scenes"}
LONG = (7.5, 5.6, 5)  # times the steps of the demo, by U-Net
INSIDE = 2  # the stage that --long first trains on "inside", for a third of its steps
INSIDE_LR = 3e-3  # its learning rate in both parts
LONGEST_FIRST = (2, 1, 3)  # stages of scenes, in the order in which they are started
BATCH_SIZE = 35  # images drawn at once
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", choices=PRESET, default="scenes", help="which demo (default: scenes)"
    )
    parser.add_argument(
        "--workdir", type=Path, help="run directory (default: runs/demo, demo-long or emoji)"
    )
    parser.add_argument(
        "--long", action="store_true", help="train on scenes for an hour: 5 to 8 times the steps"
    )
    parser.add_argument("--steps", type=int, nargs="+", help="training steps of each U-Net")
    parser.add_argument(
        "--num-images", type=int, default=100, help="images to judge for each kind of caption"
    )
    for name in ("--only", "--core"):  # a stage of scenes, and where its process runs
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.long and args.data != "scenes":
        parser.error("--long needs --data scenes")
    name = "emoji" if args.data == "bundled" else "demo-long" if args.long else "demo"
    workdir = args.workdir or Path("runs", name)
    recipes = RECIPES[PRESET[args.data]]
    longer = LONG if args.long else (1,) * len(recipes)
    steps = args.steps or [int(x.steps * times) for x, times in zip(recipes, longer, strict=True)]

    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    if len(steps) != len(recipes):
        parser.error(f"--steps has {len(steps)} values for {len(recipes)} U-Nets")
    began = time.monotonic()
    if args.data == "scenes":
        t5 = encoder_folder(workdir)
        if args.only is not None:
            sys.exit(not train_scenes(workdir, t5, args.only, steps, long=args.long))
        for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # a terminal that is closed sends it
            signal.signal(getattr(signal, name), signal.default_int_handler)
        finished = side_by_side(workdir, steps, long=args.long)
    else:
        finished = train_bundled(workdir, steps)
    if not finished:
        print("The same command resumes from there.")
        return
    if args.data == "scenes":
        draw_scenes(workdir, args.num_images)
    else:
        draw_bundled(workdir)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes. Look at {workdir / 'demo.png'}")


def train_bundled(workdir: Path, steps: Sequence[int]) -> bool:
    """Trains one stage after the other; whether they are finished."""
    captions = resources.files("imagen_jax.data").joinpath("bundled/demo_captions.txt")
    return all(
        loop.run(
            settings(workdir, "demo", number, count, captions_from=Path(str(captions))), number
        )
        for number, count in enumerate(steps, 1)
    )


def train_scenes(workdir: Path, t5: Path, number: int, steps: Sequence[int], *, long: bool) -> bool:
    """Trains one stage, with `long` the second one on "inside" first; whether it is finished."""

    def train(folder: Path, count: int, data: str, **more: Any) -> bool:
        return loop.run(
            settings(folder, "scenes", number, count, data=(data,), t5=str(t5), **more), number
        )

    count = steps[number - 1]
    if not (long and number == INSIDE):
        return train(workdir, count, "scenes")
    first, inside = count // 3, workdir / "inside"
    return train(inside, first, "scenes:inside", lr=INSIDE_LR) and train(
        workdir, count - first, "scenes", lr=INSIDE_LR, init_from=inside
    )


def side_by_side(workdir: Path, steps: Sequence[int], *, long: bool) -> bool:
    """Trains the stages in processes of their own, as many at once as there are cores, each on one;
    what a process prints is in RUN/unetN.log. Whether they are finished.

    Raises UserError, with the last line that a process printed, if it failed; ends the others.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    waiting, running = list(LONGEST_FIRST), {}
    bars = {
        number: tqdm(total=count, desc=f"U-Net {number}", unit="step", position=place)
        for place, (number, count) in enumerate(zip(sorted(waiting), steps, strict=True))
    }
    try:
        while waiting or running:
            while waiting and len(running) < len(cores):
                core = next(core for core in cores if core not in running)
                running[core] = start_stage(workdir, waiting.pop(0), steps, core, long=long)
            time.sleep(2)
            for number, done in steps_done(workdir).items():
                bars[number].update(done - bars[number].n)
            for core, (number, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[core]
                if process.returncode:
                    said = (workdir / f"unet{number}.log").read_text().strip().splitlines()
                    raise UserError(f"U-Net {number}: {said[-1] if said else 'failed'}")
        return True
    except KeyboardInterrupt:  # they are interrupted below, and save
        return False
    finally:
        for _, process in running.values():
            process.send_signal(signal.SIGINT)
        for _, process in running.values():
            process.wait()
        for bar in bars.values():
            bar.close()


def start_stage(
    workdir: Path, number: int, steps: Sequence[int], core: int | None, *, long: bool
) -> tuple[int, subprocess.Popen]:
    """The number of a stage, and its process, on one core."""
    counts = [str(count) for count in steps]
    command = [sys.executable, __file__, "--data", "scenes", "--workdir", str(workdir)]
    command += ["--only", str(number), "--steps", *counts]
    command += [] if core is None else ["--core", str(core)]
    command += ["--long"] if long else []
    with (workdir / f"unet{number}.log").open("ab") as said:
        # In a session of its own: Ctrl-C reaches it through us.
        return number, subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def steps_done(workdir: Path) -> dict[int, int]:
    """The steps of each U-Net that are written down, those on "inside" too."""
    done: Counter[int] = Counter()
    for folder in (workdir, workdir / "inside"):
        last: dict[int, int] = {}
        for line in log.read(folder):
            if line.get("kind") == "train":
                last[line["unet"]] = max(last.get(line["unet"], 0), line["step"])
        done.update(last)
    return dict(done)


def settings(workdir: Path, preset: str, number: int, steps: int, **more: Any) -> Settings:
    """The recipe of the preset, down a cosine, and what else is given."""
    return Settings(
        preset=preset,
        workdir=workdir,
        resume=True,
        **dataclasses.asdict(RECIPES[preset][number - 1]) | dict(steps=steps) | more,
        cosine_decay_max_steps=steps,
        seed=SEED,
        log_every=100,
        eval_every=steps,
        save_every=1000,
        sample_every=0,
        keep=1,
    )


def encoder_folder(workdir: Path) -> Path:
    """The encoder of captions, trained if none is there: a cascade is tied to the one it has."""
    folder = workdir / "t5"
    if not (folder / "config.json").is_file():
        encoder, _ = text_encoder.train(text_encoder.Settings(out=folder, seed=SEED))
        text.save_encoder(encoder, folder)
    return folder


def draw_scenes(workdir: Path, num_images: int) -> None:
    """Judges images of captions that were held out, and shows some, guided and not."""
    measured = composition.measure(
        composition.Settings(
            checkpoint=workdir, seed=SEED, cond_scale=COND_SCALE["scenes"], num_images=num_images
        )
    )
    pipeline, rows = Pipeline.load(workdir), []
    for level, title in (
        ("pairs", "colours and shapes never seen together"),
        ("combinations", "combinations never seen"),
        ("counts", "numbers never seen"),
    ):
        chosen, drawn, _ = measured[level]
        places = spread([scene.content for scene in chosen])
        captions = [chosen[i].caption for i in places]
        true = [chosen[i].draw(drawn.shape[1:3]) for i in places]
        rows.append((f"{title}: true", true, []))
        rows.append(("drawn, guided", list(drawn[places]), []))
        rows.append(("drawn, unguided", list(draw(pipeline, captions, 1.0)), captions))
    labelled_grid(rows).save(workdir / "demo.png")


def spread(contents: Sequence[scenes.Content]) -> list[int]:
    """Indices of a row of them, evenly spaced in the order of what they say: each relation and
    colour that many of them name is in it."""
    said = [(content.relation or "", content.kind, content.count) for content in contents]
    order = sorted(range(len(said)), key=said.__getitem__)
    evenly = np.linspace(0, len(order) - 1, min(COLUMNS, len(order))).astype(int)
    return [order[i] for i in evenly]


def draw_bundled(workdir: Path) -> None:
    """Draws every caption that was shown, and a few new ones, and counts the right ones."""
    captions = demo_captions()
    pipeline = Pipeline.load(workdir)
    drawn = draw(pipeline, [*captions, *NEW_COMBINATIONS], COND_SCALE["bundled"])
    real = real_pictures(captions, drawn.shape[1])
    right = nearest(drawn[: len(captions)], real) == np.arange(len(captions))
    show(workdir / "demo.png", captions, real, drawn)
    print(
        f"{right.sum()} of {len(captions)} drawn pictures are nearer to their own real picture "
        "than to any other."
    )


def draw(
    pipeline: Pipeline, prompts: list[str], cond_scale: float | tuple[float, ...]
) -> np.ndarray:
    """One picture a prompt, (n, 32, 32, 3) in [0, 1]: what `python -m sample.text_to_image` draws
    from them, guided by `--cond-scale`."""
    embeddings = pipeline.encode(prompts, batch_size=len(prompts))
    images = pipeline.generate(
        embeddings,
        seeds=image_seeds(SEED, len(prompts)),
        batch_size=BATCH_SIZE,
        cond_scale=cond_scale,
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
