"""Guidance against the reference's two forms; thresholds against torch.quantile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax.diffusion import guidance
from imagen_jax.diffusion.vp import VP
from imagen_jax.errors import UserError

RNG = np.random.default_rng(0)
COND, NULL = RNG.normal(size=(2, 3, 16, 16, 3)).astype(np.float32) + np.float32(0.3)


def test_projection_matches_reference(reference):
    """In float64 there; 1e-6 of the scale here."""
    x, y = (torch.from_numpy(a) for a in (COND - NULL, COND))
    for got, want in zip(
        guidance.project(x.numpy() + jnp.zeros(()), jnp.asarray(COND)),
        reference.project(x, y),
        strict=True,
    ):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-6 * np.abs(want.numpy()).max())


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("scale, keep", [(1.0, 0.0), (3.0, 0.0), (7.5, 0.25)])
def test_guided_output_matches_reference(reference, remove, scale, keep):
    class Network:
        def forward(self, cond_drop_prob=0.0):
            return torch.from_numpy(NULL if cond_drop_prob else COND)

    want = reference.Unet.forward_with_cond_scale(
        Network(), cond_scale=scale, remove_parallel_component=remove, keep_parallel_frac=keep
    )
    got = guidance.guide(
        jnp.asarray(COND),
        jnp.asarray(NULL),
        scale,
        remove_parallel_component=remove,
        keep_parallel_frac=keep,
    )
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_parts_are_orthogonal_and_sum():
    parallel, orthogonal = guidance.project(jnp.asarray(NULL), jnp.asarray(COND))
    np.testing.assert_allclose(parallel + orthogonal, NULL, atol=1e-6)
    np.testing.assert_allclose(np.sum(orthogonal * COND, axis=(1, 2, 3)), 0.0, atol=2e-3)
    zero = jnp.zeros_like(parallel)
    np.testing.assert_array_equal(guidance.project(parallel, zero)[0], 0.0)


def test_scale_per_sample():
    cond, null, scales = jnp.asarray(COND), jnp.asarray(NULL), jnp.array([1.0, 2.0, 5.0])
    got = jax.jit(guidance.guide)(cond, null, scales)
    for i, scale in enumerate(scales):
        alone = guidance.guide(cond[i : i + 1], null[i : i + 1], scale)
        np.testing.assert_allclose(got[i : i + 1], alone, atol=1e-6)


def test_plain_form_is_the_old_one():
    got = guidance.guide(jnp.asarray(COND), jnp.asarray(NULL), 4.0, remove_parallel_component=False)
    np.testing.assert_allclose(got, NULL + 4.0 * (COND - NULL), atol=1e-5)


ROWS = {
    "normal": np.abs(RNG.normal(size=(3, 769))),
    "ties": RNG.integers(0, 4, size=(3, 500)) / 2,
    "constant": np.full((2, 12), 0.7),
    "single": np.array([[2.5]]),
    "zeros and huge": np.concatenate([np.zeros((1, 40)), 1e30 * np.ones((1, 40))], axis=1),
    "denormal": np.array([[0.0, 1e-40, 2e-40, 1.0]]),
}


@pytest.mark.parametrize("name", ROWS)
def test_quantile_is_torchs(name):
    x = ROWS[name].astype(np.float32)
    quantile = jax.jit(lambda x, q: guidance.quantile(x, q))
    for q in (0.0, 0.3, 0.5, 0.95, 0.999, 1.0):
        want = torch.quantile(torch.from_numpy(x), q, dim=-1).numpy()
        np.testing.assert_allclose(quantile(x, q), want, rtol=2e-6, atol=1e-38)
    assert quantile._cache_size() == 1


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_dynamic_threshold_matches_reference(size):
    x0 = torch.from_numpy(size * COND)
    s = torch.quantile(x0.flatten(1).abs(), 0.95, dim=-1).clamp(min=1.0)[:, None, None, None]
    got = guidance.dynamic_threshold(jnp.asarray(size * COND), 0.95)
    np.testing.assert_allclose(got, (x0.clamp(-s, s) / s).numpy(), atol=1e-6)
    assert np.abs(got).max() <= 1.0


@pytest.mark.parametrize("fraction", [0.0, 0.7, 1.0])
def test_rescaled_output_is_that_of_the_paper(fraction):
    """In torch: Lin et al. 2023, Eq. 15-16, as in diffusers' `rescale_noise_cfg`."""
    cond, guided = torch.from_numpy(COND), torch.from_numpy(3 * COND - NULL)
    axes = list(range(1, cond.ndim))
    same = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    want = fraction * same + (1 - fraction) * guided
    got = guidance.rescale(jnp.asarray(guided.numpy()), jnp.asarray(COND), fraction)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


LOG_SNR = np.float32([-12, -6, -1, 0, 2, 8, 8, 8])  # five steps, padded


def weights(**settings) -> np.ndarray:
    level = VP().at(jnp.exp(-jnp.asarray(LOG_SNR[:6]) / 2))
    scale = jax.jit(lambda g: g.scale_at(level))(guidance.Guidance(5.0, **settings))
    return np.broadcast_to(scale, 6)


def test_weights_of_an_interval():
    interval = guidance.make_interval((0.9, 20.1))  # sigma / alpha; log-SNRs of -6 to 0.2
    np.testing.assert_allclose(weights(interval=interval), [1, 5, 5, 5, 1, 1])
    np.testing.assert_allclose(weights(interval=guidance.make_interval((0.0, np.inf))), 5)


@pytest.mark.parametrize(
    "schedule, want",
    [
        ("linear", 8 * np.arange(6) / 5),
        ("cosine", 4 * (1 - np.cos(np.pi * np.arange(6) / 5))),
        ((0.0, 1.0, 0.0), [0, 1.6, 3.2, 3.2, 1.6, 0]),
    ],
    ids=str,
)
def test_weights_of_a_schedule(schedule, want):
    found = weights(schedule=guidance.make_schedule(schedule, LOG_SNR))
    np.testing.assert_allclose(found, 1 + np.asarray(want), atol=0.01)


def test_a_schedule_reaches_a_level_without_noise():
    schedule = guidance.make_schedule("linear", np.float32([-9, 0, np.inf, np.inf]))
    level = VP().at(jnp.zeros(1))._replace(log_snr=jnp.full(1, jnp.inf))
    assert guidance.Guidance(5.0, schedule=schedule).scale_at(level) == pytest.approx(9.0)


@pytest.mark.parametrize(
    "make, given, message",
    [
        (guidance.make_interval, (2.0, 1.0), "guidance_interval must be two noise levels"),
        (guidance.make_interval, (-1.0, 1.0), "got -1, 1"),
        (lambda s: guidance.make_schedule(s, LOG_SNR), "parabola", "'parabola' is not one of lin"),
        (lambda s: guidance.make_schedule(s, LOG_SNR), (1.0, -1.0), "factors, none below 0"),
        (lambda s: guidance.make_schedule(s, LOG_SNR), (1.0,), "two or more factors"),
    ],
)
def test_errors(make, given, message):
    with pytest.raises(UserError, match=message):
        make(given)
