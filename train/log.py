"""What a run reports: what is about to be trained, metrics, and a profile on request.

Metrics are always written to RUN/metrics.jsonl; to TensorBoard and Weights & Biases on request.
"""

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from types import ModuleType
from typing import Any

import jax
import numpy as np
from etils import epath

from imagen_jax import distributed, nn, storage, text
from imagen_jax.data import shown
from imagen_jax.errors import UserError
from imagen_jax.stage import Stage, show
from train.feed import Feed
from train.optimizer import learning_rate
from train.settings import Optimization

FEW = 32  # held-out pictures: the loss of fewer says little about a set
NAMED = 3  # pictures named in a line about what is left out
AHEAD = 2  # steps that may wait on the device: enough to keep it busy, few enough for a fast Ctrl-C
UPLOAD_EVERY = 30.0  # seconds between uploads of metrics to an object store
WARM_UP = 3  # steps before a profile: the first compiles, and its leftovers are done by then


def drifts(stage: Stage) -> bool:
    """Whether a stage is memory-efficient super-resolution that predicts noise."""
    predicts_noise = getattr(stage.process, "objective", None) == "noise"
    efficient = getattr(stage.network, "memory_efficient", False)
    return stage.lowres is not None and predicts_noise and efficient


def announce(feed: Feed, run: epath.Path, settings: str, *, resumed: bool) -> None:
    """Prints what is about to be trained, on what, where and how (`Settings.describe`), and whether
    a run is resumed."""
    stage = feed.stage
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nn.abstract(stage.network)[1]))
    size = f"{show(stage.size)} pixels"
    if stage.lowres is not None:
        size = f"{show(stage.lowres.size)} -> {size}"
        if drifts(stage):
            print(
                "note: memory-efficient super-resolution drifts in colour when it predicts noise; "
                "pred_objectives 'v' does not."
            )
    print(f"U-Net {stage.unet_number} of {len(feed.config.unets)}: {size}, {count:,} parameters")
    spec = " + ".join(feed.settings.data)
    print(f"data: {len(feed.train)} pictures of {spec}, {len(feed.heldout)} held out")
    for note in feed.train.notes:
        print(f"data: {note}")
    if len(feed.heldout) < FEW and feed.settings.heldout_fraction:
        share = min(0.5, FEW / (len(feed.train) + len(feed.heldout)))
        weak = "says little" if len(feed.heldout) else "is not measured"
        print(
            f"note: with so few images held out, eval/heldout {weak}; --heldout-fraction "
            f"{share:.2g} keeps about {FEW}, or half of a small set."
        )
    report_left_out(feed.left_out, run, stage.unet_number, resumed=resumed)
    if feed.encoder is not None and feed.encoder.is_demo:
        print(f"{text.DEMO_NOTE} --t5 google/t5-v1_1-base uses a real one.")
    if stage.condition_on_text and feed.text_encoder is None:
        print(
            "note: no text_encoder.json beside the stored embeddings says which text encoder made "
            "them, so sampling from this cascade cannot refuse a different one."
        )
    print(f"devices: {feed.layout.describe()}")
    print(f"run: {run} (configuration in config.json)")
    print(settings)


def report_left_out(
    left_out: Mapping[str, str],
    run: epath.Path,
    unet_number: int,
    *,
    resumed: bool,
    known: Set[str] = frozenset(),
) -> None:
    """Prints how many files and pictures are left out, by reason, except for those `known`, and
    writes all of them to RUN/unetN-skipped.jsonl, after those that are there already if a run is
    `resumed`. Only one of several processes does this."""
    reasons: dict[str, list[str]] = {}
    for name in sorted(left_out.keys() - known):
        reasons.setdefault(left_out[name].partition(":")[0], []).append(shown(name))
    if not reasons or not distributed.talks():
        return
    path = run / f"unet{unet_number}-skipped.jsonl"
    lines = [
        json.dumps({"name": shown(name), "reason": shown(left_out[name])}, ensure_ascii=False)
        for name in sorted(left_out)
    ]
    if resumed and path.exists():
        lines = list(dict.fromkeys([*path.read_text().splitlines(), *lines]))
    storage.write_text(path, "\n".join(lines) + "\n")
    more = " more" if known else ""
    print(f"left out: {sum(map(len, reasons.values()))}{more}, all listed in {path}")
    for reason, names in sorted(reasons.items(), key=lambda found: -len(found[1])):
        dots = ", ..." if len(names) > NAMED else ""
        print(f"{len(names):>8}  {reason} ({', '.join(names[:NAMED])}{dots})")


class Metrics:
    """Writes one line per `write` to RUN/metrics.jsonl. Use it as a context.

    An object store, which cannot append, gets a file for this start only, metrics-unetN-TIME.jsonl,
    every `UPLOAD_EVERY` seconds and at the end. Of several processes only the one that prints also
    writes.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        unet_number: int,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any],
    ):
        self.file = self.board = self.wandb = None
        self.talks = distributed.talks()
        if not self.talks:
            return
        boards = _extra("tensorboardX", "--tensorboard") if tensorboard else None
        client = _extra("wandb", "--wandb") if wandb is not None else None
        run, self.unet_number = storage.folder(run), unet_number
        self.board = boards and boards.SummaryWriter(str(run / "tensorboard"))
        if storage.is_remote(run):
            self.wandb = client and client.init(project=wandb, config=dict(settings))
            self.path = run / f"metrics-unet{unet_number}-{time.time_ns()}.jsonl"
            self.lines, self.uploaded = [], 0.0
            return
        run.mkdir(parents=True, exist_ok=True)
        self.wandb = client and client.init(project=wandb, dir=str(run), config=dict(settings))
        self.path = run / "metrics.jsonl"
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = self.path.open("a")
        if torn:  # by a process killed while writing; another may be writing now
            self.file.write("\n")

    def write(self, step: int, kind: str, values: Mapping[str, float | None]) -> None:
        """`kind` is train, or eval/heldout and eval/train; a value that is not finite is null."""
        if not self.talks:
            return
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        head = {"unet": self.unet_number, "step": step, "kind": kind, "time": round(time.time(), 3)}
        self._append(json.dumps(head | values) + "\n")
        named = {
            f"unet{self.unet_number}/{kind}/{k}": v for k, v in values.items() if v is not None
        }
        if self.board is not None:
            for name, value in named.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(named | {f"unet{self.unet_number}/step": step})

    def _append(self, line: str) -> None:
        if self.file is not None:
            self.file.write(line)
            self.file.flush()
            return
        self.lines.append(line)
        if time.monotonic() - self.uploaded > UPLOAD_EVERY:
            self.upload()

    def upload(self) -> None:
        """Writes all lines of this start to an object store."""
        if self.talks and self.file is None and self.lines:
            storage.write_text(self.path, "".join(self.lines))
            self.uploaded = time.monotonic()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.upload()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read(run: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The lines of RUN/metrics*.jsonl, without those that a killed process left torn."""
    run = storage.folder(run)
    entries = sorted(run.iterdir()) if run.is_dir() else ()
    for path in entries:
        if not (path.name.startswith("metrics") and path.suffix == ".jsonl"):
            continue
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


class Window:
    """Metrics of the steps since the last line, fetched from the device all at once.

    `measured` are those that an interrupted run already had, so that a line is the mean of the same
    steps. `ideal_seconds` is how long a step would take at the peak of the devices, if that is
    known.
    """

    def __init__(
        self,
        settings: Optimization,
        ideal_seconds: float | None = None,
        measured: Sequence[Mapping[str, float]] = (),
    ):
        self.batch_size, self.ideal_seconds = settings.batch_size, ideal_seconds
        self.learning_rate = learning_rate(settings)
        self.measured = list(measured)
        self.waiting: list[tuple[int, dict]] = []
        self.waited_for_data = 0.0  # total seconds, as the loop counts them
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.timed, self.began = 0, time.perf_counter()
        self.waited_before = self.waited_for_data

    def add(self, step: int, measured: dict) -> None:
        self.waiting.append((step, measured))
        self.timed += 1
        if len(self.waiting) > AHEAD:
            jax.block_until_ready(self.waiting[-1 - AHEAD][1])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time spent inside out of the speed."""
        if self.waiting:
            jax.block_until_ready(self.waiting[-1][1])
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def fetch(self) -> list[dict[str, float]]:
        """The measurements since the last line, as a checkpoint keeps them.

        Raises ValueError that names the first step with a loss or gradient that is not finite.
        """
        numbers = [step for step, _ in self.waiting]
        fetched = jax.device_get([measured for _, measured in self.waiting])
        for number, measured in zip(numbers, fetched, strict=True):
            for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradients")):
                if not np.isfinite(measured[name]):
                    raise UserError(
                        f"{what} is {measured[name]} at step {number}. Checkpoints are from "
                        "earlier steps. A smaller --lr, --max-grad-norm or --dtype float32 may "
                        "help."
                    )
        self.measured += [{name: float(x) for name, x in one.items()} for one in fetched]
        self.waiting = []
        return list(self.measured)

    def line(self, step: int) -> dict[str, float | None]:
        """Means; for the steps of this process also the speed, and the share of the time that the
        loop waited for data."""
        measured = self.fetch()
        seconds = time.perf_counter() - self.began
        values = {name: float(np.mean([m[name] for m in measured])) for name in measured[0]}
        values["learning_rate"] = float(self.learning_rate(step - 1))
        values["steps_per_second"] = self.timed / seconds
        values["images_per_second"] = self.timed * self.batch_size / seconds
        values["waited_for_data"] = (self.waited_for_data - self.waited_before) / seconds
        ideal = self.ideal_seconds
        values["model_flop_utilization"] = None if ideal is None else self.timed * ideal / seconds
        return values

    def restart(self) -> None:
        """Call it after a line: the next one is about the steps that follow."""
        self.measured = []
        self._restart_clock()


class Profile:
    """`--profile STEPS`: a trace of this many steps, from the fourth on, for xprof (`xprof
    RUN/profile`, TensorBoard). Use it as a context. None: no trace."""

    def __init__(self, folder: epath.Path, steps: int | None):
        self.folder, self.steps = folder, steps
        self.seen, self.running = 0, False

    def after(self, step: int, measured: Any) -> None:
        """Call it after every step, with what the step returns."""
        if self.steps is None:
            return
        self.seen += 1
        if self.seen == WARM_UP:
            jax.block_until_ready(measured)
            jax.profiler.start_trace(os.fspath(self.folder))
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


def _extra(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{flag} needs {module}: pip install -e '.[logging]'.") from error
