"""Draws images of many prompts, to be scored: resumable, and the same on any mesh.

    python -m evaluate.generate --checkpoint RUN --prompts FILE --out DIR

Prompt number i is drawn from its own seed to DIR/00000i.png, with its text in DIR/00000i.txt.
Images that exist are not drawn again, so the same command resumes after any interruption.
An image depends only on its prompt, the settings and its seed, not on the batch or the mesh (up to
rounding: one level of 255). DIR/generate.json has the settings and a hash of the cascade; other
settings or another cascade are refused.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

import commands
from commands.sampling import Sampling, open_pipeline
from imagen_jax import run_config, storage
from imagen_jax.data import open_source, read_lines
from imagen_jax.errors import UserError, parse
from imagen_jax.pipeline import Pipeline, repeated
from imagen_jax.pixels import png
from imagen_jax.streams import image_seeds

RECORD = "generate.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """Draws an image for each of many prompts."""

    prompts: str
    """A text file with one prompt per line, a .json of COCO captions, or `scenes:PART`, such as
    scenes:heldout."""
    num_images: int | None = None
    """Only the first N prompts."""
    out: Path
    """Folder of the images."""
    batch_size: int = 64
    """Images drawn at once. This does not change the images: each has its own seed."""

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, *(["num_images"] if self.num_images is not None else []))


def main() -> None:
    given = parse(Settings, prog="python -m evaluate.generate", description=__doc__)
    config = run_config.read(given.run)
    if not config.condition_on_text:
        raise UserError(f"{given.run}: the cascade was trained without captions.")
    options, numbers = given.options(config), given.unet_numbers(config)
    prompts = read_prompts(given.prompts, given.num_images)
    pipeline = open_pipeline(given, print, numbers)
    folder = storage.folder(given.out)
    storage.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start(folder / RECORD, record(pipeline, given, options, prompts))
    done = {path.name for path in folder.iterdir()}
    missing = [i for i in range(len(prompts)) if f"{i:06}.png" not in done]
    if len(missing) < len(prompts):
        print(f"{len(prompts) - len(missing)} of {len(prompts)} images exist already.")
    draw(pipeline, given, options, prompts, missing, folder)
    print(f"{len(prompts)} images in {folder}")


def read_prompts(spec: str, count: int | None) -> list[str]:
    """The prompts of `--prompts`. Raises UserError if there are none."""
    if spec.startswith("scenes:"):
        source = open_source(spec)
        return [source[i].caption for i in range(min(len(source), count or len(source)))]
    path = Path(spec)
    if path.suffix == ".json":
        data = storage.read_object(storage.folder(path))
        try:  # the first caption of each image, in the order of the images' numbers
            captions: dict[int, str] = {}
            for one in data["annotations"]:
                captions.setdefault(one["image_id"], one["caption"].strip())
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a COCO captions file.") from error
        prompts = [captions[number] for number in sorted(captions)]
    else:
        prompts = read_lines(path)
    if not prompts:
        raise UserError(f"{path} contains no prompts.")
    return prompts[:count]


def record(
    pipeline: Pipeline, given: Settings, options: dict[str, Any], prompts: list[str]
) -> dict[str, Any]:
    """What decides the images, as JSON-ready values."""
    text = "\n".join(prompts).encode("utf-8", "surrogateescape")
    values = {
        "model_hash": pipeline.model_hash,
        "checkpoint_steps": {f"unet{n}": read.step for n, read in pipeline.choices.items()},
        "weights": {f"unet{n}": read.weights for n, read in pipeline.choices.items()},
        "prompts": hashlib.sha256(text).hexdigest(),
        "negative_prompt": given.negative_prompt,
        "seed": given.seed,
        "dtype": str(pipeline.dtype),
    }
    return json.loads(json.dumps(values | options))


def start(path: epath.Path, wanted: dict[str, Any]) -> None:
    """Writes the record, or compares it with an existing one."""
    if not path.exists():
        storage.write_text(path, json.dumps(wanted, indent=1) + "\n")
        return
    found = storage.read_object(path)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        changes = "; ".join(f"{n}: {found.get(n)} there, {wanted[n]} now" for n in different)
        raise UserError(
            f"{path.parent} contains images with other settings ({changes}): choose another --out."
        )


def draw(
    pipeline: Pipeline,
    given: Settings,
    options: dict[str, Any],
    prompts: list[str],
    missing: list[int],
    folder: epath.Path,
) -> None:
    seeds, negative = image_seeds(given.seed, len(prompts)), None
    if given.negative_prompt:
        negative = pipeline.encode_negative([given.negative_prompt])
    bar = tqdm(
        total=len(prompts),
        initial=len(prompts) - len(missing),
        unit="image",
        mininterval=commands.bar_interval(),
    )
    with bar:
        for i in range(0, len(missing), given.batch_size):
            rows = missing[i : i + given.batch_size]
            texts = [prompts[row] for row in rows]
            drawn = pipeline.generate(
                pipeline.encode_negative(texts, batch_size=given.batch_size),
                seeds=[seeds[row] for row in rows],
                negatives=None if negative is None else repeated(negative, len(rows)),
                batch_size=given.batch_size,
                pad_to=given.batch_size,
                **options,
            )
            for place, image in drawn:
                name = f"{rows[place]:06}"
                # The image is written last: if it exists, so does everything else.
                storage.write_text(folder / f"{name}.txt", texts[place] + "\n")
                storage.write_bytes(folder / f"{name}.png", png(image))
                bar.update()


if __name__ == "__main__":
    commands.run(main)
