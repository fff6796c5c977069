"""Reverse-time samplers: a table with a step function for each, and one loop for all.

A step takes x at a level to x' at the next, less noisy one. It may ask for the estimate of
(x_0, eps) any number of times. With alpha, sigma at the level and alpha', sigma' at the next:

    ancestral   x' = mean + std z      of the posterior q(x' | x, x_0)                         (1)
    ddim        x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z,
                s = eta sigma' sqrt(1 - exp(l - l'))                                           (2)
    heun        second order, with churn: heun.py
    dpm++       second and third order, from previous steps: dpm.py

(1): Ho et al. 2020, as in imagen-pytorch; (2): Song et al. 2021, Eq. 12; eta = 1 is (1).

The last step of a deterministic sampler returns the estimate of x_0: a schedule may end with a
little noise, which nothing else would remove.

The loop runs over a grid of positions of the process, padded to a fixed length, between traced
bounds: another number of steps does not recompile up to the padding (1,024 steps, then 2,048, ...),
and the caller can run the loop in slices, to show progress or to stop.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.diffusion.dpm import History, dpm_2m, dpm_2m_sde, dpm_3m
from imagen_jax.diffusion.grids import Spacing
from imagen_jax.diffusion.guidance import threshold
from imagen_jax.diffusion.heun import heun
from imagen_jax.diffusion.process import (
    Level,
    Prediction,
    Process,
    RenoiseVariance,
    Sample,
    beside,
    posterior,
    posterior_bounds,
    q_sample,
    renoise,
)
from imagen_jax.errors import UserError
from imagen_jax.types import AnyArray

Count = int | np.integer | Int[AnyArray, ""]
Scalar = float | Float[AnyArray, ""]
Noise = Callable[[Array, Array, int], Sample]
"""noise(step, resampling, which): the loop's draws. `which` is 0 for the known part of inpainting,
1 for the step, 2 for going back to the noisier level."""


class Grid(NamedTuple):
    """Positions from noise to data, and the number of steps between them, which is traced too."""

    positions: Float[AnyArray, "padded"]
    num_steps: Count
    planned_steps: Count
    """Steps of the complete grid, skipped ones included."""


class State(NamedTuple):
    """What one step passes to the next."""

    x: Sample
    x0: Sample
    """The latest estimate, in range; zeros before the first step."""
    memory: Any = ()
    """What a multistep sampler remembers."""


class Options(NamedTuple):
    """Numbers of the samplers; they may change without recompiling."""

    eta: Scalar = 0.0
    """Noise of `ddim`: 0 is deterministic, 1 ancestral."""
    S_churn: Scalar = 0.0
    """Noise of `heun`, with the paper's names; 0 is deterministic."""
    S_tmin: Scalar = 0.0
    S_tmax: Scalar = float("inf")
    S_noise: Scalar = 1.0


class Step(NamedTuple):
    """What a step is given besides the state."""

    process: Process
    now: Level
    next: Level
    noise: Sample
    last: Bool[AnyArray, ""]
    num_steps: Count
    """Steps of the complete grid."""
    options: Options


Estimate = Callable[[Sample, Level, Sample], Prediction]
"""estimate(x, level, previous x_0) -> the network's prediction, guided and in range."""


class Sampler(NamedTuple):
    step: Callable[[State, Estimate, Step], State]
    memory: Callable[[Sample], Any] = lambda x: ()
    """Initial x -> what the sampler remembers before its first step."""


class Inpaint(NamedTuple):
    """The known part of an image (RePaint): where `mask` is True, `image` (in [-1, 1]) is kept.

    The mask is (b, h, w, 1). Every step is repeated `resample_times` times, going back in between,
    and starts with the known part as noisy as the rest. With 0, each step is taken once and the
    known part is never noisy, as in DeepFloyd IF's pipelines.
    """

    image: Sample
    mask: Bool[AnyArray, "b *dims"]
    resample_times: Count = 5


def ancestral(state: State, estimate: Estimate, step: Step) -> State:
    """A draw from the posterior (1), with the variance that the network predicts if it does."""
    prediction = estimate(state.x, step.now, state.x0)
    mean, log_variance = posterior(state.x, prediction.x0, step.now, step.next)
    if prediction.fraction is not None:
        short, long = (beside(end, mean) for end in posterior_bounds(step.now, step.next))
        log_variance = short + prediction.fraction * (long - short)
    std = jnp.where(step.last, 0.0, jnp.exp(0.5 * log_variance))
    return State(mean + std * step.noise, prediction.x0)


def ddim(state: State, estimate: Estimate, step: Step) -> State:
    """The step (2)."""
    prediction, options = estimate(state.x, step.now, state.x0), step.options
    x0, eps = prediction.x0, prediction.eps
    fresh = beside(options.eta**2 * -jnp.expm1(step.now.log_snr - step.next.log_snr), x0)
    noise = jnp.sqrt(1.0 - fresh) * eps + jnp.sqrt(fresh) * step.noise
    return State(jnp.where(step.last, x0, q_sample(x0, step.next, noise)), x0)


SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(ancestral),
    "ddim": Sampler(ddim),
    "heun": Sampler(heun),
    "dpm++2m": Sampler(dpm_2m, History.none),
    "dpm++2m-sde": Sampler(dpm_2m_sde, History.none),
    "dpm++3m": Sampler(dpm_3m, History.none),
}


def find_sampler(name: str) -> Sampler:
    """Raises ValueError for an unknown name, with the nearest known one."""
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}{hint}")
    return SAMPLERS[name]


def make_grid(
    process: Process,
    num_steps: int,
    *,
    skip_steps: int = 0,
    strength: float | None = None,
    spacing: Spacing | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    multiple: int = 1024,
) -> Grid:
    """The grid of `num_steps` steps, without the first `skip_steps`, or with only the last share
    `strength` of them, at least one; `spacing` as in grids.py. IF's own spacings have a fixed
    number of steps.

    Padded with its last entry to a multiple of `multiple`, plus one. Raises ValueError unless at
    least one step is left.
    """
    if num_steps < 1:
        raise UserError(f"num_steps = {num_steps}: at least one step must be taken.")
    positions = process.grid(num_steps, spacing=spacing, sigma_min=sigma_min, sigma_max=sigma_max)
    complete = len(positions) - 1
    if strength is not None:
        skip_steps = complete - max(1, int(complete * strength))
    if not 0 <= skip_steps < complete:
        raise UserError(
            f"skip_steps = {skip_steps} of num_steps = {complete} must leave at least one step."
        )
    positions, steps = positions[skip_steps:], complete - skip_steps
    padded = np.pad(positions, (0, -steps % multiple), mode="edge")
    return Grid(padded, np.int32(steps), np.int32(complete))


def count_noises(num_steps: int, *, resample_times: int | None = None) -> int:
    """How many given noises `num_steps` steps take: one each without inpainting (None)."""
    if not resample_times:
        return num_steps
    return num_steps * (3 * resample_times - 1) - (resample_times - 1)


def given_noises(
    noises: Float[AnyArray, "count b *dims"], grid: Grid, times: Count | None
) -> Noise:
    """Draws from a run's recorded noises, in the reference's order (`Imagen.p_sample_loop`).

    One per step; with inpainting (`times` resamplings), for every resampling those of the known
    part, the step and the renoising, the last of these only where x goes back: not before the next
    step, and not in the last. With 0 resamplings, only the step's. `count_noises` gives the total.
    """
    noises = jnp.asarray(noises)

    def noise(i: Array, r: Array, which: int) -> Sample:
        if times is None:
            return noises[i]
        per_resampling = jnp.where(i == grid.num_steps - 1, 2, 3)
        resampled = i * (3 * times - 1) + r * per_resampling + which
        return noises[jnp.where(times == 0, i, resampled)]

    return noise


def start(sampler: Sampler, x: Sample) -> State:
    return State(x, jnp.zeros_like(x), sampler.memory(x))


def run_slice(
    network: Callable[..., Array],
    process: Process,
    state: State,
    grid: Grid,
    first: Count,
    stop: Count,
    *,
    sampler: Sampler,
    noise: Noise,
    options: Options = Options(),  # noqa: B008 - immutable
    percentile: Scalar | None = None,
    most: Scalar = np.inf,
    self_cond: bool = False,
    inpaint: Inpaint | None = None,
    variance: RenoiseVariance = "exact",
) -> State:
    """Runs steps `first` to `stop` (excluded) of the grid; numbers and arrays may all be traced.

    `network(x, level)`, or with `self_cond` `network(x, level, previous x_0)`, returns what the
    process asks for. `percentile` selects dynamic thresholding, which divides by at most `most`;
    None selects static thresholding. `variance` is that of `renoise`, between resamplings.
    """

    def at(i: Array) -> Level:
        position = jnp.broadcast_to(jnp.asarray(grid.positions)[i], state.x.shape[:1])
        return process.level(position)

    def estimate(x: Sample, level: Level, previous: Sample) -> Prediction:
        answer = (lambda x, level: network(x, level, previous)) if self_cond else network
        return threshold(process.predict(answer, x, level), x, level, percentile, most)

    def advance(i: Array, state: State) -> State:
        now, then, last = at(i), at(i + 1), i == grid.num_steps - 1
        times = 1 if inpaint is None else inpaint.resample_times

        def resample(r: Array, state: State) -> State:
            if inpaint is not None:
                noisy = q_sample(inpaint.image, now, noise(i, r, 0))
                known = jnp.where(inpaint.resample_times == 0, inpaint.image, noisy)
                state = state._replace(x=jnp.where(inpaint.mask, known, state.x))
            given = Step(process, now, then, noise(i, r, 1), last, grid.planned_steps, options)
            state = sampler.step(state, estimate, given)
            if inpaint is not None:
                back = renoise(state.x, then, now, noise(i, r, 2), variance=variance)
                goes_back = (r < times - 1) & ~last
                state = state._replace(x=jnp.where(goes_back, back, state.x))
            return state

        if inpaint is None:
            return resample(jnp.int32(0), state)
        return lax.fori_loop(0, jnp.maximum(times, 1), resample, state)

    return lax.fori_loop(first, stop, advance, state)


def finish(x: Sample, inpaint: Inpaint | None = None) -> Sample:
    """The sample in [-1, 1], with its known part restored as given."""
    x = jnp.clip(x, -1.0, 1.0)
    return x if inpaint is None else jnp.where(inpaint.mask, inpaint.image, x)
