"""Draws pictures from text with a trained cascade.

    python -m sample.text_to_image --checkpoint runs/demo --prompt "red heart"
    python -m sample.text_to_image --checkpoint RUN --prompt "a cat" --prompt "a dog" \\
        --num-images-per-prompt 4 --steps 100 50 --cond-scale 3 1      # one number per U-Net
    python -m sample.text_to_image --checkpoint RUN --stop-at-unet-number base  # small pictures
    python -m sample.text_to_image --checkpoint RUN --num-images-per-prompt 16  # without captions

Writes one PNG per picture, with prompt and settings in its text chunks, and grid.png with all of
them. The same prompts, seed and settings draw the same pictures again on the same device. Ctrl-C
stops between steps; what is written by then stays.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from imagen_jax import checkpoint, commands, text
from imagen_jax.config import ImagenConfig
from imagen_jax.imagen import Imagen
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
    def folder(self) -> Path:
        return self.out or self.checkpoint / "samples" / "text_to_image"

    def prompts(self, config: ImagenConfig) -> list[str] | None:
        """All prompts, None for a cascade without captions. ValueError for an unfit one."""
        if not config.condition_on_text:
            for name in ("prompt", "prompts_from", "t5"):
                if getattr(self, name):
                    raise ValueError(
                        f"{settings.flag(name)}: the cascade of {self.checkpoint} was trained "
                        "without captions; --num-images-per-prompt says how many to draw."
                    )
            return None
        prompts = list(self.prompt)
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise ValueError(f"prompt {number} of {len(prompts)} is empty: {prompt!r}.")
        if self.prompts_from is not None:
            lines = self.prompts_from.read_text(encoding="utf-8").splitlines()
            prompts += [line.strip() for line in lines if line.strip()]
            if not prompts:
                raise ValueError(f"{self.prompts_from} holds no prompt.")
        if not prompts:
            raise ValueError('say what to draw: --prompt "..." or --prompts-from FILE.')
        return prompts


def main() -> None:
    given = tyro.cli(Settings, description=__doc__)
    config = checkpoint.read_config(given.checkpoint)
    options = given.options(config)
    prompts = given.prompts(config)
    trained = given.trained_steps(config)
    embeds = None if prompts is None else embed(given, config, prompts)
    imagen = checkpoint.load(
        given.checkpoint, weights=given.weights, dtype=given.compute_dtype, unet_numbers=[*trained]
    )
    record = {
        "command": "text_to_image",
        "checkpoint": given.checkpoint.absolute().name,
        "checkpoint_steps": {f"unet{number}": step for number, step in trained.items()},
        "weights": given.weights,
        "text_encoder_name": None if prompts is None else encoder_name(given, config),
        "seed": given.seed,
        "batch_size": given.batch_size,
        "dtype": str(given.compute_dtype),
    } | options

    each = given.num_images_per_prompt
    wanted = [prompt for prompt in prompts or [None] for _ in range(each)]
    shown = []
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        for index, image in draw(given, imagen, options, embeds, len(wanted)):
            path = given.folder / outputs.file_name(index, wanted[index])
            made = record | {"index": index}
            shown.append(outputs.write_picture(path, image, prompt=wanted[index], settings=made))
    except KeyboardInterrupt:
        sys.exit(f"stopped: {len(shown)} of {len(wanted)} pictures are in {given.folder}")
    grid = given.folder / "grid.png"
    outputs.write_grid(grid, shown, prompts, per_prompt=each)
    count = f"{len(shown)} picture{'s' * (len(shown) > 1)}"
    print(f"{count} in {given.folder}, side by side in {grid}")


def draw(
    given: Settings,
    imagen: Imagen,
    options: dict[str, Any],
    embeds: tuple[np.ndarray, np.ndarray] | None,
    count: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Index and pixels, (h, w, c) in [0, 1], of picture after picture."""
    for indices in outputs.batches(count, given.batch_size):
        told: dict[str, Any] = {"batch_size": len(indices)}
        if embeds is not None:
            each = given.num_images_per_prompt
            told["text_embeds"], told["text_masks"] = (rows[indices // each] for rows in embeds)
        key = jax.random.fold_in(jax.random.key(given.seed), indices[0])
        with outputs.progress_bars(indices, count) as progress:
            images = imagen.sample(key=key, progress=progress, **options, **told)
        fresh = np.unique(indices).tolist()
        yield from zip(fresh, np.asarray(images), strict=False)


def encoder_name(given: Settings, config: ImagenConfig) -> str:
    return given.t5 or config.text_encoder_name


def embed(
    given: Settings, config: ImagenConfig, prompts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, l, d) and masks (n, l) of the prompts, on the host.

    The encoder is loaded for this alone, so that it leaves its memory to the U-Nets. Raises
    ValueError if it is not of the cascade's width.
    """
    encoder = text.load_encoder(encoder_name(given, config), dtype=given.compute_dtype)
    if encoder.width != config.text_embed_dim:
        raise ValueError(
            f"{encoder.name} has embeddings of {encoder.width}, the cascade text_embed_dim = "
            f"{config.text_embed_dim}."
        )
    if encoder.is_demo:
        print(
            "text: the demo encoder, a small T5 with random frozen weights: it knows no language, "
            "and the cascade only the captions it was shown."
        )
    length = min(text.tokenizer.MAX_LENGTH, max(unet.max_text_len for unet in config.unets))
    for number, prompt in enumerate(prompts, 1):
        tokens = len(encoder.tokenizer.encode(prompt).ids)
        if tokens > length:
            print(
                f"note: prompt {number} is cut: it has {tokens} tokens, the cascade reads {length}."
            )
    found = [
        jax.tree.map(np.asarray, encoder([prompts[i] for i in indices], length))
        for indices in outputs.batches(len(prompts), given.batch_size)
    ]
    return tuple(np.concatenate(part)[: len(prompts)] for part in zip(*found, strict=True))


if __name__ == "__main__":
    commands.run(main)
