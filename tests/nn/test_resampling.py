"""Resampling and norms against the form they are defined by, and across devices."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from imagen_jax.nn import layers
from imagen_jax.sharding import make_layout


def _fresh(layer, c_in, c_out):
    """(graph, parameters) of a layer, no parameter at zero."""
    graph, state = nnx.split(layer(c_in, c_out, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    params, rng = nnx.to_pure_dict(state), np.random.default_rng(0)
    return graph, jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) / x.shape[-2 % x.ndim] ** 0.5,
        params,
    )


def _unshuffled(params, x):
    x = rearrange(x, "b (h i) (w j) c -> b h w (c i j)", i=2, j=2)
    return x @ params["conv"]["kernel"][0, 0] + params["conv"]["bias"]


def _shuffled(params, x):
    x = nnx.silu(x @ params["conv"]["kernel"][0, 0] + params["conv"]["bias"])
    return rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=2, j=2)


RESAMPLINGS = [
    (layers.PixelUnshuffle, _unshuffled, "cpu"),
    (layers.PixelShuffle, _shuffled, "cpu"),
    (layers.PixelShuffle, _shuffled, "tpu"),
]


@pytest.mark.parametrize("mesh", ["1x1", "2x4", "1x8"])
@pytest.mark.parametrize("layer, plain, platform", RESAMPLINGS)
def test_pixel_shuffles_are_transposes_and_1x1(layer, plain, platform, mesh):
    """Outputs and gradients, 4 channels in and 16 out of 16: over eight devices the kernel's split
    axis is longer than its channels."""
    graph, params = _fresh(layer, 4, 16)
    rng, layout = np.random.default_rng(1), make_layout(mesh, min_size=0)
    x = rng.standard_normal((4, 8, 6, 4)).astype(np.float32)
    weights = rng.standard_normal(jax.eval_shape(plain, params, x).shape).astype(np.float32)

    def outcome(forward):
        def run(params, x):
            y, pullback = jax.vjp(forward, params, x)
            return y, pullback(jnp.asarray(weights))

        return run

    want = jax.jit(outcome(plain))(params, x)
    placed = layout.place(params)
    got = jax.jit(
        layout.on_mesh(outcome(lambda p, x: nnx.merge(graph, p)(x))),
        in_shardings=(placed, layout.batch),
        out_shardings=(layout.batch, (placed, layout.batch)),
    )
    with mock.patch.object(layers, "platform", lambda: platform):
        got = got(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_norms_round_once_in_bfloat16():
    """Unit length and gain are multiplied in float32: the result is the nearest bfloat16."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 48)), jnp.bfloat16)
    norm = layers.RMSNorm(48, rngs=nnx.Rngs(0))
    norm.gamma[...] = jnp.asarray(rng.uniform(0.5, 2, 48), jnp.float32)
    got, exact = norm(x), norm(x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
