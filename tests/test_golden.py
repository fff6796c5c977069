"""Parity with recorded outputs of imagen-pytorch (tests/golden), which need it no more. Here
everything is compiled as the product compiles it: optimised, with the options of the train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import nn, sampling, training
from imagen_jax.compiling import compiler_options
from imagen_jax.imagen import Imagen
from imagen_jax.interop import keys
from tests import OPTIMISED
from tests.golden import record


def compiled(fn):
    return jax.jit(fn, compiler_options=OPTIMISED | (compiler_options(jax.devices()[0]) or {}))


@pytest.fixture(autouse=True)
def optimised_sampling(monkeypatch):
    static = dict(start=("program", "batch_size"), finish="program")
    for name, names in static.items():
        fn = getattr(sampling, name).__wrapped__
        fn = jax.jit(fn, static_argnames=names, compiler_options=OPTIMISED)
        monkeypatch.setattr(sampling, name, fn)
    advance = jax.jit(sampling.advance, static_argnames="program", compiler_options=OPTIMISED)
    monkeypatch.setattr(sampling, "compiled_advance", lambda _: advance)


def ours(case: record.Case) -> np.ndarray:
    config, given = case.config, record.inputs_of(case)
    params = [
        jax.tree.map(jnp.asarray, keys.to_jax(record.weights_of(unet, i), nn.abstract(unet)[1]))
        for i, unet in enumerate(config.unets)
    ]
    if case.kind == "unet":
        return compiled(lambda p, given: nn.bind(config.unets[0], p)(**given))(params[0], given)
    if case.kind == "sample":
        bound = [nn.bind(unet, p) for unet, p in zip(config.unets, params, strict=True)]
        return Imagen(config, unets=bound).sample(**given, **case.told)
    stage = config.stage(given.pop("unet_number"))

    def loss(params, given):
        return training.stage_losses(stage, nn.bind(stage.network, params), **given)[0].mean()

    value, gradients = compiled(jax.value_and_grad(loss))(params[case.unet_number - 1], given)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 1e-3
    return value


@pytest.mark.parametrize("case", record.CASES, ids=lambda case: case.name)
def test_ours_equals_the_record(case):
    """A U-Net to 1e-4 of the largest value, a loss to 1e-5, images in [0, 1] to 1e-3."""
    got, want = ours(case), record.recorded(case)
    assert np.abs(want).max() > 0.1 and np.shape(got) == want.shape
    bound = {"unet": 1e-4 * np.abs(want).max(), "loss": 1e-5 * want, "sample": 1e-3}[case.kind]
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.torch
@pytest.mark.parametrize("case", record.CASES, ids=lambda case: case.name)
def test_the_live_reference_equals_the_record(case):
    want = record.recorded(case)
    atol = 1e-5 * max(1, np.abs(want).max())
    np.testing.assert_allclose(record.reference(case), want, rtol=0, atol=atol)
