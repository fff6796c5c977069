"""The U-Net of Imagen (Saharia et al., 2022) as imagen-pytorch 2.1.0 builds it.

It maps a noisy image and a noise level to a prediction of the same shape; the diffusion process
decides which quantity is predicted. There are four kinds of conditioning:

    time          Fourier features of the log-SNR -> a vector `t` and a few tokens
    low-res time  the same for the noise level of the low-resolution image
    text          embeddings -> Perceiver -> 36 tokens, and their mean -> added to `t`
    images        concatenated to the input: [cond_images, x, self_cond, lowres_cond_img]

`t` scales and shifts the features in every residual block; attention layers attend to the tokens.
`encode_text` computes everything that depends on the text alone, once for all steps of a sampler
(`text_cond=`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.errors import UserError
from imagen_jax.nn import levels
from imagen_jax.nn.attention import KeyValue
from imagen_jax.nn.blocks import ConvBlock, ResnetBlock
from imagen_jax.nn.embeddings import TextEmbedding, TimeEmbedding
from imagen_jax.nn.layers import CrossEmbed, affine_layer_norm, check_image, conv, linear
from imagen_jax.nn.remat import check_policy, join_channels, run
from imagen_jax.nn.transformer import PerceiverResampler, Transformer
from imagen_jax.resize import resize
from imagen_jax.sharding import constrain
from imagen_jax.streams import stream
from imagen_jax.types import (
    AnyArray,
    Image,
    KeepMask,
    LogSNR,
    PRNGKey,
    TextEmbeds,
    TextMask,
)
from imagen_jax.unet_config import UnetConfig


class TextCond(NamedTuple):
    """Everything a U-Net computes from a text, independent of image and time.

    `hiddens` is added to `t`; the rest are keys and values for each attention layer that sees
    the text, in the order of the layers.
    """

    hiddens: Float[Array, "b k"]
    downs: list[tuple[KeyValue | None, list[KeyValue] | None]]
    mids: list[KeyValue]
    ups: list[tuple[KeyValue | None, list[KeyValue] | None]]


class Unet(nnx.Module):
    """The U-Net of one stage, described by `config`; computes in `dtype`.

    `remat` is one of REMAT_POLICIES, e.g. "nothing_saveable": the backward pass then recomputes
    every residual block and transformer, except what the policy saves.
    """

    def __init__(
        self,
        config: UnetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_policy(remat)
        self.config, self.dtype, self.remat = config, dtype, remat
        make = dict(dtype=dtype, rngs=rngs)
        cond = dict(time_cond_dim=config.time_cond_dim, norm=config.norm, **make)

        c_in = config.channels * (1 + config.lowres_cond + config.self_cond)
        c_in += config.cond_images_channels
        if config.init_cross_embed:
            sizes = config.init_cross_embed_kernel_sizes
            self.init_conv = CrossEmbed(c_in, config.first_dim, sizes, stride=1, **make)
        else:
            self.init_conv = conv(c_in, config.first_dim, config.init_conv_kernel_size, **make)

        self.time = TimeEmbedding(config, **make)
        self.lowres_time = TimeEmbedding(config, **make) if config.lowres_cond else None
        self._make_text(config, **make)

        self.init_resnet_block = (
            ResnetBlock(*[config.first_dim] * 2, use_gca=config.use_global_context_attn, **cond)
            if config.memory_efficient
            else None
        )
        count = len(config.dim_mults)
        self.downs = nnx.List(levels.down(config, i, **make) for i in range(count))
        mid, heads = config.dims[-1], levels.heads_of(config)
        # As in the reference, the cross-attention here has 8 heads of 64 whatever the config says.
        self.mid_block1 = ResnetBlock(mid, mid, cond_dim=config.token_dim, **cond)
        depth = config.layer_mid_attns_depth if config.attend_at_middle else 0
        self.mid_attn = (
            Transformer(mid, depth=depth, ff_mult=2.0, context_dim=None, **heads, **make)
            if depth
            else None
        )
        self.mid_block2 = ResnetBlock(mid, mid, cond_dim=config.token_dim, **cond)
        self.ups = nnx.List(levels.up(config, i, **make) for i in reversed(range(count)))
        self._make_final(config, cond, make)

    def __repr__(self) -> str:
        """A short summary; `nnx.display` shows every parameter."""
        count = sum(x.size for x in jax.tree.leaves(nnx.state(self, nnx.Param)))
        return f"Unet({count:,} parameters, {jnp.dtype(self.dtype)}, {self.config})"

    def _make_text(self, config: UnetConfig, **make) -> None:
        """Unconditional U-Nets have the null embeddings and the pool too, as in the reference."""
        width = config.token_dim
        shape = (1, config.max_text_len, width)
        self.null_text_embed = nnx.Param(jax.random.normal(make["rngs"].params(), shape))
        shape = (1, config.time_cond_dim)
        self.null_text_hidden = nnx.Param(jax.random.normal(make["rngs"].params(), shape))
        self.norm_cond = affine_layer_norm(width, **make)
        latents, text = config.attn_pool_num_latents, config.cond_on_text
        self.attn_pool = (
            PerceiverResampler(width, num_latents=latents, **levels.heads_of(config), **make)
            if config.attn_pool_text
            else None
        )
        self.text_to_cond = linear(config.text_embed_dim, width, **make) if text else None
        self.text_embedding = TextEmbedding(width, config.time_cond_dim, **make) if text else None

    def _make_final(self, config: UnetConfig, cond: dict, make: dict) -> None:
        dim, combine = config.dim, config.combine_upsample_fmaps
        self.upsample_combiner = (
            nnx.List(
                ConvBlock(c_in, dim, norm=config.norm, **make) for c_in in reversed(config.dims[1:])
            )
            if combine
            else None
        )
        parts = 1 + combine * len(config.dim_mults) + config.init_conv_to_final_conv_residual
        width = dim * parts
        self.final_res_block = (
            ResnetBlock(width, dim, use_gca=True, **cond) if config.final_resnet_block else None
        )
        width = (dim if config.final_resnet_block else width) + config.channels * config.lowres_cond
        zeros = nnx.initializers.zeros_init()
        size = config.final_conv_kernel_size
        self.final_conv = conv(
            width, config.out_channels, size, kernel_init=zeros, bias_init=zeros, **make
        )

    @jax.named_scope("text")
    def encode_text(
        self, text_embeds: TextEmbeds, text_mask: TextMask | None = None, *, keep_mask: KeepMask
    ) -> TextCond:
        """Everything the text contributes to a step; rows with `keep_mask` False get no text.

        Texts are cut or padded to `max_text_len`. Padding is replaced by the learned null embedding
        of its position; without a `text_mask` it stays zero, as in the reference.
        """
        if text_embeds.shape[-1] != self.config.text_embed_dim:
            raise UserError(
                f"text_embeds are {text_embeds.shape[-1]} wide; this U-Net has "
                f"text_embed_dim = {self.config.text_embed_dim}."
            )
        length = self.config.max_text_len
        tokens = constrain(self.text_to_cond(jnp.asarray(text_embeds)), "b l d")[:, :length]
        missing = length - tokens.shape[1]
        tokens = jnp.pad(tokens, ((0, 0), (0, missing), (0, 0)))
        keep = jnp.asarray(keep_mask)[:, None]
        keep_token = keep
        if text_mask is not None:
            mask = jnp.pad(jnp.asarray(text_mask)[:, :length], ((0, 0), (0, missing)))
            keep_token = mask & keep
        null = self.null_text_embed[...].astype(tokens.dtype)
        tokens = jnp.where(keep_token[..., None], tokens, null)
        if self.attn_pool is not None:
            tokens = self.attn_pool(tokens)
        hiddens = self.text_embedding(jnp.mean(tokens, axis=1))
        hiddens = jnp.where(keep, hiddens, self.null_text_hidden[...].astype(hiddens.dtype))
        tokens = self.norm_cond(tokens)
        return TextCond(
            hiddens=hiddens,
            downs=[level.project_context(tokens) for level in self.downs],
            mids=[block.project_context(tokens) for block in (self.mid_block1, self.mid_block2)],
            ups=[level.project_context(tokens) for level in self.ups],
        )

    def __call__(
        self,
        x: Image,
        time: LogSNR,
        *,
        text_embeds: TextEmbeds | None = None,
        text_mask: TextMask | None = None,
        text_cond: TextCond | None = None,
        lowres_cond_img: Image | None = None,
        lowres_noise_times: LogSNR | None = None,
        cond_images: Float[AnyArray, "b h3 w3 c3"] | None = None,
        self_cond: Image | None = None,
        cond_drop_prob: float = 0.0,
        keep_mask: KeepMask | None = None,
        key: PRNGKey | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """Predicts noise, v or the clean image from a noisy image `x` at log-SNR `time`.

        Clean images are in [-1, 1]. Text is given as `text_embeds`, or as `text_cond`, a result of
        `encode_text`. It is dropped with probability `cond_drop_prob` (drawn from `key`), or where
        `keep_mask` is False. `key` also turns on the dropout of linear attention.
        `lowres_noise_times` is a log-SNR too. Raises UserError for missing or unexpected inputs.
        """
        self._check_inputs(text_embeds, text_cond, lowres_noise_times, self_cond)
        if text_embeds is not None and text_cond is None:
            keep_mask = _keep_mask(x.shape[0], cond_drop_prob, keep_mask, key)
            text_cond = self.encode_text(text_embeds, text_mask, keep_mask=keep_mask)
        x = self._inputs(x, lowres_cond_img, cond_images, self_cond)
        residual = x = constrain(self.init_conv(x), "b h w c")

        t, tokens = self.time(time)
        if self.lowres_time is not None:
            lowres_t, lowres_tokens = self.lowres_time(lowres_noise_times)
            t, tokens = t + lowres_t, jnp.concatenate([tokens, lowres_tokens], axis=1)
        tokens = self.norm_cond(tokens)
        if text_cond is not None:
            t = t + text_cond.hiddens
        return self._trunk(x, t, tokens, text_cond, residual, lowres_cond_img, key)

    def _check_inputs(
        self,
        text_embeds: TextEmbeds | None,
        text_cond: TextCond | None,
        lowres_noise_times: LogSNR | None,
        self_cond: Image | None,
    ) -> None:
        config = self.config
        for given, wanted, what in (
            (text_embeds is not None or text_cond is not None, config.cond_on_text, "text"),
            (self_cond is not None, config.self_cond, "self_cond"),
        ):
            if given and not wanted:
                raise UserError(f"this U-Net is not conditioned on {what}, but {what} is given.")
        if config.lowres_cond != (lowres_noise_times is not None):
            wants = "needs" if config.lowres_cond else "does not take"
            raise UserError(f"this U-Net {wants} lowres_cond_img and lowres_noise_times.")

    def _inputs(
        self,
        x: Image,
        lowres: Image | None,
        cond_images: Float[AnyArray, "b h3 w3 c3"] | None,
        self_cond: Image | None,
    ) -> Float[Array, "b h w c_in"]:
        """The channels of the first convolution, in the reference's order."""
        config = self.config
        if config.lowres_cond != (lowres is not None):
            wants = "needs" if config.lowres_cond else "does not take"
            raise UserError(f"this U-Net {wants} lowres_cond_img and lowres_noise_times.")
        if (config.cond_images_channels > 0) != (cond_images is not None):
            raise UserError(
                f"cond_images are {'missing' if cond_images is None else 'given'}; this U-Net "
                f"has cond_images_channels = {config.cond_images_channels}."
            )
        check_image(x, channels=config.channels, multiple=config.downsampling)
        parts = [x]
        if config.self_cond:
            parts.append(jnp.zeros_like(x) if self_cond is None else self_cond)
        if lowres is not None:
            parts.append(lowres)
        if cond_images is not None:
            if cond_images.shape[-1] != config.cond_images_channels:
                raise UserError(
                    f"cond_images have {cond_images.shape[-1]} channels; this U-Net has "
                    f"cond_images_channels = {config.cond_images_channels}."
                )
            cond_images = jnp.asarray(cond_images)
            parts.insert(0, resize(cond_images, x.shape[1:3], mode=config.resize_mode))
        x = jnp.concatenate([jnp.asarray(part, self.dtype) for part in parts], axis=-1)
        return constrain(x, "b h w _")

    def _trunk(
        self,
        x: Array,
        t: Array,
        tokens: Array,
        text: TextCond | None,
        residual: Array,
        lowres: Array | None,
        key: PRNGKey | None,
    ) -> Array:
        """Computes the prediction from the first convolution's output."""
        config, step = self.config, functools.partial(run, remat=self.remat)
        n = len(self.downs)
        none = [(None, None)] * n
        text_downs, text_ups = (none, none) if text is None else (text.downs, text.ups)
        text_mid1, text_mid2 = (None, None) if text is None else text.mids
        keys = (
            [None] * (2 * n) if key is None else [stream(key, "dropout", i) for i in range(2 * n)]
        )
        skip_scale = 2**-0.5 if config.scale_skip_connection else 1.0

        if self.init_resnet_block is not None:
            x = step(self.init_resnet_block, x, t)
        skips = []
        for i, level, (text_init, text_attn) in zip(range(n), self.downs, text_downs, strict=True):
            with jax.named_scope(f"down{i}"):
                x = x if level.before is None else level.before(x)
                x = step(level.init_block, x, t, tokens, text_init)
                for block in level.resnets:
                    x = step(block, x, t)
                    skips.append(x)
                if level.attn is not None:
                    x = step(level.attn, x, tokens, text_attn, key=keys[i])
                skips.append(x)
                x = x if level.after is None else level.after(x)

        with jax.named_scope("middle"):
            x = step(self.mid_block1, x, t, tokens, text_mid1)
            x = x if self.mid_attn is None else step(self.mid_attn, x)
            x = step(self.mid_block2, x, t, tokens, text_mid2)

        features = []
        for i, level, (text_init, text_attn) in zip(range(n), self.ups, text_ups, strict=True):
            with jax.named_scope(f"up{n - 1 - i}"):
                x = step(level.init_block, x, t, tokens, text_init, skip=skips.pop() * skip_scale)
                for block in level.resnets:
                    x = step(block, x, t, skip=skips.pop() * skip_scale)
                if level.attn is not None:
                    x = step(level.attn, x, tokens, text_attn, key=keys[n + i])
                features.append(x)
                x = x if level.after is None else level.after(x)

        with jax.named_scope("final"):
            return self._final(x, t, features, residual, lowres)

    def _final(
        self, x: Array, t: Array, features: list[Array], residual: Array, lowres: Array | None
    ) -> Array:
        """Computes the prediction from the last level's output and all levels' `features`."""
        if self.upsample_combiner is not None:
            size = x.shape[1:3]
            combined = [
                block(resize(feature, size))
                for block, feature in zip(self.upsample_combiner, features, strict=True)
            ]
            x = join_channels([x, *combined])
        if self.config.init_conv_to_final_conv_residual:
            x = join_channels([x, residual])
        if self.final_res_block is not None:
            x = run(self.final_res_block, x, t, remat=self.remat)
        if lowres is not None:
            x = join_channels([x, jnp.asarray(lowres, x.dtype)])
        return constrain(self.final_conv(x), "b h w _")


class NullUnet(nnx.Module):
    """A placeholder for the base of a cascade that only upsamples (reference `NullUnet`)."""

    def __init__(self, *, rngs: nnx.Rngs | None = None):
        self.dummy_parameter = nnx.Param(jnp.zeros((1,)))


def _keep_mask(
    b: int, cond_drop_prob: float, keep_mask: AnyArray | None, key: PRNGKey | None
) -> Array:
    """A mask of the rows that keep their text."""
    if keep_mask is not None:
        return jnp.asarray(keep_mask)
    if cond_drop_prob in (0.0, 1.0):
        return jnp.full((b,), cond_drop_prob == 0.0)
    if key is None:
        raise UserError(f"cond_drop_prob = {cond_drop_prob} needs a key or a keep_mask.")
    return jax.random.bernoulli(stream(key, "text_drop"), 1 - cond_drop_prob, (b,))
