"""The algebra of the process: round trips, Bayes by brute force, and the reference's formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax.diffusion import process
from imagen_jax.diffusion.edm import EDM
from imagen_jax.diffusion.schedules import log_snr
from imagen_jax.diffusion.vp import VP, x0_from_output

OBJECTIVES = ("noise", "v", "x_start")
X0, NOISE = jax.random.normal(jax.random.key(0), (2, 4, 3, 5, 3))


PROCESSES = {objective: VP(objective=objective) for objective in OBJECTIVES}
PROCESSES["edm"] = EDM()
RATIOS = jnp.array([7.0, 1.5, 0.7, 0.1])  # sigma / alpha


@pytest.mark.parametrize("a, b", list(itertools.product(PROCESSES, PROCESSES)))
def test_round_trip_between_parameterisations(a, b):
    """Answer of a -> x_0, noise and score -> answer of b -> x_0, at the same ratio."""
    first, second = PROCESSES[a], PROCESSES[b]
    level = first.at(RATIOS)
    x = process.q_sample(X0, level, NOISE)
    found = first.predict(lambda *_: first.target(X0, NOISE, level), x, level)
    np.testing.assert_allclose(found.x0, X0, atol=5e-5)
    np.testing.assert_allclose(found.eps, NOISE, atol=5e-5)
    score = -found.eps / process.beside(level.sigma, x)  # of the Gaussian q(x | x_0)
    noise = -score * process.beside(level.sigma, x)
    level = second.at(RATIOS)
    x = process.q_sample(found.x0, level, noise)
    again = second.predict(lambda *_: second.target(found.x0, noise, level), x, level)
    np.testing.assert_allclose(again.x0, X0, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_are_consistent(name):
    one = PROCESSES[name]
    for level in (one.at(RATIOS), one.training_level(one.draw(jax.random.key(0), 500))):
        ratio = level.sigma / level.alpha
        np.testing.assert_allclose(level.log_snr, -2 * jnp.log(ratio), atol=1e-4)
    np.testing.assert_allclose(one.at(RATIOS).sigma / one.at(RATIOS).alpha, RATIOS, rtol=1e-5)
    grid = one.grid(7)
    levels = one.level(grid)
    assert grid.shape == (8,) and np.all(np.diff(levels.log_snr) > 0)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_optimum_of_the_loss_is_the_posterior_mean(name):
    """On Gaussian data of variance v it is x_0 = g x with g = alpha v / (alpha^2 v + sigma^2)."""
    one, v = PROCESSES[name], 0.3
    level = one.at(RATIOS)
    x0, noise = jax.random.normal(jax.random.key(1), (2, 4, 200_000))
    x0 = x0 * v**0.5
    gain = level.alpha * v / (level.alpha**2 * v + level.sigma**2)

    def loss(factor):
        def answer(x, level):
            estimate = factor * gain[:, None] * one_x
            eps = process.eps_from_x0(one_x, estimate, level)
            return one.target(estimate, eps, level)

        one_x = process.q_sample(x0, level, noise)
        return one.losses(answer, x0, noise, level)

    best = loss(1.0)
    for factor in (0.97, 1.03):
        assert np.all(loss(factor) > best)
    slope = jax.jacfwd(loss)(1.0) / best
    np.testing.assert_allclose(slope, 0.0, atol=0.05)


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

    levels = VP().level(jnp.array([level])), VP().level(jnp.array([level_next]))
    got = process.posterior(jnp.full((1, 1), x_t), jnp.full((1, 1), x0), *levels)
    want = (mean, np.log(variance))
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(value[0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_matches_reference(reference, schedule):
    """At the ends of the schedules too, where alpha is 4.4e-8 and the variance is clipped."""
    theirs = reference.GaussianDiffusionContinuousTimes(noise_schedule=schedule)
    t, t_next = np.float32([1.0, 0.999, 0.5, 0.001]), np.float32([0.999, 0.9, 0.499, 0.0])
    level, level_next = (VP().level(log_snr(times, schedule)) for times in (t, t_next))
    t, t_next, x, noise = (torch.from_numpy(np.array(a)) for a in (t, t_next, X0, NOISE))
    pairs = [
        (process.q_sample(X0, level, NOISE), theirs.q_sample(x, t, noise)[0]),
        (x0_from_output(X0, NOISE, level, "v"), theirs.predict_start_from_v(x, t, noise)),
        (
            x0_from_output(X0, NOISE, level, "noise"),
            theirs.predict_start_from_noise(x, t, noise),
        ),
        *zip(
            process.posterior(X0, NOISE, level, level_next),
            theirs.q_posterior(noise, x, t, t_next=t_next)[::2],
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
    level = VP().at(RATIOS)
    _, log_variance = process.posterior(X0, X0, level, level)
    np.testing.assert_allclose(log_variance, np.log(1e-20), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_renoise_keeps_the_marginal_variance(schedule):
    """(alpha_to / alpha)^2 sigma^2 + std^2 = sigma_to^2; the reference's std falls short of it."""
    t = jnp.linspace(0.05, 0.95, 19)
    start, to = (VP().level(log_snr(times, schedule)) for times in (t - 0.05, t))
    (alpha, sigma, *_), (alpha_to, sigma_to, *_) = start, to
    ones, zeros = jnp.ones((19, 1)), jnp.zeros((19, 1))

    def total(variance):
        std = process.renoise(zeros, start, to, ones, variance=variance)[:, 0]
        return (alpha_to / alpha * sigma) ** 2 + std**2

    kept = process.renoise(ones, start, to, zeros)[:, 0] * alpha
    np.testing.assert_allclose(kept, alpha_to, rtol=1e-5)
    np.testing.assert_allclose(total("exact"), sigma_to**2, rtol=1e-4)
    assert np.all(total("reference") < 0.99 * sigma_to**2)
