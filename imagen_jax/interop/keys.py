"""The names of a U-Net's parameters, in imagen-pytorch's state dict and here: one table, both ways.

An entry is (their name, our name, how the array changes), or a table of such entries under a
common prefix. `#` stands for a number, the same on both sides. Their `Linear` and 1 x 1 `Conv2d`
hold (c_out, c_in[, 1, 1]), our kernels (c_in, c_out); their `Conv2d` (c_out, c_in, h, w), ours
(h, w, c_in, c_out), depth-wise ones included. Pixel shuffles keep their channel order.

Their feed-forward under a linear attention is made of convolutions where ours stays linear, so
that only its attention tells the two apart: `linear_layers` below stands for such `layers`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from imagen_jax.types import Params


class Change(NamedTuple):
    """How an array changes on its way to us, and back."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


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


def to_jax(state_dict: Mapping[str, Any], target: Params) -> Params:
    """The parameters of a U-Net from the state dict of the reference's, as NumPy arrays.

    `target` says what must come out: the pure dict of arrays or `jax.ShapeDtypeStruct`s that
    `nn.abstract(config)` gives. Raises ValueError that lists, at once, every name that is
    unknown or missing and every array of another shape.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    wanted = {_join(path): leaf for path, leaf in leaves}
    theirs, found, problems = {}, {}, []
    for name, value in state_dict.items():
        ours, change = _translate(name, state_dict, to_ours=True)
        if ours not in wanted:
            problems.append(f"unknown {name}")
            continue
        theirs[ours] = name
        array, leaf = np.asarray(value), wanted[ours]
        shape = change.to_torch(np.broadcast_to(0, leaf.shape)).shape
        if array.shape == shape:
            found[ours] = change.to_jax(array).astype(leaf.dtype)
        else:
            problems.append(f"{name} has shape {array.shape} and not {shape}")
    names = wanted.keys() - theirs.keys()
    problems += [f"missing {_translate(name, wanted, to_ours=False)[0]}" for name in sorted(names)]
    _raise(problems)
    return structure.unflatten(found[name] for name in wanted)


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The state dict of the reference's U-Net that holds these parameters, as NumPy arrays.

    Raises ValueError that lists every parameter which is not in the table.
    """
    leaves = {_join(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    names = {name: _translate(name, leaves, to_ours=False) for name in leaves}
    _raise([f"unknown {name}" for name, (theirs, _) in names.items() if theirs is None])
    return {
        theirs: np.ascontiguousarray(change.to_torch(np.asarray(leaves[name])))
        for name, (theirs, change) in names.items()
    }


def _flatten(table: Iterable, prefix: tuple[str, str] = ("", "")) -> Iterator[tuple]:
    for theirs, ours, entry in table:
        names = prefix[0] + theirs, prefix[1] + ours
        if isinstance(entry, Change):
            yield *names, entry
        else:
            yield from _flatten(entry, (names[0] + ".", names[1] + "."))


def _translate(
    name: str, names: Iterable[str], *, to_ours: bool
) -> tuple[str, Change] | tuple[None, None]:
    """The name on the other side, and the change of the array; `names` are all of this side's."""
    block, found, rest = name.partition(".layers.")
    sign = (
        f"{block}.layers.0.0.to_k.1.weight" if to_ours else f"{block}.layers.0.attn.to_k.0.kernel"
    )
    marked = f"{block}.linear_layers.{rest}" if found and sign in names else name
    skeleton = re.sub(r"\d+", "#", marked)
    for pattern, other, change in _rules(to_ours).get(skeleton, ()):
        if match := pattern.fullmatch(marked):
            translated = functools.reduce(lambda s, n: s.replace("#", n, 1), match.groups(), other)
            return translated.replace("linear_layers", "layers"), change
    return None, None


@functools.cache
def _rules(to_ours: bool) -> dict[str, list[tuple[re.Pattern[str], str, Change]]]:
    """The table by the name to translate, its own numbers hidden too: few patterns are left."""
    rules = {}
    for names in _flatten(UNET):
        here, there = names[:2] if to_ours else names[1::-1]
        pattern = re.compile(re.escape(here).replace(r"\#", r"(\d+)"))
        rules.setdefault(re.sub(r"\d+", "#", here), []).append((pattern, there, names[2]))
    return rules


def _join(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)


def _raise(problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{len(problems)} parameters do not fit this U-Net: {shown}{more}.")
