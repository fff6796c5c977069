"""The forward process, its posterior, and the algebra between x_0, eps and v.

With alpha, sigma at the log-SNR l and alpha', sigma' at the less noisy l' > l:

    x_t = alpha x_0 + sigma eps                                                              (1)
    v = alpha eps - sigma x_0,   x_0 = alpha x_t - sigma v                                   (2)
    q(x' | x_t, x_0) = N(alpha' (x_t (1 - c) / alpha + c x_0), sigma'^2 c),                  (3)
        c = -expm1(l - l')

(1) and (3): Variational Diffusion Models, Kingma et al. 2021, Eq. 1 and 32-33; (2): Progressive
Distillation, Salimans & Ho 2022, Appendix D. Arrays are `b *dims`, pictures and videos alike; a
log-SNR is one number a sample.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Float

from imagen_jax.config import Objective
from imagen_jax.diffusion.schedules import alpha_sigma
from imagen_jax.types import AnyArray, LogSNR

Sample = Float[AnyArray, "b *dims"]
PerSample = Float[AnyArray, "b *ones"]  # (b, 1, 1, 1) beside a picture

ALPHA_MIN = 1e-8


def q_sample(x0: Sample, log_snr: LogSNR, noise: Sample) -> Sample:
    """x_t of (1)."""
    alpha, sigma = alpha_sigma(_beside(log_snr, x0))
    return alpha * x0 + sigma * noise


def posterior(
    x_t: Sample, x0: Sample, log_snr: LogSNR, log_snr_next: LogSNR
) -> tuple[Sample, PerSample, PerSample]:
    """Mean, variance and log variance (of the variance clipped at 1e-20) of (3).

    imagen_pytorch.py, `GaussianDiffusionContinuousTimes.q_posterior`.
    """
    alpha, _ = alpha_sigma(_beside(log_snr, x_t))
    alpha_next, sigma_next = alpha_sigma(_beside(log_snr_next, x_t))
    c = -jnp.expm1(_beside(log_snr - log_snr_next, x_t))
    mean = alpha_next * (x_t * (1.0 - c) / alpha + c * x0)
    variance = sigma_next**2 * c
    return mean, variance, jnp.log(jnp.maximum(variance, 1e-20))


def predict_x0(x_t: Sample, output: Sample, log_snr: LogSNR, objective: Objective) -> Sample:
    """The estimate of x_0 in a network's output.

    For `noise` alpha is kept above 1e-8, as in the reference: at t = 1 of the cosine schedule it
    is 4.4e-8, and the estimate enormous until it is thresholded.
    """
    alpha, sigma = alpha_sigma(_beside(log_snr, x_t))
    match objective:
        case "noise":
            return (x_t - sigma * output) / jnp.maximum(alpha, ALPHA_MIN)
        case "v":
            return alpha * x_t - sigma * output
        case "x_start":
            return output
    raise ValueError(f"objective = {objective!r} is none of 'noise', 'v', 'x_start'.")


def target(x0: Sample, noise: Sample, log_snr: LogSNR, objective: Objective) -> Sample:
    """What a network of this objective should have answered; the inverse of `predict_x0`."""
    alpha, sigma = alpha_sigma(_beside(log_snr, x0))
    match objective:
        case "noise":
            return noise
        case "v":
            return alpha * noise - sigma * x0
        case "x_start":
            return x0
    raise ValueError(f"objective = {objective!r} is none of 'noise', 'v', 'x_start'.")


def noise_from_x0(x_t: Sample, x0: Sample, log_snr: LogSNR) -> Sample:
    """The eps that leads from x_0 to x_t in (1)."""
    alpha, sigma = alpha_sigma(_beside(log_snr, x_t))
    return (x_t - alpha * x0) / sigma


def renoise(
    x: Sample,
    log_snr_from: LogSNR,
    log_snr_to: LogSNR,
    noise: Sample,
    *,
    variance: Literal["exact", "reference"] = "exact",
) -> Sample:
    """Takes x back from the less noisy log-SNR to the noisier one (RePaint, Lugmayr et al. 2022).

    `exact` adds the variance by which the scaled x falls short of sigma_to^2, so that a sample of
    the marginal (1) stays one. `reference` takes the difference of the standard deviations
    instead (imagen_pytorch.py, `q_sample_from_to`), which leaves too little noise.
    """
    alpha, sigma = alpha_sigma(_beside(log_snr_from, x))
    alpha_to, sigma_to = alpha_sigma(_beside(log_snr_to, x))
    match variance:
        case "exact":  # sigma_to^2 - (alpha_to / alpha)^2 sigma^2, without the cancellation
            std = sigma_to * jnp.sqrt(-jnp.expm1(_beside(log_snr_to - log_snr_from, x)))
        case "reference":
            std = (sigma_to * alpha - sigma * alpha_to) / alpha
        case _:
            raise ValueError(f"variance = {variance!r} is neither 'exact' nor 'reference'.")
    return x * (alpha_to / alpha) + noise * std


def _beside(per_sample: LogSNR, x: Sample) -> PerSample:
    return per_sample.reshape(-1, *(1,) * (x.ndim - 1))
