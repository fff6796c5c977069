"""The levels of the U-Net, one per resolution, and the layers of each, on the way down and up."""

import functools

from flax import nnx
from jaxtyping import Array

from imagen_jax.nn.attention import KeyValue
from imagen_jax.nn.blocks import ResnetBlock
from imagen_jax.nn.layers import ConvPair, CrossEmbed, NearestUpsample, PixelShuffle, PixelUnshuffle
from imagen_jax.nn.transformer import Transformer
from imagen_jax.unet_config import UnetConfig


class Level(nnx.Module):
    """One resolution on the way down or up: residual blocks, then attention.

    `before` and `after` change the resolution. Which of them exist depends on the direction and on
    `memory_efficient`, which halves the resolution before the blocks on the way down.
    """

    def __init__(self, *, before=None, init_block, resnets, attn=None, after=None):
        self.before = before
        self.init_block = init_block
        self.resnets = nnx.List(resnets)
        self.attn = attn
        self.after = after

    def project_context(self, tokens: Array) -> tuple[KeyValue | None, list[KeyValue] | None]:
        attn = None if self.attn is None else self.attn.project_context(tokens)
        return self.init_block.project_context(tokens), attn


def down(config: UnetConfig, i: int, **make) -> Level:
    """Level `i` of the way down, 0 being the largest; `make` are the arguments of every layer."""
    c_in, c_out = config.dims[i : i + 2]
    if config.cross_embed_downsample:
        sizes = config.cross_embed_downsample_kernel_sizes
        halve = functools.partial(CrossEmbed, kernel_sizes=sizes, stride=2)
    else:
        halve = PixelUnshuffle
    if config.memory_efficient:
        before = halve(c_in, c_out, **make)
        return Level(before=before, **_blocks(config, i, c_out, c_out, **make))
    blocks = _blocks(config, i, c_in, c_in, **make)
    last = i == len(config.dim_mults) - 1
    return Level(after=(ConvPair if last else halve)(c_in, c_out, **make), **blocks)


def up(config: UnetConfig, i: int, **make) -> Level:
    """Level `i` of the way up, 0 being the largest, which comes last."""
    c_out, c_in = config.dims[i : i + 2]
    skip = c_in if config.memory_efficient else c_out
    blocks = _blocks(config, i, c_in + skip, c_in, **make)
    double = PixelShuffle if config.pixel_shuffle_upsample else NearestUpsample
    stays = i == 0 and not config.memory_efficient
    return Level(after=None if stays else double(c_in, c_out, **make), **blocks)


def heads_of(config: UnetConfig) -> dict[str, int]:
    """The arguments of attention layers that describe their heads."""
    return dict(dim_head=config.attn_dim_head, heads=config.attn_heads)


def _blocks(config: UnetConfig, i: int, c_in: int, c_out: int, **make) -> dict:
    """The residual blocks and attention of level `i`, in either direction."""
    cond = dict(time_cond_dim=config.time_cond_dim, norm=config.norm, **make)
    linear_cross = config.levels("use_linear_cross_attn")[i]
    attends = config.levels("layer_cross_attns")[i] or linear_cross
    full, linear_attn = (config.levels(f)[i] for f in ("layer_attns", "use_linear_attn"))
    attn = None
    if full or linear_attn:
        attn = Transformer(
            c_out,
            depth=config.levels("layer_attns_depth")[i],
            linear_attn=not full,
            ff_mult=config.ff_mult,
            context_dim=config.token_dim,
            **heads_of(config),
            **make,
        )
    init_block = ResnetBlock(
        c_in,
        c_out,
        cond_dim=config.token_dim if attends else None,
        linear_attn=linear_cross,
        **heads_of(config),
        **cond,
    )
    resnets = [
        ResnetBlock(c_in, c_out, use_gca=config.use_global_context_attn, **cond)
        for _ in range(config.levels("num_resnet_blocks")[i])
    ]
    return dict(init_block=init_block, resnets=resnets, attn=attn)
