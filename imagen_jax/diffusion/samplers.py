"""Reverse-time samplers: one step function each, one loop for all.

A step goes from x_t at the log-SNR l to x' at the next, less noisy l' > l, given the estimate of
x_0. With alpha, sigma at l and alpha', sigma' at l':

    ancestral    x' = mean + std z      of the posterior q(x' | x_t, x_0)                       (1)
    DDIM         x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z,
                 eps = (x_t - alpha x_0) / sigma,   s = eta sigma' sqrt(1 - exp(l - l'))        (2)

(1): Ho et al. 2020, as imagen-pytorch samples; (2): Song et al. 2021, Eq. 12; eta = 1 is (1).

The loop runs over a grid of log-SNRs that is padded to a fixed length, between bounds that are
traced: another number of steps is no other program, and the caller can run it in slices, to show
progress or to stop. `jax.jit` is the caller's, around whatever builds its `denoise`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import Objective, Schedule
from imagen_jax.diffusion.guidance import dynamic_threshold, static_threshold
from imagen_jax.diffusion.process import (
    Sample,
    noise_from_x0,
    posterior,
    predict_x0,
    q_sample,
    renoise,
)
from imagen_jax.diffusion.schedules import alpha_sigma, log_snr
from imagen_jax.types import AnyArray, Denoiser, LogSNR, PRNGKey

Count = int | np.integer | Int[AnyArray, ""]
Noises = Float[AnyArray, "count b *dims"]
Step = Callable[..., Sample]
"""step(x_t, x0, log_snr, log_snr_next, noise, *, last) -> x'. `last` (a traced bool) marks the
step that ends at t = 0: it adds no noise. A solver of higher order is one more of these, with what
it remembers of earlier steps as a further keyword."""


class Grid(NamedTuple):
    """log-SNRs from noise to picture, and how many steps lie between them; data, not shape."""

    log_snr: Float[AnyArray, "padded"]
    num_steps: Count


class Carry(NamedTuple):
    """What one step hands to the next."""

    x: Sample
    x0: Sample  # the latest estimate, thresholded; zeros before the first step


class Inpaint(NamedTuple):
    """The known part of a picture (RePaint): where `mask` is True, `image` (in [-1, 1]) is kept.

    The mask is (b, h, w, 1). Every step is made `resample_times` times, renoised between.
    """

    image: Sample
    mask: Bool[AnyArray, "b *dims"]
    resample_times: Count = 5


def time_grid(num_steps: int) -> Float[np.ndarray, "points"]:
    """num_steps + 1 times from 1 to 0, with the roundings of `torch.linspace(1, 0, num_steps + 1)`.

    torch counts from both ends with a float32 step, the product and the sum rounded once.
    """
    step = np.float64(np.float32(1.0) / np.float32(num_steps))
    i = np.arange(num_steps + 1)
    times = np.where(i < (num_steps + 1) // 2, 1.0 - step * i, step * (num_steps - i))
    return times.astype(np.float32)


def make_grid(
    num_steps: int, schedule: Schedule, *, skip_steps: int = 0, multiple: int = 1024
) -> Grid:
    """The log-SNRs of `num_steps` steps of equal time, without the first `skip_steps`.

    Padded with its last entry to a multiple of `multiple`, plus one. Raises ValueError unless
    0 <= skip_steps < num_steps.
    """
    if not 0 <= skip_steps < num_steps:
        raise ValueError(
            f"skip_steps = {skip_steps} of num_steps = {num_steps} must leave at least one step."
        )
    points = log_snr(time_grid(num_steps)[skip_steps:], schedule)
    steps = len(points) - 1
    return Grid(np.pad(points, (0, -steps % multiple), mode="edge"), np.int32(steps))


def ancestral(
    x_t: Sample,
    x0: Sample,
    log_snr: LogSNR,
    log_snr_next: LogSNR,
    noise: Sample,
    *,
    last: bool | Bool[AnyArray, ""],
) -> Sample:
    """A draw from the posterior (1); its mean at the last step."""
    mean, _, log_variance = posterior(x_t, x0, log_snr, log_snr_next)
    return mean + jnp.where(last, 0.0, jnp.exp(0.5 * log_variance)) * noise


def ddim(
    x_t: Sample,
    x0: Sample,
    log_snr: LogSNR,
    log_snr_next: LogSNR,
    noise: Sample,
    *,
    last: bool | Bool[AnyArray, ""],
    eta: float | Float[AnyArray, ""] = 0.0,
) -> Sample:
    """The step (2), deterministic at eta = 0.

    The last step answers x_0 itself: at t = 0 a schedule still has a little noise, which nothing
    would remove.
    """
    eps = noise_from_x0(x_t, x0, log_snr)
    ones = (1,) * (x_t.ndim - 1)
    alpha_next, sigma_next = alpha_sigma(log_snr_next.reshape(-1, *ones))
    fresh = eta**2 * -jnp.expm1(log_snr - log_snr_next).reshape(-1, *ones)
    noisy = alpha_next * x0 + sigma_next * (jnp.sqrt(1.0 - fresh) * eps + jnp.sqrt(fresh) * noise)
    return jnp.where(last, x0, noisy)


def count_noises(num_steps: int, *, resample_times: int | None = None) -> int:
    """How many given noises `num_steps` steps take: one each without inpainting (None)."""
    if resample_times is None:
        return num_steps
    return num_steps * (3 * resample_times - 1) - (resample_times - 1)


def run_slice(
    denoise: Denoiser,
    carry: Carry,
    grid: Grid,
    start: Count,
    stop: Count,
    *,
    objective: Objective,
    step: Step = ancestral,
    percentile: float | Float[AnyArray, ""] | None = None,
    self_cond: bool = False,
    inpaint: Inpaint | None = None,
    variance: Literal["exact", "reference"] = "exact",
    key: PRNGKey | None = None,
    noises: Noises | None = None,
) -> Carry:
    """Steps `start` to `stop` (excluded) of the grid; numbers and arrays may all be traced.

    `percentile` chooses dynamic thresholding, None static. `denoise` gets the previous estimate
    of x_0 only with `self_cond`. `variance` is that of `renoise`, between resamplings.

    Noise is drawn from `key`, by the step's number, or taken from `noises`, the whole run's, in
    the reference's order: one a step; with inpainting, for every resampling the known part's, the
    step's and the renoising's, the last one only where there is a renoising, so not before the
    next step and not in the last (imagen_pytorch.py, `Imagen.p_sample_loop`; `count_noises` says
    how many). Raises ValueError unless exactly one of the two is given.
    """
    if (key is None) == (noises is None):
        raise ValueError("give either a key or the noises, and not both.")

    def at(i: Array) -> LogSNR:
        return jnp.broadcast_to(jnp.asarray(grid.log_snr)[i], carry.x.shape[:1])

    def estimate(x: Sample, level: LogSNR, x0_previous: Sample) -> Sample:
        output = denoise(x, level, x0_previous) if self_cond else denoise(x, level)
        x0 = predict_x0(x, output.astype(x.dtype), level, objective)
        return static_threshold(x0) if percentile is None else dynamic_threshold(x0, percentile)

    def advance(i: Array, carry: Carry) -> Carry:
        now, then, last = at(i), at(i + 1), i == grid.num_steps - 1
        times = 1 if inpaint is None else inpaint.resample_times

        def noise(r: Array, which: int) -> Sample:
            """Draw `which` of resampling r: 0 for the known part, 1 the step, 2 renoising."""
            if noises is None:
                drawn = jax.random.fold_in(jax.random.fold_in(key, i), 3 * r + which)
                return jax.random.normal(drawn, carry.x.shape, carry.x.dtype)
            if inpaint is None:
                return jnp.asarray(noises)[i]
            return jnp.asarray(noises)[i * (3 * times - 1) + r * jnp.where(last, 2, 3) + which]

        def resample(r: Array, carry: Carry) -> Carry:
            x = carry.x
            if inpaint is not None:
                x = jnp.where(inpaint.mask, q_sample(inpaint.image, now, noise(r, 0)), x)
            x0 = estimate(x, now, carry.x0)
            x = step(x, x0, now, then, noise(r, 1), last=last)
            if inpaint is not None:
                back = renoise(x, then, now, noise(r, 2), variance=variance)
                x = jnp.where((r < times - 1) & ~last, back, x)
            return Carry(x, x0)

        if inpaint is None:
            return resample(jnp.int32(0), carry)
        return lax.fori_loop(0, times, resample, carry)

    return lax.fori_loop(start, stop, advance, carry)


def finish(x: Sample, inpaint: Inpaint | None = None) -> Sample:
    """The sample in [-1, 1], its known part put back as it was given."""
    x = jnp.clip(x, -1.0, 1.0)
    return x if inpaint is None else jnp.where(inpaint.mask, inpaint.image, x)
