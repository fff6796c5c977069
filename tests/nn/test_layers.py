"""Every layer on its own against the module of imagen-pytorch 2.1.0 that it stands for.

Weights go through the interop key table's entries for that layer. Pixels are 4 x 6, channels 8.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import Conv2d, Linear, Sequential, SiLU

from imagen_jax.config import UnetConfig
from imagen_jax.interop import keys, table
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.nn import attention, blocks, embeddings, layers, transformer
from tests import parity

REFERENCE = import_imagen_pytorch().imagen_pytorch
MAKE = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
RANDOM = np.random.default_rng(0)
B, H, W, C, TOKENS, COND, TIME = 2, 4, 6, 8, 5, 12, 16
HEADS = dict(heads=3, dim_head=5)

MAP = RANDOM.standard_normal((B, H, W, C), np.float32)
PIXELS = MAP.reshape(B, H * W, C)
CONTEXT = RANDOM.standard_normal((B, TOKENS, COND), np.float32)
TIMES = RANDOM.standard_normal((B, TIME), np.float32)
SCALARS = np.float32([-9.5, 3.25])


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    theirs: Callable[[], torch.nn.Module]
    ours: Callable[[], nnx.Module]
    table: tuple
    inputs: tuple[np.ndarray, ...]
    named: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments of ours alone
    call: Callable = lambda module, *inputs: module(*inputs)  # theirs


R = REFERENCE
SR_TIME = UnetConfig(dim=4, cond_dim=COND)
LINEAR_CONTEXT = dict(context_dim=COND, **HEADS)
CASES = [
    Case(
        "rms norm", lambda: R.ChanRMSNorm(C), lambda: layers.RMSNorm(C, rngs=MAKE["rngs"]),
        (("gamma", "gamma", table.PIXEL),), (MAP,),
    ),
    Case(
        "layer norm", lambda: R.LayerNorm(C), lambda: layers.LayerNorm(C, rngs=MAKE["rngs"]),
        table.GAIN, (PIXELS,),
    ),
    Case(
        "layer norm of channels", lambda: R.ChanLayerNorm(C),
        lambda: layers.LayerNorm(C, rngs=MAKE["rngs"]), table.POINT_GAIN, (MAP,),
    ),
    Case(
        "Fourier features", lambda: R.LearnedSinusoidalPosEmb(6),
        lambda: layers.FourierFeatures(6, rngs=MAKE["rngs"]),
        (("weights", "weights", table.SAME),), (SCALARS,),
    ),
    Case(
        "cross-embedding", lambda: R.CrossEmbedLayer(C, (3, 7, 5), 10, stride=1),
        lambda: layers.CrossEmbed(C, 10, (3, 7, 5), stride=1, **MAKE), table.CROSS_EMBED, (MAP,),
    ),
    Case(
        "cross-embedding that halves", lambda: R.CrossEmbedLayer(C, (2, 4), 9),
        lambda: layers.CrossEmbed(C, 9, (2, 4), stride=2, **MAKE), table.CROSS_EMBED, (MAP,),
    ),
    Case(
        "pixel unshuffle", lambda: R.Downsample(C, 10),
        lambda: layers.PixelUnshuffle(C, 10, **MAKE), table.DOWNSAMPLE, (MAP,),
    ),
    Case(
        "pixel shuffle", lambda: R.PixelShuffleUpsample(C, 10),
        lambda: layers.PixelShuffle(C, 10, **MAKE), (("net.0", "conv", table.CONV),), (MAP,),
    ),
    Case(
        "nearest upsampling", lambda: R.Upsample(C, 10),
        lambda: layers.NearestUpsample(C, 10, **MAKE), (("1", "project", table.CONV),), (MAP,),
    ),
    Case(
        "pair of convolutions", lambda: R.Parallel(Conv2d(C, 10, 3, padding=1), Conv2d(C, 10, 1)),
        lambda: layers.ConvPair(C, 10, **MAKE),
        (("fns.0", "wide", table.CONV), ("fns.1", "point", table.CONV)), (MAP,),
    ),
    Case(
        "attention", lambda: R.Attention(C, **HEADS),
        lambda: attention.Attention(C, **HEADS, **MAKE), table.ATTENTION, (PIXELS,), dict(h=H),
    ),
    Case(
        "attention with context", lambda: R.Attention(C, context_dim=COND, **HEADS),
        lambda: attention.Attention(C, context_dim=COND, **HEADS, **MAKE), table.ATTENTION,
        (PIXELS, CONTEXT), dict(h=H),
    ),
    Case(
        "cross-attention", lambda: R.CrossAttention(C, context_dim=COND, **HEADS),
        lambda: attention.CrossAttention(C, context_dim=COND, **HEADS, **MAKE), table.ATTENTION,
        (PIXELS, CONTEXT), dict(h=H),
    ),
    Case(
        "linear cross-attention", lambda: R.LinearCrossAttention(C, context_dim=COND, **HEADS),
        lambda: attention.CrossAttention(C, context_dim=COND, linear_attn=True, **HEADS, **MAKE),
        table.ATTENTION, (PIXELS, CONTEXT), dict(h=H),
    ),
    Case(
        "linear attention", lambda: R.LinearAttention(C, context_dim=COND, **HEADS),
        lambda: attention.LinearAttention(C, context_dim=COND, **HEADS, **MAKE),
        table.LINEAR_ATTENTION, (MAP, CONTEXT),
    ),
    Case(
        "convolution block", lambda: R.Block(C, 10),
        lambda: blocks.ConvBlock(C, 10, norm="rms", **MAKE), table.BLOCK, (MAP,),
    ),
    Case(
        "global context", lambda: R.GlobalContext(dim_in=C, dim_out=C),
        lambda: blocks.GlobalContext(C, **MAKE),
        (
            ("to_k", "to_k", table.CONV),
            ("net.0", "squeeze", table.POINT),
            ("net.2", "excite", table.POINT),
        ), (MAP,),
    ),
    Case(
        "residual block", lambda: R.ResnetBlock(C, C, time_cond_dim=TIME),
        lambda: blocks.ResnetBlock(C, C, time_cond_dim=TIME, norm="rms", **MAKE), table.RESNET,
        (MAP, TIMES),
    ),
    Case(
        "residual block with everything",
        lambda: R.ResnetBlock(C, 10, time_cond_dim=TIME, cond_dim=COND, use_gca=True, **HEADS),
        lambda: blocks.ResnetBlock(
            C, 10, time_cond_dim=TIME, cond_dim=COND, use_gca=True, norm="rms", **HEADS, **MAKE
        ),
        table.RESNET, (MAP, TIMES, CONTEXT),
    ),
    Case(
        "transformer", lambda: R.TransformerBlock(C, depth=2, ff_mult=1.5, **LINEAR_CONTEXT),
        lambda: transformer.Transformer(C, depth=2, ff_mult=1.5, **LINEAR_CONTEXT, **MAKE),
        table.TRANSFORMER, (MAP, CONTEXT),
    ),
    Case(
        "linear transformer",
        lambda: R.LinearAttentionTransformerBlock(C, depth=2, ff_mult=3, **LINEAR_CONTEXT),
        lambda: transformer.Transformer(
            C, depth=2, ff_mult=3, linear_attn=True, **LINEAR_CONTEXT, **MAKE
        ),
        tuple((a.replace("linear_", ""), b.replace("linear_", ""), sub)
              for a, b, sub in table.TRANSFORMER if "linear" in a),
        (MAP, CONTEXT),
    ),
    Case(
        "resampler",
        lambda: R.PerceiverResampler(dim=COND, depth=2, num_latents=3, **HEADS),
        lambda: transformer.PerceiverResampler(COND, num_latents=3, **HEADS, **MAKE),
        tuple((a.removeprefix("attn_pool."), b.removeprefix("attn_pool."), sub)
              for a, b, sub in table.UNET if a.startswith("attn_pool.")),
        (CONTEXT,),
    ),
    Case(
        "time embedding",
        lambda: Sequential(
            R.LearnedSinusoidalPosEmb(16), Linear(17, 16), SiLU(), Linear(16, 16),
            Linear(16, 2 * COND),
        ),
        lambda: embeddings.TimeEmbedding(SR_TIME, **MAKE),
        (
            ("0.weights", "fourier.weights", table.SAME),
            ("1", "to_hiddens", table.LINEAR),
            ("3", "to_cond", table.LINEAR),
            ("4", "to_tokens", table.LINEAR),
        ),
        (SCALARS,),
        call=lambda m, x: (m[3](m[:3](x)), m[4](m[:3](x)).reshape(B, 2, COND)),
    ),
    Case(
        "text embedding",
        lambda: Sequential(torch.nn.LayerNorm(C), Linear(C, 10), SiLU(), Linear(10, 10)),
        lambda: embeddings.TextEmbedding(C, 10, **MAKE),
        (("0", "norm", table.NORM), ("1", "expand", table.LINEAR), ("3", "project", table.LINEAR)),
        (PIXELS[:, 0],),
    ),
]  # fmt: skip


def converted(reference: torch.nn.Module, ours: nnx.Module, entries: tuple) -> nnx.State:
    """Our layer's parameters out of the reference's, by these entries of the table; all are used,
    but for those that the reference has in vain."""
    state, graph = parity.state_dict(reference), nnx.split(ours)[1]
    left, found = set(state), {}
    rules = list(keys._entries(entries))
    for name, leaf in keys.flatten(nnx.to_pure_dict(graph)).items():
        for theirs, mine, change in rules:
            if match := re.fullmatch(re.escape(mine).replace(r"\#", r"(\d+)"), name):
                for number in match.groups():
                    theirs = theirs.replace("#", number, 1)
                found[name] = change.to_jax(state[theirs])
                assert found[name].shape == leaf.shape, name
                left.discard(theirs)
                break
    assert not left, left
    leaves, structure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(graph))
    return structure.unflatten([jnp.asarray(found[keys._join(path)]) for path, _ in leaves])


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy() if x.ndim == 4 else x)


def outputs_of(case: Case) -> tuple[Any, Any]:
    """(ours, theirs), both with channels last."""
    reference = case.theirs()
    parity.randomise(reference, 3)
    ours = case.ours()
    params = converted(reference.eval(), ours, case.table)
    graph = nnx.split(ours)[0]
    run = jax.jit(
        lambda params, *inputs: nnx.merge(graph, params)(*inputs, **case.named),
    )
    with torch.no_grad():
        want = case.call(reference, *map(channels_first, case.inputs))
    want = jax.tree.map(lambda x: np.moveaxis(x.numpy(), 1, -1) if x.ndim == 4 else x.numpy(), want)
    return run(params, *case.inputs), want


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layer_is_the_references(case):
    got, want = outputs_of(case)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["attention with context", "cross-attention", "linear attention"])
def test_a_text_may_be_projected_once(name):
    """Half of the tokens as the keys and values that `project_context` gives."""
    case = next(case for case in CASES if case.name == name)
    layer, (x, context) = case.ours(), case.inputs
    x, context = jnp.asarray(x), jnp.asarray(context)
    together = layer(x, context, **case.named)
    text = layer.project_context(context[:, 2:])
    apart = layer(x, context[:, :2], text, **case.named)
    np.testing.assert_allclose(apart, together, rtol=0, atol=1e-5)


def test_a_scaled_and_shifted_block_is_the_references():
    scale, shift = (RANDOM.standard_normal((B, 1, 1, C)).astype(np.float32) for _ in range(2))
    case = dataclasses.replace(
        next(case for case in CASES if case.name == "convolution block"),
        named=dict(scale_shift=(jnp.asarray(scale), jnp.asarray(shift))),
        call=lambda module, x: module(x, (channels_first(scale), channels_first(shift))),
    )
    got, want = outputs_of(case)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_group_norm_is_torchs():
    theirs, ours = torch.nn.GroupNorm(8, 16), layers.block_norm("group", 16, **MAKE)
    parity.randomise(theirs, 3)
    ours.scale[...], ours.bias[...] = theirs.weight.detach().numpy(), theirs.bias.detach().numpy()
    x = RANDOM.standard_normal((B, H, W, 16)).astype(np.float32)
    want = np.moveaxis(theirs(channels_first(x)).detach().numpy(), 1, -1)
    np.testing.assert_allclose(ours(x), want, rtol=0, atol=1e-5)
