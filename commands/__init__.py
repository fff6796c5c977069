"""What the commands share: one clear line for a mistake, an error log, a compilation cache.

    if __name__ == "__main__":
        commands.run(main)

A `UserError`, an OSError such as a full disk, or a device that is full or gone ends the command
with one line and exit status 1. Anything else is a bug and keeps its traceback. Either way the
traceback is in RUN/error.log if a command has named its run directory. If several processes run as
one, all of them end.
"""

import datetime
import logging
import os
import re
import sys
import traceback
import warnings
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from commands import processes
from commands.memory import keep_memory
from imagen_jax.errors import UserError, first_line

STAGES = {"base": 1, "sr256": 2, "sr1024": 3}
"""Names of stages, accepted wherever a number is."""
LOST = r"^(UNAVAILABLE|DATA_LOSS|ABORTED|DEADLINE_EXCEEDED)\b|CUDA_ERROR_"
"""JAX's errors about a device that was taken away or is broken."""

_error_log: Path | None = None


def run(main: Callable[[], None]) -> None:
    """Runs a command."""
    keep_memory()
    use_compilation_cache()
    logged = keep_writers_logs()
    try:
        main()
    except BrokenPipeError:  # the output's reader has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _end("interrupted")
    except Exception as error:
        log = _write_error_log(error, logged)
        line = _line(error)
        if line is None and not processes.started():
            raise
        if line is None:
            traceback.print_exc()
            line = f"{type(error).__name__}: {error}"
        elif log is not None and not isinstance(error, UserError):
            line += f" (traceback in {log})"
        _end(f"error: {line}")
    for text in logged:
        print(f"note: {text.splitlines()[0]}", file=sys.stderr)


def errors_go_to(folder: Path) -> None:
    """From now on a failure writes its traceback to error.log in this folder, if the folder exists
    by then."""
    global _error_log
    _error_log = folder / "error.log"


def use_precision(dtype: DTypeLike) -> None:
    """Computes float32 in full precision: GPUs and TPUs round the factors of products, to TF32 or
    bfloat16, unless asked not to. JAX_DEFAULT_MATMUL_PRECISION in the environment overrides it."""
    if jnp.dtype(dtype) == jnp.float32 and jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, unless the environment already names a folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "imagen-jax" / "xla"))


def keep_writers_logs() -> list[str]:
    """Collects what Orbax and TensorStore log; returns the growing list.

    They raise errors and also log the traceback of every array: thousands of lines when a disk is
    full. Those belong in error.log.
    """
    kept = _Kept()
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [kept], False
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def show(unraisable: object) -> None:
        error = unraisable.exc_value
        # An array that failed too late, or whose reading was abandoned.
        closed = str(error) == "Event loop is closed"
        if closed or isinstance(error.__cause__, (GeneratorExit, CancelledError)):
            kept.texts.append("".join(traceback.format_exception(error)))
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = show
    return kept.texts


def bar_interval() -> float:
    """Seconds between updates of a progress bar: many on a terminal, few in a log file."""
    return 0.1 if sys.stderr.isatty() else 10.0


def flag(name: str) -> str:
    """The command-line flag of a field: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def stage_number(stage: str | int) -> int:
    """1, 2, 3 or base, sr256, sr1024 as a number. Raises UserError for anything else."""
    if stage in STAGES:
        return STAGES[stage]
    if str(stage).isdecimal() and int(stage) > 0:
        return int(stage)
    raise UserError(f"{stage!r} is not a stage: give its number, or one of {', '.join(STAGES)}.")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


def _line(error: Exception) -> str | None:
    """A line that the user can act on; None for a bug."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the device is out of memory: try a smaller --batch-size; in training also "
            "--accumulate, --remat nothing_saveable or --dtype bfloat16."
        )
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search(LOST, str(error)):
        return f"a device stopped responding: {first_line(error)}"
    return None


def _write_error_log(error: Exception, logged: list[str]) -> Path | None:
    """The file that was written; None without a run directory."""
    if _error_log is None or not _error_log.parent.is_dir():
        return None
    number = processes.own_number()
    path = _error_log.with_name(f"error-{number}.log") if number else _error_log
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    parts = [f"{when}  {' '.join(sys.argv)}\n", *traceback.format_exception(error), *logged]
    try:
        path.write_text("\n".join(part.rstrip() for part in parts) + "\n", encoding="utf-8")
    except OSError as full:  # often the same full disk: the error itself must still be shown
        print(f"note: {path} could not be written: {full}", file=sys.stderr)
        return None
    return path


def _end(line: str) -> NoReturn:
    if processes.started():
        print(line, file=sys.stderr, flush=True)
        processes.end_all(line.removeprefix("error: "))
    sys.exit(line)
