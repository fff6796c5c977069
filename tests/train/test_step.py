"""The train step: accumulation and recomputation change nothing, and it compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import nn
from imagen_jax.compiling import OPTIONS, SAMPLING_OPTIONS, compiler_options
from imagen_jax.sharding import single
from tests.train import support
from train.optimizer import make_optimizer
from train.settings import Optimization
from train.state import TrainState
from train.step import make_train_step


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return support.settings(tmp_path_factory.mktemp("step"))


@pytest.fixture(scope="module")
def plain(settings):
    return one_step(settings)


def one_step(settings, unet_number=1):
    config, rng = support.CASCADE, np.random.default_rng(0)
    shapes = nn.abstract(support.UNET_OF[unet_number])[1]
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), shapes)
    size = config.image_sizes[unet_number - 1]
    batch = dict(
        images=jnp.asarray(rng.integers(0, 256, (4, size, size, 3)), jnp.uint8),
        text_embeds=jnp.asarray(rng.normal(size=(4, 16, 128)), jnp.float32),
        text_masks=jnp.asarray(np.arange(16) < np.array([[3], [5], [16], [1]])),
    )
    step = make_train_step(config.stage(unet_number), settings.section(Optimization))
    state = TrainState.create(params, make_optimizer(settings))
    state = jax.device_put(state, single().place(state))
    return step, batch, step(state, batch, jax.random.key(0))


# eps is large in these: at 1e-8 leaves whose gradient is zero move by rounding noise.
CHANGES = {
    "two parts": dict(accumulate=2),
    "four parts": dict(accumulate=4),
    "recomputation": dict(remat="nothing_saveable"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_step(settings, name):
    exact = dict(eps=1e-3)
    want = one_step(dataclasses.replace(settings, **exact))[2]
    got = one_step(dataclasses.replace(settings, **exact, **CHANGES[name]))[2]
    np.testing.assert_allclose(got[1]["loss"], want[1]["loss"], rtol=1e-5)
    for tree in ("params", "ema"):
        pairs = (getattr(state, tree) for state in (got[0], want[0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *pairs)


def test_compiles_once_and_counts(plain):
    step, batch, (state, _) = plain
    programs = step._cache_size()
    for number in (2, 3):
        state, metrics = step(state, batch, jax.random.key(0))
        assert state.step == number
    assert step._cache_size() == programs
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


def test_the_state_is_donated(settings):
    rng, shapes = np.random.default_rng(0), nn.abstract(support.UNET_OF[1])[1]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    step, batch, _ = one_step(settings)
    state = TrainState.create(params, make_optimizer(settings))
    step(state, batch, jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.ema)))


def test_every_step_draws_anew(settings, plain):
    """The same batch twice has another loss, by far more than one small step could change."""
    step, batch, _ = plain
    frozen = make_train_step(
        support.CASCADE.stage(1), dataclasses.replace(settings, lr=1e-12).section(Optimization)
    )
    state = one_step(settings)[2][0]
    state, first = frozen(state, batch, jax.random.key(0))
    _, second = frozen(state, batch, jax.random.key(0))
    assert abs(first["loss"] - second["loss"]) > 1e-3


def test_bfloat16_follows_float32(settings, plain):
    half = one_step(dataclasses.replace(settings, dtype="bfloat16"))[2][1]
    np.testing.assert_allclose(half["loss"], plain[2][1]["loss"], rtol=0.05)


def test_super_resolution_and_adafactor(settings):
    """Every leaf with a gradient moves, by about the learning rate, and its average follows."""
    state, metrics = one_step(dataclasses.replace(settings, optimizer="adafactor", lr=1e-3), 2)[2]
    rng, shapes = np.random.default_rng(0), nn.abstract(support.UNET_OF[2])[1]
    before = jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before)
    moved = np.array(jax.tree.leaves(moved))
    assert moved.max() < 0.02 and np.mean(moved > 1e-5) > 0.8
    assert 0.1 < metrics["loss"] < 10 and metrics["grad_norm"] > 0


def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch):
    device = jax.devices()[0]
    for options, taken in (
        ({"xla_backend_optimization_level": 0}, True),
        ({"xla_cpu_option_of_another_version": True}, False),
    ):
        for table, sampling in ((OPTIONS, False), (SAMPLING_OPTIONS, True)):
            monkeypatch.setitem(table, device.platform, options)
            found = compiler_options.__wrapped__(device, sampling=sampling)
            assert found == (options if taken else None)
