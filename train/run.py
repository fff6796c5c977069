"""A run directory during training: which steps it holds, the state to start from, and saving.

    run = RunDir.open(path, config, stage, resume=...)      checks it, changes nothing
    start = run.start(optimization, layout, record, ...)    saved state, other weights, fresh ones
    with run.checkpoints(record, keep=...) as checkpoints:  from here on it is written to
        checkpoints.save(step, state, measured)

`record` is the settings as config.json and every checkpoint keep them. See
imagen_jax/checkpoint.py for the layout on disk.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import commands
from imagen_jax import checkpoint, distributed, nn, run_config, storage, text
from imagen_jax.config import ImagenConfig
from imagen_jax.errors import UserError, first_line
from imagen_jax.fields import first_difference
from imagen_jax.sharding import Layout
from imagen_jax.stage import Stage
from imagen_jax.streams import stream
from imagen_jax.types import Params
from train import log
from train.optimizer import make_optimizer
from train.settings import Optimization, Watching, spelled
from train.state import TrainState

Record = Mapping[str, Any]

TREES = ("params", "ema", "opt_state")

OPTIMIZER = ("optimizer", "moments")

# What decides which pictures and which noise a step uses, and the optimiser's state.
SAME = (
    *("seed", "batch_size", "limit", "heldout_fraction"),
    *("flip", "crop", "small", "buckets"),
    *OPTIMIZER,
)
# The same for the data itself, wherever it is stored: the number of pictures, and a hash of them.
MEASURED = {
    "pictures": "the number of pictures",
    "content": "the hash of the pictures",
    "weights_of_sets": "the weights of the sets",
}

# Belong to this start only, or are printed elsewhere: not part of what a run is.
PASSING = ("workdir", "resume", "print_config", "preset", "config", "init_from",
           "continue_from", "profile",
           "coordinator", "process_id", "num_processes")  # fmt: skip

# The last line of each evaluation in metrics.jsonl, by its kind.
LINES = {"evaluation": "eval/train", "composition": "eval/composition"}

# How messages from TensorStore start, which raises ValueError for a failing disk or store too.
STORAGE = re.compile(
    r"os_error_code=|(UNKNOWN|CANCELLED|DEADLINE_EXCEEDED|NOT_FOUND|PERMISSION_DENIED|RESOURCE_EXHAUSTED|ABORTED|"
    r"FAILED_PRECONDITION|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS|UNAUTHENTICATED): "
)

VISIBLE_WITHIN = 60.0  # seconds in which a shared folder shows what another machine wrote


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts: the state, and the measurements since the last line of metrics."""

    state: TrainState
    measured: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The run directory of one stage. All processes see the same."""

    path: epath.Path
    config: ImagenConfig
    stage: Stage
    newest: int | None = None  # newest step when the directory was opened
    complete: int | None = None  # the newest complete step

    @classmethod
    def open(
        cls, path: str | os.PathLike, config: ImagenConfig, stage: Stage, *, resume: bool
    ) -> "RunDir":
        """Raises ValueError if it has another cascade, or steps without `resume`, or if the
        processes do not all see the same steps. It need not exist."""
        path = storage.folder(path)
        run_config.check(path, config)
        number = stage.unet_number
        found = checkpoint.steps(path, number), checkpoint.latest_step(path, number)
        every = [json.loads(text) for text in distributed.gather(json.dumps(found))]
        if any(other != every[0] for other in every):
            newest = ", ".join(str(complete) for _, complete in every)
            raise UserError(
                f"the processes see different steps in {path}/unet{number} (the newest: {newest}): "
                "--workdir must be a folder that all of them share. If it is, start them again."
            )
        run = cls(path, config, stage, newest=max(found[0], default=None), complete=found[1])
        if run.newest is not None and not resume:
            raise UserError(
                f"{run.folder} is at step {run.newest}: continue with --resume, or choose another "
                "--workdir."
            )
        return run

    @property
    def folder(self) -> str:
        """The folder of the stage's checkpoints, for messages."""
        return f"{self.path}/unet{self.stage.unet_number}"

    def metrics(self, settings: Watching, record: Record) -> log.Metrics:
        """A context that writes the run's metrics."""
        return log.Metrics(
            self.path,
            self.stage.unet_number,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            settings=record,
        )

    def picture_path(self, step: int) -> epath.Path:
        """The file for samples drawn after a step."""
        return self.path / "samples" / f"unet{self.stage.unet_number}-{step:07d}.png"

    def missing(self, due: set[str], step: int) -> set[str]:
        """What was due at a step but an interrupted run has not written, as process 0 sees it."""
        here = dict(unet=self.stage.unet_number, step=step)
        lines = [line for line in log.read(self.path) if here.items() <= line.items()]
        left = {line.get("kind") for line in lines}
        found = {name for name in due if LINES.get(name, name) not in left}
        if self.picture_path(step).exists():
            found.discard("samples")
        return set(json.loads(distributed.gather(json.dumps(sorted(found)))[0]))

    def start(
        self,
        optimization: Optimization,
        layout: Layout,
        record: Record,
        *,
        seed: int,
        init_from: str | os.PathLike | None,
        continue_from: str | os.PathLike | None = None,
    ) -> Start:
        """The run's saved state if it has one, another run's, or that before the first step."""
        if self.newest is not None:
            return self.resume(optimization, layout, record)
        if continue_from is not None:
            return self.go_on(optimization, layout, record, continue_from)
        return self.begin(optimization, layout, seed=seed, init_from=init_from)

    def resume(self, optimization: Optimization, layout: Layout, record: Record) -> Start:
        """The newest state that can be read, saved on any mesh and placed on this one.

        Prints which settings have changed. Damaged and incomplete steps are reported, and renamed
        once an older one is read. Raises UserError unless `record` continues what was recorded
        there, and if no step can be read.
        """
        damaged, number = [], self.stage.unet_number
        incomplete = checkpoint.incomplete(self.path, number)
        for step in checkpoint.steps(self.path, number):
            error, start = None, None
            if step in incomplete:
                error = f"step {step} of {self.folder} is not complete: {incomplete[step]}"
            else:
                try:
                    start = self._saved(step, optimization, layout, record)
                except checkpoint.Damaged as damage:
                    error = str(damage)
            errors = [text for text in distributed.gather(error or "") if text]
            if errors:
                damaged.append((step, errors[0]))
                continue
            for broken, error in damaged:
                print(f"{error}. Resuming from step {step}.")
                if distributed.talks():
                    checkpoint.set_aside(self.path, number, broken)
            distributed.gather("renamed")
            return start
        raise UserError(f"{damaged[0][1]}. No older step of {self.folder} can be read.")

    def go_on(
        self, optimization: Optimization, layout: Layout, record: Record, run: str | os.PathLike
    ) -> Start:
        """The newest complete state of another run of the same network, to continue with other
        pictures, another batch size or learning rate. Prints what has changed. Raises UserError for
        another optimiser."""
        other = dataclasses.replace(self, path=storage.folder(run))
        _check_network(other.path, self.config, self.stage, "--continue-from")
        step = checkpoint.latest_step(other.path, self.stage.unet_number)
        if step is None:
            raise UserError(f"--continue-from {other.path}: no complete step of {other.folder}.")
        print(f"continuing from step {step} of {other.folder}")
        start = other._saved(step, optimization, layout, record, exactly=False)
        return Start(start.state, [])

    def _saved(
        self,
        step: int,
        optimization: Optimization,
        layout: Layout,
        record: Record,
        *,
        exactly: bool = True,
    ) -> Start:
        meta = checkpoint.read_meta(self.path, self.stage.unet_number, step)
        saved = meta.get("settings")
        if saved is None:
            raise UserError(
                f"{self.folder} contains only weights: start another run from them with "
                "--init-from."
            )
        _check_continues(saved, record, (*SAME, *MEASURED) if exactly else OPTIMIZER)
        for line in changes(saved, record, () if exactly else (*SAME, *MEASURED)):
            print(f"changed: {line}")
        shapes = TrainState.shapes(self.stage.network, make_optimizer(optimization))
        target = layout.targets(shapes)
        trees = {
            name: checkpoint.restore(
                self.path, self.stage.unet_number, step, name, getattr(target, name)
            )
            for name in TREES
        }
        state = TrainState(step=layout.replicate(np.int32(step)), **trees)
        return Start(state, meta.get("measured", []))

    def begin(
        self,
        optimization: Optimization,
        layout: Layout,
        *,
        seed: int,
        init_from: str | os.PathLike | None,
    ) -> Start:
        """The state before the first step: weights of `--init-from`, or drawn from the seed."""
        unet, optimizer = self.stage.network, make_optimizer(optimization)
        if init_from is not None:
            params = _weights_of(init_from, self.config, self.stage, layout)
        else:
            key = stream(layout.key(seed), "init", self.stage.unet_number)
            params = nn.init_fn(unet, layout)(key)
        create = functools.partial(TrainState.create, optimizer=optimizer)
        placed = layout.place(TrainState.shapes(unet, optimizer))
        return Start(jax.jit(create, out_shardings=placed, donate_argnums=0)(params), [])

    @contextlib.contextmanager
    def checkpoints(
        self, record: Record, text_encoder: text.Identity | None = None, *, keep: int | None
    ) -> Iterator["Checkpoints"]:
        """Writes config.json, then opens the directory for saving."""
        number = self.stage.unet_number
        if distributed.talks():
            run_config.write(
                self.path, self.config, {f"unet{number}": record}, text_encoder=text_encoder
            )
        self.check_shared()
        with checkpoint.Writer(self.path, number, keep=keep) as writer:
            yield Checkpoints(self, record, writer)

    def check_shared(self) -> None:
        """Raises ValueError unless every process sees the `config.json` that one has written."""
        distributed.gather("written")
        file, given_up = self.path / "config.json", time.monotonic() + VISIBLE_WITHIN
        while not file.exists() and time.monotonic() < given_up:
            time.sleep(1)
        seen = distributed.gather("yes" if file.exists() else "no")
        if "no" in seen:
            raise UserError(
                f"process {seen.index('no')} of {len(seen)} does not see what process 0 wrote in "
                f"{self.path}: --workdir must be a folder that all of them share."
            )


@dataclasses.dataclass
class Checkpoints:
    """Saves the steps of a run. Writing a step overlaps the training of the next ones."""

    run: RunDir
    record: Record
    writer: checkpoint.Writer
    newest: int | None = None  # the last step whose writing started

    def save(self, step: int, state: TrainState, measured: list[dict[str, float]]) -> None:
        """Starts to write a step, once the previous one is complete."""
        self.wait()  # a failure here is of the previous step
        self.newest = step
        trees = {name: getattr(state, name) for name in TREES}
        meta = {"step": step, "settings": self.record, "measured": measured}
        self._writing(lambda: self.writer.save(step, trees, meta))

    def wait(self) -> None:
        """Waits until all is on disk."""
        self._writing(self.writer.wait)

    def poll(self) -> None:
        """Marks a step that has been written by now as complete."""
        self._writing(self.writer.poll)

    def _writing(self, write: Callable[[], None]) -> None:
        """Reports a failed write (such as a full disk) in one line; complete checkpoints remain."""
        try:
            write()
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and not STORAGE.search(str(error)):
                raise
            kept = checkpoint.latest_step(self.run.path, self.run.stage.unet_number)
            raise UserError(
                f"could not save step {self.newest} in {self.run.path}: {_reason(error)}. "
                + ("Nothing was saved before." if kept is None else f"Step {kept} is complete.")
            ) from error


def _reason(error: Exception) -> str:
    """The system's own message if TensorStore wraps it in paths, else the first line."""
    found = re.search(r": ([^:]+) \[os_error_code=", str(error))
    return found[1] if found else first_line(error)


def _check_continues(saved: Record, record: Record, names: Sequence[str]) -> None:
    for name in names:
        was, now = saved.get(name, record[name]), record[name]  # older runs recorded less
        other = "" if name in OPTIMIZER else "--continue-from, or "
        if was != now and name in MEASURED:
            given = ", ".join(
                f"{commands.flag(x)} {spelled(record[x])}" for x in ("data", "captions_from")
            )
            raise UserError(
                f"{given}: not the pictures that the run was trained on ({MEASURED[name]} was "
                f"{was} and is {now}). Start another with {other}--init-from."
            )
        if was != now:
            raise UserError(
                f"{commands.flag(name)} was {spelled(was)} and is {spelled(now)}: that would not "
                f"continue the run. Start another with {other}--init-from."
            )


def changes(saved: Record, record: Record, more: Sequence[str] = ()) -> list[str]:
    """The differences between the settings of a saved step and the current ones, a line each. Of
    settings that must not differ when a run is resumed, only those in `more` are included."""
    unsaid = {*PASSING, *SAME, *MEASURED} - set(more)
    return [
        f"{MEASURED.get(name) or commands.flag(name)} was {spelled(saved[name])} "
        f"and is {spelled(now)}"
        for name, now in record.items()
        if name in saved and name not in unsaid and saved[name] != now
    ]


def _check_network(run: epath.Path, config: ImagenConfig, stage: Stage, flag: str) -> None:
    """Raises UserError unless the run's U-Net is the one that is trained. Prints what else differs
    in the cascade: its objective, its noise, its sizes."""
    number, source = stage.unet_number, run_config.read(run)
    network = source.stage(number).network
    difference = first_difference(network, stage.network, f"unets.{number - 1}")
    if difference:
        raise UserError(f"{flag} {run}: {difference}.")
    for field in dataclasses.fields(config):
        was, now = getattr(source, field.name), getattr(config, field.name)
        if field.name != "unets" and was != now:
            print(f"changed: {field.name} was {was} and is {now}")


def _weights_of(
    run: str | os.PathLike, config: ImagenConfig, stage: Stage, layout: Layout
) -> Params:
    run, number = storage.folder(run), stage.unet_number
    _check_network(run, config, stage, "--init-from")
    choice = checkpoint.choose(run, number)
    if choice is None:
        raise UserError(f"{run} has no weights of U-Net {number}.")
    for note in choice.notes:
        print(f"note: {note}")
    print(f"weights: step {choice.step} of {run} ({choice.weights})")
    return checkpoint.load_params(run, number, choice, layout=layout)
