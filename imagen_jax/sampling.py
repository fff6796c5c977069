"""One stage of the cascade: its sampling programs, `start`, `advance` and `finish`.

The host runs `advance` in slices of the steps, for progress and cancelling. The theory only ever
sees the closure

    denoise(x_t, log_snr, x0_previous=None) -> network output, guidance applied

Randomness comes from one key, or is given as a sequence of noises, in the reference's order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax import nn
from imagen_jax.config import ImagenConfig, StageConfig
from imagen_jax.diffusion import guidance, process, samplers, schedules
from imagen_jax.resize import resize
from imagen_jax.stages import check_kind, normalize, to_float, unnormalize
from imagen_jax.types import AnyArray, Image, Params, PRNGKey, TextEmbeds, TextMask


class Conditioning(NamedTuple):
    """What a stage's network is told at every step, prepared once."""

    text: nn.TextCond | None
    lowres: Array | None
    lowres_log_snr: Array | None
    cond_images: Array | None
    inpaint: samplers.Inpaint | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a stage's compiled programs are made for; everything else about sampling is data."""

    config: ImagenConfig
    unet_number: int
    dtype: DTypeLike
    guided: bool
    remove_parallel_component: bool = True
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    inpaint_variance: Literal["exact", "reference"] = "exact"

    @property
    def stage(self) -> StageConfig:
        return self.config.stage(self.unet_number)

    def without_numbers(self) -> "Program":
        """The same for all configurations that differ in what the programs get as data."""
        config = dataclasses.replace(
            self.config,
            timesteps=1,
            dynamic_thresholding_percentile=1.0,
            lowres_sample_noise_level=0.0,
        )
        return dataclasses.replace(self, config=config)


class Guidance(NamedTuple):
    """Numbers that may change from call to call without another compilation."""

    cond_scale: Array
    keep_parallel_frac: Array
    percentile: Array
    eta: Array


@functools.partial(jax.jit, static_argnames=("program", "batch_size"))
def start(
    params: Params,
    *,
    program: Program,
    batch_size: int,
    key: PRNGKey | None = None,
    noises: Float[Array, "count b h w c"] | None = None,
    text_embeds: TextEmbeds | None = None,
    text_masks: TextMask | None = None,
    previous: Float[AnyArray, "b h2 w2 c"] | None = None,
    lowres_noise_level: Float[Array, ""] | None = None,
    cond_images: AnyArray | None = None,
    init_images: AnyArray | None = None,
    inpaint_images: AnyArray | None = None,
    inpaint_masks: Bool[AnyArray, "b h3 w3"] | None = None,
    resample_times: Int[Array, ""] | None = None,
) -> tuple[samplers.Carry, Conditioning]:
    """The noise a stage begins with and what its network is told; pictures in [0, 1].

    With guidance the text conditioning has two rows a picture: with the text and without.
    """
    config, stage = program.config, program.stage
    check_kind(config)
    size, b = stage.image_size, batch_size
    shape = (b, size, size, config.channels)
    lowres_key, init_key = (None, None) if key is None else _stage_keys(key)[:2]
    fit = functools.partial(resize, size=size, mode=config.resize_mode)

    text = None
    if text_embeds is not None:
        unet = nn.bind(stage.unet, params, dtype=program.dtype)
        keep = jnp.ones(b, bool)
        if program.guided:
            keep = jnp.tile(jnp.array([True, False]), b)
            text_embeds, text_masks = (jnp.repeat(a, 2, axis=0) for a in (text_embeds, text_masks))
        text = unet.encode_text(text_embeds, text_masks, keep_mask=keep)

    lowres = lowres_log_snr = None
    if previous is not None:
        level = jnp.full((b,), lowres_noise_level)
        lowres_log_snr = schedules.log_snr(level, config.lowres_noise_schedule)
        noise = jax.random.normal(lowres_key, shape) if noises is None else noises[0]
        lowres = process.q_sample(normalize(config, fit(previous)), lowres_log_snr, noise)

    x = jax.random.normal(init_key, shape) if noises is None else noises[int(lowres is not None)]
    if init_images is not None:
        # The picture is resized in [-1, 1] and added, as the reference does.
        x = x + fit(normalize(config, to_float(init_images)))
    inpaint = None
    if inpaint_images is not None:
        masks = fit(jnp.asarray(inpaint_masks, jnp.float32)[..., None]) > 0
        known = fit(normalize(config, to_float(inpaint_images)))
        inpaint = samplers.Inpaint(known, masks, resample_times)
    cond_images = None if cond_images is None else to_float(cond_images)
    conditioning = Conditioning(text, lowres, lowres_log_snr, cond_images, inpaint)
    return samplers.Carry(x, jnp.zeros_like(x)), conditioning


@functools.partial(jax.jit, static_argnames="program", donate_argnames="carry")
def advance(
    params: Params,
    carry: samplers.Carry,
    conditioning: Conditioning,
    numbers: Guidance,
    grid: samplers.Grid,
    first: Int[Array, ""],
    last: Int[Array, ""],
    *,
    program: Program,
    key: PRNGKey | None = None,
    noises: Float[Array, "count b h w c"] | None = None,
) -> samplers.Carry:
    """Steps `first` up to `last` (excluded) of the grid."""
    stage = program.stage
    step = samplers.ancestral
    if program.sampler == "ddim":
        step = functools.partial(samplers.ddim, eta=numbers.eta)
    return samplers.run_slice(
        denoiser(nn.bind(stage.unet, params, dtype=program.dtype), conditioning, numbers, program),
        carry,
        grid,
        first,
        last,
        objective=stage.pred_objective,
        step=step,
        percentile=numbers.percentile if stage.dynamic_thresholding else None,
        self_cond=stage.unet.self_cond,
        inpaint=conditioning.inpaint,
        variance=program.inpaint_variance,
        key=None if key is None else _stage_keys(key)[2],
        noises=None if noises is None else noises[1 + (conditioning.lowres is not None) :],
    )


def denoiser(
    unet: Callable, conditioning: Conditioning, numbers: Guidance, program: Program
) -> Callable:
    """The closure that the samplers see: both halves of the guidance in one batch."""
    told = dict(
        text_cond=conditioning.text,
        lowres_cond_img=conditioning.lowres,
        lowres_noise_times=conditioning.lowres_log_snr,
        cond_images=conditioning.cond_images,
    )

    def denoise(x_t, log_snr, x0_previous=None):
        output = unet(x_t, log_snr, self_cond=x0_previous, **told).astype(jnp.float32)
        if not program.guided:
            return output
        pairs = output.reshape(-1, 2, *output.shape[1:])
        return guidance.guide(
            pairs[:, 0],
            pairs[:, 1],
            numbers.cond_scale,
            remove_parallel_component=program.remove_parallel_component,
            keep_parallel_frac=numbers.keep_parallel_frac,
        )

    return denoise


@functools.partial(jax.jit, static_argnames="config")
def finish(carry: samplers.Carry, conditioning: Conditioning, *, config: ImagenConfig) -> Image:
    """The finished pictures in [0, 1]."""
    return unnormalize(config, samplers.finish(carry.x, conditioning.inpaint))


def _stage_keys(key: PRNGKey) -> Array:
    """Keys of the low-resolution noise, the initial noise and the steps."""
    return jax.random.split(key, 3)
