"""Ctrl-C and SIGTERM as a question the loop asks between two steps."""

import collections
import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax

from imagen_jax.sharding import Layout

DELAY = 2  # steps after which processes look at each other's answers, so that none of them waits


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: str | None = None
        self.asked: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> "Interrupt":
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def heard(self, layout: Layout) -> str | None:
        """The signal to stop at after this step. Ask once a step: of several processes each may
        hear it at another moment, or only one of them, and all must stop after the same step."""
        if jax.process_count() == 1:
            return self.received
        number = signal.Signals[self.received] if self.received else 0
        self.asked.append(layout.largest(int(number)))
        number = int(self.asked.popleft()) if len(self.asked) > DELAY else 0
        return signal.Signals(number).name if number else None

    @contextlib.contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """Processes started inside never hear Ctrl-C, which a terminal sends to all: they work on
        until this one ends them. While inside, this one does not hear it either."""
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield
        signal.signal(signal.SIGINT, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()
