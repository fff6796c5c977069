"""Trains a super-resolution stage of a cascade: from small pictures, with noise, to larger ones.

    python -m train.super_res --unet-number 2                    # the demo's, 16 -> 32 pixels
    python -m train.super_res --preset imagen --unet-number sr1024 --data 'shards/*.tar'

Needs no trained base: the small pictures are made from the large ones.
"""

import dataclasses

import commands
from commands import processes
from imagen_jax.errors import UserError
from train import loop
from train.command_line import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The stage of the cascade."""

    unet_number: str = "2"
    """Which U-Net: 2, 3, ... or sr256, sr1024."""

    @property
    def number(self) -> int:
        """Raises UserError for an unknown name, and for the base."""
        number = commands.stage_number(self.unet_number)
        if number == 1:
            raise UserError("U-Net 1 is the base: train it with python -m train.base.")
        return number


def main() -> None:
    stage, settings = parse(__doc__, Stage, unet_number="2")
    processes.start(settings.coordinator, settings.process_id, settings.num_processes)
    commands.errors_go_to(settings.run)
    commands.use_precision(settings.compute_dtype)
    loop.run(settings, stage.number)


if __name__ == "__main__":
    commands.run(main)
