"""Trains a super-resolution stage of a cascade: small pictures, noised, to larger ones.

    python -m train.super_res --unet-number 2                    # the demo's, 16 -> 64 pixels
    python -m train.super_res --preset imagen --unet-number sr1024 --data 'shards/*.tar'

Needs no trained base: the small pictures are made from the large ones.
"""

import dataclasses

import tyro

from imagen_jax import commands
from train import loop
from train.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResSettings(Settings):
    """Trains a super-resolution stage of a cascade."""

    unet_number: str = "2"
    """Which U-Net: 2, 3, ... or sr256, sr1024."""


def main() -> None:
    settings = tyro.cli(SuperResSettings, description=__doc__)
    number = commands.stage_number(settings.unet_number)
    if number == 1:
        raise ValueError("U-Net 1 is the base: train it with python -m train.base.")
    loop.run(settings, number)


if __name__ == "__main__":
    commands.run(main)
