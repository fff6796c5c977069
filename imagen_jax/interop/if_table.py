"""The names of the parameters of DeepFloyd IF's U-Net in diffusers and here (see `table`), and what
the original files call them.

The original's attention has queries, keys and values in one matrix, head by head: with rows (head,
3, channel), and for the text (head, 2, channel).
"""

from collections.abc import Mapping

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop.table import CONV, LINEAR, NORM, Change

TIME = (("linear_1", "expand", LINEAR), ("linear_2", "contract", LINEAR))
BLOCK = (
    ("norm1", "norm1", NORM),
    ("conv1", "block1", CONV),
    ("time_emb_proj", "time_mlp", LINEAR),
    ("norm2", "norm2", NORM),
    ("conv2", "block2", CONV),
    ("conv_shortcut", "res_conv", CONV),
)
ATTENTION = (
    ("group_norm", "norm", NORM),
    ("norm_cross", "text_norm", NORM),
    *((f"to_{a}", a, LINEAR) for a in "qkv"),
    *((f"add_{a}_proj", f"text_{a}", LINEAR) for a in "kv"),
    ("to_out.0", "o", LINEAR),
)
IF_UNET = (
    ("time_embedding", "time", TIME),
    ("class_embedding", "lowres_time", TIME),
    ("encoder_hid_proj", "text_to_cond", LINEAR),
    ("add_embedding.norm1", "text_pool.norm", NORM),
    (
        "add_embedding.pool.positional_embedding",
        "text_pool.position",
        Change(lambda a: a[0], lambda a: a[None]),
    ),
    *((f"add_embedding.pool.{a}_proj", f"text_pool.{a}", LINEAR) for a in "qkv"),
    ("add_embedding.proj", "text_pool.project", LINEAR),
    ("add_embedding.norm2", "text_pool.norm_out", NORM),
    ("conv_in", "init_conv", CONV),
    *(
        entry
        for way in ("down", "up")
        for entry in (
            (f"{way}_blocks.#.resnets.#", f"{way}s.#.blocks.#", BLOCK),
            (f"{way}_blocks.#.attentions.#", f"{way}s.#.attns.#", ATTENTION),
            (f"{way}_blocks.#.{way}samplers.0", f"{way}s.#.resample", BLOCK),
        )
    ),
    ("mid_block.resnets.0", "mid_block1", BLOCK),
    ("mid_block.attentions.0", "mid_attn", ATTENTION),
    ("mid_block.resnets.1", "mid_block2", BLOCK),
    ("conv_norm_out", "final_norm", NORM),
    ("conv_out", "final_conv", CONV),
)

_ORIGINAL_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ORIGINAL_ATTENTION = {
    "norm": "group_norm",
    "norm_encoder": "norm_cross",
    "proj_out": "to_out.0",
}
_ORIGINAL = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "aug_proj.0": "class_embedding.linear_1",
    "aug_proj.2": "class_embedding.linear_2",
    "encoder_proj": "encoder_hid_proj",
    "encoder_pooling.0": "add_embedding.norm1",
    "encoder_pooling.1": "add_embedding.pool",
    "encoder_pooling.2": "add_embedding.proj",
    "encoder_pooling.3": "add_embedding.norm2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def from_original(
    state_dict: Mapping[str, np.ndarray], config: IFUnetConfig
) -> dict[str, np.ndarray]:
    """A state dict of the original repository with diffusers' names and shapes.

    Raises UserError that lists names which such a U-Net does not have.
    """
    known = modules(config)
    found, unknown = {}, []
    for name, array in state_dict.items():
        match = next((m for m in known if name.startswith(m + ".")), None)
        if match is None:
            unknown.append(name)
            continue
        theirs, inner = known[match]
        part, _, kind = name[len(match) + 1 :].rpartition(".")
        if inner is None:
            found[".".join(filter(None, (theirs, part, kind)))] = array
        elif part in inner:
            flat = array[..., 0] if part == "proj_out" and array.ndim == 3 else array
            found[f"{theirs}.{inner[part]}.{kind}"] = flat
        elif part in ("qkv", "encoder_kv") and inner is _ORIGINAL_ATTENTION:
            names = ("to_q", "to_k", "to_v") if part == "qkv" else ("add_k_proj", "add_v_proj")
            for own, rows in zip(names, _by_head(array, len(names), config), strict=True):
                found[f"{theirs}.{own}.{kind}"] = rows
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(state_dict)} tensors do not belong to a U-Net of DeepFloyd "
            "IF: " + ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        )
    return found


def _by_head(array: np.ndarray, parts: int, config: IFUnetConfig) -> list[np.ndarray]:
    """Queries, keys and values, (c, c_in) or (c,), from rows in the order (head, part, channel)."""
    array = array[..., 0] if array.ndim == 3 else array  # a convolution of size 1
    split = array.reshape(-1, parts, config.attn_dim_head, *array.shape[1:])
    return [split[:, i].reshape(-1, *array.shape[1:]) for i in range(parts)]


def modules(config: IFUnetConfig) -> dict[str, tuple[str, Mapping[str, str] | None]]:
    """Original module -> diffusers' module, and how names inside change (None: they do not).

    The original numbers its blocks through all levels; a level's last one resamples.
    """
    found: dict[str, tuple[str, Mapping[str, str] | None]] = {
        name: (theirs, None) for name, theirs in _ORIGINAL.items()
    }
    depths, last = config.levels("num_resnet_blocks"), len(config.dim_mults) - 1
    place = 1
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"input_blocks.{place}"
            found[f"{block}.0"] = f"down_blocks.{i}.resnets.{j}", _ORIGINAL_BLOCK
            if config.layer_attns[i]:
                found[f"{block}.1"] = f"down_blocks.{i}.attentions.{j}", _ORIGINAL_ATTENTION
            place += 1
        if i < last:
            resampler = f"down_blocks.{i}.downsamplers.0"
            found[f"input_blocks.{place}.0"] = resampler, _ORIGINAL_BLOCK
            place += 1
    found["middle_block.0"] = "mid_block.resnets.0", _ORIGINAL_BLOCK
    found["middle_block.1"] = "mid_block.attentions.0", _ORIGINAL_ATTENTION
    found["middle_block.2"] = "mid_block.resnets.1", _ORIGINAL_BLOCK
    place = 0
    for up, i in enumerate(reversed(range(last + 1))):
        for j in range(depths[i] + 1):
            block, after = f"output_blocks.{place}", 1
            found[f"{block}.0"] = f"up_blocks.{up}.resnets.{j}", _ORIGINAL_BLOCK
            if config.layer_attns[i]:
                found[f"{block}.1"] = f"up_blocks.{up}.attentions.{j}", _ORIGINAL_ATTENTION
                after = 2
            if i and j == depths[i]:
                found[f"{block}.{after}"] = f"up_blocks.{up}.upsamplers.0", _ORIGINAL_BLOCK
            place += 1
    return found
