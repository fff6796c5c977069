"""DPM-Solver++: multistep samplers of second and third order, one network evaluation per step.

With lambda = log(alpha / sigma), half the log-SNR, h = lambda' - lambda and D(u) the estimate of
x_0 at lambda + u, the probability flow and its stochastic form have the exact solutions

    x' = (sigma' / sigma) x + alpha' int_0^h e^(u - h) D(u) du                                 (1)
    x' = (sigma' / sigma) e^-h x + 2 alpha' int_0^h e^(2 (u - h)) D(u) du
         + sigma' sqrt(1 - e^(-2h)) z                                                          (2)

A step knows D(0) and extrapolates from the estimates of earlier steps: as a constant (first order,
which is DDIM), with a slope (2M), or also with a curvature (3M).

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", Eq. 9 and Algorithm 2. 2M and its
SDE form take the slope at the middle of the step, as diffusers' `DPMSolverMultistepScheduler` does.
Third order there takes half of the curvature, and remains second order; 3M here integrates (1).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from imagen_jax.diffusion.process import PerSample, Sample, beside

SERIES_BELOW = 1e-2
"""Below this h the integrals of 3M use their series: the closed forms suffer from cancellation."""


class History(NamedTuple):
    """The estimates of x_0 at the two previous levels, and their lambdas; infinite for none."""

    newer: Sample
    lambda_newer: PerSample
    older: Sample
    lambda_older: PerSample

    @classmethod
    def none(cls, x: Sample) -> "History":
        never = jnp.full(x.shape[:1], jnp.inf, x.dtype)
        return cls(jnp.zeros_like(x), never, jnp.zeros_like(x), never)


class _Known(NamedTuple):
    """What is known about D: its value and divided differences at u = 0, zero where unknown."""

    value: Sample
    first: Sample
    second: Sample
    back: PerSample
    """Distance in lambda from the previous level to this one."""
    h: PerSample


def dpm_2m(state, estimate, step):
    """A step of `samplers.Sampler`: (1), second order, deterministic."""
    known, state = _look(state, estimate, step)
    middle = known.value + beside(known.h / 2, known.value) * known.first
    weight = step.next.alpha * -jnp.expm1(-known.h)
    x = _times(step.next.sigma / step.now.sigma, state.x) + _times(weight, middle)
    return state._replace(x=jnp.where(step.last, known.value, x))


def dpm_2m_sde(state, estimate, step):
    """A step of `samplers.Sampler`: (2), second order, with a new noise at every step."""
    known, state = _look(state, estimate, step)
    middle = known.value + beside(known.h / 2, known.value) * known.first
    fresh = -jnp.expm1(-2 * known.h)
    x = _times(step.next.sigma / step.now.sigma * jnp.exp(-known.h), state.x)
    x += _times(step.next.alpha * fresh, middle)
    x += _times(step.next.sigma * jnp.sqrt(fresh), step.noise)
    return state._replace(x=jnp.where(step.last, known.value, x))


def dpm_3m(state, estimate, step):
    """A step of `samplers.Sampler`: (1), third order, deterministic."""
    known, state = _look(state, estimate, step)
    h = known.h
    slope = known.first + beside(known.back, known.first) * known.second
    # int_0^h e^(u - h) u^k / k! du
    i0 = -jnp.expm1(-h)
    i1 = jnp.where(h < SERIES_BELOW, h**2 / 2 - h**3 / 6 + h**4 / 24, h - i0)
    i2 = jnp.where(h < SERIES_BELOW, h**3 / 6 - h**4 / 24 + h**5 / 120, h**2 / 2 - h + i0)
    integral = _times(i0, known.value) + _times(i1, slope) + _times(2 * i2, known.second)
    x = _times(step.next.sigma / step.now.sigma, state.x) + _times(step.next.alpha, integral)
    return state._replace(x=jnp.where(step.last, known.value, x))


def _look(state, estimate, step):
    """D at this level, its differences from previous levels, and the state that remembers them."""
    value = estimate(state.x, step.now, state.x0).x0
    past = state.memory
    here = (step.now.log_snr / 2).astype(past.lambda_newer.dtype)
    h = jnp.where(step.last, 1.0, step.next.log_snr / 2 - here)  # the last step returns the value
    back, further = here - past.lambda_newer, past.lambda_newer - past.lambda_older
    first = _slope(value - past.newer, back)
    before = _slope(past.newer - past.older, further)
    second = _slope(first - before, jnp.where((back > 0) & (further > 0), back + further, 0.0))
    again = back == 0  # RePaint came back to this level
    older = jnp.where(beside(jnp.where(again, 1.0, 0.0), value) > 0, past.older, past.newer)
    lambda_older = jnp.where(again, past.lambda_older, past.lambda_newer)
    memory = History(value, here, older, lambda_older)
    known = _Known(value, first, second, jnp.maximum(back, 0.0), h)
    return known, state._replace(x0=value, memory=memory)


def _slope(change: Array, distance: PerSample) -> Array:
    """`change` / `distance`; zero where the distance is not above zero."""
    exists = distance > 0
    return beside(exists / jnp.where(exists, distance, 1.0), change) * change


def _times(scale: PerSample, x: Sample) -> Array:
    return beside(scale, x) * x
