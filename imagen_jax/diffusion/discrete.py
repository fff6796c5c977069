"""The variance-preserving process in discrete steps: DeepFloyd IF's, after Improved DDPM.

Steps run from 0, nearly the data, to T - 1, noise. With betas b_t and abar_t = prod (1 - b_s), a
level has alpha^2 = abar_t, sigma^2 = 1 - abar_t; the network is given t and predicts the noise. If
it learns the variance, it also has as many channels v, which interpolate the log variance of a step
between its two bounds:

    log var = f log b_t + (1 - f) log b~_t,   f = (v + 1) / 2,   b~_t of the posterior        (1)

(1): Nichol & Dhariwal 2021, Eq. 15. Positions are steps; -1 is the data itself.

Spacings of sampling grids:

    leading    diffusers' `num_inference_steps`: multiples of T // N from 0 up
    trailing   evenly spaced from T - 1 down
    log_snr, karras, a list of sigma / alpha: the steps nearest to those of grids.py
    fast27, smart27, smart50, smart100, smart185, super27, super40, super100: IF's own, for T = 1000
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion import grids, losses
from imagen_jax.diffusion.grids import Spacing
from imagen_jax.diffusion.process import (
    Level,
    Network,
    PerSample,
    Prediction,
    Sample,
    beside,
    posterior,
    posterior_bounds,
    q_sample,
)
from imagen_jax.diffusion.vp import LOG_SNR_MIN
from imagen_jax.errors import UserError
from imagen_jax.types import PRNGKey

Betas = Literal["squaredcos_cap_v2", "linear"]

LOG_SNR_OF_DATA = 40.0
"""Replaces infinity, at the position -1."""

PRESETS: dict[str, tuple[int, ...]] = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, *range(4, 17), 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
"""The number of steps taken from each of several equal sections of the process, data to noise."""

SPACINGS = ("leading", "trailing", *PRESETS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete:
    """Betas, and whether the variance is learned. See `Process`."""

    betas: Betas = "squaredcos_cap_v2"
    steps: int = 1000
    learned_variance: bool = True
    loss_type: losses.Loss = "l2"

    sampler: ClassVar[str] = "ancestral"
    objective: ClassVar[str] = "noise"

    def draw(self, key: PRNGKey, count: int) -> PerSample:
        """Times, uniform in [0, 1)."""
        return jax.random.uniform(key, (count,))

    def training_level(self, draw: PerSample) -> Level:
        """The level of the step whose part of [0, 1] contains the time."""
        time = jnp.asarray(draw)
        return self.level(jnp.clip(jnp.floor(time * self.steps + 1e-3), 0, self.steps - 1))

    def level(self, position: PerSample) -> Level:
        alpha, sigma, log_snr = (jnp.asarray(part) for part in _tables(self.betas, self.steps))
        position = jnp.asarray(position, jnp.float32)
        row = position.astype(jnp.int32) + 1
        return Level(alpha[row], sigma[row], log_snr[row], position)

    def at(self, ratio: PerSample) -> Level:
        """The nearest step's level."""
        log_snr = jnp.asarray(_tables(self.betas, self.steps)[2])
        wanted = -2 * jnp.log(ratio)
        nearest = jnp.argmin(jnp.abs(log_snr[None, 1:] - wanted[:, None]), axis=1)
        return self.level(nearest.astype(jnp.float32))

    def predict(self, network: Network, x: Sample, level: Level) -> Prediction:
        eps, fraction = self._split(network(x, level).astype(x.dtype), x)
        x0 = (x - beside(level.sigma, x) * eps) / beside(level.alpha, x)
        return Prediction(x0, eps, fraction)

    def target(self, x0: Sample, noise: Sample, level: Level) -> Sample:
        return noise

    def losses(self, network: Network, x0: Sample, noise: Sample, level: Level) -> PerSample:
        """The error of the noise; with a learned variance also the variational bound, through which
        no gradient reaches the noise (Nichol & Dhariwal 2021, Eq. 16, where lambda is 1 / 1000 and
        the bound has T terms)."""
        x = q_sample(x0, level, noise)
        eps, fraction = self._split(network(x, level), x)
        error = losses.per_sample(eps, noise, self.loss_type)
        if fraction is None:
            return error
        frozen = jax.lax.stop_gradient(eps)
        estimate = (x - beside(level.sigma, x) * frozen) / beside(level.alpha, x)
        return error + self.steps / 1000 * self._bound(x0, x, estimate, fraction, level)

    def grid(
        self,
        num_steps: int,
        *,
        spacing: Spacing | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Float[np.ndarray, "points"]:
        """Steps in descending order, then -1; IF's own spacings have a fixed number of steps."""
        grids.refuse_range(sigma_min, sigma_max)
        if num_steps > self.steps:
            raise UserError(f"num_steps = {num_steps}: the process has only {self.steps}.")
        return np.append(self._timesteps(num_steps, spacing), -1).astype(np.float32)

    def prior(self, noise: Sample, level: Level) -> Sample:
        """Noise of unit variance, wherever the grid starts."""
        return noise

    def _split(self, output: Array, x: Sample) -> tuple[Array, Array | None]:
        channels = x.shape[-1]
        if not self.learned_variance:
            return output, None
        return output[..., :channels], (output[..., channels:] + 1) / 2

    def _bound(
        self, x0: Sample, x: Sample, estimate: Sample, fraction: Sample, level: Level
    ) -> PerSample:
        """The term L_{t-1} of the variational bound, in bits per dimension; at t = 0 the likelihood
        of 8-bit data (Ho et al. 2020, Eq. 13)."""
        before = self.level(level.conditioning - 1)
        true_mean, _ = posterior(x, x0, level, before)
        mean, _ = posterior(x, estimate, level, before)
        short, long = self._log_bounds(level, before)
        log_variance = beside(long, x) * fraction + beside(short, x) * (1 - fraction)
        true = beside(short, x)
        kl = 0.5 * (
            log_variance
            - true
            - 1
            + jnp.exp(true - log_variance)
            + (true_mean - mean) ** 2 * jnp.exp(-log_variance)
        )
        first = beside(jnp.where(level.conditioning == 0, 1.0, 0.0), x) > 0
        nats = jnp.where(first, -_log_likelihood(x0, mean, 0.5 * log_variance), kl)
        return jnp.mean(nats, axis=range(1, x.ndim)) / np.log(2)

    def _log_bounds(self, level: Level, before: Level) -> tuple[PerSample, PerSample]:
        """The log variances of (1). At t = 0 the smaller variance is 0; its logarithm is replaced
        by that at t = 1, as in Improved DDPM."""
        short, long = posterior_bounds(level, before)
        one, zero = (self.level(jnp.full_like(level.alpha, t)) for t in (1.0, 0.0))
        floor, _ = posterior_bounds(one, zero)
        return jnp.where(level.conditioning == 0, floor, short), long

    def _timesteps(self, num_steps: int, spacing: Spacing | None) -> np.ndarray:
        total = self.steps
        if spacing in (None, "leading", "t"):
            return (np.arange(num_steps) * (total // num_steps))[::-1]
        if spacing == "trailing":
            return np.round(np.linspace(total - 1, 0, num_steps))
        if spacing in PRESETS:
            if total != 1000:
                raise UserError(f"spacing {spacing!r} is for 1000 steps; this process has {total}.")
            return _sections(PRESETS[spacing], total)[::-1]
        log_snr = _tables(self.betas, total)[2][1:]
        low = max(float(log_snr[-1]), LOG_SNR_MIN)
        wanted = grids.log_snrs(spacing, low, float(log_snr[0]), num_steps)
        nearest = np.abs(log_snr[None] - wanted[:, None]).argmin(axis=1)
        for i in range(1, num_steps):  # several levels may have the same nearest step
            nearest[i] = min(nearest[i], nearest[i - 1] - 1)
        return np.maximum(nearest, np.arange(num_steps)[::-1])


@functools.lru_cache(maxsize=8)
def _tables(betas: Betas, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma and log-SNR by position + 1, in float32; the first row is the data's."""
    i = np.arange(steps + 1) / steps
    if betas == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021, Eq. 17, betas clipped to 0.999
        curve = np.cos((i + 0.008) / 1.008 * np.pi / 2) ** 2
        values = np.minimum(1 - curve[1:] / curve[:-1], 0.999).astype(np.float32)
    elif betas == "linear":
        values = np.linspace(1e-4, 0.02, steps, dtype=np.float32)  # Ho et al. 2020
    else:
        raise UserError(f"betas {betas!r} must be squaredcos_cap_v2 or linear.")
    abar = np.cumprod(1 - values.astype(np.float64))
    columns = (
        np.append(1.0, np.sqrt(abar)),
        np.append(0.0, np.sqrt(1 - abar)),
        np.append(LOG_SNR_OF_DATA, np.log(abar) - np.log1p(-abar)),
    )
    return tuple(column.astype(np.float32) for column in columns)


def _sections(counts: tuple[int, ...], total: int) -> np.ndarray:
    """The steps that a preset keeps, ascending: evenly spaced in each section, ends included."""
    size, extra = divmod(total, len(counts))
    kept, start = [], 0
    for place, count in enumerate(counts):
        length = size + (place < extra)
        at, stride = 0.0, (length - 1) / max(count - 1, 1)
        for _ in range(count):  # summed, not multiplied, to round halves as the original does
            kept.append(start + round(at))
            at += stride
        start += length
    return np.array(kept)


def _log_likelihood(x: Sample, mean: Sample, log_std: Sample) -> Array:
    """log of a Gaussian's mass on the 8-bit bin of x in [-1, 1]; the outer bins are open."""
    centred, inverse = x - mean, jnp.exp(-log_std)
    above = jax.scipy.stats.norm.cdf(inverse * (centred + 1 / 255))
    below = jax.scipy.stats.norm.cdf(inverse * (centred - 1 / 255))
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))
