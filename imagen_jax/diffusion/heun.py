"""Heun's second-order steps with churn: EDM's stochastic sampler, on any process.

Karras et al. 2022, Algorithm 2, in y = x / alpha and s = sigma / alpha, for which every process is
EDM's. A step first raises the noise from s to s^ = (1 + gamma) s, then follows dy/ds = eps:

    gamma = min(S_churn / N, sqrt(2) - 1) where S_tmin <= s <= S_tmax, else 0
    y^  = y + sqrt(s^^2 - s^2) S_noise z
    y'  = y^ + (s' - s^) eps^                            (Euler)
    y'' = y^ + (s' - s^) (eps^ + eps') / 2               (eps' at y', s')

y^ - s^ eps^ is the estimate of x_0, so y' = x_0 + s' eps^: stable where s^ is huge.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from imagen_jax.diffusion.process import Level, beside, q_sample

NO_SIGNAL = 1e4
"""From this s up, a step is Euler's: the slope at s' would be multiplied by s^, and x is noise."""


def heun(state, estimate, step):
    """A step of `samplers.Sampler`; two evaluations of the network, one in the last step."""
    level, x = _churned(state.x, step)
    first = estimate(x, level, state.x0)

    def end() -> tuple[Array, Array]:
        return first.x0, first.x0

    def corrected() -> tuple[Array, Array]:
        euler = q_sample(first.x0, step.next, first.eps)
        second = estimate(euler, step.next, first.x0)
        s, s_next = level.sigma / level.alpha, step.next.sigma / step.next.alpha
        half = jnp.where(s < NO_SIGNAL, step.next.alpha * (s_next - s) / 2, 0.0)
        return euler + beside(half, x) * (second.eps - first.eps), second.x0

    x, x0 = jax.lax.cond(step.last, end, corrected)
    return state._replace(x=x, x0=x0)


def _churned(x: Array, step) -> tuple[Level, Array]:
    """The noisier level, and x with the noise that leads there."""
    options, now = step.options, step.now
    s = now.sigma / now.alpha
    most = jnp.minimum(options.S_churn / step.num_steps, math.sqrt(2) - 1)
    gamma = jnp.where((s >= options.S_tmin) & (s <= options.S_tmax), most, 0.0)
    hat = step.process.at(s * (1 + gamma))
    level = jax.tree.map(lambda a, b: jnp.where(gamma > 0, a, b), hat, now)
    added = s * jnp.sqrt(gamma * (2 + gamma)) * options.S_noise
    kept = beside(level.alpha / now.alpha, x) * x
    return level, kept + beside(level.alpha * added, x) * step.noise
