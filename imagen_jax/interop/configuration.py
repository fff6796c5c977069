"""Converts the configuration of a cascade from imagen-pytorch's form to ours, and back.

Its config classes (`imagen_pytorch.configs`), which every JSON file and every checkpoint with
`imagen_params` goes through, have other defaults than its constructors: CLASS_DEFAULTS.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from imagen_jax import storage
from imagen_jax.config import ImagenConfig
from imagen_jax.diffusion_config import ElucidatedConfig
from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop import infer
from imagen_jax.stage import show

UNET_CLASS_DEFAULTS = dict(text_embed_dim=768, attn_dim_head=32, attn_heads=16)
CLASS_DEFAULTS = dict(cond_drop_prob=0.5)
HYPER_PARAMETERS = [
    field.name
    for field in dataclasses.fields(ElucidatedConfig)
    if field.name != "lowres_conditioning"  # only ours
]
NOT_ELUCIDATED = (
    "timesteps",
    "loss_type",
    "noise_schedules",
    "pred_objectives",
    "min_snr_loss_weight",
    "min_snr_gamma",
)
OURS = ("discrete", "lowres_noise_range")
"""Fields of `ImagenConfig` that the reference does not have."""
Kind = Literal["original", "elucidated"]


def read_json(path: str | Path) -> dict[str, Any]:
    """{"type", "imagen"} of a JSON file: the CLI's `imagen_config.json`, only its `imagen` part, a
    run directory's `config.json`, or the fields that a checkpoint leaves open.

    Raises ValueError for a file that is not a JSON object.
    """
    data = storage.read_object(storage.folder(path))
    imagen = data.get("imagen", data)
    if not isinstance(imagen, dict):
        raise UserError(f"{path}: 'imagen' is not a JSON object.")
    kind = data.get("type") if "imagen" in data else None
    if kind not in (None, "original", "elucidated"):
        raise UserError(f"{path}: type {kind!r} is neither 'original' nor 'elucidated'.")
    if kind is None and (imagen.get("elucidated") or set(HYPER_PARAMETERS) & imagen.keys()):
        kind = "elucidated"
    return {"type": kind, "imagen": imagen}


def is_complete(params: Mapping[str, Any]) -> bool:
    """Whether this describes complete networks: the config classes' required fields are there."""
    unets = params.get("unets")
    unets = [unets] if isinstance(unets, Mapping) else unets
    return (
        bool(unets)
        and "image_sizes" in params
        and all("is_null" in unet or {"dim", "dim_mults"} <= unet.keys() for unet in unets)
    )


def to_ours(
    params: Mapping[str, Any],
    kind: Kind,
    norms: Sequence[str],
    known: Sequence[Mapping[str, Any]] | None = None,
) -> ImagenConfig:
    """Our configuration from fields of the reference's config classes. `norms` are inferred from
    the weights, and `known` are fields of each U-Net that its file has and `params` may lack.

    Raises ValueError for what does not exist here, above all video.
    """
    unets = params["unets"]
    unets = [unets] if isinstance(unets, Mapping) else unets
    if len(unets) != len(norms):
        raise UserError(f"the configuration has {len(unets)} unets, the weights {len(norms)}.")
    described = [
        unet if "is_null" in unet else UNET_CLASS_DEFAULTS | dict(sure) | unet | {"norm": norm}
        for unet, norm, sure in zip(unets, norms, known or [{}] * len(unets), strict=True)
    ]
    return cascade(CLASS_DEFAULTS | dict(params) | {"unets": described}, kind)


def cascade(fields: Mapping[str, Any], kind: Kind) -> ImagenConfig:
    """Our configuration from arguments of the reference's constructors, `unets` as dictionaries."""
    fields = dict(fields)
    factors = fields.pop("temporal_downsample_factor", 1)
    fields.pop("resize_cond_video_frames", None)
    if fields.pop("video", False) or set(_tuple(factors)) != {1}:
        raise UserError("this is a video cascade; only image cascades can be converted.")
    if kind == "elucidated" and fields.get("elucidated") is None:
        own = {name: fields.pop(name) for name in HYPER_PARAMETERS if name in fields}
        fields["elucidated"] = own
    fields["unets"] = [_with_eight_groups(unet) for unet in fields["unets"]]
    schedules = fields.get("noise_schedules")
    if isinstance(schedules, (list, tuple)):  # the reference ignores extra ones
        fields["noise_schedules"] = list(schedules)[: len(fields["unets"])]
    return ImagenConfig.from_dict(fields)


def to_theirs(config: ImagenConfig) -> tuple[Kind, dict[str, Any]]:
    """(`imagen_type`, `imagen_params`) for the reference's config classes, with every field.

    How the noise of the low-resolution image was drawn in training is left out. Raises UserError
    for networks and images that the reference does not have.
    """
    if config.discrete is not None or any(isinstance(u, IFUnetConfig) for u in config.unets):
        raise UserError("imagen-pytorch has no U-Net of DeepFloyd IF: use to-diffusers.")
    for number, size in enumerate(config.image_sizes, 1):
        if not isinstance(size, int):
            raise UserError(
                f"U-Net {number} is {show(size)}: imagen-pytorch supports only square images."
            )
    params = {name: value for name, value in config.to_dict().items() if name not in OURS}
    if isinstance(params["lowres_sample_noise_level"], list):
        raise UserError(
            "lowres_sample_noise_level differs per U-Net; imagen-pytorch has one for all."
        )
    own = params.pop("elucidated")
    for unet in params["unets"]:
        unet.pop("norm", None)
        if unet.get("text_embed_dim", 0) is None:  # the class needs a number, but ignores it
            del unet["text_embed_dim"]
    if own is None:
        return "original", params
    for name in NOT_ELUCIDATED:
        del params[name]
    return "elucidated", params | {name: own[name] for name in HYPER_PARAMETERS}


def complete(
    shapes: Sequence[infer.Shapes], known: Sequence[Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """All fields of a cascade: `given` ones, the `known` ones of each U-Net, the rest inferred.

    `shapes` are those of each U-Net's tensors. Raises ValueError that lists every field left open,
    as a JSON object to fill in.
    """
    partial = given.get("unets", [{}] * len(shapes))
    partial = [partial] if isinstance(partial, Mapping) else partial
    if len(partial) != len(shapes):
        raise UserError(f"the configuration has {len(partial)} unets, the weights {len(shapes)}.")
    unets, missing = [], []
    for tensors, sure, more in zip(shapes, known, partial, strict=True):
        if tensors.keys() <= {"dummy_parameter"}:
            unets.append({"is_null": True})
            missing.append({})
            continue
        known_norm = {"norm": infer.norm(tensors)}
        inferred, left = (known_norm, {}) if sure else infer.unet_fields(tensors, more)
        unets.append({**inferred, **sure, **more})
        missing.append(left)
    networks = [unet for unet in unets if "is_null" not in unet]
    text = any(unet["cond_on_text"] for unet in networks)
    wanted = dict(image_sizes=None, pred_objectives="noise")
    wanted["noise_schedules"] = (["cosine", "cosine"] + ["linear"] * len(unets))[: len(unets)]
    if text:
        wanted["text_encoder_name"] = "google/t5-v1_1-base"
    if set(HYPER_PARAMETERS) & given.keys():
        wanted = dict(image_sizes=None)
    wanted = {name: value for name, value in wanted.items() if name not in given}
    if any(missing):
        wanted["unets"] = missing
    if wanted:
        raise UserError(
            "the file has no configuration, and its tensors do not determine these fields. Give "
            "them in a JSON file for --config (here with imagen-pytorch's defaults):\n"
            + json.dumps(wanted, indent=2)
        )
    widths = {unet["text_embed_dim"] for unet in networks if unet["cond_on_text"]}
    channels = {unet.get("channels", 3) for unet in networks}
    if len(widths) > 1 or len(channels) > 1:
        raise UserError(f"the U-Nets differ in text widths {widths} or channels {channels}.")
    found = dict(condition_on_text=text, channels=channels.pop())
    if text:
        found["text_embed_dim"] = widths.pop()
    return found | dict(given) | {"unets": unets}


def _with_eight_groups(unet: Mapping[str, Any]) -> dict[str, Any]:
    """`resnet_groups` was an argument from 1.22 to 1.26; here `norm="group"` has its default, 8."""
    groups = unet.get("resnet_groups", 8)
    if set(_tuple(groups)) != {8}:
        raise UserError(f"resnet_groups = {groups}: only the default, 8, is implemented.")
    return {name: value for name, value in unet.items() if name != "resnet_groups"}


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
