"""Sampling from one stage: three compiled programs, and the host's loop over them.

    start    noise and conditioning, prepared once
    advance  a slice of the denoising steps; the host repeats it, for progress and cancelling
    finish   images in [0, 1]

Each image's noise is a function of its own key, so that it does not depend on the batch.
Alternatively, noises are given as a sequence, in the reference's order.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax import nn
from imagen_jax.compiling import compiler_options
from imagen_jax.conditioning import Condition, Conditioning, Guided
from imagen_jax.diffusion import samplers
from imagen_jax.diffusion.guidance import Guidance
from imagen_jax.diffusion.process import RenoiseVariance, q_sample
from imagen_jax.errors import UserError
from imagen_jax.resize import resize
from imagen_jax.sharding import Layout
from imagen_jax.stage import SamplingDefaults, Stage, to_float
from imagen_jax.streams import RowKeys, normal, spherical, stream
from imagen_jax.tiled import Tiled
from imagen_jax.tiling import Tiles
from imagen_jax.types import AnyArray, Image, Params, TextEmbeds, TextMask

SLICES = 20
"""The compiled loop is called this many times per stage, so progress is reported that often."""

Progress = Callable[[int, int, int], None]
"""progress(unet_number, steps done, total steps). Raise in it to stop."""
OnStep = Callable[[int, int, int, Image], None]
"""on_step(unet_number, steps done, total steps, estimates in [0, 1]), after every step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Compile-time options of a stage's programs; everything else is a traced argument."""

    stage: Stage
    dtype: DTypeLike
    guided: bool
    sampler: str
    remove_parallel_component: bool = True
    inpaint_variance: RenoiseVariance = "exact"
    tiles: Tiles | None = None
    """Where the network is applied, in an image larger than it was trained on."""
    tile_batch: int = 8
    """Tiles per call of the network."""

    def __post_init__(self):
        samplers.find_sampler(self.sampler)
        if self.inpaint_variance not in ("exact", "reference"):
            raise UserError(
                f"inpaint_variance must be 'exact' or 'reference', got {self.inpaint_variance!r}."
            )


class Numbers(NamedTuple):
    """Numbers that may change from call to call without recompiling."""

    guidance: Guidance
    percentile: Float[AnyArray, ""]
    most: Float[AnyArray, ""]
    options: samplers.Options


class Given(NamedTuple):
    """Arrays that a stage's images are generated from; images are in [0, 1] or uint8."""

    text_embeds: TextEmbeds | None = None
    text_masks: TextMask | None = None
    negative_embeds: TextEmbeds | None = None
    """What guidance steers away from; None means no text."""
    negative_masks: TextMask | None = None
    previous: Float[AnyArray, "b h2 w2 c"] | None = None
    """Images of the previous stage."""
    lowres_noise_level: Float[AnyArray, ""] | None = None
    """Time of the noise added to them."""
    cond_images: AnyArray | None = None
    init_images: AnyArray | None = None
    """Added to the initial noise, as the reference does."""
    source_images: AnyArray | None = None
    """Noised to the first level of the grid, instead of pure noise."""
    inpaint_images: AnyArray | None = None
    inpaint_masks: Bool[AnyArray, "b h3 w3"] | None = None
    resample_times: Int[AnyArray, ""] | None = None


class Randomness(NamedTuple):
    """One key per image, or the noises of the stage."""

    keys: RowKeys | None = None
    noises: Float[AnyArray, "count b h w c"] | None = None
    other_keys: RowKeys | None = None
    """Noise is interpolated spherically from that of `keys` to that of these."""
    mix: Float[AnyArray, "b"] | None = None
    """How far, from 0 to 1."""

    def image(self, name: str, place: int, shape: tuple[int, ...]) -> Array:
        """Noise for a named purpose; among given noises it is at index `place`."""
        if self.keys is None:
            return jnp.asarray(self.noises[place])
        return self._normal(lambda keys: stream(keys, name), shape)

    def steps(self, grid: samplers.Grid, first: int, shape, times: Array | None) -> samplers.Noise:
        """The noises of the steps; given ones start at index `first`."""
        if self.keys is None:
            return samplers.given_noises(self.noises[first:], grid, times)

        def noise(i: Array, r: Array, which: int) -> Array:
            one = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, i), 3 * r + which))
            return self._normal(lambda keys: one(stream(keys, "step")), shape)

        return noise

    def _normal(self, purpose: Callable[[RowKeys], RowKeys], shape: tuple[int, ...]) -> Array:
        def of(keys: RowKeys) -> Array:
            return normal(purpose(keys), shape)

        noise = of(self.keys)
        if self.other_keys is None:
            return noise
        return spherical(noise, of(self.other_keys), jnp.asarray(self.mix))


@functools.partial(jax.jit, static_argnames=("program", "batch_size"))
def start(
    params: Params,
    given: Given,
    randomness: Randomness,
    grid: samplers.Grid,
    *,
    program: Program,
    batch_size: int,
) -> tuple[samplers.State, Conditioning, samplers.Inpaint | None]:
    """The state at the first level of the grid, the conditioning inputs, and the known part.

    With guidance the conditioning has two rows per image: with the text and without.
    """
    stage, b = program.stage, batch_size
    fit = functools.partial(resize, size=stage.size, mode=stage.resize_mode)
    lowres = lowres_time = text = inpaint = None
    if given.previous is not None:
        time = jnp.full((b,), given.lowres_noise_level)
        level = stage.lowres.sampling_process.training_level(time)
        noise = randomness.image("lowres_noise", 0, stage.sample_shape)
        lowres = q_sample(stage.normalize(fit(given.previous)), level, noise)
        lowres_time = level.conditioning
    cond_images = None if given.cond_images is None else to_float(given.cond_images)
    conditioning = Conditioning(None, lowres, lowres_time, cond_images)
    embeds, masks, keep = given.text_embeds, given.text_masks, jnp.ones(b, bool)
    if masks is not None:
        keep = jnp.any(masks, axis=1)
    if program.guided:
        conditioning = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), conditioning)
        embeds, masks, keep = _pairs(given)
    if embeds is not None:
        network = nn.bind(stage.network, params, dtype=program.dtype)
        text = network.encode_text(embeds, masks, keep_mask=keep)
    if given.inpaint_images is not None:
        known = fit(stage.normalize(to_float(given.inpaint_images)))
        known_where = fit(jnp.asarray(given.inpaint_masks, jnp.float32)[..., None]) != 0
        inpaint = samplers.Inpaint(known, known_where, given.resample_times)
    noise = randomness.image("initial_noise", int(lowres is not None), stage.sample_shape)
    level = stage.process.level(jnp.broadcast_to(grid.positions[0], b))
    x = stage.process.prior(noise, level)
    if given.source_images is not None:
        x = q_sample(fit(stage.normalize(to_float(given.source_images))), level, noise)
    if given.init_images is not None:
        # The image is resized in [-1, 1] and added, as the reference does.
        x = x + fit(stage.normalize(to_float(given.init_images)))
    state = samplers.start(samplers.find_sampler(program.sampler), x)
    return state, conditioning._replace(text=text), inpaint


def _pairs(given: Given) -> tuple[TextEmbeds, TextMask, Bool[Array, "b2"]]:
    """Embeddings, masks and keep mask of guided rows: with the text, and with the negative or none.

    A text without tokens means no text.
    """
    embeds, masks = given.text_embeds, given.text_masks
    has_text = jnp.any(masks, axis=1)
    against, against_masks = given.negative_embeds, given.negative_masks
    keep = jnp.zeros(len(embeds), bool)
    if against is None:
        against, against_masks = embeds, masks
    else:
        keep = jnp.any(against_masks, axis=1)

    def pairs(with_text: Array, without: Array) -> Array:
        return jnp.stack([with_text, without], 1).reshape(-1, *with_text.shape[1:])

    return pairs(embeds, against), pairs(masks, against_masks), pairs(has_text, keep)


def advance(
    params: Params,
    state: samplers.State,
    conditioning: Conditioning,
    inpaint: samplers.Inpaint | None,
    numbers: Numbers,
    grid: samplers.Grid,
    first: Int[Array, ""],
    last: Int[Array, ""],
    randomness: Randomness,
    *,
    program: Program,
) -> samplers.State:
    """Runs steps `first` up to `last` (excluded) of the grid."""
    stage = program.stage
    place = 1 + (conditioning.lowres is not None)
    times = None if inpaint is None else inpaint.resample_times
    return samplers.run_slice(
        estimator(params, conditioning, numbers, program),
        stage.process,
        state,
        grid,
        first,
        last,
        sampler=samplers.find_sampler(program.sampler),
        noise=randomness.steps(grid, place, stage.sample_shape, times),
        options=numbers.options,
        percentile=numbers.percentile if stage.dynamic_thresholding else None,
        most=numbers.most,
        self_cond=stage.network.self_cond,
        inpaint=inpaint,
        variance=program.inpaint_variance,
    )


def compiled_advance(device: jax.Device) -> Callable[..., samplers.State]:
    """`advance`, compiled for this kind of device; it donates the state."""
    options = compiler_options(device, sampling=True) or {}
    return _compiled_advance(tuple(options.items()))


@functools.cache
def _compiled_advance(options: tuple[tuple[str, str], ...]) -> Callable[..., samplers.State]:
    return jax.jit(
        advance, static_argnames="program", donate_argnames="state", compiler_options=dict(options)
    )


def estimator(
    params: Params, conditioning: Conditioning, numbers: Numbers, program: Program
) -> Condition | Guided:
    """The network as the samplers call it, with guidance applied."""
    network = nn.bind(program.stage.network, params, dtype=program.dtype)
    if program.tiles is not None:
        network = Tiled(network, program.tiles, program.tile_batch)
    conditioned = Condition(network, conditioning)
    if not program.guided:
        return conditioned
    return Guided(conditioned, numbers.guidance, program.remove_parallel_component)


@functools.partial(jax.jit, static_argnames="program")
def finish(
    state: samplers.State, inpaint: samplers.Inpaint | None = None, *, program: Program
) -> Image:
    """The finished images in [0, 1]."""
    return program.stage.unnormalize(samplers.finish(state.x, inpaint))


def sample_stage(
    params: Params,
    program: Program,
    given: Given,
    randomness: Randomness,
    *,
    batch_size: int,
    grid: samplers.Grid,
    numbers: Numbers,
    layout: Layout | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Image:
    """Runs one stage: prepares, loops in slices, finishes. Returns images (b, h, w, c) in [0, 1].

    `layout` is the mesh that the parameters are on, None for one device.
    """
    number = program.stage.unet_number
    total = int(grid.num_steps)
    _check_noises(given, randomness, total)
    with contextlib.nullcontext() if layout is None else layout.use():
        state, conditioning, inpaint = start(
            params, given, randomness, grid, program=program, batch_size=batch_size
        )
        stride = math.ceil(total / SLICES) if on_step is None else 1
        step = compiled_advance(next(iter(state.x.devices())))
        for first in range(0, total, stride):
            last = min(first + stride, total)
            if progress is not None:
                progress(number, first, total)
            bounds = np.int32(first), np.int32(last)
            state = step(
                params, state, conditioning, inpaint, numbers, grid, *bounds, randomness,
                program=program,
            )  # fmt: skip
            if progress is not None:
                jax.block_until_ready(state)
            if on_step is not None:
                # A copy, since the program donates the state.
                on_step(number, last, total, jnp.copy(program.stage.unnormalize(state.x0)))
        if progress is not None:
            progress(number, total, total)
        return finish(state, inpaint, program=program)


def numbers_for(defaults: SamplingDefaults, guidance: Guidance, *, eta: float = 0.0) -> Numbers:
    """The traced numbers of a stage, as float32."""
    options = defaults.options._replace(eta=eta)
    numbers = Numbers(guidance, defaults.percentile, defaults.most, options)
    return jax.tree.map(np.float32, numbers)


def _check_noises(given: Given, randomness: Randomness, num_steps: int) -> None:
    if randomness.noises is None:
        return
    times = None if given.inpaint_images is None else int(given.resample_times)
    wanted = samplers.count_noises(num_steps, resample_times=times)
    wanted += 1 + (given.previous is not None)
    if len(randomness.noises) != wanted:
        raise UserError(
            f"the draws hold {len(randomness.noises)} noises; this stage needs {wanted}."
        )
