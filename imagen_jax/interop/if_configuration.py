"""DeepFloyd IF's U-Net as described by diffusers' `config.json` and the original's `config.yml`.

All that decides the network is read from the file, never from a model's name; a field that this
project's U-Net does not support is named in the error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.fields import first_difference
from imagen_jax.if_config import GROUPS, IF_TEXT_LENGTH, IFUnetConfig

# Fields of which one value is supported: that value, and diffusers' default for files that lack the
# field (because they are older than it).
_FIXED: dict[str, tuple[Any, Any]] = {
    "addition_embed_type": ("text", None),
    "center_input_sample": (False, False),
    "class_embeddings_concat": (False, False),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "cross_attention_norm": ("group_norm", None),
    "downsample_padding": (1, 1),
    "dual_cross_attention": (False, False),
    "encoder_hid_dim_type": ("text_proj", "text_proj"),
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "mid_block_only_cross_attention": (None, None),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DCrossAttn"),
    "norm_eps": (1e-5, 1e-5),
    "norm_num_groups": (GROUPS, 32),
    "num_class_embeds": (None, None),
    "only_cross_attention": (False, False),
    "projection_class_embeddings_input_dim": (None, None),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "time_cond_proj_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "timestep_post_act": (None, None),
}
_DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
_UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}


def from_diffusers(config: Mapping[str, Any]) -> tuple[IFUnetConfig, int]:
    """The network that a `config.json` of `UNet2DConditionModel` describes, and its image size.

    Raises UserError that names the first field that belongs to another network.
    """
    for name, (wanted, default) in _FIXED.items():
        found = config.get(name, default)
        if found != wanted:
            raise UserError(f"{name} = {found!r}: a U-Net of DeepFloyd IF has {wanted!r}.")
    try:
        widths, dim = tuple(config["block_out_channels"]), config["block_out_channels"][0]
        down, up = tuple(config["down_block_types"]), tuple(config["up_block_types"])
        inputs, out = config["in_channels"], config["out_channels"]
        text, heads = config["encoder_hid_dim"], config["attention_head_dim"]
        cond, size = config["cross_attention_dim"], config["sample_size"]
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing.") from error
    attends = tuple(name == _DOWN[True] for name in down)
    if down != tuple(_DOWN[a] for a in attends) or up != tuple(_UP[a] for a in attends[::-1]):
        raise UserError(f"blocks {down}, {up} are not those of a U-Net of DeepFloyd IF.")
    if any(width % dim for width in widths):
        raise UserError(f"block_out_channels = {widths} must be multiples of the first.")
    lowres = config.get("class_embed_type") == "timestep"
    channels = inputs // (1 + lowres)
    scale = config.get("resnet_out_scale_factor", 1.0)
    if config.get("mid_block_scale_factor", 1) != scale:
        raise UserError("mid_block_scale_factor and resnet_out_scale_factor differ.")
    # Activating the time embedding once, or in every block, gives the same network.
    once = bool(config.get("resnet_skip_time_act", False))
    if once != (config.get("time_embedding_act_fn") is not None):
        raise UserError("resnet_skip_time_act and time_embedding_act_fn contradict each other.")
    depth = config.get("layers_per_block", 2)
    return IFUnetConfig(
        dim=dim,
        dim_mults=tuple(width // dim for width in widths),
        num_resnet_blocks=tuple(depth) if isinstance(depth, (list, tuple)) else depth,
        layer_attns=attends,
        attn_dim_head=heads,
        text_embed_dim=text,
        cond_dim=cond,
        time_cond_dim=config.get("time_embedding_dim") or 4 * dim,
        null_text="encoded",
        pool_heads=config.get("addition_embed_type_num_heads", 64),
        channels=channels,
        channels_out=channels,
        learned_variance=_learns_variance(channels, out),
        lowres_cond=lowres,
        activation=_activation(config.get("act_fn", "silu")),
        skip_scale=float(scale),
    ), size


def to_diffusers(unet: IFUnetConfig, size: int) -> dict[str, Any]:
    """The `config.json` of a network. Raises UserError for one that diffusers does not have."""
    config = {
        "_class_name": "UNet2DConditionModel",
        **{name: wanted for name, (wanted, default) in _FIXED.items()},
        "act_fn": unet.activation,
        "addition_embed_type_num_heads": unet.pool_heads,
        "attention_head_dim": unet.attn_dim_head,
        "block_out_channels": list(unet.dims),
        "class_embed_type": "timestep" if unet.lowres_cond else None,
        "cross_attention_dim": unet.token_dim,
        "down_block_types": [_DOWN[attends] for attends in unet.layer_attns],
        "encoder_hid_dim": unet.text_embed_dim,
        "in_channels": unet.channels * (1 + unet.lowres_cond),
        "layers_per_block": list(unet.levels("num_resnet_blocks")),
        "mid_block_scale_factor": unet.skip_scale,
        "out_channels": unet.out_channels,
        "resnet_out_scale_factor": unet.skip_scale,
        "resnet_skip_time_act": unet.lowres_cond,
        "sample_size": size,
        "time_embedding_act_fn": unet.activation if unet.lowres_cond else None,
        "time_embedding_dim": unet.time_dim,
        "up_block_types": [_UP[attends] for attends in unet.layer_attns[::-1]],
    }
    again, _ = from_diffusers(config)
    if difference := first_difference(_resolved(again), _resolved(unet)):
        raise UserError(f"diffusers cannot represent this U-Net: {difference}.")
    return config


def from_original(config: Mapping[str, Any]) -> tuple[IFUnetConfig, int]:
    """The network that the original `config.yml` describes (its `params`), and its image size."""
    params = config.get("params", config)
    wanted = {"use_scale_shift_norm": True, "resblock_updown": True, "dropout": 0}
    wanted |= {"disable_self_attentions": False, "only_cross_attention": False}
    for name, value in wanted.items():
        if params.get(name, value) != value:
            raise UserError(f"{name} = {params[name]!r}: a U-Net of DeepFloyd IF has {value!r}.")
    try:
        size, dim = params["image_size"], params["model_channels"]
        inputs, out = params["in_channels"], params["out_channels"]
        head, text = params["num_head_channels"], params["encoder_dim"]
        mults, depths = _numbers(params["channel_mult"]), _numbers(params["num_res_blocks"])
        resolutions = _numbers(params["attention_resolutions"])
        cond = params["encoder_channels"]
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing.") from error
    lowres = inputs == 6
    return IFUnetConfig(
        dim=dim,
        dim_mults=mults,
        num_resnet_blocks=depths if len(depths) > 1 else depths[0],
        layer_attns=tuple(size // 2**i in resolutions for i in range(len(mults))),
        attn_dim_head=head,
        text_embed_dim=text,
        cond_dim=cond,
        time_cond_dim=params.get("time_embed_dim") or (dim * mults[-1] if lowres else 4 * dim),
        null_text="encoded",
        pool_heads=params.get("att_pool_heads", 64),
        channels=3,
        channels_out=3,
        learned_variance=_learns_variance(3, out),
        lowres_cond=lowres,
        activation=_activation(params.get("activation", "gelu")),
        skip_scale=1 / 0.7071 if params.get("scale_skip_connection", lowres) else 1.0,
    ), size


def _numbers(value: Any) -> tuple[int, ...]:
    """`"32,16,8"`, `3` or a list, as integers."""
    if isinstance(value, str):
        return tuple(int(part) for part in value.split(","))
    return (value,) if isinstance(value, int) else tuple(value)


def _learns_variance(channels: int, out: int) -> bool:
    if out not in (channels, 2 * channels):
        raise UserError(f"{out} output channels for images of {channels}.")
    return out == 2 * channels


def _activation(name: str) -> str:
    if name not in ("gelu", "silu"):
        raise UserError(f"the activation {name!r} must be gelu or silu.")
    return name


def _resolved(unet: IFUnetConfig) -> IFUnetConfig:
    """The same network, with nothing left to defaults."""
    return dataclasses.replace(
        unet,
        num_resnet_blocks=unet.levels("num_resnet_blocks"),
        cond_dim=unet.token_dim,
        time_cond_dim=unet.time_dim,
        channels_out=unet.channels,
        max_text_len=IF_TEXT_LENGTH,
        null_text="encoded",
    )
