"""FLOPs of a jaxpr against closed forms and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from imagen_jax import flops, nn
from tests.train.sharded import NETWORKS, WIDTH


def shape(*axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def xla(fn, *args) -> float:
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


def test_products_and_loops():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    args = shape(3, 5), shape(5, 5)
    once = 2 * 3 * 5 * 5
    assert flops.count(jnp.matmul, *args) == once
    assert flops.count(jax.jit(loop), *args) == 7 * once
    assert flops.count(jax.checkpoint(loop), *args) == 7 * once
    assert flops.count(either, *args) == once
    with pytest.raises(ValueError, match="a loop whose length is not known in advance"):
        flops.count(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x), *args, 3)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 4, 6), dict(padding="SAME")),
        ((3, 3, 4, 6), dict(padding="VALID")),
        ((4, 4, 4, 6), dict(padding=((1, 1), (1, 1)), window_strides=(2, 2))),
        ((3, 3, 1, 4), dict(padding="SAME", feature_group_count=4)),
    ],
)
def test_convolutions_and_their_gradients_count_as_xla_counts_them(kernel, options):
    options = dict(window_strides=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")) | options

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, **options)

    def gradients(x, w):
        out, pull = jax.vjp(conv, x, w)
        return out, pull(jnp.ones_like(out))

    args = shape(2, 10, 10, 4), shape(*kernel)
    for fn in (conv, gradients):
        assert flops.count(fn, *args) == pytest.approx(xla(fn, *args), rel=0.02)


def test_a_gradient_of_a_unet_counts_as_xla_counts_it():
    """Of which element by element work, that is not counted here, is a small part."""
    config = dataclasses.replace(NETWORKS["base"], text_embed_dim=WIDTH)

    def loss(params, x, time, embeds):
        out = nn.bind(config, params)(x, time, text_embeds=embeds)
        return jnp.mean(out**2)

    args = nn.abstract(config)[1], shape(2, 16, 16, 3), shape(2), shape(2, 6, WIDTH)
    gradient = jax.grad(loss)
    assert flops.count(gradient, *args) == pytest.approx(xla(gradient, *args), rel=0.1)


def test_the_peak_of_an_unknown_device_is_not_guessed():
    assert flops.peak("cpu") is None
    assert flops.peak("TPU v5 lite", "float32") is None  # the figures are of bfloat16
