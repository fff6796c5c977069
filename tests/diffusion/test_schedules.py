"""Both schedules against the reference, on the host, eager and jitted, and at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax.diffusion.discrete import Discrete
from imagen_jax.diffusion.samplers import make_grid
from imagen_jax.diffusion.schedules import alpha_sigma, log_snr
from imagen_jax.diffusion.vp import VP, time_grid

SCHEDULES = ("cosine", "linear")


def theirs(reference, schedule):
    return reference.GaussianDiffusionContinuousTimes(noise_schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_matches_reference(reference, schedule):
    t = np.linspace(0, 1, 1001, dtype=np.float32)
    want = theirs(reference, schedule).log_snr(torch.from_numpy(t)).numpy()
    host = log_snr(t, schedule)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    np.testing.assert_allclose(host, want, atol=1e-4)
    np.testing.assert_allclose(log_snr(jnp.asarray(t), schedule), want, atol=1e-4)
    np.testing.assert_allclose(jax.jit(log_snr, static_argnums=1)(t, schedule), want, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scales_match_reference(reference, schedule):
    """Relative to their size: alpha at the cosine's t = 1 is 4.4e-8 and divides the noise."""
    t = np.array([0.0, 0.2, 0.5, 0.9, 1.0], np.float32)
    level = theirs(reference, schedule).log_snr(torch.from_numpy(t))
    want = reference.log_snr_to_alpha_sigma(level)
    for got, expected in zip(jax.jit(alpha_sigma)(level.numpy()), want, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "schedule, ends", [("cosine", (8.7692, -33.8913)), ("linear", (9.21029, -10.00005))]
)
def test_ends(schedule, ends):
    for t, want in zip((0.0, 1.0), ends, strict=True):
        np.testing.assert_allclose(log_snr(t, schedule), want, atol=1e-4)
        np.testing.assert_allclose(log_snr(jnp.float32(t), schedule), want, atol=1e-4)


def test_variance_is_preserved():
    alpha, sigma = alpha_sigma(jnp.linspace(-40.0, 40.0, 81))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 100, 250, 1000, 1001])
def test_time_grid_is_torchs_linspace_to_the_bit(steps):
    np.testing.assert_array_equal(time_grid(steps), torch.linspace(1.0, 0.0, steps + 1).numpy())


def test_grid_skips_and_pads():
    whole, late = (
        make_grid(VP(schedule="linear"), 10, multiple=16),
        make_grid(VP(schedule="linear"), 10, skip_steps=3),
    )
    assert (whole.num_steps, late.num_steps) == (10, 7)
    assert (len(whole.positions), len(late.positions)) == (17, 1025)
    np.testing.assert_array_equal(whole.positions[3:11], late.positions[:8])
    assert len(make_grid(VP(schedule="linear"), 1024).positions) == 1025
    # IF's own spacings have as many steps as they have, whatever is asked for.
    for spacing, steps in (("super100", 30), ("fast27", 8)):
        grid = make_grid(Discrete(), 20, spacing=spacing, strength=0.3)
        assert grid.num_steps == steps, spacing
    assert make_grid(VP(), 10, strength=0.01).num_steps == 1
    for skip in (10, -1):
        with pytest.raises(ValueError, match="skip_steps"):
            make_grid(VP(schedule="linear"), 10, skip_steps=skip)
