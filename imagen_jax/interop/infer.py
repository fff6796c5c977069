"""Infers the configuration of a U-Net from the names and shapes of its tensors, as far as possible.

What leaves no trace in them (such as how skip connections are scaled) is listed as open, with the
reference's default: a wrong guess would silently give wrong pictures, so the caller asks.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from imagen_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


def unet_fields(shapes: Shapes, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of `UnetConfig` that a state dict's shapes determine, open fields -> defaults).

    `given` are fields known from elsewhere: they are not open, and fields that depend on them
    follow them.
    Raises ValueError if these are not the tensors of a `Unet` of imagen-pytorch 1.22 or newer.
    """
    if any(".temporal" in name or ".spatial_conv." in name for name in shapes):
        raise UserError("this is a video U-Net (Unet3D); only image U-Nets can be converted.")
    try:
        fields = _core(shapes) | _levels(shapes) | _text(shapes) | _ending(shapes)
    except KeyError as error:
        raise UserError(
            "these are not the tensors of a Unet of imagen-pytorch 1.22 to 2.1: "
            f"{error.args[0]} is missing."
        ) from error
    heads, unknown = _heads(shapes)
    fields |= heads
    maybe = {"scale_skip_connection": True} | unknown
    if fields["norm"] == "group":
        maybe["resnet_groups"] = 8
    if any(re.fullmatch(r"downs\.\d+\.1\.cross_attn\.to_q\.weight", name) for name in shapes):
        maybe["use_linear_cross_attn"] = False
    inputs, unknown = _inputs(shapes, fields, given)
    return fields | inputs, {
        name: default for name, default in (maybe | unknown).items() if name not in given
    }


def norm(shapes: Shapes) -> str:
    """`UnetConfig.norm` of these tensors."""
    return "group" if any(".groupnorm." in name for name in shapes) else "rms"


def _core(shapes: Shapes) -> dict[str, Any]:
    cond_dim = shapes["norm_cond.weight"][0]
    fields = dict(
        dim=_dim(shapes),
        lowres_cond=_lowres(shapes),
        cond_dim=cond_dim,
        num_time_tokens=shapes["to_time_tokens.0.weight"][0] // cond_dim,
        learned_sinu_pos_emb_dim=2 * shapes["to_time_hiddens.0.weights"][0],
        memory_efficient=_has(shapes, "init_resnet_block."),
        use_global_context_attn=any(
            re.match(r"(downs\.\d+\.2\.\d+|init_resnet_block)\.gca\.", name) for name in shapes
        ),
        norm=norm(shapes),
    )
    if "init_conv.weight" in shapes:
        init_dim, _, size, _ = shapes["init_conv.weight"]
        fields |= dict(init_cross_embed=False, init_conv_kernel_size=size)
    else:
        convs = _convs(shapes, "init_conv")
        init_dim = sum(shape[0] for shape in convs)
        fields["init_cross_embed_kernel_sizes"] = tuple(shape[2] for shape in convs)
    return fields | ({} if init_dim == fields["dim"] else dict(init_dim=init_dim))


def _levels(shapes: Shapes) -> dict[str, Any]:
    memory_efficient = _has(shapes, "init_resnet_block.")
    fields = dict(layer_attns=[], use_linear_attn=[], layer_attns_depth=[], dim_mults=[])
    fields |= dict(num_resnet_blocks=[], layer_cross_attns=[])
    for i in range(_count(shapes, "downs.")):
        resample = f"downs.{i}.{0 if memory_efficient else 4}"
        depth = _count(shapes, f"downs.{i}.3.layers.")
        linear = f"downs.{i}.3.layers.0.0.to_k.1.weight" in shapes
        fields["dim_mults"].append(_width(shapes, resample) // _dim(shapes))
        fields["num_resnet_blocks"].append(_count(shapes, f"downs.{i}.2."))
        fields["layer_attns"].append(depth > 0 and not linear)
        fields["use_linear_attn"].append(linear)
        fields["layer_attns_depth"].append(max(depth, 1))
        fields["layer_cross_attns"].append(_has(shapes, f"downs.{i}.1.cross_attn."))
        if _has(shapes, f"{resample}.convs."):
            sizes = tuple(shape[2] for shape in _convs(shapes, resample))
            fields |= dict(cross_embed_downsample=True, cross_embed_downsample_kernel_sizes=sizes)
    multiples = [
        _multiple(*shape[:2])
        for name, shape in shapes.items()
        if re.fullmatch(r"(downs\.\d+\.3|ups\.\d+\.2)\.layers\.0\.1\.1\.weight", name)
    ]
    if multiples:  # each was rounded down
        fields["ff_mult"] = max(multiples)
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


def _text(shapes: Shapes) -> dict[str, Any]:
    fields = dict(
        cond_on_text="text_to_cond.weight" in shapes,
        max_text_len=shapes["null_text_embed"][1],
        attn_pool_text=_has(shapes, "attn_pool."),
    )
    width = shapes["text_to_cond.weight"][1] if fields["cond_on_text"] else None
    if fields["attn_pool_text"]:
        fields["attn_pool_num_latents"] = shapes["attn_pool.latents"][0]
    return fields | dict(text_embed_dim=width)


def _ending(shapes: Shapes) -> dict[str, Any]:
    channels, last, size, _ = shapes["final_conv.weight"]
    combine = _has(shapes, "upsample_combiner.")
    combined = _dim(shapes) * (1 + _count(shapes, "downs.") * combine)
    last -= channels * _lowres(shapes)
    final = shapes.get("final_res_block.block1.project.weight")
    fields = dict(
        channels=channels,
        final_conv_kernel_size=size,
        final_resnet_block=final is not None,
        combine_upsample_fmaps=combine,
        init_conv_to_final_conv_residual=(last if final is None else final[1]) > combined,
        attend_at_middle=_has(shapes, "mid_attn."),
        layer_mid_attns_depth=max(1, _count(shapes, "mid_attn.layers.")),
    )
    if any(re.fullmatch(r"ups\.\d+\.3\.1\.weight", name) for name in shapes):
        fields["pixel_shuffle_upsample"] = False
    return fields


def _heads(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Heads and their width; the mid blocks' cross-attention has its own, always 8 of 64."""
    for name, shape in shapes.items():
        block, found, _ = name.rpartition(".q_scale")
        if found and not name.startswith("mid_block"):
            inner = shapes[f"{block}.to_q.weight"][0]
            return dict(attn_dim_head=shape[0], attn_heads=inner // shape[0]), {}
    linear = any(name.endswith(".to_k.1.weight") for name in shapes)
    return {}, dict(attn_dim_head=64, attn_heads=8) if linear else {}


def _inputs(
    shapes: Shapes, fields: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What input channels other than the picture's and the low-resolution picture's are for."""
    channels = fields["channels"]
    if "init_conv.weight" in shapes:
        c_in = shapes["init_conv.weight"][1]
    else:
        c_in = _convs(shapes, "init_conv")[0][1]
    rest = c_in - channels * (1 + fields["lowres_cond"])
    if rest < 0:
        raise UserError(
            "a cascade's U-Net must output as many channels as it takes; this one outputs "
            f"{channels}, and its first convolution takes {c_in}."
        )
    self_cond = given.get("self_cond", False) and rest >= channels
    cond = rest - channels * self_cond
    unknown = {"self_cond": False} if rest >= channels else {}
    if cond:
        unknown["resize_mode"] = "nearest"
    return dict(self_cond=self_cond, cond_images_channels=cond), unknown


def _lowres(shapes: Shapes) -> bool:
    return "to_lowres_time_cond.0.weight" in shapes


def _dim(shapes: Shapes) -> int:
    """The base width; with a low-resolution time the conditioning vector is twice as wide."""
    return shapes["to_time_cond.0.weight"][0] // (8 if _lowres(shapes) else 4)


def _multiple(hidden: int, dim: int) -> float:
    """The factor f with int(dim * f) == hidden, as nearly hidden / dim as floats allow."""
    factor = hidden / dim
    return factor if int(dim * factor) == hidden else math.nextafter(factor, math.inf)


def _width(shapes: Shapes, module: str) -> int:
    """Output channels of a downsampling."""
    if _has(shapes, f"{module}.convs."):
        return sum(shape[0] for shape in _convs(shapes, module))
    if f"{module}.fns.0.weight" in shapes:
        return shapes[f"{module}.fns.0.weight"][0]
    return shapes[f"{module}.1.weight"][0]


def _convs(shapes: Shapes, module: str) -> list[tuple[int, ...]]:
    return [
        shapes[f"{module}.convs.{i}.weight"]
        for i in range(max(1, _count(shapes, f"{module}.convs.")))
    ]


def _has(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix; 0 if none does."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)", name) for name in shapes)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)
