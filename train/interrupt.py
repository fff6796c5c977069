"""Ctrl-C and SIGTERM, which the loop checks for between two steps."""

import collections
import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

import jax

from imagen_jax.sharding import Layout

DELAY = 2  # steps after which processes read each other's answers, so that none of them waits


class Stopped(Exception):
    """A signal arrived in the middle of something that can be done again."""


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is noted; a second one acts as usual.

    `received` is the signal that this process has received, `stopped_by` the one for which all
    processes stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, layout: Layout):
        self.layout = layout
        self.received: str | None = None
        self.stopped_by: str | None = None
        self.asked: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> "Interrupt":
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def ask(self) -> str | None:
        """Sets `stopped_by` and returns it. Call it once per step: processes may receive a signal
        at different times, or only one of them may, and all must stop after the same step."""
        if jax.process_count() == 1:
            self.stopped_by = self.received
            return self.stopped_by
        number = signal.Signals[self.received] if self.received else 0
        self.asked.append(self.layout.largest(int(number)))
        number = int(self.asked.popleft()) if len(self.asked) > DELAY else 0
        self.stopped_by = signal.Signals(number).name if number else None
        return self.stopped_by

    def listen(self, *_) -> None:
        """Raises Stopped if a signal has arrived: for what can be done again."""
        if self.ask() is not None:
            raise Stopped

    @contextlib.contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """Processes started inside never receive these signals, which a terminal sends to all (as
        does Slurm): they keep working until this one ends them. It gets the signals at the end."""
        resource_tracker.ensure_running()  # started inside, it would lift the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()
