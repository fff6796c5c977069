"""The configuration of DeepFloyd IF's U-Net, as frozen data.

It is the base U-Net of the Imagen paper (Saharia et al. 2022, appendix F.1) with another activation
and output head. diffusers' `UNet2DConditionModel` and the original `config.yml` name the same
numbers differently: `interop.deepfloyd` translates them.
"""

import dataclasses
from typing import Any, Literal

from imagen_jax.errors import UserError
from imagen_jax.fields import Config
from imagen_jax.unet_config import ResizeMode

IF_TEXT_LENGTH = 77
"""Tokens that a caption is padded or cut to. Padding is attended to: there is no mask."""

GROUPS = 32  # of every group norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFUnetConfig(Config):
    """One U-Net of DeepFloyd IF. Tuples run from fine to coarse.

    Fields that `UnetConfig` also has mean the same there. `cond_dim` is the width of the text that
    attention sees (original `encoder_channels`, diffusers `cross_attention_dim`), by default that
    of the coarsest level; `time_cond_dim` is the width of the embedding of time and pooled text
    (`time_embed_dim`), by default 4 `dim`.
    """

    dim: int
    dim_mults: tuple[int, ...] = (1, 2, 3, 4)
    num_resnet_blocks: int | tuple[int, ...] = 3
    layer_attns: tuple[bool, ...] = (False, True, True, True)
    """Levels with attention, jointly to the text and to the image."""
    attn_dim_head: int = 64
    text_embed_dim: int | None = 4096
    cond_dim: int | None = None
    time_cond_dim: int | None = None
    pool_heads: int = 64
    """Heads of the attention that pools the text."""
    channels: int = 3
    channels_out: int | None = None
    learned_variance: bool = True
    """Twice the output channels: the second half interpolates the variance (Nichol & Dhariwal 2021,
    Eq. 15)."""
    lowres_cond: bool = False
    cond_on_text: bool = True
    max_text_len: int = IF_TEXT_LENGTH
    null_text: Literal["zeros", "encoded"] = "zeros"
    """What replaces a text that is dropped: zeros, as in the Imagen paper, or, as in DeepFloyd IF,
    the embedding of the empty text."""
    activation: Literal["gelu", "silu"] = "gelu"
    """`gelu` with the error function, as in IF; `silu` as in the paper."""
    skip_scale: float = 1.0
    """Residual blocks divide their output by it (IF's stage II: 1 / 0.7071)."""

    def __post_init__(self):
        self._check_types()
        count = len(self.dim_mults)
        for name in ("num_resnet_blocks", "layer_attns"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise UserError(
                    f"{name} = {value} has {len(value)} entries; dim_mults = {self.dim_mults} has "
                    f"{count}, one per level."
                )
        for width in (*self.dims, self.token_dim):
            if width % GROUPS:
                raise UserError(
                    f"dim = {self.dim}, dim_mults = {self.dim_mults}, cond_dim = {self.token_dim}: "
                    f"all widths must be multiples of {GROUPS}, the groups of the norms."
                )
        for width, attends in zip(self.dims, (*self.layer_attns[:-1], True), strict=True):
            if attends and width % self.attn_dim_head:
                raise UserError(
                    f"attn_dim_head = {self.attn_dim_head} does not divide the width {width}."
                )
        if self.text_embed_dim is not None and self.text_embed_dim % self.pool_heads:
            raise UserError(
                f"pool_heads = {self.pool_heads} does not divide text_embed_dim = "
                f"{self.text_embed_dim}."
            )
        if self.cond_on_text and self.text_embed_dim is None:
            raise UserError("cond_on_text needs text_embed_dim.")

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(self.dim * mult for mult in self.dim_mults)

    @property
    def token_dim(self) -> int:
        """Width of the text that attention sees."""
        return self.dims[-1] if self.cond_dim is None else self.cond_dim

    @property
    def time_dim(self) -> int:
        """Width of the embedding of time and pooled text."""
        return 4 * self.dim if self.time_cond_dim is None else self.time_cond_dim

    @property
    def out_channels(self) -> int:
        out = self.channels if self.channels_out is None else self.channels_out
        return out * (1 + self.learned_variance)

    @property
    def text_len(self) -> int:
        """The number of tokens that this U-Net reads."""
        return self.max_text_len

    @property
    def downsampling(self) -> int:
        """The total downsampling factor; the image's sides must be multiples of it."""
        return 2 ** (len(self.dim_mults) - 1)

    @property
    def self_cond(self) -> bool:
        return False

    @property
    def cond_images_channels(self) -> int:
        return 0

    @property
    def resize_mode(self) -> ResizeMode:
        return "bilinear"

    def levels(self, name: str) -> tuple[Any, ...]:
        """The field `name` as a tuple with one entry per level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.dim_mults)
