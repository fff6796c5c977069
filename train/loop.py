"""The training loop: restore, step, measure, save; stopped by a signal, it goes on exactly.

Everything that a step depends on is a function of the seed and the step number: the batch, the
noise, the learning rate. So a checkpoint is the train state, its step, and what was measured since
the last line of metrics.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from imagen_jax import checkpoint, distributed, flops
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.sharding import Layout, make_layout
from imagen_jax.stage import Stage
from imagen_jax.streams import stream
from train import restore
from train.announce import announce
from train.feed import Feed
from train.interrupt import Interrupt, Stopped
from train.metrics import Metrics, Window, read
from train.profile import Profile
from train.samples import picture_path, write_samples
from train.settings import Optimization, Settings
from train.state import TrainState
from train.step import LOG_SNR_EDGES, make_eval_step, make_train_step, step_flops


def run(settings: Settings, unet_number: int, layout: Layout | None = None) -> bool:
    """Trains to `settings.steps`. Returns False if a signal stopped it before, all saved.

    `layout` stands for `settings.mesh`. Raises ValueError for mistaken settings, and when the loss
    is not finite.
    """
    config = settings.cascade()
    if settings.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return True
    _check_stage(config, unet_number)
    checkpoint.check_config(settings.run, config)
    layout = layout or make_layout(settings.mesh, rows=settings.rows)
    existing, whole = restore.newest_steps(settings.run, unet_number)
    if existing is not None and not settings.resume:
        raise ValueError(
            f"{settings.run}/unet{unet_number} is at step {existing}: continue with --resume, or "
            "choose another --workdir."
        )
    if whole is not None and whole >= settings.steps and not missing(settings, unet_number, whole):
        print(f"U-Net {unet_number} in {settings.run} has all of its {whole} steps.")
        return True
    with distributed.together():
        feed = Feed.open(config, unet_number, settings, layout)
    record = settings.record() | {"pictures": len(feed.train), "order": feed.train.fingerprint()}
    with Metrics(
        settings.run,
        unet_number,
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        settings=record,
    ) as metrics:
        announce(config, unet_number, settings, feed)
        if existing is None:
            begun = restore.begin(config, unet_number, settings, layout)
        else:
            begun = restore.resume(config, unet_number, settings, layout, record)
        if distributed.talks():
            checkpoint.write_config(settings.run, config, {f"unet{unet_number}": record})
        restore.check_shared(settings.run)
        with (
            checkpoint.open_manager(settings.run, unet_number, keep=settings.keep) as manager,
            Interrupt() as interrupt,
        ):
            trainer = Trainer(
                config, unet_number, settings, layout, feed, metrics, manager, interrupt, record
            )
            return trainer.train(begun)


def due(settings: Settings, step: int) -> set[str]:
    """What is to be looked at after a step: "evaluation", "samples"."""
    last, found = step == settings.steps, set()
    if last or step % settings.eval_every == 0:
        found.add("evaluation")
    if settings.sample_every and step and (last or step % settings.sample_every == 0):
        found.add("samples")
    return found


def missing(settings: Settings, unet_number: int, step: int) -> set[str]:
    """Of what is due at a step, what an interrupted run has not left; as process 0 sees it."""
    found = due(settings, step)
    evaluated = dict(unet=unet_number, step=step, kind="eval/train")
    if any(evaluated.items() <= line.items() for line in read(settings.run)):
        found.discard("evaluation")
    if picture_path(settings, unet_number, step).exists():
        found.discard("samples")
    return set(json.loads(distributed.gather(json.dumps(sorted(found)))[0]))


@dataclasses.dataclass
class Trainer:
    """One run of the loop, and what it needs at hand."""

    config: ImagenConfig
    unet_number: int
    settings: Settings
    layout: Layout
    feed: Feed
    metrics: Metrics
    manager: ocp.CheckpointManager
    interrupt: Interrupt
    record: Mapping[str, Any]
    saving: int | None = None  # the last step whose writing began
    stopped_by: str | None = None  # the signal that was heard

    @property
    def stage(self) -> Stage:
        return self.config.stage(self.unet_number)

    def train(self, begun: restore.Begun) -> bool:
        settings, state = self.settings, begun.state
        step_fn = make_train_step(self.stage, settings.section(Optimization), self.layout)
        self.evaluate_fn = make_eval_step(self.stage, settings.compute_dtype, self.layout)
        key = stream(self.layout.key(settings.seed), "train", self.unet_number)
        step = first = int(state.step)
        # A run that begins anew may have another's lines before it.
        wanted = missing(settings, self.unet_number, first) if first else due(settings, first)
        self.watch(wanted, state, first)
        options = dict(start_step=first, flip=settings.flip, workers=settings.workers)
        with (
            self.feed.batches(self.feed.train, **options) as batches,
            tqdm(
                total=settings.steps,
                initial=first,
                desc=f"U-Net {self.unet_number}",
                unit="step",
                dynamic_ncols=True,
                disable=not distributed.talks(),
            ) as bar,
            Profile(settings.run / "profile", settings.profile) as profile,
        ):
            if settings.workers:
                with self.interrupt.kept_from_children():
                    batches = itertools.chain([next(batches)], batches)
            window = Window(settings, self.ideal_seconds(), begun.measured)
            while step < settings.steps and self.stopped_by is None:
                step += 1
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, measured = step_fn(state, self.feed.to_device(next(batches)), key)
                window.add(step, measured)
                profile.after(step, measured)
                bar.update()
                self.stopped_by = self.interrupt.heard(self.layout)
                last, on_line = step == settings.steps, step % settings.log_every == 0
                if last or on_line:
                    values = window.line(step)
                    bar.set_postfix(loss=f"{values['loss']:.4f}")
                    self.metrics.write(step, "train", values)
                if on_line:
                    window.restart()
                if last or self.stopped_by is not None or step % settings.save_every == 0:
                    with window.pause():
                        self.save(step, state, window.fetch())
                if wanted := due(settings, step):
                    with window.pause():
                        self.watch(wanted, state, step)
                if self.stopped_by is not None and self.saving != step:
                    self.save(step, state, window.fetch())
        self.wait()
        return self.report(step)

    def watch(self, wanted: set[str], state: TrainState, step: int) -> None:
        """Evaluates and draws, unless a signal is heard: a resumed run makes up for it."""
        if self.stopped_by is not None:
            return
        try:
            if "evaluation" in wanted:
                self.evaluate(state, step)
            if "samples" in wanted:
                write_samples(
                    *(self.config, self.unet_number, self.settings, self.feed, state.ema, step),
                    progress=self.listen,
                )
        except Stopped:
            pass

    def listen(self, *_) -> None:
        """Raises Stopped if a signal was heard."""
        self.stopped_by = self.interrupt.heard(self.layout)
        if self.stopped_by is not None:
            raise Stopped

    def ideal_seconds(self) -> float | None:
        """What a step would take at the peak of the devices, if that is known."""
        devices = self.layout.mesh.devices.flat
        peak = flops.peak(devices[0].device_kind)
        if peak is None:
            return None
        work = step_flops(self.stage, self.settings.section(Optimization))
        return work / (peak * len(devices))

    def report(self, step: int) -> bool:
        """Says what was skipped, and how to go on after a signal: then False."""
        run, skipped = self.settings.run, {}
        for text in distributed.gather(json.dumps(self.feed.skipped)):
            skipped |= json.loads(text)
        for key in skipped.keys() - self.feed.skipped.keys():
            print(f"skipped {key}: {skipped[key]}")
        if skipped:
            print(f"skipped {len(skipped)} of {self.feed.count} pictures, named above")
        if self.stopped_by is None:
            print(f"U-Net {self.unet_number} is at step {step}, saved in {run}.")
            return True
        where = f"stopped after step {step}, saved in {run}"
        if step == 0:
            where = "stopped before the first step, nothing to save"
        print(f"{self.stopped_by}: {where}. Go on with the same command and --resume.")
        return False

    def evaluate(self, state: TrainState, step: int) -> None:
        """Loss of the averaged weights per log-SNR bin, with the same noise every time."""
        for name, source in (("heldout", self.feed.heldout), ("train", self.feed.train)):
            if not len(source):
                continue
            sums = counts = np.zeros(len(LOG_SNR_EDGES) + 1)
            for i, batch in enumerate(self.feed.evaluation(source)):
                key = stream(self.layout.key(0), "evaluation", self.unet_number, i)
                more = self.evaluate_fn(state.ema, batch, key)
                sums, counts = sums + np.asarray(more[0]), counts + np.asarray(more[1])
                self.listen()
            values = {"loss": float(sums.sum() / counts.sum())}
            for label, total, count in zip(bin_labels(), sums, counts, strict=True):
                values[f"loss[{label}]"] = float(total / count) if count else None
            self.metrics.write(step, f"eval/{name}", values)

    def save(self, step: int, state: TrainState, measured: list[dict[str, float]]) -> None:
        """Begins to write a step, once the one before is whole."""
        self.wait()
        self.saving = step
        trees = {name: getattr(state, name) for name in restore.TREES}
        meta = {"step": step, "settings": self.record, "measured": measured}
        self._writing(lambda: checkpoint.save_step(self.manager, step, trees, meta))

    def wait(self) -> None:
        self._writing(self.manager.wait_until_finished)

    def _writing(self, write: Callable[[], None]) -> None:
        """A failed write (a full disk, say) in one line; whole checkpoints stay as they are."""
        try:
            write()
        except Exception as error:  # Orbax and TensorStore each have their own kinds
            kept = checkpoint.latest_step(self.settings.run, self.unet_number)
            raise ValueError(
                f"could not save step {self.saving} in {self.settings.run}: {_reason(error)}. "
                + ("Nothing was saved before." if kept is None else f"Step {kept} is whole.")
            ) from error


def _reason(error: Exception) -> str:
    """The system's own words where TensorStore wraps them in paths, else the first line."""
    found = re.search(r": ([^:]+) \[os_error_code=", str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return found[1] if found else lines[0]


def bin_labels() -> list[str]:
    """Names of the log-SNR bins: `..-10`, `-10..-7.5`, ..., `10..`."""
    edges = [f"{edge:g}" for edge in LOG_SNR_EDGES]
    return [f"{a}..{b}" for a, b in zip(["", *edges], [*edges, ""], strict=True)]


def _check_stage(config: ImagenConfig, unet_number: int) -> None:
    if isinstance(config.stage(unet_number).network, NullUnetConfig):
        raise ValueError(f"U-Net {unet_number} is a NullUnet: it cannot be trained.")
    if config.only_train_unet_number not in (None, unet_number):
        raise ValueError(
            f"only_train_unet_number is {config.only_train_unet_number}, not {unet_number}."
        )
