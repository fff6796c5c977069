"""Files of imagen-pytorch made without it: random tensors of the smallest cascade."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from imagen_jax.config import ImagenConfig, NullUnetConfig, UnetConfig
from imagen_jax.interop import configuration, keys
from imagen_jax.types import Params
from tests import SMALLEST_UNET

UNET = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=6)
CASCADE = ImagenConfig(unets=(UNET, UNET), image_sizes=(5, 8), text_embed_dim=6)


def shapes_of(unet: UnetConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the reference's state dict; nothing is allocated."""
    empty = jax.tree.map(lambda leaf: np.broadcast_to(0.0, leaf.shape), keys.target(unet))
    return {name: array.shape for name, array in keys.to_torch(empty).items()}


def params_of(unet: UnetConfig | NullUnetConfig, seed: int = 0) -> Params:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape, np.float32), keys.target(unet)
    )


def state_of(unet: UnetConfig | NullUnetConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of one U-Net, as `torch.save` gets it."""
    state = keys.to_torch(params_of(unet, seed))
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def trainers_file(config: ImagenConfig = CASCADE, seed: int = 0) -> dict[str, Any]:
    """What `ImagenTrainer.save` writes of a config-built cascade, without averages."""
    kind, params = configuration.to_theirs(config)
    model = {
        f"unets.{i}.{name}": tensor
        for i, unet in enumerate(config.unets)
        for name, tensor in state_of(unet, seed + i).items()
    }
    steps = torch.zeros(len(config.unets), dtype=torch.int64)
    return dict(model=model, version="2.1.0", steps=steps, imagen_type=kind, imagen_params=params)


def saved(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def contents(path: Path) -> Mapping[str, bytes | str | None]:
    """Everything under a path, bit for bit; symbolic links by what they point to."""
    found = {}
    for place in (path, *sorted(path.rglob("*"))):
        name = str(place.relative_to(path))
        if place.is_symlink():
            found[name] = os.readlink(place)
        else:
            found[name] = place.read_bytes() if place.is_file() else None
    return found
