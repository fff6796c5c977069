"""Metrics of a run: always a JSONL file, TensorBoard and Weights & Biases on request."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Metrics:
    """Appends one line per `write` to RUN/metrics.jsonl. Use it as a context."""

    def __init__(
        self,
        run: Path,
        unet_number: int,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any],
    ):
        run.mkdir(parents=True, exist_ok=True)
        self.unet_number = unet_number
        self.file = (run / "metrics.jsonl").open("a")
        self.board = self.wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"))
        if wandb is not None:
            import wandb as client

            self.wandb = client.init(project=wandb, dir=str(run), config=dict(settings))

    def write(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        """`kind` is train, or eval/heldout and eval/train; a value that is not finite is null."""
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
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
