"""Draws pictures from text with a trained cascade.

    python -m sample.text_to_image --checkpoint runs/demo --prompt "red heart"
    python -m sample.text_to_image --checkpoint RUN --prompt "a cat" --prompt "a dog" \\
        --num-images-per-prompt 4 --steps 100 50 --cond-scale 3 1      # one number per U-Net
    python -m sample.text_to_image --checkpoint RUN --stop-at-unet-number base  # small pictures
    python -m sample.text_to_image --checkpoint RUN --num-images-per-prompt 16  # without captions

Writes one PNG per picture, with prompt and settings in its text chunks, and grid.png with all of
them. A picture depends on its prompt, the settings and its own seed, which is in its PNG: that seed
alone repeats it, in any batch and on any mesh. Ctrl-C stops between steps; what is written by then
stays.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro
from etils import epath

import commands
from imagen_jax import checkpoint, storage, text
from imagen_jax.checkpoint import Weights
from imagen_jax.config import ImagenConfig
from imagen_jax.data import read_lines
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Embeddings, Pipeline
from imagen_jax.streams import image_seeds
from sample import outputs, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Draws pictures from text with a trained cascade."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw. Give it again for another prompt."""
    prompts_from: Path | None = None
    """Text file, one prompt a line, drawn after those of --prompt. Blank lines are passed over."""
    num_images_per_prompt: int = 1
    """Pictures of each prompt; in all, for a cascade without captions."""
    out: Path | None = None
    """Folder to write to; files of the same names are replaced.
    Default: samples/text_to_image in the run directory."""

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "num_images_per_prompt")

    @property
    def folder(self) -> epath.Path:
        return storage.folder(self.out or self.run / "samples" / "text_to_image")

    def prompts(self, config: ImagenConfig) -> list[str] | None:
        """All prompts, None for a cascade without captions. ValueError for an unfit one."""
        if not config.condition_on_text:
            for name in ("prompt", "prompts_from", "t5"):
                if getattr(self, name):
                    raise UserError(
                        f"{commands.flag(name)}: the cascade of {self.run} was trained "
                        "without captions; --num-images-per-prompt says how many to draw."
                    )
            return None
        prompts = list(self.prompt)
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise UserError(f"prompt {number} of {len(prompts)} is empty: {prompt!r}.")
            prompts[number - 1] = text.valid(prompt)
            if prompts[number - 1] != prompt:
                print(f"note: prompt {number} is not UTF-8; it is read as {prompts[number - 1]!r}.")
        if self.prompts_from is not None:
            prompts += read_lines(self.prompts_from)
            if not prompts:
                raise UserError(f"{self.prompts_from} holds no prompt.")
        if not prompts:
            raise UserError('say what to draw: --prompt "..." or --prompts-from FILE.')
        return prompts


def main() -> None:
    given = tyro.cli(Settings, description=__doc__)
    commands.use_precision(given.compute_dtype)
    config = checkpoint.read_config(given.run)
    options = given.options(config)
    prompts = given.prompts(config)
    unet_numbers = given.unet_numbers(config)
    pipeline = Pipeline.load(
        given.run,
        mesh=given.mesh,
        dtype=given.compute_dtype,
        weights=given.weights,
        t5=given.t5,
        unet_numbers=unet_numbers,
    )
    say_choices(pipeline, given.weights)
    embeddings = None if prompts is None else embed(pipeline, prompts, given.batch_size)
    record = {
        "command": "text_to_image",
        "checkpoint": checkpoint.stage_path(given.run, 1).parent.name,
        "checkpoint_steps": {f"unet{n}": read.step for n, read in pipeline.choices.items()},
        "weights": {f"unet{n}": read.weights for n, read in pipeline.choices.items()},
        "text_encoder_name": None if prompts is None else pipeline.text_encoder_name,
        "batch_size": given.batch_size,
        "dtype": str(pipeline.dtype),
    } | options

    each = given.num_images_per_prompt
    wanted = [prompt for prompt in prompts or [None] for _ in range(each)]
    seeds = image_seeds(given.seed, len(wanted))
    if embeddings is not None:
        embeddings = Embeddings(*(np.repeat(part, each, axis=0) for part in embeddings))
    drawn = pipeline.generate(
        embeddings,
        seeds=seeds,
        batch_size=given.batch_size,
        progress=outputs.progress_bars,
        **options,
    )
    shown = []
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        for index, image in drawn:
            path = given.folder / outputs.file_name(index, wanted[index])
            made = record | {"index": index, "seed": seeds[index]}
            outputs.check_finite(image, f"{path.name}, drawn by U-Net {unet_numbers[-1]}")
            shown.append(outputs.write_picture(path, image, prompt=wanted[index], settings=made))
    except KeyboardInterrupt:
        sys.exit(f"stopped: {len(shown)} of {len(wanted)} pictures are in {given.folder}")
    grid = given.folder / "grid.png"
    outputs.write_grid(grid, shown, prompts, per_prompt=each)
    count = f"{len(shown)} picture{'s' * (len(shown) > 1)}"
    print(f"{count} in {given.folder}, side by side in {grid}")


def say_choices(pipeline: Pipeline, weights: Weights) -> None:
    """Prints which steps are passed over, and where no average is stored."""
    for number, read in pipeline.choices.items():
        for note in read.notes:
            print(f"note: {note}")
        if read.weights != weights:
            print(
                f"note: {pipeline.run} holds no averaged weights (ema) of U-Net {number}: "
                "its online weights are used."
            )


def embed(pipeline: Pipeline, prompts: list[str], batch_size: int) -> Embeddings:
    """Embeddings of the prompts. The encoder is loaded for this alone, so that it leaves its memory
    to the U-Nets; what it cuts is said."""
    encoder = pipeline.encoder
    if encoder.is_demo:
        print(text.DEMO_NOTE)
    for number, prompt in enumerate(prompts, 1):
        tokens = len(encoder.tokenizer.encode(prompt).ids)
        if tokens > pipeline.config.text_len:
            print(
                f"note: prompt {number} is cut: it has {tokens} tokens, the cascade reads "
                f"{pipeline.config.text_len}."
            )
    embeddings = pipeline.encode(prompts, batch_size=batch_size)
    pipeline.release_encoder()
    return embeddings


if __name__ == "__main__":
    commands.run(main)
