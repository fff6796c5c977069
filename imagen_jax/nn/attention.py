"""Attention over pixels and conditioning tokens.

Softmax attention is the reference's: queries and keys of unit length with learned gains, logits
times 8, softmax in float32 (lucidrains' answer to overflow in half precision).

Keys and values of conditioning tokens come in two parts. Time tokens change at every sampling
step and are projected in the layer. Text tokens do not: `project_context` computes their keys and
values once, and the layer takes them as an input. The order of keys does not matter, so the parts
are simply concatenated.

Pixels are a flattened feature map of `h` rows. Layers take `h` because `constrain` shards pixels
the way it shards the feature map.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.nn.attend import SCALE, attend
from imagen_jax.nn.layers import LayerNorm, affine_layer_norm, conv, dropout, l2norm, linear
from imagen_jax.sharding import constrain, splits
from imagen_jax.types import PRNGKey

Pixels = Float[Array, "b p c"]
Tokens = Float[Array, "b m d"]


class KeyValue(NamedTuple):
    """Keys and values of one layer, before normalisation."""

    k: Float[Array, "b m n k"]
    v: Float[Array, "b m n k"]


def split_heads(
    x: Float[Array, "b p nk"], heads: int, *, h: int | None = None
) -> Float[Array, "b p n k"]:
    """Splits channels into heads, for pixels of `h` rows or for tokens (None).

    If the heads do not split evenly over the devices, they are gathered first: the partitioner
    gets a reshape of a sharded axis to (2, ...) wrong.
    """
    axes = "b m" if h is None else "b p"
    x = constrain(x, f"{axes} c" if splits(heads) else f"{axes} _", h=h)
    return constrain(rearrange(x, "b p (n k) -> b p n k", n=heads), f"{axes} n k", h=h)


def split_kv(kv: Float[Array, "b m nk2"], heads: int) -> KeyValue:
    """Separates fused keys and values by a split, as the partitioner gets a reshape of a sharded
    axis to (2, heads) wrong. Every device needs all keys, so `m` is never sharded, even for pixels.
    """
    kv = jnp.split(constrain(kv, "b m _"), 2, axis=-1)
    k, v = (rearrange(a, "b m (n k) -> b m n k", n=heads) for a in kv)
    return KeyValue(constrain(k, "b m n k"), constrain(v, "b m n k"))


def join(parts: list[KeyValue]) -> KeyValue:
    """Concatenates along the tokens."""
    return KeyValue(*(jnp.concatenate(a, axis=1) for a in zip(*parts, strict=True)))


def null_key_value(null_kv: Array, like: Array, heads: int) -> KeyValue:
    """The learned key and value that attention can fall back on, shared by all heads."""
    b, k = like.shape[0], null_kv.shape[-1]
    pair = null_kv.astype(like.dtype)
    return KeyValue(*(jnp.broadcast_to(a, (b, 1, heads, k)) for a in (pair[0], pair[1])))


class QKNorm(nnx.Module):
    """Scales queries and keys to unit length, with a gain per channel of a head."""

    def __init__(self, dim_head: int, *, rngs: nnx.Rngs):
        self.q_scale = nnx.Param(jnp.ones((dim_head,)))
        self.k_scale = nnx.Param(jnp.ones((dim_head,)))

    def __call__(self, q: Array, k: Array) -> tuple[Array, Array]:
        return l2norm(q, self.q_scale[...]), l2norm(k, self.k_scale[...])


class Attention(nnx.Module):
    """Self-attention with one key head for all query heads; context is added to the keys."""

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int,
        heads: int,
        context_dim: int | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.norm = LayerNorm(dim, rngs=rngs)
        self.null_kv = nnx.Param(jax.random.normal(rngs.params(), (2, dim_head)))
        self.to_q = linear(dim, heads * dim_head, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_kv = linear(dim, 2 * dim_head, use_bias=False, dtype=dtype, rngs=rngs)
        self.qk_norm = QKNorm(dim_head, rngs=rngs)
        context = context_dim is not None
        self.context_norm = (
            affine_layer_norm(context_dim, dtype=dtype, rngs=rngs) if context else None
        )
        self.to_context = (
            linear(context_dim, 2 * dim_head, dtype=dtype, rngs=rngs) if context else None
        )
        self.to_out = linear(heads * dim_head, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(dim, rngs=rngs)

    def project_context(self, tokens: Tokens) -> KeyValue:
        return split_kv(self.to_context(self.context_norm(tokens)), 1)

    def __call__(
        self, x: Pixels, tokens: Tokens | None = None, text: KeyValue | None = None, *, h: int
    ) -> Pixels:
        x = self.norm(constrain(x, "b p _", h=h))
        q = split_heads(self.to_q(x), self.heads, h=h)
        parts = [null_key_value(self.null_kv[...], x, 1), split_kv(self.to_kv(x), 1)]
        if tokens is not None:
            parts.append(self.project_context(tokens))
        if text is not None:
            parts.append(text)
        k, v = join(parts)
        out = self.to_out(attend(*self.qk_norm(q, k), v, scale=SCALE, h=h))
        return self.norm_out(constrain(out, "b p c", h=h))


class CrossAttention(nnx.Module):
    """Pixels attend to the conditioning tokens; every head has its own keys.

    `linear_attn` replaces the softmax over tokens by one over channels and one over tokens, so
    that keys and values contract first (reference `LinearCrossAttention`, which has the gains of
    queries and keys but does not use them).
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int,
        dim_head: int,
        heads: int,
        linear_attn: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.linear_attn = linear_attn
        self.norm = LayerNorm(dim, rngs=rngs)
        self.null_kv = nnx.Param(jax.random.normal(rngs.params(), (2, dim_head)))
        self.to_q = linear(dim, heads * dim_head, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_kv = linear(
            context_dim, 2 * heads * dim_head, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.qk_norm = QKNorm(dim_head, rngs=rngs)
        self.to_out = linear(heads * dim_head, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(dim, rngs=rngs)

    def project_context(self, tokens: Tokens) -> KeyValue:
        return split_kv(self.to_kv(tokens), self.heads)

    def __call__(
        self, x: Pixels, tokens: Tokens, text: KeyValue | None = None, *, h: int
    ) -> Pixels:
        x = self.norm(constrain(x, "b p _", h=h))
        q = split_heads(self.to_q(x), self.heads, h=h)
        parts = [null_key_value(self.null_kv[...], x, self.heads), self.project_context(tokens)]
        if text is not None:
            parts.append(text)
        k, v = join(parts)
        if self.linear_attn:
            out = linear_attend(q, k, v, h=h, scale=SCALE)
        else:
            out = attend(*self.qk_norm(q, k), v, scale=SCALE, h=h)
        return self.norm_out(constrain(self.to_out(out), "b p c", h=h))


def linear_attend(
    q: Float[Array, "b p n k"],
    k: Float[Array, "b m n k"],
    v: Float[Array, "b m n k"],
    *,
    h: int,
    scale: float,
) -> Float[Array, "b p nk"]:
    """Efficient attention (Shen et al., 2018): softmax(q) (softmax(k)^T v), linear in p and m."""
    q = jax.nn.softmax(q.astype(jnp.float32), axis=-1).astype(v.dtype) * scale
    k = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(v.dtype)
    context = jnp.einsum("bmnk,bmne->bnke", k, v)
    out = constrain(jnp.einsum("bpnk,bnke->bpne", q, context), "b p n k", h=h)
    return rearrange(out, "b p n e -> b p (n e)")


class LinearAttention(nnx.Module):
    """Linear self-attention with depth-wise convolved queries, keys and values.

    With a key, its inputs are dropped at the reference's fixed rate of 5 %.
    """

    DROPOUT = 0.05

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int,
        heads: int,
        context_dim: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inner = heads * dim_head
        self.heads = heads
        self.norm = LayerNorm(dim, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (
            nnx.List(
                [
                    conv(dim, inner, 1, use_bias=False, dtype=dtype, rngs=rngs),
                    conv(inner, inner, 3, groups=inner, use_bias=False, dtype=dtype, rngs=rngs),
                ]
            )
            for _ in range(3)
        )
        self.context_norm = affine_layer_norm(context_dim, dtype=dtype, rngs=rngs)
        self.to_context = linear(context_dim, 2 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = conv(inner, dim, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(dim, rngs=rngs)

    def project_context(self, tokens: Tokens) -> KeyValue:
        return split_kv(self.to_context(self.context_norm(tokens)), self.heads)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        tokens: Tokens,
        text: KeyValue | None = None,
        *,
        key: PRNGKey | None = None,
    ) -> Float[Array, "b h w c"]:
        h, w = x.shape[1:3]
        x = self.norm(constrain(x, "b h w _"))
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        q, k, v = (
            split_heads(
                rearrange(
                    depthwise(pointwise(dropout(x, self.DROPOUT, part_key))), "b h w c -> b (h w) c"
                ),
                self.heads,
                h=h,
            )
            for (pointwise, depthwise), part_key in zip(
                (self.to_q, self.to_k, self.to_v), keys, strict=True
            )
        )
        parts = [KeyValue(k, v), self.project_context(tokens)]
        if text is not None:
            parts.append(text)
        out = linear_attend(q, *join(parts), h=h, scale=q.shape[-1] ** -0.5)
        out = nnx.silu(rearrange(out, "b (h w) c -> b h w c", h=h, w=w))
        return self.norm_out(constrain(self.to_out(out), "b h w c"))
