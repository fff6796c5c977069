"""The algebra of the process: round trips, Bayes by brute force, and the reference's formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax.diffusion import process
from imagen_jax.diffusion.schedules import alpha_sigma, log_snr

OBJECTIVES = ("noise", "v", "x_start")
LEVELS = jnp.array([-4.0, -1.0, 1.0, 4.0])
X0, NOISE = jax.random.normal(jax.random.key(0), (2, 4, 3, 5, 3))


@pytest.mark.parametrize("a, b", list(itertools.product(OBJECTIVES, OBJECTIVES)))
def test_round_trip_between_parameterisations(a, b):
    """Output of a -> x_0 and noise -> output of b -> x_0."""
    x_t = process.q_sample(X0, LEVELS, NOISE)
    x0 = process.predict_x0(x_t, process.target(X0, NOISE, LEVELS, a), LEVELS, a)
    noise = process.noise_from_x0(x_t, x0, LEVELS)
    np.testing.assert_allclose(noise, NOISE, atol=2e-5)
    output = process.target(x0, noise, LEVELS, b)
    np.testing.assert_allclose(process.predict_x0(x_t, output, LEVELS, b), X0, atol=2e-5)


@pytest.mark.parametrize("level, level_next", [(-3.0, -1.0), (0.0, 0.5), (2.0, 8.0)])
def test_posterior_is_bayes(level, level_next):
    """The product of prior and likelihood on a dense line, in float64."""
    x_t, x0 = 0.7, -0.4
    a, s = (1 / (1 + np.exp(-level))) ** 0.5, (1 / (1 + np.exp(level))) ** 0.5
    a_next, s_next = (1 / (1 + np.exp(-level_next))) ** 0.5, (1 / (1 + np.exp(level_next))) ** 0.5
    line = np.linspace(-8, 8, 400_001)
    log_p = -0.5 * ((line - a_next * x0) / s_next) ** 2
    log_p -= 0.5 * (x_t - a / a_next * line) ** 2 / (s**2 - (a / a_next * s_next) ** 2)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * line).sum()
    variance = (p * (line - mean) ** 2).sum()

    got = process.posterior(
        jnp.full((1, 1), x_t), jnp.full((1, 1), x0), jnp.array([level]), jnp.array([level_next])
    )
    want = (mean, variance, np.log(variance))
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(value[0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_matches_reference(reference, schedule):
    """At the ends of the schedules too, where alpha is 4.4e-8 and the variance is clipped."""
    theirs = reference.GaussianDiffusionContinuousTimes(noise_schedule=schedule)
    t, t_next = np.float32([1.0, 0.999, 0.5, 0.001]), np.float32([0.999, 0.9, 0.499, 0.0])
    level, level_next = jnp.asarray(log_snr(t, schedule)), jnp.asarray(log_snr(t_next, schedule))
    t, t_next, x, noise = (torch.from_numpy(np.array(a)) for a in (t, t_next, X0, NOISE))
    pairs = [
        (process.q_sample(X0, level, NOISE), theirs.q_sample(x, t, noise)[0]),
        (process.predict_x0(X0, NOISE, level, "v"), theirs.predict_start_from_v(x, t, noise)),
        (
            process.predict_x0(X0, NOISE, level, "noise"),
            theirs.predict_start_from_noise(x, t, noise),
        ),
        *zip(
            process.posterior(X0, NOISE, level, level_next),
            theirs.q_posterior(noise, x, t, t_next=t_next),
            strict=True,
        ),
        (
            process.renoise(X0, level_next, level, NOISE, variance="reference"),
            theirs.q_sample_from_to(x, t_next, t, noise),
        ),
    ]
    for got, want in pairs:
        scale = np.abs(want.numpy()).max(axis=tuple(range(1, want.ndim)), keepdims=True)
        np.testing.assert_allclose(got / scale, want.numpy() / scale, atol=1e-4)


def test_variance_is_clipped_in_the_logarithm():
    """Two equal levels leave no variance."""
    _, variance, log_variance = process.posterior(X0, X0, LEVELS, LEVELS)
    np.testing.assert_array_equal(variance, 0.0)
    np.testing.assert_allclose(log_variance, np.log(1e-20), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_renoise_keeps_the_marginal_variance(schedule):
    """(alpha_to / alpha)^2 sigma^2 + std^2 = sigma_to^2; the reference's std falls short of it."""
    t = jnp.linspace(0.05, 0.95, 19)
    start, to = log_snr(t - 0.05, schedule), log_snr(t, schedule)
    (alpha, sigma), (alpha_to, sigma_to) = alpha_sigma(start), alpha_sigma(to)
    ones, zeros = jnp.ones((19, 1)), jnp.zeros((19, 1))

    def total(variance):
        std = process.renoise(zeros, start, to, ones, variance=variance)[:, 0]
        return (alpha_to / alpha * sigma) ** 2 + std**2

    kept = process.renoise(ones, start, to, zeros)[:, 0] * alpha
    np.testing.assert_allclose(kept, alpha_to, rtol=1e-5)
    np.testing.assert_allclose(total("exact"), sigma_to**2, rtol=1e-4)
    assert np.all(total("reference") < 0.99 * sigma_to**2)
