"""What the command lines share: one clear line for a mistake, and a cache of compiled programs."""

import ctypes
import logging
import os
import sys
import warnings
from asyncio import CancelledError
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from imagen_jax.errors import UserError

STAGES = {"base": 1, "sr256": 2, "sr1024": 3}
"""Names of stages, accepted wherever a number is."""

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_... of glibc's malloc.h
MOST = 2**31 - 1


def run(main: Callable[[], None]) -> None:
    """Runs a command. A ValueError or OSError is a user's mistake: one line and exit status 1.

    IMAGEN_JAX_TRACEBACK=1 in the environment shows the traceback instead.
    """
    keep_memory()
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
        first = str(error).strip().splitlines()[0]
        sys.exit(f"error: another process has stopped, or is out of reach: {first}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def keep_memory() -> None:
    """On a CPU: freed memory stays with the process, for the next step's temporaries.

    glibc gives a program's buffers back after each step, and the kernel maps and clears them again
    at the next: a third of a training step (benchmarks/README.md). Call it before JAX starts its
    threads, each of which would take an arena of its own, whose large blocks are always given back.
    """
    accelerated = entry_points(group="jax_plugins") or find_spec("libtpu")
    if sys.platform != "linux" or (accelerated and jax.config.jax_platforms != "cpu"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        for parameter, value in (ARENA_MAX, 1), (MMAP_THRESHOLD, MOST), (TRIM_THRESHOLD, MOST):
            mallopt(parameter, value)


def use_precision(dtype: DTypeLike) -> None:
    """Computes float32 in float32: GPUs and TPUs round the factors of products, to TF32 or
    bfloat16, unless asked not to. JAX_DEFAULT_MATMUL_PRECISION in the environment overrides it."""
    if jnp.dtype(dtype) == jnp.float32 and jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")


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
