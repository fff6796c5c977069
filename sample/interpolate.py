"""Draws an animation from one prompt to the next.

    python -m sample.interpolate --checkpoint RUN --prompt "red apple" --prompt "pear" --frames 16
    python -m sample.interpolate --checkpoint RUN --prompt A --prompt B --prompt C --format webp \\
        --fps 12 --save-frames

Every prompt has its own seed. Between two prompts the noise of every stage is interpolated
spherically, so that its level stays the same, and the text embeddings linearly. Deterministic
samplers, such as the default, give the smoothest transitions. A cascade without captions goes from
seed to seed. Writes a GIF or an animated WebP; to get an MP4, run `ffmpeg -i a.gif a.mp4`.
"""

import dataclasses
import json
import sys
from typing import Any, Literal

import numpy as np
import tyro

import commands
from commands.sampling import NotAFlag, progress_bars
from imagen_jax.errors import UserError, parse
from imagen_jax.pipeline import Embeddings
from imagen_jax.pixels import to_pil
from imagen_jax.streams import image_seeds, seed_keys
from sample import outputs, settings
from sample.drawing import Drawing, Job, read_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Draws an animation from one prompt to the next."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw first; repeat the flag for each prompt that follows."""
    frames: int = 16
    """Total number of frames, including those of the first and the last prompt."""
    fps: float = 8.0
    """Frames a second."""
    format: Literal["gif", "webp"] = "gif"
    """GIF has 256 colours; WebP has full colour and is lossless."""
    save_frames: bool = False
    """Also writes every frame as a PNG."""
    save_stages: NotAFlag[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.fps <= 50:
            raise UserError(f"--fps {self.fps:g} must be above 0 and at most 50.")

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "frames")


def main() -> None:
    given = parse(Settings, prog="python -m sample.interpolate", description=__doc__)
    drawing = Drawing.open("interpolate", given)
    prompts = read_prompts(given, drawing.config)
    if prompts is not None and len(prompts) < 2:
        raise UserError('--prompt: give two or more, as --prompt "an apple" --prompt "a pear".')
    stops = prompts or [None, None]
    if given.frames < len(stops):
        raise UserError(f"--frames {given.frames}: must be at least {len(stops)}, one per prompt.")
    seeds = image_seeds(given.seed, len(stops))
    jobs = [
        Job(seed=seed, prompt=prompt, negative_prompt=given.negative_prompt)
        for seed, prompt in zip(seeds, stops, strict=True)
    ]
    images = draw_frames(drawing, jobs)
    recipe = drawing.recipe() | {"frames": given.frames, "fps": given.fps, "seeds": seeds}
    recipe |= {"prompt": " -> ".join(prompts or []) or None, "prompts": prompts}
    recipe |= {"seed": given.seed, "negative_prompt": given.negative_prompt}
    write(drawing, images, recipe)


def places(stops: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """For each frame the stop before it, and how far it is on the way to the next, in [0, 1]."""
    at = np.linspace(0, stops - 1, frames)
    before = np.minimum(at.astype(int), stops - 2)
    return before, (at - before).astype(np.float32)


def between(embeddings: Embeddings, before: np.ndarray, mix: np.ndarray) -> Embeddings:
    """Embeddings between a stop and the next, with the tokens of both; at a stop only its own."""
    embeds, masks = (np.asarray(part) for part in embeddings)
    first, second = masks[before], masks[before + 1]
    t = mix[:, None, None]
    found = (1 - t) * embeds[before] * first[..., None]
    found += t * embeds[before + 1] * second[..., None]
    kept = (first & (mix[:, None] < 1)) | (second & (mix[:, None] > 0))
    return Embeddings(found.astype(np.float32), kept)


def draw_frames(drawing: Drawing, jobs: list[Job]) -> list[np.ndarray]:
    """The frames of the last stage, float in [0, 1]."""
    before, mix = places(len(jobs), drawing.given.frames)
    embeddings, negatives = drawing.encode(jobs)
    if negatives is not None:
        negatives = Embeddings(*(part[before] for part in negatives))
    seeds = np.array([job.seed for job in jobs])
    drawn = drawing.pipeline.generate(
        None if embeddings is None else between(embeddings, before, mix),
        negatives=negatives,
        seeds=seeds[before].tolist(),
        per_image={"other_key": seed_keys(seeds[before + 1].tolist()), "mix": mix},
        batch_size=drawing.given.batch_size,
        progress=progress_bars,
        **drawing.options,
    )
    try:
        return [drawing.safe(image) for _, image in drawn]
    except KeyboardInterrupt:
        sys.exit("stopped: nothing is written.")


def write(drawing: Drawing, images: list[np.ndarray], recipe: dict[str, Any]) -> None:
    given, folder = drawing.given, drawing.folder
    recipe["size"] = list(images[0].shape[:2])
    path = outputs.free_path(folder, recipe["prompt"], given.seed, given.format)
    for number, image in enumerate(images, 1):
        outputs.check_finite(image, f"frame {number} of {path.name}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = recipe if given.metadata else None
    outputs.write_animation(
        path, [to_pil(image) for image in images], kept, given.fps, sign=drawing.sign
    )
    if given.save_frames:
        for number, image in enumerate(images, 1):
            own = kept and kept | {"frame": number}
            frame = outputs.free_path(folder, f"{path.stem}-frame", number, "png")
            outputs.write_image(frame, image, own, sign=drawing.sign)
    if given.json:
        print(json.dumps({"file": str(path)} | recipe, ensure_ascii=False), flush=True)
    drawing.say(f"{len(images)} frames: {path}")
    drawing.report_hooks()


if __name__ == "__main__":
    commands.run(main)
