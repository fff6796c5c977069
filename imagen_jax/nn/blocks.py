"""Residual convolution blocks."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.nn.attention import CrossAttention, KeyValue, Tokens
from imagen_jax.nn.layers import block_norm, conv, linear
from imagen_jax.sharding import constrain

FeatureMap = Float[Array, "b h w c"]
Conditioning = Float[Array, "b k"]


class ConvBlock(nnx.Module):
    """Norm, scale and shift, SiLU, 3 x 3 convolution (reference `Block`)."""

    def __init__(self, c_in: int, c_out: int, *, norm: str, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = block_norm(norm, c_in, dtype=dtype, rngs=rngs)
        self.project = conv(c_in, c_out, 3, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c_in"], scale_shift: tuple[Array, Array] | None = None
    ) -> Float[Array, "b h w c_out"]:
        x = self.norm(x)
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return constrain(self.project(nnx.silu(x)), "b h w c")


class GlobalContext(nnx.Module):
    """A gate per channel, from an attention-weighted mean over all pixels (Cao et al., 2019)."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = max(3, dim // 2)
        self.to_k = conv(dim, 1, 1, dtype=dtype, rngs=rngs)
        self.squeeze = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.excite = linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: FeatureMap) -> Float[Array, "b 1 1 c"]:
        logits = rearrange(self.to_k(x), "b h w 1 -> b (h w)").astype(jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        pooled = jnp.einsum("bp,bpc->bc", weights, rearrange(x, "b h w c -> b (h w) c"))
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(pooled))))
        return gate[:, None, None, :]


class ResnetBlock(nnx.Module):
    """Two convolution blocks, cross-attention between them; time and text modulate the second."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        time_cond_dim: int,
        cond_dim: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        linear_attn: bool = False,
        use_gca: bool = False,
        norm: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.time_mlp = linear(time_cond_dim, 2 * c_out, dtype=dtype, rngs=rngs)
        self.cross_attn = (
            CrossAttention(
                c_out,
                context_dim=cond_dim,
                dim_head=dim_head,
                heads=heads,
                linear_attn=linear_attn,
                dtype=dtype,
                rngs=rngs,
            )
            if cond_dim is not None
            else None
        )
        self.block1 = ConvBlock(c_in, c_out, norm=norm, dtype=dtype, rngs=rngs)
        self.block2 = ConvBlock(c_out, c_out, norm=norm, dtype=dtype, rngs=rngs)
        self.gca = GlobalContext(c_out, dtype=dtype, rngs=rngs) if use_gca else None
        self.res_conv = conv(c_in, c_out, 1, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def project_context(self, tokens: Tokens) -> KeyValue | None:
        return None if self.cross_attn is None else self.cross_attn.project_context(tokens)

    def __call__(
        self,
        x: Float[Array, "b h w c_in"],
        t: Conditioning,
        tokens: Tokens | None = None,
        text: KeyValue | None = None,
    ) -> Float[Array, "b h w c_out"]:
        gathered = constrain(x, "b h w _")
        h = self.block1(gathered)
        if self.cross_attn is not None:
            pixels = rearrange(h, "b h w c -> b (h w) c")
            h = h + self.cross_attn(pixels, tokens, text, h=h.shape[1]).reshape(h.shape)
        # Gathered before the split: half of a sharded axis lies on only half of the devices.
        halves = jnp.split(constrain(self.time_mlp(nnx.silu(t)), "b _"), 2, axis=-1)
        scale, shift = (constrain(half, "b c")[:, None, None, :] for half in halves)
        h = self.block2(h, (scale, shift))
        if self.gca is not None:
            h = h * self.gca(h)
        return h + (x if self.res_conv is None else constrain(self.res_conv(gathered), "b h w c"))
