"""Ctrl-C and SIGTERM as a question the loop asks between two steps."""

import signal
from types import FrameType


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "Interrupt":
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()
