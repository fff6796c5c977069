"""The arguments that a `Pipeline` call accepts: names of diffusers and of `Imagen.sample`, values
per prompt or per image."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.streams import image_seeds
from imagen_jax.types import AnyArray

PER_IMAGE = {
    *("cond_images", "inpaint_images", "inpaint_masks", "init_images", "start_image_or_video"),
    "mix",
}
"""Arguments of `Imagen.sample` that have one row per image."""
THEIRS = {"prompt": "texts", "guidance_scale": "cond_scale", "num_inference_steps": "timesteps"}
"""Argument of a pipeline -> its name in `Imagen.sample`; a pipeline accepts both."""
INSTEAD = {
    **dict.fromkeys(("key", "draws", "other_key"), "give seed or seeds"),
    **dict.fromkeys(("text_embeds", "text_masks"), "give prompt, or embeddings to `generate`"),
    **dict.fromkeys(
        ("negative_texts", "negative_text_embeds", "negative_text_masks"),
        "give negative_prompt, or embeddings to `generate`",
    ),
    "progress": "give callback_on_step_end",
    "generator": "give seed or seeds",
    **dict.fromkeys(("height", "width"), "the cascade determines the sizes"),
    "return_pil_images": "give output_type",
}
"""Argument of `Imagen.sample` or diffusers that a pipeline does not take -> what to do instead."""


def renamed(arguments: dict[str, Any], **ours: Any) -> dict[str, Any]:
    """The arguments of a call under the names of `Imagen.sample`. Raises UserError for one that a
    pipeline does not take, or that is given under both of its names."""
    for name in INSTEAD.keys() & arguments.keys():
        raise UserError(f"{name} is not an argument of a pipeline: {INSTEAD[name]}.")
    for name, value in ours.items():
        value = _either(name, value, THEIRS[name], arguments.pop(THEIRS[name], None))
        if value is not None:
            arguments[THEIRS[name]] = value
    return arguments


def check_output(output_type: str) -> None:
    if output_type not in ("pil", "np"):
        raise UserError(f"output_type {output_type!r} is not one of 'pil', 'np'.")


def one_each(negative: str | Sequence[str], count: int) -> list[str]:
    """A negative prompt for each of `count` prompts."""
    every = [negative] * count if isinstance(negative, str) else list(negative)
    if len(every) != count:
        raise UserError(f"{len(every)} negative prompts for {count} prompts.")
    return every


def one_seed_each(seed: int, seeds: Sequence[int] | None, count: int) -> list[int]:
    """One seed per image: `seeds`, or seeds derived from `seed`."""
    if count < 1:
        raise UserError(
            "nothing to draw: give at least one prompt, and at least one image per prompt."
        )
    if seeds is not None and len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} images.")
    for one in [seed] if seeds is None else seeds:
        if not 0 <= one < 2**32:
            raise UserError(f"seed {one} must lie in 0 .. {2**32 - 1}.")
    return image_seeds(seed, count) if seeds is None else list(seeds)


def rows_of(name: str, arrays: Any, count: int, times: int) -> Any:
    """The arrays of an argument with one row per image; None, for a U-Net without one, is kept."""

    def rows(array: AnyArray) -> AnyArray:
        if len(array) not in (count, count * times):
            raise UserError(f"{name} has {len(array)} rows for {count * times} images.")
        return array if len(array) == count * times else np.repeat(array, times, axis=0)

    return jax.tree.map(rows, arrays)


def _either(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise UserError(f"{name} and {other_name} are the same argument: give only one of them.")
    return other if value is None else value
