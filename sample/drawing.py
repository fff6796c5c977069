"""What the sampling commands share: load a cascade, encode prompts, draw, write.

settings -> Drawing.open -> encode -> draw(jobs) -> files with their recipes
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

import commands
from commands.sampling import open_pipeline, progress_bars
from imagen_jax import checkpoint, run_config, storage, text
from imagen_jax.config import ImagenConfig
from imagen_jax.data import read_lines
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Embeddings, Pipeline, padded
from imagen_jax.streams import image_seeds
from sample import outputs
from sample.hooks import Hooks, blank
from sample.settings import Settings

Finish = Callable[[int, np.ndarray], np.ndarray]
"""finish(index, pixels) -> the pixels to write, float in [0, 1] or uint8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One image to draw."""

    seed: int
    prompt: str | None = None
    negative_prompt: str = ""


class Drawn(NamedTuple):
    """One image that was written."""

    index: int
    path: epath.Path
    image: Image.Image
    """At most as large as a grid shows it."""
    recipe: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """A loaded cascade with the settings of a command."""

    command: str
    given: Settings
    pipeline: Pipeline
    options: Mapping[str, Any]
    """Arguments of `Imagen.sample`."""
    first: int = 1
    """Number of the first U-Net to run."""
    hooks: Hooks = dataclasses.field(default_factory=Hooks)

    @classmethod
    def open(cls, command: str, given: Settings, *, first: int = 1) -> "Drawing":
        """Checks the settings against the cascade, and the folder to write to; weights are read
        when they are needed.

        Prints which steps are skipped, and where no average is stored. Raises UserError.
        """
        config = run_config.read(given.run)
        options, numbers = given.options(config), given.unet_numbers(config, first)
        hooks = Hooks.open(given)
        drawing = cls(
            command=command,
            given=given,
            pipeline=open_pipeline(given, given.say, numbers),
            options=options,
            first=first,
            hooks=hooks,
        )
        storage.check_writable(drawing.folder)
        return drawing

    @property
    def config(self) -> ImagenConfig:
        return self.pipeline.config

    @property
    def folder(self) -> epath.Path:
        """Where images are written. Created with the first."""
        return storage.folder(self.given.out or self.given.run / "samples" / self.command)

    def say(self, line: str) -> None:
        self.given.say(line)

    def jobs(self, prompts: Sequence[str] | None, each: int = 1) -> list[Job]:
        """`each` images of every prompt, or in total for a cascade without captions."""
        negative = self.given.negative_prompt
        wanted = [prompt for prompt in prompts or [None] for _ in range(each)]
        seeds = image_seeds(self.given.seed, len(wanted))
        return [
            Job(seed=seed, prompt=prompt, negative_prompt=negative)
            for seed, prompt in zip(seeds, wanted, strict=True)
        ]

    def encode(self, jobs: Sequence[Job]) -> tuple[Embeddings | None, Embeddings | None]:
        """Embeddings of the prompts and of the negative ones. Each text is encoded once; prints
        what is cut from it."""
        if not self.config.condition_on_text:
            return None, None
        if self.pipeline.encoder.is_demo:
            self.say(text.DEMO_NOTE)
        prompts = [job.prompt or "" for job in jobs]  # a blank one means no text
        prompts = self._encoded(prompts, self.pipeline.encode_negative)
        negatives = None
        if any(job.negative_prompt for job in jobs):
            negative = [job.negative_prompt for job in jobs]
            negatives = self._encoded(negative, self.pipeline.encode_negative)
        return prompts, negatives

    def _encoded(self, texts: Sequence[str], encode: Callable) -> Embeddings:
        distinct = list(dict.fromkeys(texts))
        encoder, length = self.pipeline.encoder, self.config.text_len
        for prompt in distinct:
            if rest := encoder.left_out(prompt, length):
                self.say(
                    f"note: the prompt {shortened(prompt)!r} is cut off: it has more than the "
                    f"{length} tokens that the cascade reads. Left out: {shortened(rest)!r}."
                )
        found = encode(distinct, batch_size=self.given.batch_size)
        rows = [distinct.index(prompt) for prompt in texts]
        return Embeddings(*(part[rows] for part in found))

    def draw(
        self,
        jobs: Sequence[Job],
        *,
        images: Mapping[str, Any] | None = None,
        finish: Finish | None = None,
        record: Mapping[str, Any] | None = None,
        pad_to: int | None = None,
        **arguments: Any,
    ) -> Iterator[Drawn]:
        """Draws and writes one image per job.

        `images` are arrays, or tuples of them, with one row per job, by their names in
        `Imagen.sample`; `arguments` are its other arguments. `record` is added to the recipes.
        Ctrl-C keeps the images already written.
        """
        prompts, negatives = self.encode(jobs)
        batch_size, done = self.given.batch_size, 0
        options = dict(self.options) | arguments
        pad_to = pad_to or padded(min(len(jobs), batch_size), batch_size)
        drawn = self.pipeline.generate(
            prompts,
            seeds=[job.seed for job in jobs],
            negatives=negatives,
            per_image=images,
            batch_size=batch_size,
            pad_to=pad_to,
            progress=progress_bars,
            return_all_unet_outputs=True,
            **options,
        )
        shared = self._shared_recipe(options) | {"batch_size": pad_to} | dict(record or {})
        try:
            for index, stages in drawn:
                recipe = shared | dataclasses.asdict(jobs[index])
                yield self._write(index, stages, recipe, finish)
                done += 1
        except KeyboardInterrupt:
            self.report_hooks()
            sys.exit(f"stopped: {done} of {len(jobs)} images are in {self.folder}")
        self.report_hooks()

    def report_hooks(self) -> None:
        """Prints what the safety checker found."""
        line = self.hooks.report()
        if line is not None:
            self.say(line)

    def report(self, drawn: Sequence[Drawn], prompts: Sequence[str] | None, each: int = 1) -> None:
        """Prints where the images are, and writes a grid of several: `each` per prompt."""
        if len(drawn) == 1:
            self.say(f"1 image: {drawn[0].path}")
            return
        grid = outputs.free_path(self.folder, "grid", self.given.seed, "png")
        outputs.write_grid(grid, [one.image for one in drawn], prompts, per_prompt=each)
        self.say(f"{len(drawn)} images in {self.folder}, side by side in {grid}")

    def _write(
        self, index: int, stages: list[np.ndarray], recipe: dict[str, Any], finish: Finish | None
    ) -> Drawn:
        given, image = self.given, stages[-1]
        path = outputs.free_path(self.folder, recipe["prompt"], recipe["seed"], given.format)
        last = self.first + len(stages) - 1
        outputs.check_finite(image, f"{path.name}, drawn by U-Net {last}")
        image = image if finish is None else finish(index, image)
        stages = [*stages[:-1], image]
        recipe |= {"size": list(image.shape[:2])}
        if self.hooks.flags(image):
            stages = [blank(stage) for stage in stages]
            recipe["flagged"] = True
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = recipe if given.metadata else None
        shown = outputs.write_image(path, stages[-1], kept, given.format, sign=self.sign)
        if given.save_stages:
            for number, stage in enumerate(stages[:-1], self.first):
                smaller = path.with_name(f"{path.stem}-unet{number}{path.suffix}")
                outputs.write_image(smaller, stage, None, given.format, sign=self.sign)
        if given.json:
            print(json.dumps({"file": str(path)} | recipe, ensure_ascii=False), flush=True)
        return Drawn(index, path, shown, recipe)

    @property
    def sign(self) -> outputs.Sign | None:
        """What signs the files, if they are to be signed."""
        signer = self.hooks.signer
        return signer and functools.partial(signer.sign, command=self.command)

    def safe(self, image: np.ndarray) -> np.ndarray:
        """The image, or plain grey if the safety checker flags it: for images that `draw` does not
        write."""
        return blank(image) if self.hooks.flags(image) else image

    def recipe(self) -> dict[str, Any]:
        """What the recipes of a command's files have in common."""
        return self._shared_recipe(self.options)

    def _shared_recipe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        choices = self.pipeline.choices
        texts = self.config.condition_on_text
        return {
            "command": self.command,
            "version": outputs.version(),
            "checkpoint": checkpoint.stage_path(self.given.run, 1).parent.name,
            "model_hash": self.pipeline.model_hash,
            "checkpoint_steps": {f"unet{n}": read.step for n, read in choices.items()},
            "weights": {f"unet{n}": read.weights for n, read in choices.items()},
            "text_encoder_name": self.pipeline.text_encoder_name if texts else None,
            "dtype": str(self.pipeline.dtype),
        } | dict(options)


def read_prompts(given: Any, config: ImagenConfig) -> list[str] | None:
    """All prompts of a command; None for a cascade without captions.

    `given` has `prompt`, several texts, and may have `prompts_from`, a file or `-` for standard
    input. Raises UserError for an empty prompt, or for any prompt if the cascade has no captions.
    """
    source = getattr(given, "prompts_from", None)
    if not config.condition_on_text:
        for name, value in (("prompt", given.prompt), ("prompts_from", source), ("t5", given.t5)):
            if value:
                raise UserError(
                    f"{commands.flag(name)}: the cascade of {given.run} was trained without "
                    "captions."
                )
        return None
    prompts = list(given.prompt)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} of {len(prompts)} is empty: {prompt!r}.")
        prompts[number - 1] = text.valid(prompt)
        if prompts[number - 1] != prompt:
            print(
                f"note: prompt {number} is not UTF-8; it is read as {prompts[number - 1]!r}.",
                file=sys.stderr,
            )
    if source is not None:
        name = "/dev/stdin" if str(source) == "-" else source
        prompts += read_lines(name)
        if not prompts:
            raise UserError(f"{source} contains no prompts.")
    if not prompts:
        raise UserError('say what to draw: --prompt "..." or --prompts-from FILE.')
    return prompts


def shortened(prompt: str, most: int = 60) -> str:
    return prompt if len(prompt) <= most else prompt[: most - 1] + "…"
