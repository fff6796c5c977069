"""Trains the base of a cascade: text to small pictures.

    python -m train.base                              # the demo's, on the bundled pictures
    python -m train.base --data FOLDER --steps 20000  # pictures with a .txt caption beside each
    python -m train.base --workdir RUN --resume       # resume, with the run's settings
    python -m train.base --preset imagen --mesh 8x1   # on eight devices

The super-resolution stages are trained by `python -m train.super_res`, in any order.
"""

import commands
from commands import processes
from train import loop
from train.command_line import parse


def main() -> None:
    (settings,) = parse(__doc__)
    processes.start(settings.coordinator, settings.process_id, settings.num_processes)
    commands.errors_go_to(settings.run)
    commands.use_precision(settings.compute_dtype)
    loop.run(settings, 1)


if __name__ == "__main__":
    commands.run(main)
