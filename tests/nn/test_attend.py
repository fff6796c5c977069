"""Every form of attention against the plain one, and where each is taken.

Splash attention runs interpreted; cuDNN's is lowered for CUDA, no GPU being here to run it.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from imagen_jax import flops, sharding
from imagen_jax.nn import attend as module
from imagen_jax.nn.attend import SCALE, attend
from imagen_jax.sharding import make_layout

INTERPRETED = functools.partial(module._splash, interpret=True)


def arrays(p=256, n=2, m=300, heads=1, k=8, dtype=np.float32):
    """Queries and keys of unit length, values, and a cotangent."""
    rng = np.random.default_rng(0)
    q, keys, v, out = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, p, n, k), (2, m, heads, k), (2, m, heads, k), (2, p, n * k))
    )
    q, keys = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, keys))
    return [jnp.asarray(a, dtype) for a in (q, keys, v, out)]


def outcome(q, k, v, cotangent, h=None):
    out, pullback = jax.vjp(lambda *a: attend(*a, scale=SCALE, h=h), q, k, v)
    return out, pullback(cotangent)


def assert_close(got, want, atol=2e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max())


def by_hand(q, k, v, bias=0.0):
    """In float64, head by head."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.broadcast_to(a, (*a.shape[:2], *q.shape[2:])) for a in (k, v))
    logits = SCALE * np.einsum("bpnk,bmnk->bnpm", q, k) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = np.einsum("bnpm,bmnk->bpnk", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(*out.shape[:2], -1)


@pytest.mark.parametrize("heads, with_bias", [(1, False), (2, False), (2, True)])
def test_the_plain_forms_are_softmax_attention(heads, with_bias):
    q, k, v, _ = arrays(p=6, m=9, heads=heads)
    bias = np.random.default_rng(1).standard_normal((1, 2, 6, 9)).astype(np.float32)
    bias[..., 7:] = np.finfo(np.float32).min  # padding
    bias = jnp.asarray(bias) if with_bias else None
    got = attend(q, k, v, scale=SCALE, bias=bias)
    assert_close(got, by_hand(q, k, v, 0.0 if bias is None else np.asarray(bias)))


@pytest.mark.parametrize("m", [256, 300])
def test_splash_attention_is_the_plain_one(m):
    """Outputs and gradients, with keys that fill their blocks and keys that do not."""
    inputs = arrays(m=m)
    want = jax.jit(outcome)(*inputs)
    assert_close(want[0], by_hand(*inputs[:3]))
    with mock.patch.object(module, "_fused", lambda q, k: INTERPRETED):
        assert_close(jax.jit(outcome)(*inputs), want)


@pytest.mark.parametrize("h", [32, 16], ids=["rows split", "heads split"])
def test_splash_attention_on_a_mesh(h):
    """Its gradients of keys and values are sums over the devices along `model`."""
    inputs = arrays(p=16 * h, n=4)
    layout = make_layout("2x4", min_size=0)
    run = jax.jit(layout.on_mesh(functools.partial(outcome, h=h)), in_shardings=layout.batch)
    with mock.patch.object(module, "_fused", lambda q, k: INTERPRETED):
        got = run(*inputs)
    assert_close(got, jax.jit(outcome)(*inputs))


@pytest.mark.parametrize("h", [32, 16], ids=["rows split", "heads split"])
@pytest.mark.parametrize("heads", [1, 4], ids=["one key head", "a key head each"])
def test_cudnns_attention_on_a_mesh(heads, h):
    """A stand-in that, like cuDNN's, lets several query heads share a key head without a word."""
    inputs = arrays(p=16 * h, n=4, heads=heads)
    layout = make_layout("4x2", min_size=0)
    inputs = [jnp.concatenate([x, x[:, ::-1]]) for x in inputs]
    run = jax.jit(layout.on_mesh(functools.partial(outcome, h=h)), in_shardings=layout.batch)
    with mock.patch.object(module, "_fused", lambda q, k: jax.nn.dot_product_attention):
        got = run(*inputs)
    assert_close(got, jax.jit(outcome)(*inputs))


@pytest.mark.parametrize(
    "platform, dtype, changes, form",
    [
        ("cpu", "bfloat16", {}, None),
        ("gpu", "bfloat16", {}, module._cudnn),
        ("gpu", "float16", dict(heads=2), module._cudnn),
        ("gpu", "float32", {}, None),
        ("gpu", "bfloat16", dict(k=12), None),
        ("gpu", "bfloat16", dict(p=289), None),
        ("tpu", "bfloat16", {}, module._splash),
        ("tpu", "bfloat16", dict(heads=2), None),
        ("tpu", "float32", {}, None),
        ("tpu", "bfloat16", dict(p=64), None),
        ("tpu", "bfloat16", dict(m=39), None),
    ],
)
def test_each_form_is_taken_where_it_runs(platform, dtype, changes, form):
    q, k, _, _ = arrays(**changes, dtype=dtype)
    with (
        mock.patch.object(module, "platform", lambda: platform),
        mock.patch.object(module, "_has_cudnn_attention", lambda: True),
    ):
        assert module._fused(q, k) is form


@pytest.mark.parametrize(
    "capability, able", [("9.0", True), ("8.0", True), ("7.5", False), ("gfx90a", False)]
)
def test_cudnns_attention_needs_ampere(capability, able):
    device = mock.Mock(compute_capability=capability)
    with mock.patch.object(jax, "devices", lambda: [device]):
        assert module._has_cudnn_attention.__wrapped__() is able


def test_cudnns_filled_up_keys_are_masked():
    """The same call, its implementation XLA's."""
    inputs = arrays(m=301)
    plain = jax.nn.dot_product_attention
    with (
        mock.patch.object(module, "_fused", lambda q, k: module._cudnn),
        mock.patch.object(
            jax.nn,
            "dot_product_attention",
            lambda *args, implementation, **kwargs: plain(*args, **kwargs),
        ),
    ):
        got = jax.jit(outcome)(*inputs)
    assert_close(got, jax.jit(outcome)(*inputs))


@pytest.mark.parametrize("heads", [1, 4])
def test_cudnns_attention_lowers_for_cuda(heads):
    """Forward and backward, the key head shared by four query heads, an odd number of keys."""
    inputs = arrays(n=4, m=301, heads=heads, k=64, dtype=jnp.bfloat16)
    with (
        mock.patch.object(module, "_fused", lambda q, k: module._cudnn),
        mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000),
    ):
        text = jax.jit(outcome).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == 1
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == 1
    assert "x256x301x" not in text and "x256x302x" not in text  # no logits


@pytest.mark.parametrize("form", [module._splash, module._cudnn])
def test_fused_forms_count_as_their_products(form):
    """Keys filled up to 128 or to an even number are counted, as they are computed."""
    one = jax.ShapeDtypeStruct
    q, k = one((2, 512, 2, 64), jnp.bfloat16), one((2, 384, 1, 64), jnp.bfloat16)
    with mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000):
        found = flops.count(lambda q, k, v: form(q, k, v, scale=0.1), q, k, k)
    assert found == 2 * 2 * 2 * 512 * 2 * 384 * 64


def test_the_arithmetic_of_a_model_is_that_of_the_plain_form():
    with sharding.traced_for("tpu"):
        assert module.platform() == "tpu"
        with sharding.traced_for("cpu"):
            assert module.platform() == "cpu"
