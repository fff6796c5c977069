"""Keeps a process's memory on a CPU."""

import ctypes
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_... of glibc's malloc.h
MOST = 2**31 - 1


def keep_memory() -> None:
    """On a CPU: freed memory stays with the process, for the next step's temporaries.

    glibc returns a program's buffers to the kernel after each step, and the kernel maps and clears
    them again at the next: a third of a training step (benchmarks/README.md). Call it before JAX
    starts its threads: each would have its own arena, whose large blocks are always returned.
    """
    accelerated = entry_points(group="jax_plugins") or find_spec("libtpu")
    if sys.platform != "linux" or (accelerated and jax.config.jax_platforms != "cpu"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        for parameter, value in (ARENA_MAX, 1), (MMAP_THRESHOLD, MOST), (TRIM_THRESHOLD, MOST):
            mallopt(parameter, value)
