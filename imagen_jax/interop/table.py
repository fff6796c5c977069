"""The names of a U-Net's parameters, in imagen-pytorch's state dict and here: one table, both ways.

An entry is (their name, our name, how the array changes), or a table of such entries under a
common prefix. `#` is a number, the same on both sides. Their `Linear` and 1 x 1 `Conv2d`
have (c_out, c_in[, 1, 1]), our kernels (c_in, c_out); their `Conv2d` (c_out, c_in, h, w), ours
(h, w, c_in, c_out), including depth-wise ones. Pixel shuffles keep their channel order, (c, i, j)
in both, and heads keep their place; keys stay before values.

Their feed-forward under a linear attention is made of convolutions while ours is still linear, so
that only its attention tells the two apart: `linear_layers` below replaces such `layers`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Change(NamedTuple):
    """How an array is converted to ours, and back."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


Table = tuple
"""Entries (their name, our name, a `Change` or another table)."""

SAME = Change(lambda a: a, lambda a: a)
FLIP = Change(lambda a: a.T, lambda a: a.T)
IMAGE = Change(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
PIXEL = Change(lambda a: a[..., 0, 0].T, lambda a: a.T[..., None, None])  # weights and gains

LINEAR = (("weight", "kernel", FLIP), ("bias", "bias", SAME))
CONV = (("weight", "kernel", IMAGE), ("bias", "bias", SAME))
POINT = (("weight", "kernel", PIXEL), ("bias", "bias", SAME))
NORM = (("weight", "scale", SAME), ("bias", "bias", SAME))
GAIN = (("g", "g", SAME),)
POINT_GAIN = (("g", "g", PIXEL),)

QUERY_KEY_VALUE = (
    ("q_scale", "qk_norm.q_scale", SAME),
    ("k_scale", "qk_norm.k_scale", SAME),
    ("to_q", "to_q", LINEAR),
    ("to_kv", "to_kv", LINEAR),
    ("to_out.0", "to_out", LINEAR),
)
ATTENTION = (  # self- and cross-attention
    *QUERY_KEY_VALUE,
    ("null_kv", "null_kv", SAME),
    ("norm", "norm", GAIN),
    ("to_context.0", "context_norm", NORM),
    ("to_context.1", "to_context", LINEAR),
    ("to_out.1", "norm_out", GAIN),
)
LINEAR_ATTENTION = (
    ("norm", "norm", POINT_GAIN),
    *((f"to_{a}.{i + 1}", f"to_{a}.{i}", CONV) for a in "qkv" for i in (0, 1)),  # 0: their dropout
    ("to_context.0", "context_norm", NORM),
    ("to_context.1", "to_context", LINEAR),
    ("to_out.0", "to_out", CONV),
    ("to_out.1", "norm_out", POINT_GAIN),
)
FEED_FORWARD = (
    ("0", "norm_in", GAIN),
    ("1", "expand", LINEAR),
    ("3", "norm_hidden", GAIN),
    ("4", "contract", LINEAR),
)
POINT_FEED_FORWARD = (
    ("0", "norm_in", POINT_GAIN),
    ("1", "expand", POINT),
    ("3", "norm_hidden", POINT_GAIN),
    ("4", "contract", POINT),
)
TRANSFORMER = (
    ("layers.#.0", "layers.#.attn", ATTENTION),
    ("layers.#.1", "layers.#.ff", FEED_FORWARD),
    ("linear_layers.#.0", "linear_layers.#.attn", LINEAR_ATTENTION),
    ("linear_layers.#.1", "linear_layers.#.ff", POINT_FEED_FORWARD),
)
BLOCK = (
    ("norm.gamma", "norm.gamma", PIXEL),
    ("groupnorm", "norm", NORM),  # before 2.0
    ("project", "project", CONV),
)
RESNET = (
    ("time_mlp.1", "time_mlp", LINEAR),
    ("cross_attn", "cross_attn", ATTENTION),
    ("block1", "block1", BLOCK),
    ("block2", "block2", BLOCK),
    ("gca.to_k", "gca.to_k", CONV),
    ("gca.net.0", "gca.squeeze", POINT),
    ("gca.net.2", "gca.excite", POINT),
    ("res_conv", "res_conv", CONV),
)
CROSS_EMBED = (("convs.#", "convs.#", CONV),)
DOWNSAMPLE = (("1", "conv", CONV), *CROSS_EMBED)

UNET = (
    ("init_conv", "init_conv", CONV + CROSS_EMBED),
    *(
        entry
        for theirs, ours in (("to_time", "time"), ("to_lowres_time", "lowres_time"))
        for entry in (
            (f"{theirs}_hiddens.0.weights", f"{ours}.fourier.weights", SAME),
            (f"{theirs}_hiddens.1", f"{ours}.to_hiddens", LINEAR),
            (f"{theirs}_cond.0", f"{ours}.to_cond", LINEAR),
            (f"{theirs}_tokens.0", f"{ours}.to_tokens", LINEAR),
        )
    ),
    ("null_text_embed", "null_text_embed", SAME),
    ("null_text_hidden", "null_text_hidden", SAME),
    ("text_to_cond", "text_to_cond", LINEAR),
    ("to_text_non_attn_cond.0", "text_embedding.norm", NORM),
    ("to_text_non_attn_cond.1", "text_embedding.expand", LINEAR),
    ("to_text_non_attn_cond.3", "text_embedding.project", LINEAR),
    ("norm_cond", "norm_cond", NORM),
    ("attn_pool.latents", "attn_pool.latents", SAME),
    ("attn_pool.pos_emb.weight", "attn_pool.pos_emb", SAME),
    ("attn_pool.to_latents_from_mean_pooled_seq.0", "attn_pool.mean_norm", GAIN),
    ("attn_pool.to_latents_from_mean_pooled_seq.1", "attn_pool.to_mean_latents", LINEAR),
    ("attn_pool.layers.#.0", "attn_pool.layers.#", QUERY_KEY_VALUE),
    ("attn_pool.layers.#.0.norm", "attn_pool.layers.#.norm", NORM),
    ("attn_pool.layers.#.0.norm_latents", "attn_pool.layers.#.norm_latents", NORM),
    ("attn_pool.layers.#.0.to_out.1", "attn_pool.layers.#.norm_out", NORM),
    ("attn_pool.layers.#.1", "attn_pool.layers.#.ff", FEED_FORWARD),
    ("init_resnet_block", "init_resnet_block", RESNET),
    ("downs.#.0", "downs.#.before", DOWNSAMPLE),
    ("downs.#.1", "downs.#.init_block", RESNET),
    ("downs.#.2.#", "downs.#.resnets.#", RESNET),
    ("downs.#.3", "downs.#.attn", TRANSFORMER),
    ("downs.#.4", "downs.#.after", DOWNSAMPLE),
    ("downs.#.4.fns.0", "downs.#.after.wide", CONV),
    ("downs.#.4.fns.1", "downs.#.after.point", CONV),
    ("mid_block1", "mid_block1", RESNET),
    ("mid_attn", "mid_attn", TRANSFORMER),
    ("mid_block2", "mid_block2", RESNET),
    ("ups.#.0", "ups.#.init_block", RESNET),
    ("ups.#.1.#", "ups.#.resnets.#", RESNET),
    ("ups.#.2", "ups.#.attn", TRANSFORMER),
    ("ups.#.3.net.0", "ups.#.after.conv", CONV),  # pixel shuffle
    ("ups.#.3.1", "ups.#.after.project", CONV),  # nearest neighbour
    ("upsample_combiner.fmap_convs.#", "upsample_combiner.#", BLOCK),
    ("final_res_block", "final_res_block", RESNET),
    ("final_conv", "final_conv", CONV),
    ("dummy_parameter", "dummy_parameter", SAME),  # all that a NullUnet has
)
