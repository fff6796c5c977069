"""A cascade as one safetensors file, without torch.

Tensors are named `unets.{i}.` and the dotted path of the parameter here (`unets.0.final_conv.
kernel`), in this project's layouts; the metadata has `format` (imagen-jax), and as JSON `config`
(ImagenConfig), `steps`, `weights` (ema or online) and `origin`, what a run directory keeps of a
file of imagen-pytorch.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from imagen_jax.checkpoint import Weights
from imagen_jax.config import ImagenConfig
from imagen_jax.errors import UserError
from imagen_jax.interop import keys
from imagen_jax.text import Identity
from imagen_jax.types import Params

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a file; `params` has an entry for each U-Net, by its number from 1."""

    config: ImagenConfig
    params: Mapping[int, Params]
    steps: Mapping[int, int]
    weights: Weights
    origin: Mapping[str, Any] | None = None
    text_encoder: Identity | None = None
    """The one of the run's training."""


def write(path: str | os.PathLike, contents: Contents) -> None:
    """Writes the file."""
    tensors = {
        f"unets.{number - 1}.{name}": np.ascontiguousarray(array)
        for number, params in contents.params.items()
        for name, array in keys.flatten(params).items()
    }
    metadata = {
        "format": "imagen-jax",
        "config": json.dumps(contents.config.to_dict()),
        "steps": json.dumps(contents.steps),
        "weights": json.dumps(contents.weights),
        "origin": json.dumps(contents.origin),
        "text_encoder": json.dumps(contents.text_encoder and contents.text_encoder.to_dict()),
    }
    safetensors.numpy.save_file(tensors, path, metadata)


def read(path: str | os.PathLike) -> Contents:
    """Reads the file. Raises ValueError if it is damaged or was not written by `write`, and
    MisfitError for tensors that do not fit its configuration."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}  # opening it checked all names and offsets
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if metadata.get("format") != "imagen-jax":
        raise UserError(f"{path} was not written by imagen-jax: its metadata contain no cascade.")
    try:
        fields = {
            name: json.loads(metadata[name]) for name in ("config", "steps", "weights", "origin")
        }
        encoder = json.loads(metadata.get("text_encoder", "null"))  # older files have none
        encoder = encoder and Identity.from_dict(encoder)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its metadata are damaged: {error}") from error
    if fields["weights"] not in ("ema", "online"):
        raise UserError(f"{path}: its metadata are damaged: weights {fields['weights']!r}")
    config = ImagenConfig.from_dict(fields["config"])
    steps = {int(number): step for number, step in fields["steps"].items()}
    tensors = views(path)
    return Contents(
        config=config,
        params=_params(config, tensors, steps),
        steps=steps,
        weights=fields["weights"],
        origin=fields["origin"],
        text_encoder=encoder,
    )


def views(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that is known to be valid, memory-mapped: only those used are read.

    The library's own reader copies, and does not know every dtype.
    """
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    data = np.memmap(path, np.uint8, "r")
    views = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise UserError(
                    f"{path}: {name} is of type {entry['dtype']}, not one of {', '.join(DTYPES)}."
                )
            views[name] = np.asarray(data[begin:end]).view(dtype).reshape(entry["shape"])
    return views


def _params(
    config: ImagenConfig, tensors: Mapping[str, np.ndarray], steps: Mapping[int, Any]
) -> dict[int, Params]:
    targets = {number: keys.target(config.unets[number - 1]) for number in steps}
    expected = {
        f"unets.{number - 1}.{name}": leaf.shape
        for number, target in targets.items()
        for name, leaf in keys.flatten(target).items()
    }
    keys.check({name: array.shape for name, array in tensors.items()}, expected)
    return {
        number: jax.tree.unflatten(
            jax.tree.structure(target),
            [tensors[f"unets.{number - 1}.{name}"] for name in keys.flatten(target)],
        )
        for number, target in targets.items()
    }
