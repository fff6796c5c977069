"""The configuration of a U-Net, as frozen data: the arguments of imagen-pytorch 2.1.0's `Unet`.

A field that the reference takes per level (`layer_attns`, ...) keeps the form in which it was
given, one value or a tuple; `UnetConfig.levels` resolves it.
"""

import dataclasses
import warnings
from typing import Any, Literal

from imagen_jax.errors import UserError
from imagen_jax.fields import Config

ResizeMode = Literal["nearest", "bilinear", "bicubic", "area", "bilinear_corners"]

TEXT_LENGTH = 256
"""The length, in tokens, at which captions are encoded (imagen-pytorch's t5.py, MAX_LENGTH)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnetConfig(Config):
    """One U-Net. Fields are those of the reference's `Unet`; tuples run from fine to coarse.

    `norm` is the only added field: `"rms"` is the reference from 2.0 on, `"group"` (8 groups) its
    versions 1.22 to 1.26. `num_image_tokens`, `out_dim`, `layer_attns_add_text_cond` and `dropout`
    are accepted but have no effect, as in the reference.
    """

    dim: int
    text_embed_dim: int | None = 768
    num_resnet_blocks: int | tuple[int, ...] = 1
    cond_dim: int | None = None
    num_image_tokens: int = 4
    num_time_tokens: int = 2
    learned_sinu_pos_emb_dim: int = 16
    out_dim: int | None = None
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    cond_images_channels: int = 0
    channels: int = 3
    channels_out: int | None = None
    attn_dim_head: int = 64
    attn_heads: int = 8
    ff_mult: float = 2.0
    lowres_cond: bool = False
    layer_attns: bool | tuple[bool, ...] = True
    layer_attns_depth: int | tuple[int, ...] = 1
    layer_mid_attns_depth: int = 1
    layer_attns_add_text_cond: bool = True
    attend_at_middle: bool = True
    layer_cross_attns: bool | tuple[bool, ...] = True
    use_linear_attn: bool | tuple[bool, ...] = False
    use_linear_cross_attn: bool | tuple[bool, ...] = False
    cond_on_text: bool = True
    max_text_len: int = 256
    init_dim: int | None = None
    init_conv_kernel_size: int = 7
    init_cross_embed: bool = True
    init_cross_embed_kernel_sizes: tuple[int, ...] = (3, 7, 15)
    cross_embed_downsample: bool = False
    cross_embed_downsample_kernel_sizes: tuple[int, ...] = (2, 4)
    attn_pool_text: bool = True
    attn_pool_num_latents: int = 32
    dropout: float = 0.0
    memory_efficient: bool = False
    init_conv_to_final_conv_residual: bool = False
    use_global_context_attn: bool = True
    scale_skip_connection: bool = True
    final_resnet_block: bool = True
    final_conv_kernel_size: int = 3
    self_cond: bool = False
    resize_mode: ResizeMode = "nearest"
    combine_upsample_fmaps: bool = False
    pixel_shuffle_upsample: bool = True
    norm: Literal["rms", "group"] = "rms"

    def __post_init__(self):
        self._check_types()
        for name in (
            "num_resnet_blocks",
            "layer_attns",
            "layer_attns_depth",
            "layer_cross_attns",
            "use_linear_attn",
            "use_linear_cross_attn",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.dim_mults):
                raise UserError(
                    f"{name} = {value} has {len(value)} entries; dim_mults = {self.dim_mults} "
                    f"has {len(self.dim_mults)}, one per level."
                )
        self._check_values()
        _warn_once_of_ignored(self)

    def _check_values(self) -> None:
        if self.attn_heads < 2:
            raise UserError(f"attn_heads = {self.attn_heads}; attention needs at least 2.")
        if self.learned_sinu_pos_emb_dim % 2:
            raise UserError(
                f"learned_sinu_pos_emb_dim = {self.learned_sinu_pos_emb_dim} must be even."
            )
        if not 1 <= self.max_text_len <= 512:
            raise UserError(f"max_text_len = {self.max_text_len} must lie in 1 .. 512.")
        if self.cond_on_text and self.text_embed_dim is None:
            raise UserError("cond_on_text needs text_embed_dim.")
        if not self.memory_efficient and self.dim_mults[0] != 1:
            raise UserError(
                f"dim_mults = {self.dim_mults} must start with 1 unless memory_efficient: the last "
                f"level up is dim = {self.dim} wide."
            )
        if self.first_dim != self.dim:
            for name in ("memory_efficient", "init_conv_to_final_conv_residual"):
                if getattr(self, name):
                    raise UserError(
                        f"{name} needs init_dim = {self.init_dim} to equal dim = {self.dim}."
                    )
        for name in ("init_conv_kernel_size", "final_conv_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise UserError(f"{name} = {getattr(self, name)} must be odd.")
        if self.norm == "group" and any(width % 8 for width in self.dims):
            raise UserError(
                f"norm='group' has 8 groups: the widths {self.dims} must be multiples of 8."
            )
        for name, stride, used in (
            ("init_cross_embed_kernel_sizes", 1, self.init_cross_embed),
            ("cross_embed_downsample_kernel_sizes", 2, self.cross_embed_downsample),
        ):
            if used and any(kernel % 2 != stride % 2 for kernel in getattr(self, name)):
                parity = "odd" if stride == 1 else "even"
                raise UserError(f"{name} = {getattr(self, name)}: every size must be {parity}.")

    @property
    def text_len(self) -> int:
        """The number of tokens that this U-Net reads; its `encode_text` cuts off the rest."""
        return min(TEXT_LENGTH, self.max_text_len)

    @property
    def first_dim(self) -> int:
        """Channels after the initial convolution."""
        return self.dim if self.init_dim is None else self.init_dim

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels at each resolution, starting with the output of the initial convolution."""
        return (self.first_dim, *(self.dim * mult for mult in self.dim_mults))

    @property
    def token_dim(self) -> int:
        """Width of the conditioning tokens."""
        return self.dim if self.cond_dim is None else self.cond_dim

    @property
    def time_cond_dim(self) -> int:
        """Width of the conditioning vector (doubled with a low-resolution time)."""
        return self.dim * 4 * (2 if self.lowres_cond else 1)

    @property
    def out_channels(self) -> int:
        return self.channels if self.channels_out is None else self.channels_out

    @property
    def downsampling(self) -> int:
        """The total downsampling factor; the image's sides must be multiples of it."""
        return 2 ** (len(self.dim_mults) - (0 if self.memory_efficient else 1))

    def levels(self, name: str) -> tuple[Any, ...]:
        """The field `name` as a tuple with one entry per level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.dim_mults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullUnetConfig(Config):
    """A placeholder for the base of a cascade that only upsamples (reference `NullUnet`)."""

    is_null: Literal[True] = True

    def __post_init__(self):
        self._check_types()


_IGNORED = ("num_image_tokens", "out_dim", "layer_attns_add_text_cond", "dropout")
_warned: set[str] = set()


def _warn_once_of_ignored(config: UnetConfig) -> None:
    for name in _IGNORED:
        default = UnetConfig.__dataclass_fields__[name].default
        if getattr(config, name) != default and name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"UnetConfig.{name} = {getattr(config, name)!r} has no effect: imagen-pytorch "
                "accepts it and never uses it. It is kept so that configurations convert.",
                stacklevel=4,
            )
