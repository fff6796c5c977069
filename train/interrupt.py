"""Ctrl-C and SIGTERM as a question the loop asks between two steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "Interrupt":
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

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
