"""Sampling a cascade: the arguments of `Imagen.sample`, checked and resolved stage by stage."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from imagen_jax import sampling
from imagen_jax.config import ImagenConfig
from imagen_jax.diffusion.grids import Spacing
from imagen_jax.diffusion.guidance import Guidance, make_interval, make_schedule
from imagen_jax.diffusion.process import Process, RenoiseVariance
from imagen_jax.diffusion.samplers import Grid, make_grid
from imagen_jax.errors import UserError
from imagen_jax.memory import to_device
from imagen_jax.resize import resize
from imagen_jax.sampling import Given, OnStep, Program, Progress, Randomness
from imagen_jax.sharding import Layout
from imagen_jax.stage import Stage, to_float
from imagen_jax.streams import RowKeys, row_keys, stream
from imagen_jax.tiling import Tiles
from imagen_jax.training import check_aspect, default_text_mask
from imagen_jax.types import AnyArray, Image, Params, PRNGKey, TextEmbeds, TextMask


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What to sample. Fields marked * take one value, or one per U-Net.

    Another key, text, guidance weight, number of steps (up to 1,024) or threshold does not
    recompile; turning guidance on or off (`cond_scale` 1) does, and so do other tiles.
    """

    key: PRNGKey | RowKeys | None = None
    """One key, or one per image: an image depends on its own key, not on its batch."""
    draws: Sequence[AnyArray] | None = None
    """The noises of each stage that runs, instead of a key, in the reference's order: that of the
    low-resolution image, the initial noise, then one per step (with inpainting: those of the known
    part, the step and the renoising)."""
    other_key: PRNGKey | RowKeys | None = None
    """With `mix`: noise is interpolated spherically between that of `key` and that of this one."""
    mix: AnyArray | None = None
    """(b,) from 0, the noise of `key`, to 1, that of `other_key`."""
    tiles: Tiles | None = None
    """Tiles over an image larger than the one stage that runs: the stage then has the size of the
    tiled image, and `start_image_or_video` must fit it (tiling.py)."""
    tile_batch: int = 8
    """Tiles per call of the network."""
    text_embeds: TextEmbeds | None = None
    text_masks: TextMask | None = None
    """A row that is all False means no text."""
    negative_text_embeds: TextEmbeds | None = None
    """What guidance steers away from, instead of no text. The same shape as `text_embeds`."""
    negative_text_masks: TextMask | None = None
    """A row that is all False means no text."""
    cond_images: AnyArray | None = None
    inpaint_images: AnyArray | None = None
    inpaint_masks: AnyArray | None = None
    """(b, h, w), True where `inpaint_images` are kept."""
    inpaint_resample_times: int | None = None
    """Repetitions of each step (RePaint). 0: the known part is kept clean instead, as DeepFloyd
    IF's pipelines do. None: 5, or 0 for a cascade in discrete steps."""
    inpaint_variance: RenoiseVariance = "exact"
    init_images: AnyArray | Sequence[AnyArray | None] | None = None
    """* Added to the initial noise, as in the reference; with `strength`, noised instead."""
    skip_steps: int | Sequence[int | None] | None = None
    """* Steps to leave out at the noisy end."""
    strength: float | None = None
    """Share of the steps to take, in (0, 1], starting from noised `init_images` (SDEdit, Meng et
    al. 2022; diffusers' image to image)."""
    batch_size: int | None = None
    cond_scale: float | Sequence[float] = 1.0
    """* Guidance weight; 1 is unguided."""
    cfg_remove_parallel_component: bool = True
    cfg_keep_parallel_frac: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level sigma / alpha at which to guide (diffusion/guidance.py)."""
    guidance_schedule: str | Sequence[float] | None = None
    """`linear`, `cosine`, or factors of `cond_scale` - 1 from noise to data."""
    guidance_rescale: float = 0.0
    """In [0, 1]: how far to rescale the guided output to the conditional one's deviation."""
    lowres_sample_noise_level: float | Sequence[float | None] | None = None
    """* A time in [0, 1] on `lowres_noise_schedule`; None is the configuration's."""
    start_at_unet_number: int = 1
    start_image_or_video: AnyArray | None = None
    stop_at_unet_number: int | None = None
    timesteps: int | Sequence[int | None] | None = None
    """* Number of steps; None is the configuration's."""
    sigma_min: float | Sequence[float | None] | None = None
    """* For elucidated cascades, instead of the configuration's."""
    sigma_max: float | Sequence[float | None] | None = None
    spacing: Spacing | None = None
    """Spacing of the noise levels: `t`, `log_snr`, `karras`, or a list of sigma / alpha
    (diffusion/grids.py); None is the noise process's default."""
    sampler: str | None = None
    """A name in `samplers.SAMPLERS`; None is the noise process's default."""
    eta: float = 0.0
    """Noise of `ddim`, in [0, 1]."""
    progress: Progress | None = None
    on_step: OnStep | None = None

    def check(self, config: ImagenConfig) -> None:
        """Raises ValueError for arguments that do not fit together, or do not fit the cascade."""
        check_text(config, self.text_embeds, None)
        for name in ("text_embeds", "negative_text_embeds"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise UserError(f"{name} hold NaN or infinity.")
        if self.negative_text_embeds is not None:
            self._check_negative_text()
        if (self.key is None) == (self.draws is None):
            raise UserError("sample needs either a key or draws.")
        numbers = self.numbers(config)
        self._check_noise(numbers)
        if self.draws is not None and len(self.draws) != len(numbers):
            raise UserError(f"{len(self.draws)} sequences of draws for {len(numbers)} stages.")
        scales = self.per_unet(config, "cond_scale")
        if config.cond_drop_prob == 0 and any(scale != 1 for scale in scales):
            raise UserError("cond_scale other than 1 needs a model trained with cond_drop_prob.")
        if (self.inpaint_images is None) != (self.inpaint_masks is None):
            raise UserError("inpainting needs both inpaint_images and inpaint_masks.")
        if self._resample_times(config) < 0:
            raise UserError(
                f"inpaint_resample_times must be at least 0, got {self.inpaint_resample_times}."
            )
        if numbers[0] > 1 and self.start_image_or_video is None:
            raise UserError(f"starting at U-Net {numbers[0]} needs start_image_or_video.")
        if self.strength is not None:
            self._check_strength()
        self._check_images(config)

    def _check_noise(self, numbers: list[int]) -> None:
        if (self.other_key is None) != (self.mix is None):
            raise UserError("interpolated noise needs both other_key and mix.")
        if self.draws is not None and self.other_key is not None:
            raise UserError("other_key needs key, not draws.")
        if self.tiles is not None and (len(numbers) > 1 or numbers[0] == 1):
            raise UserError(
                "tiles need a single super-resolution stage: start and stop at the same U-Net, 2 "
                "or later."
            )

    def _check_negative_text(self) -> None:
        if self.text_embeds is None:
            raise UserError("negative_text_embeds need text_embeds to guide away from them.")
        found, wanted = np.shape(self.negative_text_embeds), np.shape(self.text_embeds)
        if found != wanted:
            raise UserError(
                f"negative_text_embeds have shape {found}; they must match text_embeds, {wanted}."
            )

    def _check_strength(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, got {self.strength:g}.")
        if self.init_images is None:
            raise UserError("strength needs init_images to start from.")
        if self.skip_steps is not None:
            raise UserError("strength decides how many steps are skipped: leave out skip_steps.")

    def _check_images(self, config: ImagenConfig) -> None:
        """Images are never squashed: all must have the cascade's aspect ratio."""
        stage = config.stage(1)
        images = {name: getattr(self, name) for name in _IMAGES if self.tiles is None}
        for number, image in enumerate(self.per_unet(config, "init_images"), 1):
            images[f"init_images of U-Net {number}"] = image
        for name, image in images.items():
            if image is not None:
                check_aspect(stage, np.shape(image), name)
        if self.inpaint_masks is not None:
            check_aspect(stage, np.shape(self.inpaint_masks), "inpaint_masks", ndim=3)

    def numbers(self, config: ImagenConfig) -> list[int]:
        """Numbers of the U-Nets to run."""
        first, last, count = self.start_at_unet_number, self.stop_at_unet_number, len(config.unets)
        last = count if last is None else last
        for name, number in (("start_at", first), ("stop_at", last)):
            if not 1 <= number <= count:
                raise UserError(f"{name}_unet_number = {number} is not in 1 .. {count}.")
        if first > last:
            raise UserError(
                f"start_at_unet_number ({first}) must not exceed stop_at_unet_number ({last})."
            )
        return list(range(first, last + 1))

    def rows(self, config: ImagenConfig) -> int:
        """The batch size: that of the arrays, which must agree, or `batch_size`, or 1."""
        arrays = {
            name: getattr(self, name) for name in ("text_embeds", *_IMAGES, "inpaint_masks", "mix")
        }
        for number, images in enumerate(self.per_unet(config, "init_images"), 1):
            arrays[f"init_images of U-Net {number}"] = images
        counts = {name: len(array) for name, array in arrays.items() if array is not None}
        if self.batch_size is not None:
            counts["batch_size"] = self.batch_size
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(f"batch sizes differ: {found}.")
        return next(iter(counts.values()), 1)

    def _resample_times(self, config: ImagenConfig) -> int:
        if self.inpaint_resample_times is None:
            return 5 if config.discrete is None else 0
        return self.inpaint_resample_times

    def given(self, config: ImagenConfig) -> Given:
        """The arrays that are the same for every stage."""
        inpaints = self.inpaint_images is not None
        embeds, masks = _with_mask(self.text_embeds, self.text_masks)
        negative, negative_masks = _with_mask(self.negative_text_embeds, self.negative_text_masks)
        return Given(
            text_embeds=embeds,
            text_masks=masks,
            negative_embeds=negative,
            negative_masks=negative_masks,
            cond_images=self.cond_images,
            inpaint_images=self.inpaint_images,
            inpaint_masks=self.inpaint_masks,
            resample_times=np.int32(self._resample_times(config)) if inpaints else None,
        )

    def randomness(self, keys: RowKeys, number: int) -> Randomness:
        """The noise of a stage."""
        others, mix = self.other_key, self.mix
        if others is not None:
            others = stream(row_keys(others, len(keys)), "stage", number)
            mix = np.asarray(mix, np.float32)
        return Randomness(keys=stream(keys, "stage", number), other_keys=others, mix=mix)

    def program(self, stage: Stage, dtype: Any, guided: bool) -> Program:
        return Program(
            stage=stage,
            dtype=dtype,
            guided=guided,
            sampler=self.sampler or stage.process.sampler,
            remove_parallel_component=self.cfg_remove_parallel_component,
            inpaint_variance=self.inpaint_variance,
            tiles=self.tiles,
            tile_batch=self.tile_batch,
        )

    def guidance(self, process: Process, grid: Grid, cond_scale: float) -> Guidance:
        """Guidance over the levels of a stage's grid."""
        schedule = self.guidance_schedule
        if schedule is not None:
            log_snr = np.asarray(process.level(jnp.asarray(grid.positions)).log_snr)
            schedule = make_schedule(schedule, log_snr)
        return Guidance(
            cond_scale,
            self.cfg_keep_parallel_frac,
            rescale=self.guidance_rescale or None,
            interval=None
            if self.guidance_interval is None
            else make_interval(self.guidance_interval),
            schedule=schedule,
        )

    def per_unet(self, config: ImagenConfig, name: str) -> tuple[Any, ...]:
        """The argument `name` with one entry per U-Net of the cascade."""
        value, count = getattr(self, name), len(config.unets)
        if not isinstance(value, (tuple, list)):
            return (value,) * count
        if len(value) != count:
            raise UserError(f"{name} has {len(value)} entries for {count} unets.")
        return tuple(value)


def _with_mask(
    embeds: TextEmbeds | None, masks: TextMask | None
) -> tuple[TextEmbeds, TextMask] | tuple[None, None]:
    return (None, None) if embeds is None else (embeds, default_text_mask(embeds, masks))


_IMAGES = ("cond_images", "inpaint_images", "start_image_or_video")


def sample_cascade(
    config: ImagenConfig,
    params: Sequence[Params | None],
    request: Request,
    *,
    dtypes: Sequence[Any],
    layout: Layout | None = None,
) -> list[Image]:
    """Images (b, h, w, c) in [0, 1] of every stage that runs.

    `params` are the parameters of each U-Net, None for one without weights; `dtypes` are their
    compute dtypes. Raises ValueError for invalid input.
    """
    request.check(config)
    b, outputs = request.rows(config), []
    keys = None if request.key is None else row_keys(request.key, b)
    images = None
    if request.start_at_unet_number > 1:
        before = config.stage(request.start_at_unet_number).lowres.size
        images = to_float(request.start_image_or_video)
        if request.tiles is None:
            images = resize(images, before, mode=config.resize_mode)
    for number in request.numbers(config):
        if params[number - 1] is None:
            raise UserError(f"U-Net {number} has no weights: there is nothing to sample from.")
    for place, number in enumerate(request.numbers(config)):
        if keys is None:
            randomness = Randomness(noises=jnp.asarray(request.draws[place]))
        else:
            randomness = request.randomness(keys, number)
        images = _sample_stage(
            config, number, params[number - 1], request, images, randomness,
            dtype=dtypes[number - 1], batch_size=b, layout=layout,
        )  # fmt: skip
        outputs.append(images)
    return outputs


def _sample_stage(
    config: ImagenConfig,
    number: int,
    params: Params,
    request: Request,
    previous: Array | None,
    randomness: Randomness,
    *,
    dtype: Any,
    batch_size: int,
    layout: Layout | None,
) -> Image:
    stage, defaults = config.stage(number), config.sampling_defaults(number)
    if request.tiles is not None:
        stage = dataclasses.replace(stage, size=request.tiles.image)

    def own(name: str) -> Any:
        return request.per_unet(config, name)[number - 1]

    guided = request.text_embeds is not None and own("cond_scale") != 1
    level, steps = own("lowres_sample_noise_level"), own("timesteps")
    level = defaults.lowres_noise_level if level is None else level
    steps = defaults.num_steps if steps is None else steps
    start_from = own("init_images")
    noised = request.strength is not None and start_from is not None
    given = request.given(config)._replace(
        previous=previous,
        lowres_noise_level=None if stage.lowres is None else np.float32(level),
        init_images=None if noised else start_from,
        source_images=start_from if noised else None,
    )
    if not guided:
        given = given._replace(negative_embeds=None, negative_masks=None)
    grid = make_grid(
        stage.process,
        steps,
        skip_steps=own("skip_steps") or 0,
        strength=request.strength if noised else None,
        spacing=request.spacing,
        sigma_min=own("sigma_min"),
        sigma_max=own("sigma_max"),
    )
    guidance = request.guidance(stage.process, grid, own("cond_scale"))
    weights = to_device(params)
    images = sampling.sample_stage(
        weights,
        request.program(stage, dtype, guided),
        given,
        randomness,
        batch_size=batch_size,
        grid=grid,
        numbers=sampling.numbers_for(defaults, guidance, eta=request.eta),
        layout=layout,
        progress=request.progress,
        on_step=request.on_step,
    )
    # Streamed weights must leave the device before those of the next stage are copied to it.
    return images if weights is params else jax.block_until_ready(images)


def check_text(config: ImagenConfig, text_embeds: TextEmbeds | None, count: int | None) -> None:
    """Raises ValueError unless text is given exactly when the cascade needs it, with its width."""
    if config.condition_on_text and text_embeds is None:
        raise UserError("this cascade is conditioned on text: give texts or text_embeds.")
    if text_embeds is None:
        return
    if not config.condition_on_text:
        raise UserError("text_embeds are given, but condition_on_text is off.")
    if text_embeds.shape[-1] != config.text_embed_dim:
        raise UserError(
            f"text_embeds are {text_embeds.shape[-1]} wide, but text_embed_dim is "
            f"{config.text_embed_dim}."
        )
    if count is not None and text_embeds.shape[0] != count:
        raise UserError(f"{text_embeds.shape[0]} text_embeds for {count} images.")
