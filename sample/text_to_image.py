"""Draws images from prompts with a trained cascade.

    python -m sample.text_to_image --checkpoint runs/demo --prompt "a red triangle"
    python -m sample.text_to_image --checkpoint RUN --prompt "a cat" --prompt "a dog" \\
        --num-images-per-prompt 4 --steps 30 20 --cond-scale 3 1       # one number per U-Net
    python -m sample.text_to_image --checkpoint RUN --prompts-from prompts.txt --json
    python -m sample.text_to_image --checkpoint RUN --from-image apple-7.png  # that image again
    python -m sample.text_to_image --checkpoint RUN --stop-at-unet-number base  # small images
    python -m sample.text_to_image --checkpoint RUN --num-images-per-prompt 16  # without captions

Writes one file per image, named by prompt and seed, with its recipe inside, and a grid of all. An
image depends on its prompt, the settings and its own seed: with that seed it can be drawn again on
its own, in any batch and on any mesh. Ctrl-C keeps the images already written.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

import commands
from imagen_jax import run_config, storage
from imagen_jax.errors import UserError, parse
from imagen_jax.pipeline import own_spacing
from sample import outputs, settings
from sample.drawing import Drawing, Job, read_prompts

REPEATED = (
    *("cond_scale", "sampler", "spacing", "eta", "lowres_sample_noise_level", "dtype"),
    *("guidance_interval", "guidance_schedule", "guidance_rescale", "negative_prompt"),
)
"""Settings that a recipe has under the same names."""
READ = (
    *("command", "prompt", "seed", "timesteps", "stop_at_unet_number"),
    *("batch_size", "model_hash", "checkpoint", "weights"),
)
OF_RECIPE = (
    *(*REPEATED, "prompt", "prompts_from", "seed", "steps", "stop_at_unet_number"),
    *("num_images_per_prompt", "weights"),
)
"""Settings that `--from-image` takes from the recipe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Draws images from prompts with a trained cascade."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw. Repeat the flag for more prompts."""
    prompts_from: Path | None = None
    """Text file with one prompt per line, drawn after those of --prompt; `-` is standard input.
    Blank lines are skipped."""
    num_images_per_prompt: int = 1
    """Images per prompt, or in total for a cascade without captions."""
    from_image: Path | None = None
    """An image that this command wrote: draws it again with its prompt, seed and settings, bit for
    bit on the same kind of hardware."""

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "num_images_per_prompt")


def main() -> None:
    given = parse(Settings, prog="python -m sample.text_to_image", description=__doc__)
    if given.from_image is not None:
        draw_again(given)
        return
    drawing = Drawing.open("text_to_image", given)
    prompts = read_prompts(given, drawing.config)
    each = given.num_images_per_prompt
    drawing.report(list(drawing.draw(drawing.jobs(prompts, each))), prompts, each)


def draw_again(given: Settings) -> None:
    """The image of a recipe, in a batch of the recorded size. Raises UserError for a recipe of
    another cascade."""
    config = run_config.read(given.run)
    for field in dataclasses.fields(given):
        if field.name in OF_RECIPE and getattr(given, field.name) != field.default:
            flag = commands.flag(field.name)
            raise UserError(f"--from-image already sets {flag}: leave it out.")
    recipe = outputs.read_recipe(storage.folder(given.from_image))
    missing = [name for name in (*REPEATED, *READ) if name not in recipe]
    if missing:
        raise UserError(f"{given.from_image}: its recipe lacks {', '.join(missing)}.")
    if recipe["spacing"] is None:  # written before a process's own spacing had a name
        recipe["spacing"] = own_spacing(config)
    drawing = Drawing.open("text_to_image", with_recipe(given, recipe))
    found = drawing.pipeline.model_hash
    if recipe["model_hash"] != found:
        raise UserError(
            f"{given.from_image} was drawn by {recipe['checkpoint']}, model hash "
            f"{recipe['model_hash']}; that of {given.run} is {found}."
        )
    job = Job(
        seed=recipe["seed"],
        prompt=recipe["prompt"],
        negative_prompt=recipe["negative_prompt"],
    )
    drawing.report(list(drawing.draw([job], pad_to=recipe["batch_size"])), None)


def with_recipe(given: Settings, recipe: dict[str, Any]) -> Settings:
    """The settings with those of a recipe. Raises UserError if it is of another command."""
    if recipe["command"] != "text_to_image":
        raise UserError(
            f"{given.from_image} was made by sample.{recipe['command']}, which also read an image: "
            "give that command the image and the recipe's settings."
        )
    values = {name: recipe[name] for name in REPEATED}
    values |= {"steps": recipe["timesteps"], "seed": recipe["seed"]}
    values |= {"stop_at_unet_number": str(recipe["stop_at_unet_number"])}
    given_tuples = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    weights = set(recipe["weights"].values())
    if len(weights) == 1:
        given_tuples["weights"] = weights.pop()
    return dataclasses.replace(given, **given_tuples)


if __name__ == "__main__":
    commands.run(main)
