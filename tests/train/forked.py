"""Processes of a test, forked from one that has imported the trainer and touched no device: a
tenth of the time that a new interpreter takes."""

import multiprocessing
import os
import sys
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


def _call(target: Callable, arguments: tuple, said: str, environment: dict[str, str]) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.update(environment)
    target(*arguments)
