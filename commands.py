"""What the command lines share: one clear line for a mistake, and a cache of compiled programs."""

import logging
import os
import sys
import warnings
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path

import jax

from imagen_jax.errors import UserError, first_line

STAGES = {"base": 1, "sr256": 2, "sr1024": 3}
"""Names of stages, accepted wherever a number is."""


def run(main: Callable[[], None]) -> None:
    """Runs a command. A ValueError or OSError is a user's mistake: one line and exit status 1.

    IMAGEN_JAX_TRACEBACK=1 in the environment shows the traceback instead.
    """
    use_compilation_cache()
    quiet_writers()
    try:
        main()
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("IMAGEN_JAX_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            sys.exit(
                "error: the device's memory is full: a smaller --batch-size may fit; in training "
                "also --accumulate, --remat nothing_saveable or --dtype bfloat16."
            )
        if jax.process_count() == 1 or os.environ.get("IMAGEN_JAX_TRACEBACK"):
            raise
        sys.exit(f"error: another process has stopped, or is out of reach: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, unless the environment chose a place already."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "imagen-jax" / "xla"))


def quiet_writers() -> None:
    """Orbax and TensorStore raise what goes wrong, and show the traceback of each array besides:
    thousands of lines when a disk is full."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def show(unraisable: object) -> None:
        error = unraisable.exc_value
        # An array too late to fail, or one whose reading was given up.
        closed = str(error) == "Event loop is closed"
        if not closed and not isinstance(error.__cause__, (GeneratorExit, CancelledError)):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = show


def stage_number(stage: str | int) -> int:
    """1, 2, 3 or base, sr256, sr1024 as a number. Raises ValueError for anything else."""
    if stage in STAGES:
        return STAGES[stage]
    if str(stage).isdecimal() and int(stage) > 0:
        return int(stage)
    raise UserError(f"{stage!r} is no stage: give its number, or one of {', '.join(STAGES)}.")
