"""Trains the base of a cascade: text to small pictures.

    python -m train.base                              # the demo's, on the bundled pictures
    python -m train.base --data FOLDER --steps 20000  # pictures with a .txt caption beside each
    python -m train.base --workdir RUN --resume       # go on where it stopped

The super-resolution stages are trained by `python -m train.super_res`, in any order.
"""

from imagen_jax import commands
from train import loop
from train.settings import parse


def main() -> None:
    (settings,) = parse(__doc__)
    loop.run(settings, 1)


if __name__ == "__main__":
    commands.run(main)
