"""Stacks of attention and feed-forward: over the pixels of a feature map, and over a text."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.nn.attend import SCALE, attend
from imagen_jax.nn.attention import (
    Attention,
    KeyValue,
    LinearAttention,
    QKNorm,
    Tokens,
    split_heads,
    split_kv,
)
from imagen_jax.nn.layers import LayerNorm, affine_layer_norm, linear
from imagen_jax.sharding import constrain
from imagen_jax.types import PRNGKey


class FeedForward(nnx.Module):
    """Norm, expand, exact GELU, norm, contract; no biases.

    Also the reference's `ChanFeedForward`: a 1 x 1 convolution is a linear layer.
    """

    def __init__(self, dim: int, mult: int | float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = int(dim * mult)
        self.norm_in = LayerNorm(dim, rngs=rngs)
        self.expand = linear(dim, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_hidden = LayerNorm(hidden, rngs=rngs)
        self.contract = linear(hidden, dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*s c"], axes: str = "b h w") -> Float[Array, "*s c"]:
        """`axes` are the names of `*s`; see `sharding`."""
        x = self.norm_in(constrain(x, f"{axes} _"))
        hidden = nnx.gelu(constrain(self.expand(x), f"{axes} c"), approximate=False)
        return constrain(self.contract(self.norm_hidden(hidden)), f"{axes} c")


class TransformerLayer(nnx.Module):
    """Attention and feed-forward, each with a residual."""

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int,
        heads: int,
        ff_mult: int | float,
        context_dim: int | None,
        linear_attn: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        attention = LinearAttention if linear_attn else Attention
        self.attn = attention(
            dim, dim_head=dim_head, heads=heads, context_dim=context_dim, dtype=dtype, rngs=rngs
        )
        self.ff = FeedForward(dim, ff_mult, dtype=dtype, rngs=rngs)


class Transformer(nnx.Module):
    """A stack of transformer layers over the pixels of a feature map.

    Reference `TransformerBlock`, and `LinearAttentionTransformerBlock` with `linear_attn`.
    """

    def __init__(self, dim: int, *, depth: int, linear_attn: bool = False, **layer):
        self.linear_attn = linear_attn
        self.layers = nnx.List(
            TransformerLayer(dim, linear_attn=linear_attn, **layer) for _ in range(depth)
        )

    def project_context(self, tokens: Tokens) -> list[KeyValue]:
        return [layer.attn.project_context(tokens) for layer in self.layers]

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        tokens: Tokens | None = None,
        text: list[KeyValue] | None = None,
        *,
        key: PRNGKey | None = None,
    ) -> Float[Array, "b h w c"]:
        shape = x.shape
        texts = [None] * len(self.layers) if text is None else text
        for i, (layer, layer_text) in enumerate(zip(self.layers, texts, strict=True)):
            if self.linear_attn:
                layer_key = None if key is None else jax.random.fold_in(key, i)
                x = layer.attn(x, tokens, layer_text, key=layer_key) + x
            else:
                pixels = rearrange(x, "b h w c -> b (h w) c")
                out = layer.attn(pixels, tokens, layer_text, h=shape[1])
                x = (out + pixels).reshape(shape)
            x = layer.ff(x) + x
        return x


class PerceiverLayer(nnx.Module):
    """Latents attend to the text and to themselves, then a feed-forward; both with residuals."""

    def __init__(self, dim: int, *, dim_head: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = heads * dim_head
        self.heads = heads
        self.norm = affine_layer_norm(dim, dtype=dtype, rngs=rngs)
        self.norm_latents = affine_layer_norm(dim, dtype=dtype, rngs=rngs)
        self.to_q = linear(dim, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_kv = linear(dim, 2 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.qk_norm = QKNorm(dim_head, rngs=rngs)
        self.to_out = linear(inner, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_out = affine_layer_norm(dim, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(dim, 4.0, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Tokens, x: Float[Array, "b l d"]) -> Tokens:
        y = self.norm_latents(latents)
        q = split_heads(self.to_q(y), self.heads)
        k, v = split_kv(self.to_kv(jnp.concatenate([self.norm(x), y], axis=1)), self.heads)
        out = constrain(self.to_out(attend(*self.qk_norm(q, k), v, scale=SCALE)), "b m d")
        latents = self.norm_out(out) + latents
        return constrain(self.ff(latents, "b m"), "b m d") + latents


class PerceiverResampler(nnx.Module):
    """Pools a text to a fixed number of tokens: learned latents, and four computed from its mean.

    Position embeddings are added for the attention only. As in the reference, the mean is over all
    positions, including padding (which holds null embeddings).
    """

    MEAN_LATENTS = 4
    MAX_LENGTH = 512
    DEPTH = 2

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int,
        heads: int,
        num_latents: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.pos_emb = nnx.Param(jax.random.normal(rngs.params(), (self.MAX_LENGTH, dim)))
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (num_latents, dim)))
        self.mean_norm = LayerNorm(dim, rngs=rngs)
        self.to_mean_latents = linear(dim, dim * self.MEAN_LATENTS, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            PerceiverLayer(dim, dim_head=dim_head, heads=heads, dtype=dtype, rngs=rngs)
            for _ in range(self.DEPTH)
        )

    def __call__(self, x: Float[Array, "b l d"]) -> Tokens:
        b, length, d = x.shape
        mean = constrain(self.to_mean_latents(self.mean_norm(jnp.mean(x, axis=1))), "b d")
        learned = jnp.broadcast_to(self.latents[...].astype(x.dtype), (b, *self.latents.shape))
        latents = jnp.concatenate([mean.reshape(b, self.MEAN_LATENTS, d), learned], axis=1)
        x = x + self.pos_emb[...][:length].astype(x.dtype)
        for layer in self.layers:
            latents = layer(latents, x)
        return latents
