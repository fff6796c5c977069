"""Losses and weights against torch and the reference's `p_losses`; loss per log-SNR bin."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagen_jax.diffusion import losses
from imagen_jax.diffusion.vp import VP

RNG = np.random.default_rng(0)
OUTPUT, X0, NOISE = RNG.normal(size=(3, 4, 5, 6, 3)).astype(np.float32)
TIMES = np.float32([0.02, 0.4, 0.7, 0.97])


@pytest.mark.parametrize("name, torchs", [("l1", "l1"), ("l2", "mse"), ("huber", "smooth_l1")])
def test_distance_is_torchs(name, torchs):
    a, b = torch.from_numpy(3 * OUTPUT), torch.from_numpy(X0)
    want = getattr(F, f"{torchs}_loss")(a, b, reduction="none").numpy()
    got = losses.elementwise(jnp.asarray(3 * OUTPUT), jnp.asarray(X0), name)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_reduction_is_float32_whatever_comes_in():
    got = losses.per_sample(
        jnp.full((2, 40, 40, 1), 0.1, jnp.bfloat16), jnp.zeros((2, 40, 40, 1)), "l1"
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.float32(jnp.bfloat16(0.1)), rtol=1e-6)


@pytest.fixture(scope="module")
def imagen(reference):
    """The reference's cascade around a network that answers `OUTPUT`."""

    class Answer(reference.Unet):
        def forward(self, x, *_, **__):
            return torch.from_numpy(np.moveaxis(OUTPUT, -1, 1))

    unet = Answer(dim=8, dim_mults=(1,), attn_heads=2, cond_on_text=False)
    cascade = reference.Imagen(unet, image_sizes=8, condition_on_text=False)
    cascade.unets[0].__class__ = Answer
    return cascade


@pytest.mark.parametrize("gamma", [5.0, None])
@pytest.mark.parametrize("objective", ["noise", "v", "x_start"])
def test_weighted_loss_matches_reference(imagen, objective, gamma):
    want = imagen.p_losses(
        imagen.unets[0],
        torch.from_numpy(np.moveaxis(X0, -1, 1)),
        torch.from_numpy(TIMES),
        noise_scheduler=imagen.noise_schedulers[0],
        noise=torch.from_numpy(np.moveaxis(NOISE, -1, 1)),
        pred_objective=objective,
        min_snr_gamma=gamma,
    )
    process = VP(objective=objective, min_snr_gamma=gamma)
    level = process.training_level(TIMES)
    got = process.losses(lambda *_: jnp.asarray(OUTPUT), 2 * X0 - 1, NOISE, level).mean()
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)


def test_weights_of_the_objectives_are_one_loss():
    """Errors of v and of noise are errors of x_0 times snr + 1 and snr: one weight on x_0."""
    level = jnp.linspace(-12.0, 9.0, 22)
    snr = jnp.exp(level)
    on_x0 = losses.min_snr_weight(level, "x_start", 5.0)
    for objective, factor in (("noise", snr), ("v", snr + 1)):
        weight = losses.min_snr_weight(level, objective, 5.0) * factor
        np.testing.assert_allclose(weight, on_x0, rtol=1e-5)


def test_binned():
    level = jnp.array([-20.0, -5.0, -4.9, 0.0, 7.0, 30.0])
    sums, counts = losses.binned(jnp.arange(1.0, 7.0), level, np.float32([-5.0, 0.0, 6.0]))
    np.testing.assert_array_equal(sums, [1, 5, 4, 11])
    np.testing.assert_array_equal(counts, [1, 2, 1, 2])
