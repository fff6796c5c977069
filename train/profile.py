"""`--profile STEPS`: a trace of some steps for xprof (`xprof RUN/profile`, TensorBoard)."""

from pathlib import Path
from typing import Any

import jax

WARM_UP = 3  # steps before it: the first compiles, and what it leaves on the way is done by then


class Profile:
    """Traces `steps` steps of a run, from the fourth on. Use it as a context; None: never."""

    def __init__(self, folder: Path, steps: int | None):
        self.folder, self.steps = folder, steps
        self.seen, self.running = 0, False

    def after(self, step: int, measured: Any) -> None:
        """Tell it of every step, with what the step returns."""
        if self.steps is None:
            return
        self.seen += 1
        if self.seen == WARM_UP:
            jax.block_until_ready(measured)
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif self.running and self.seen == WARM_UP + self.steps:
            jax.block_until_ready(measured)
            self._stop()
            print(f"profile of steps {step - self.steps + 1} .. {step} in {self.folder}")

    def _stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()
