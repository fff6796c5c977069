"""Processes of a test, forked from one that has imported the trainer and touched no device: a
tenth of the time that a new interpreter takes."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.loop", "commands", "tests.train.support"])


def start(target: Callable, *arguments, said: Path, environment: dict[str, str]) -> BaseProcess:
    """Calls `target(*arguments)` in a process; what it prints goes to the file `said`."""
    process = CONTEXT.Process(target=_call, args=(target, arguments, str(said), environment))
    process.start()
    return process


def join(process: BaseProcess, seconds: float = 120) -> int:
    """Its exit code. One that has not ended by then is killed, and the test fails."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"process {process.pid} did not end in {seconds} s")
    return process.exitcode


def wait(until: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Polls a condition; the test fails where it is not met in time."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)


def _call(target: Callable, arguments: tuple, said: str, environment: dict[str, str]) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.update(environment)
    target(*arguments)
