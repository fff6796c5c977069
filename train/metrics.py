"""Metrics of a run: always a JSONL file, TensorBoard and Weights & Biases on request."""

import contextlib
import importlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import jax
import numpy as np

from imagen_jax import distributed
from train.optimizer import learning_rate
from train.settings import Settings

AHEAD = 2  # steps that may wait on the device: enough to keep it busy, and Ctrl-C is heard soon


class Metrics:
    """Appends one line per `write` to RUN/metrics.jsonl. Use it as a context.

    Of many processes only the one that talks writes.
    """

    def __init__(
        self,
        run: Path,
        unet_number: int,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any],
    ):
        self.file = self.board = self.wandb = None
        if not distributed.talks():
            return
        boards = _extra("tensorboardX", "--tensorboard") if tensorboard else None
        client = _extra("wandb", "--wandb") if wandb is not None else None
        run.mkdir(parents=True, exist_ok=True)
        self.unet_number = unet_number
        self.board = boards and boards.SummaryWriter(str(run / "tensorboard"))
        self.wandb = client and client.init(project=wandb, dir=str(run), config=dict(settings))
        self.file = (run / "metrics.jsonl").open("a")
        _drop_torn_line(self.file)

    def write(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        """`kind` is train, or eval/heldout and eval/train; a value that is not finite is null."""
        if self.file is None:
            return
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        head = {"unet": self.unet_number, "step": step, "kind": kind, "time": round(time.time(), 3)}
        self.file.write(json.dumps(head | values) + "\n")
        self.file.flush()
        named = {
            f"unet{self.unet_number}/{kind}/{k}": v for k, v in values.items() if v is not None
        }
        if self.board is not None:
            for name, value in named.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(named | {f"unet{self.unet_number}/step": step})

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


class Window:
    """Metrics of the steps since the last line, fetched from the device all at once.

    `ideal_seconds` is what a step would take at the peak of the devices, where that is known.
    """

    def __init__(self, settings: Settings, ideal_seconds: float | None = None):
        self.batch_size, self.ideal_seconds = settings.batch_size, ideal_seconds
        self.learning_rate = learning_rate(settings)
        self._restart()

    def _restart(self) -> None:
        self.steps: list[tuple[int, dict]] = []
        self.began = time.perf_counter()

    def add(self, step: int, measured: dict) -> None:
        self.steps.append((step, measured))
        if len(self.steps) > AHEAD:
            jax.block_until_ready(self.steps[-1 - AHEAD][1])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what is done inside out of the speed."""
        if self.steps:
            jax.block_until_ready(self.steps[-1][1])
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def close(self) -> dict[str, float | None]:
        """Means and speed. ValueError names the first step with a loss or gradient not finite."""
        numbers = [step for step, _ in self.steps]
        fetched = jax.device_get([measured for _, measured in self.steps])
        for number, measured in zip(numbers, fetched, strict=True):
            for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradients")):
                if not np.isfinite(measured[name]):
                    raise ValueError(
                        f"{what} is {measured[name]} at step {number}. Checkpoints are of "
                        "steps before. A smaller --lr, --max-grad-norm or --dtype float32 may help."
                    )
        seconds = time.perf_counter() - self.began
        values = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        values["learning_rate"] = float(self.learning_rate(numbers[-1] - 1))
        values["steps_per_second"] = len(numbers) / seconds
        values["images_per_second"] = len(numbers) * self.batch_size / seconds
        ideal = self.ideal_seconds
        values["model_flop_utilization"] = None if ideal is None else len(numbers) * ideal / seconds
        self._restart()
        return values


def _drop_torn_line(file: TextIO) -> None:
    """What a process left that was killed as it wrote."""
    written = Path(file.name).read_bytes()
    file.truncate(written.rfind(b"\n") + 1)


def _extra(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag} needs {module}: pip install 'imagen-jax[logging]'.") from error
