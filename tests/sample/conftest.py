"""A run directory of a tiny cascade, and commands run in this process as a user types them."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import imagen_jax
from imagen_jax import nn, presets
from imagen_jax.config import ImagenConfig, UnetConfig
from tests import SMALLEST_UNET


def cascade() -> ImagenConfig:
    """`presets.tiny`, 8 -> 16 pixels, with networks that compile in a few seconds."""
    config = presets.tiny()
    unet = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=16)
    return dataclasses.replace(config, unets=(unet, unet))


def save_run(run: Path, config: ImagenConfig, numbers: tuple[int, ...] = (1, 2)) -> Path:
    """Random weights for the U-Nets of these numbers, none for the others."""
    rng = np.random.default_rng(0)

    def network(number: int):
        unet = config.unets[number - 1]
        if number not in numbers:
            return nn.NullUnet()
        shapes = nn.abstract(unet)[1]
        draw = lambda x: jax.numpy.asarray(0.1 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
        return nn.bind(unet, jax.tree.map(draw, shapes))

    unets = [network(number) for number in range(1, len(config.unets) + 1)]
    imagen_jax.save(run, imagen_jax.Imagen(config, unets=unets), step=7)
    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", cascade())


@pytest.fixture
def command(monkeypatch):
    """Runs a command of sample/: `command(run, *arguments, name="inpaint")`."""

    def start(run: Path, *arguments: object, name: str = "text_to_image") -> None:
        monkeypatch.setattr(sys, "argv", ["", "--checkpoint", *map(str, (run, *arguments))])
        importlib.import_module(f"sample.{name}").main()

    return start


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def recorded(path: Path) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.text["imagen_jax"])
