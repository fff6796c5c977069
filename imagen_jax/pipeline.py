"""A cascade ready to sample from: weights in their sampling dtype on a mesh, and the encoder.

    pipeline = Pipeline.load("runs/demo", mesh="auto")
    result = pipeline("a red triangle", num_inference_steps=20, guidance_scale=2.0, seed=7)
    result.images[0].save("triangle.png")

The commands are thin wrappers around it. Networks and encoder are loaded at their first use.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float
from PIL import Image as PILImage

from imagen_jax import checkpoint, nn, run_config, text
from imagen_jax.call_arguments import (
    PER_IMAGE,
    check_output,
    one_each,
    one_seed_each,
    renamed,
    rows_of,
)
from imagen_jax.checkpoint import Choice, Weights
from imagen_jax.config import ImagenConfig
from imagen_jax.imagen import Imagen
from imagen_jax.memory import Memory, nbytes, streams, to_host
from imagen_jax.pixels import to_pil
from imagen_jax.sampling import OnStep
from imagen_jax.sharding import Layout, make_layout
from imagen_jax.streams import seed_keys

STEPS = (20, 15, 10)
"""Default denoising steps of each stage; further stages use the last number."""
SAMPLER, SPACING = "dpm++2m", "log_snr"
DISCRETE_SAMPLER = "dpm++2m-sde"
"""For cascades in discrete steps: without noise in every step, a small IF network leaves noise in a
third of its images (docs/deepfloyd.md), and IF's own sampler draws noise too."""
GUIDANCE = 3.0
"""Default guidance weight of the base; the other stages run unguided, at half the cost."""


class Embeddings(NamedTuple):
    """Encoded prompts, on the host. A row whose mask is all False means no text."""

    embeds: Float[np.ndarray, "n l d"]
    masks: Bool[np.ndarray, "n l"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a `Pipeline` call, one entry per image."""

    images: (
        list[PILImage.Image]
        | list[Float[np.ndarray, "h w c"]]
        | list[list[PILImage.Image]]
        | list[list[Float[np.ndarray, "_ _ c"]]]
    )
    seeds: list[int]
    """Each one alone reproduces its image, with the same arguments."""
    prompts: list[str | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """A loaded cascade, made by `load`."""

    run: str | os.PathLike
    config: ImagenConfig
    choices: Mapping[int, Choice]
    """What is read for each U-Net that has weights, by its number: the step, averaged or online
    weights, and notes on what was skipped, which commands print."""
    dtype: np.dtype
    layout: Layout | None
    text_encoder_name: str
    memory: Memory

    @classmethod
    def load(
        cls,
        run: str | os.PathLike,
        *,
        mesh: str | Layout | None = None,
        dtype: DTypeLike | None = None,
        weights: Weights = "ema",
        t5: str | None = None,
        memory: Memory = "auto",
        unet_numbers: Sequence[int] | None = None,
    ) -> "Pipeline":
        """The cascade of a run directory.

        `mesh`, e.g. "8x1" or "auto", distributes weights and images over devices; None is the first
        one. `dtype` is that of the weights and the computation (default: `nn.compute_dtype`). `t5`
        is the folder or name of the cascade's encoder, if it is not its `text_encoder_name`.
        `memory` decides where weights are while their network does not run: `resident` on the
        device, `streamed` in the host's memory; `auto` streams them if they would take more than
        half of the device's. `unet_numbers` are the U-Nets to load. What is read for each is
        decided here (`choices`), before anything is loaded. Raises UserError if `run` is not a run
        directory, or for a mesh that does not fit the devices.
        """
        config = run_config.read(run)
        return cls(
            run=run,
            config=config,
            choices=checkpoint.choose_all(run, config, weights, unet_numbers),
            dtype=nn.compute_dtype(dtype),
            layout=make_layout(mesh) if isinstance(mesh, str) else mesh,
            text_encoder_name=t5 or config.text_encoder_name,
            memory=memory,
        )

    @functools.cached_property
    def imagen(self) -> Imagen:
        """The cascade with its weights, cast once to `dtype`. Raises UserError, which names the
        array, for weights that are not finite."""
        return checkpoint.load(
            self.run,
            dtype=self.dtype,
            param_dtype=self.dtype,
            mesh=self.layout,
            choices=self.choices,
            on_host=streams(self.memory, self._unet_bytes(), self.layout),
        )

    @functools.cached_property
    def encoder(self) -> text.TextEncoder:
        """The text encoder in `dtype`. Raises UserError if it is not the cascade's."""
        encoder = text.cascade_encoder(
            self.config,
            name=self.text_encoder_name,
            dtype=self.dtype,
            layout=self.layout,
            recorded=run_config.read_text_encoder(self.run),
        )
        if streams(self.memory, nbytes(encoder.params) + self._unet_bytes(), self.layout):
            encoder = dataclasses.replace(encoder, params=to_host(encoder.params))
        return encoder

    @property
    def model_hash(self) -> str:
        """Ten hexadecimal digits that differ between cascades and between steps.

        A hash of the configuration and of which saved steps are read, not of the weights, which
        take seconds to hash.
        """
        read = {number: dataclasses.astuple(choice)[:2] for number, choice in self.choices.items()}
        found = hashlib.sha256(json.dumps([self.config.to_dict(), read]).encode())
        for number, choice in self.choices.items():
            step = checkpoint.stage_path(self.run, number) / str(choice.step)
            written = step / "_CHECKPOINT_METADATA"  # by Orbax: when it was written, in nanoseconds
            if written.exists():
                found.update(written.read_bytes())
        return found.hexdigest()[:10]

    def _unet_bytes(self) -> int:
        """Bytes of the parameters of the U-Nets to load."""
        unets = [self.config.unets[number - 1] for number in self.choices]
        return sum(nbytes(nn.stored_shapes(nn.abstract(one)[1], self.dtype)) for one in unets)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 8,
        output_type: Literal["pil", "np"] = "pil",
        callback_on_step_end: OnStep | None = None,
        **arguments: Any,
    ) -> Result:
        """Samples images for prompts, with the interface of a diffusers pipeline.

        `num_inference_steps` and `guidance_scale` take one number, or one per U-Net; their defaults
        are those of `defaults`. A cascade without captions takes no prompt. `seeds` has one per
        image; otherwise they are derived from `seed` and the image's index. `negative_prompt` is
        one for all or one per prompt. "pil" images are 8-bit, "np" float arrays in [0, 1].
        `callback_on_step_end(unet_number, step, steps, estimates)` is called after every step, with
        the current estimates of the batch's images; raise in it to stop. `arguments` are those of
        `Imagen.sample`, under its names; its `texts`, `cond_scale` and `timesteps` are accepted
        instead of ours too. Arrays such as `inpaint_images` have one row per image, or per prompt.
        With `return_all_unet_outputs` an entry of `images` is a list of the images of every stage
        that ran. Raises UserError for invalid input.
        """
        check_output(output_type)
        arguments = renamed(
            arguments,
            prompt=prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
        )
        prompt = arguments.pop("texts", None)
        if callback_on_step_end is not None:
            arguments["on_step"] = callback_on_step_end
        prompts = [prompt] if isinstance(prompt, str) or prompt is None else list(prompt)
        each = num_images_per_prompt
        seeds = one_seed_each(seed, seeds, len(prompts) * each)
        embeddings = negatives = None
        if prompt is not None:
            embeddings = repeated(self.encode(prompts, batch_size=batch_size), each)
        if negative_prompt is not None:
            negative = one_each(negative_prompt, len(prompts))
            negatives = repeated(self.encode_negative(negative, batch_size=batch_size), each)
        arrays = {name: arguments.pop(name) for name in PER_IMAGE & arguments.keys()}
        drawn = self.generate(
            embeddings,
            seeds=seeds,
            negatives=negatives,
            per_image={name: rows_of(name, x, len(prompts), each) for name, x in arrays.items()},
            batch_size=batch_size,
            **arguments,
        )
        images = [image for _, image in drawn]
        if output_type == "pil":
            images = jax.tree.map(to_pil, images)
        return Result(images=images, seeds=seeds, prompts=list(np.repeat(prompts, each)))

    def defaults(self) -> dict[str, Any]:
        """The default arguments of `generate`: few steps."""
        return sampling_defaults(self.config)

    def encode(self, prompts: Sequence[str], *, batch_size: int = 8) -> Embeddings:
        """Embeddings of prompts, as from `Imagen.encode_text`, computed `batch_size` at a time."""
        parts = [
            self.encoder([prompts[row] for row in rows], length=self.config.text_len)
            for rows in batches(len(prompts), batch_size)
        ]
        found = (np.concatenate(part)[: len(prompts)] for part in zip(*parts, strict=True))
        return Embeddings(*found)

    def encode_negative(self, prompts: Sequence[str], *, batch_size: int = 8) -> Embeddings:
        """Embeddings of negative prompts; a blank one means no text."""
        encode = functools.partial(self.encode, batch_size=batch_size)
        blank = self.config.encodes_blank_text
        return Embeddings(*text.encode_or_absent(encode, prompts, blank=blank))

    def generate(
        self,
        embeddings: Embeddings | None,
        *,
        seeds: Sequence[int],
        negatives: Embeddings | None = None,
        per_image: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        pad_to: int | None = None,
        progress: Callable[[np.ndarray, int], Any] | None = None,
        **arguments: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Yields index and pixels, (h, w, c) in [0, 1], of one image per seed.

        Up to rounding, an image depends on its embedding, its seed and the arguments of
        `Imagen.sample`, not on its batch or the mesh. `embeddings`, `negatives` and the arrays of
        `per_image`, by their names there, have one row per seed. Batches are padded to a power of
        two, at most `batch_size`, so that few sizes are compiled, or to exactly `pad_to`.
        `progress(indices, count)` is a context manager that yields the batch's `Progress`. With
        `return_all_unet_outputs` the pixels are a list with those of every stage that ran.
        """
        arguments = self.defaults() | arguments
        guided = np.any(np.asarray(arguments["cond_scale"]) != 1)
        blank = self.config.encodes_blank_text and guided
        if blank and embeddings is not None and negatives is None:
            negatives = repeated(self.encode_negative([""]), len(embeddings.embeds))
        size = pad_to or padded(min(len(seeds), batch_size), batch_size)
        if self.layout is not None:
            size = self.layout.split_rows(size)
        arrays = dict(per_image or {})
        for prefix, part in (("", embeddings), ("negative_", negatives)):
            if part is not None:
                arrays |= {f"{prefix}text_embeds": part.embeds, f"{prefix}text_masks": part.masks}
        for rows in batches(len(seeds), size, fill=True):
            given = arguments | jax.tree.map(lambda array, rows=rows: array[rows], arrays)
            fresh = np.unique(rows)
            with (
                contextlib.nullcontext()
                if progress is None
                else progress(fresh, len(seeds)) as listener
            ):
                images = self.imagen.sample(
                    key=seed_keys([seeds[row] for row in rows]),
                    batch_size=len(rows),
                    progress=listener,
                    **given,
                )
            if given.get("return_all_unet_outputs"):
                stages = [np.asarray(stage) for stage in images]
                yield from (
                    (int(i), [stage[row] for stage in stages]) for row, i in enumerate(fresh)
                )
            else:
                yield from zip(fresh.tolist(), np.asarray(images), strict=False)

    def warm_up(self, *, batch_size: int = 1, **arguments: Any) -> None:
        """Compiles every stage for batches of `batch_size`, by sampling one step of each.

        `arguments` are those that later calls of `generate` will get: guidance on or off, the
        sampler, inpainting and the like decide which programs are compiled.
        """
        embeddings = self.encode(["-"]) if self.config.condition_on_text else None
        given = dict(arguments, timesteps=1, batch_size=batch_size, pad_to=batch_size)
        for _ in self.generate(embeddings, seeds=[0], **given):
            pass


def sampling_defaults(config: ImagenConfig) -> dict[str, Any]:
    """Arguments of `Imagen.sample` for a good image in few steps; see docs/samplers.md.

    `sampler=None`, `spacing=None` and `timesteps=None` sample as the reference does instead.
    """
    count = len(config.unets)
    guided = config.condition_on_text and config.cond_drop_prob > 0
    if config.discrete is not None:
        # As in DeepFloyd IF: plain guidance, in both stages.
        guided_by = (7.0,) + (4.0,) * (count - 1) if guided else (1.0,) * count
        return dict(
            sampler=DISCRETE_SAMPLER,
            spacing=SPACING,
            timesteps=_few_steps(count),
            cond_scale=guided_by,
            cfg_remove_parallel_component=False,
        )
    return dict(
        sampler=SAMPLER,
        spacing=SPACING if config.elucidated is None else own_spacing(config),
        timesteps=_few_steps(count),
        cond_scale=(GUIDANCE if guided else 1.0,) + (1.0,) * (count - 1),
    )


def own_spacing(config: ImagenConfig) -> str:
    """The name of the spacing that a cascade's process has by default, with `spacing=None`."""
    return "t" if config.elucidated is None else "karras"


def _few_steps(count: int) -> tuple[int, ...]:
    return tuple(STEPS[min(i, len(STEPS) - 1)] for i in range(count))


def repeated(embeddings: Embeddings, times: int) -> Embeddings:
    """Each row `times` times."""
    return Embeddings(*(np.repeat(part, times, axis=0) for part in embeddings))


def padded(count: int, most: int) -> int:
    """The next power of two, or `most` if that is less."""
    return min(1 << (count - 1).bit_length(), most)


def batches(count: int, batch_size: int, *, fill: bool = False) -> Iterator[np.ndarray]:
    """Yields the indices of each batch, all of one shape: the last repeats index `count` - 1.

    With `fill` a batch has `batch_size` rows even if `count` is smaller.
    """
    size = batch_size if fill else min(count, batch_size)
    for first in range(0, count, size):
        yield np.minimum(np.arange(first, first + size), count - 1)
