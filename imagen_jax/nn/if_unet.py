"""The U-Net of DeepFloyd IF, and the base U-Net of the Imagen paper (appendix F.1).

    time          sinusoids of the step -> two layers -> a vector `t`
    low-res time  the same for the noise of the low-resolution image, added to `t`
    text          pooled by attention and added to `t`; also projected to keys and values
    low-res image concatenated to the input

`t` scales and shifts the features in every residual block. Attention layers attend to the text and
to the image with one softmax, over all tokens: IF was trained without masking the padding. Residual
blocks that resample join the levels (BigGAN). Reference: diffusers' `UNet2DConditionModel` with
`SimpleCrossAttn` blocks; source of the design: Nichol & Dhariwal 2021, Dhariwal & Nichol 2021.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.errors import UserError
from imagen_jax.if_config import GROUPS, IFUnetConfig
from imagen_jax.nn.attend import attend
from imagen_jax.nn.attention import KeyValue, join, split_heads
from imagen_jax.nn.layers import affine_layer_norm, check_image, conv, linear
from imagen_jax.nn.remat import check_policy, run
from imagen_jax.sharding import constrain
from imagen_jax.types import AnyArray, Image, KeepMask, PRNGKey, TextEmbeds, TextMask

FeatureMap = Float[Array, "b h w c"]
Times = Float[AnyArray, "b"]

MAX_PERIOD = 10_000.0
_ACTIVATIONS = {"gelu": functools.partial(nnx.gelu, approximate=False), "silu": nnx.silu}
_ZEROS = nnx.initializers.zeros_init()


class IFTextCond(NamedTuple):
    """Everything a U-Net computes from a text, independent of image and time."""

    pooled: Float[Array, "b k"]
    downs: list[list[KeyValue]]
    """Keys and values for each attention layer, by level."""
    mid: KeyValue
    ups: list[list[KeyValue]]


class IFUnet(nnx.Module):
    """The U-Net of one stage, described by `config`; computes in `dtype`.

    `remat` is one of REMAT_POLICIES: the backward pass then recomputes every block, except what the
    policy saves.
    """

    def __init__(
        self,
        config: IFUnetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_policy(remat)
        self.config, self.dtype, self.remat = config, dtype, remat
        make = dict(dtype=dtype, rngs=rngs)
        dims, depths = config.dims, config.levels("num_resnet_blocks")
        self.act = _ACTIVATIONS[config.activation]
        self.time = TimeMLP(config, **make)
        self.lowres_time = TimeMLP(config, **make) if config.lowres_cond else None
        self.text_pool = TextPool(config, **make) if config.cond_on_text else None
        self.text_to_cond = (
            linear(config.text_embed_dim, config.token_dim, **make) if config.cond_on_text else None
        )
        self.init_conv = conv(config.channels * (1 + config.lowres_cond), dims[0], 3, **make)

        downs, skips, width = [], [dims[0]], dims[0]
        last = len(dims) - 1
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            inputs, leaves = [width] + [dim] * (depth - 1), "down" if i < last else None
            downs.append(Level(config, inputs, dim, config.layer_attns[i], leaves, **make))
            skips += [dim] * (depth + (i < last))
            width = dim
        self.downs = nnx.List(downs)
        self.mid_block1 = Block(config, width, width, **make)
        self.mid_attn = Attention(config, width, **make)
        self.mid_block2 = Block(config, width, width, **make)
        ups = []
        for i in reversed(range(len(dims))):
            depth = depths[i] + 1
            wide = [width, *[dims[i]] * (depth - 1)]
            inputs = [own + skips.pop() for own in wide]
            leaves = "up" if i else None
            ups.append(Level(config, inputs, dims[i], config.layer_attns[i], leaves, **make))
            width = dims[i]
        self.ups = nnx.List(ups)
        self.final_norm = group_norm(dims[0], **make)
        self.final_conv = conv(
            dims[0], config.out_channels, 3, kernel_init=_ZEROS, bias_init=_ZEROS, **make
        )

    def __repr__(self) -> str:
        """A short summary; `nnx.display` shows every parameter."""
        count = sum(x.size for x in jax.tree.leaves(nnx.state(self, nnx.Param)))
        return f"IFUnet({count:,} parameters, {jnp.dtype(self.dtype)}, {self.config})"

    @jax.named_scope("text")
    def encode_text(
        self, text_embeds: TextEmbeds, text_mask: TextMask | None = None, *, keep_mask: KeepMask
    ) -> IFTextCond:
        """Everything the text contributes to a step.

        Embeddings are those of all tokens, padding included; there is no mask, and `text_mask` has
        no effect. Rows with `keep_mask` False get zeros, as in the Imagen paper; if `null_text` is
        "encoded", there are no such rows: the empty text is given like any other.
        """
        config = self.config
        if text_embeds.shape[-1] != config.text_embed_dim:
            raise UserError(
                f"text_embeds are {text_embeds.shape[-1]} wide; this U-Net has "
                f"text_embed_dim = {config.text_embed_dim}."
            )
        tokens = constrain(jnp.asarray(text_embeds, self.dtype), "b l _")[:, : config.max_text_len]
        tokens = jnp.where(jnp.asarray(keep_mask)[:, None, None], tokens, 0)
        pooled = self.text_pool(tokens)
        tokens = constrain(self.text_to_cond(tokens), "b l _")
        return IFTextCond(
            pooled=pooled,
            downs=[level.project_text(tokens) for level in self.downs],
            mid=self.mid_attn.project_text(tokens),
            ups=[level.project_text(tokens) for level in self.ups],
        )

    def __call__(
        self,
        x: Image,
        time: Times,
        *,
        text_embeds: TextEmbeds | None = None,
        text_cond: IFTextCond | None = None,
        lowres_cond_img: Image | None = None,
        lowres_noise_times: Times | None = None,
        cond_images: AnyArray | None = None,
        self_cond: Image | None = None,
        key: PRNGKey | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """Predicts the noise from a noisy image `x` at the step `time`, and with `learned_variance`
        as many more channels, which interpolate the variance.

        Text is given as `text_embeds`, or as `text_cond`, a result of `encode_text`. Without text,
        attention sees only the image. `lowres_noise_times` is a step too. Raises UserError for
        missing or unexpected inputs.
        """
        self._check_inputs(x, lowres_cond_img, lowres_noise_times, cond_images, self_cond)
        if text_embeds is not None and text_cond is None:
            keep = jnp.ones(x.shape[0], bool)
            text_cond = self.encode_text(text_embeds, keep_mask=keep)
        if self.config.cond_on_text != (text_cond is not None):
            wants = "needs" if self.config.cond_on_text else "is not conditioned on"
            raise UserError(f"this U-Net {wants} text.")
        parts = [x] if lowres_cond_img is None else [x, lowres_cond_img]
        x = jnp.concatenate([jnp.asarray(part, self.dtype) for part in parts], axis=-1)
        x = constrain(self.init_conv(constrain(x, "b h w _")), "b h w c")
        t = self.time(time)
        if self.lowres_time is not None:
            t = t + self.lowres_time(lowres_noise_times)
        if text_cond is not None:
            t = t + text_cond.pooled
        return self._trunk(x, self.act(t), text_cond)

    def _trunk(self, x: FeatureMap, t: Array, text: IFTextCond | None) -> Array:
        """Computes the prediction from the first convolution's output and the activated `t`."""
        step = functools.partial(run, remat=self.remat)
        skips = [x]
        for i, level in enumerate(self.downs):
            with jax.named_scope(f"down{i}"):
                for j, block in enumerate(level.blocks):
                    x = step(block, x, t)
                    if level.attns is not None:
                        x = step(level.attns[j], x, None if text is None else text.downs[i][j])
                    skips.append(x)
                if level.resample is not None:
                    x = step(level.resample, x, t)
                    skips.append(x)
        with jax.named_scope("middle"):
            x = step(self.mid_block1, x, t)
            x = step(self.mid_attn, x, None if text is None else text.mid)
            x = step(self.mid_block2, x, t)
        for i, level in enumerate(self.ups):
            with jax.named_scope(f"up{len(self.ups) - 1 - i}"):
                for j, block in enumerate(level.blocks):
                    x = step(block, x, t, skip=skips.pop())
                    if level.attns is not None:
                        x = step(level.attns[j], x, None if text is None else text.ups[i][j])
                if level.resample is not None:
                    x = step(level.resample, x, t)
        with jax.named_scope("final"):
            return constrain(self.final_conv(self.act(self.final_norm(x))), "b h w _")

    def _check_inputs(
        self,
        x: Image,
        lowres: Image | None,
        lowres_times: Times | None,
        cond_images: AnyArray | None,
        self_cond: Image | None,
    ) -> None:
        config = self.config
        for given, what in ((cond_images, "cond_images"), (self_cond, "self_cond")):
            if given is not None:
                raise UserError(f"this U-Net is not conditioned on {what}.")
        if not config.lowres_cond == (lowres is not None) == (lowres_times is not None):
            wants = "needs" if config.lowres_cond else "does not take"
            raise UserError(f"this U-Net {wants} lowres_cond_img and lowres_noise_times.")
        check_image(x, channels=config.channels, multiple=config.downsampling)


class Level(nnx.Module):
    """The blocks of one resolution, each with its attention, and the block that changes it."""

    def __init__(
        self,
        config: IFUnetConfig,
        inputs: list[int],
        dim: int,
        attends: bool,
        leaves: Literal["up", "down"] | None,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        make = dict(dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(Block(config, width, dim, **make) for width in inputs)
        self.attns = nnx.List(Attention(config, dim, **make) for _ in inputs) if attends else None
        self.resample = Block(config, dim, dim, resample=leaves, **make) if leaves else None

    def project_text(self, tokens: Float[Array, "b l d"]) -> list[KeyValue]:
        return [] if self.attns is None else [attn.project_text(tokens) for attn in self.attns]


class Block(nnx.Module):
    """Norm, activation and convolution, twice; time scales and shifts the second norm's output
    (`ResnetBlock2D`).

    `resample` halves the resolution by averaging or doubles it by repeating, both before the first
    convolution and on the skip connection.
    """

    def __init__(
        self,
        config: IFUnetConfig,
        c_in: int,
        c_out: int,
        *,
        resample: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        make = dict(dtype=dtype, rngs=rngs)
        self.act, self.resample = _ACTIVATIONS[config.activation], resample
        self.skip_scale = config.skip_scale
        self.norm1 = group_norm(c_in, **make)
        self.block1 = conv(c_in, c_out, 3, **make)
        self.time_mlp = linear(config.time_dim, 2 * c_out, **make)
        self.norm2 = group_norm(c_out, **make)
        self.block2 = conv(c_out, c_out, 3, kernel_init=_ZEROS, bias_init=_ZEROS, **make)
        self.res_conv = conv(c_in, c_out, 1, **make) if c_in != c_out else None

    def __call__(
        self, x: Float[Array, "b h w c_in"], t: Float[Array, "b k"]
    ) -> Float[Array, "b h2 w2 c_out"]:
        y = self.act(self.norm1(x))
        x, y = (_resampled(part, self.resample) for part in (x, y))
        y = constrain(self.block1(y), "b h w c")
        scale, shift = jnp.split(self.time_mlp(t)[:, None, None], 2, axis=-1)
        y = self.norm2(y) * (1 + scale) + shift
        y = constrain(self.block2(self.act(y)), "b h w c")
        x = x if self.res_conv is None else constrain(self.res_conv(x), "b h w c")
        return (x + y) / self.skip_scale


class Attention(nnx.Module):
    """Attention to text and image with one softmax, and the residual (`AttnAddedKVProcessor`)."""

    def __init__(self, config: IFUnetConfig, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = dict(dtype=dtype, rngs=rngs)
        self.heads = dim // config.attn_dim_head
        self.scale = config.attn_dim_head**-0.5
        self.norm = group_norm(dim, **make)
        self.q, self.k, self.v = (linear(dim, dim, **make) for _ in range(3))
        text = config.cond_on_text
        self.text_norm = group_norm(config.token_dim, **make) if text else None
        self.text_k = linear(config.token_dim, dim, **make) if text else None
        self.text_v = linear(config.token_dim, dim, **make) if text else None
        self.o = linear(dim, dim, kernel_init=_ZEROS, bias_init=_ZEROS, **make)

    def project_text(self, tokens: Float[Array, "b l d"]) -> KeyValue:
        """The norm's statistics are over all tokens, padding included."""
        tokens = self.text_norm(tokens)
        return KeyValue(*(split_heads(to(tokens), self.heads) for to in (self.text_k, self.text_v)))

    def __call__(self, x: FeatureMap, text: KeyValue | None = None) -> FeatureMap:
        h = x.shape[1]
        y = rearrange(self.norm(x), "b h w c -> b (h w) c")
        y = constrain(y, "b p _", h=h)
        q = split_heads(self.q(y), self.heads, h=h)
        own = KeyValue(*(split_heads(to(y), self.heads) for to in (self.k, self.v)))
        k, v = own if text is None else join([text, own])
        out = self.o(attend(q, k, v, scale=self.scale, h=h))
        return x + constrain(rearrange(out, "b (h w) c -> b h w c", h=h), "b h w c")


class TimeMLP(nnx.Module):
    """A step as sinusoids (`cos` first, always in float32), then two layers."""

    def __init__(self, config: IFUnetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dim, self.act = config.dim, _ACTIVATIONS[config.activation]
        self.expand = linear(config.dim, config.time_dim, dtype=dtype, rngs=rngs)
        self.contract = linear(config.time_dim, config.time_dim, dtype=dtype, rngs=rngs)

    def __call__(self, time: Times) -> Float[Array, "b k"]:
        return self.contract(self.act(self.expand(sinusoids(time, self.dim))))


class TextPool(nnx.Module):
    """The text as one vector: attention from the mean of its tokens (`TextTimeEmbedding`)."""

    def __init__(self, config: IFUnetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = dict(dtype=dtype, rngs=rngs)
        width, self.heads = config.text_embed_dim, config.pool_heads
        self.norm = affine_layer_norm(width, **make)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (width,)) / math.sqrt(width))
        self.q, self.k, self.v = (linear(width, width, **make) for _ in range(3))
        self.project = linear(width, config.time_dim, **make)
        self.norm_out = affine_layer_norm(config.time_dim, **make)

    def __call__(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b k"]:
        tokens = self.norm(tokens)
        mean = jnp.mean(tokens, axis=1, keepdims=True)
        asks = mean + self.position[...].astype(mean.dtype)
        tokens = jnp.concatenate([asks, tokens], axis=1)
        q, k, v = (
            split_heads(to(part), self.heads)
            for to, part in ((self.q, asks), (self.k, tokens), (self.v, tokens))
        )
        pooled = attend(q, k, v, scale=q.shape[-1] ** -0.5)[:, 0]
        return self.norm_out(self.project(pooled))


def group_norm(dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """`torch.nn.GroupNorm(32, dim)`; statistics over all axes between batch and channels."""
    return nnx.GroupNorm(
        dim, num_groups=GROUPS, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


def sinusoids(time: Times, dim: int) -> Float[Array, "b d"]:
    """cos and sin of the time, at `dim` / 2 frequencies from 1 down to almost 1 / MAX_PERIOD."""
    half = dim // 2
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / half).astype(np.float32)
    angles = jnp.asarray(time, jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _resampled(x: FeatureMap, way: str | None) -> Float[Array, "b h2 w2 c"]:
    if way == "down":
        b, h, w, c = x.shape
        return constrain(x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)), "b h w c")
    if way == "up":
        return constrain(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), "b h w c")
    return x
