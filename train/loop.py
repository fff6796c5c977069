"""The training loop: restore, step, measure, save; after a signal it can be resumed exactly.

Everything that a step depends on is a function of the seed and the step number: the batch, the
noise, the learning rate. So a checkpoint is the train state, its step, and what was measured since
the last line of metrics.

`run` splits the settings and opens what a step needs: the run directory, the pictures, the state.
From there on every part gets its own section of the settings, or plain values.
"""

import contextlib
import dataclasses
import itertools
import json

import jax
from tqdm import tqdm

import commands
from imagen_jax import distributed, flops, run_config
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import Layout, make_layout
from imagen_jax.stage import Stage
from imagen_jax.streams import stream
from train.feed import Ahead, Feed
from train.interrupt import Interrupt, Stopped
from train.log import Metrics, Profile, Window, announce, report_left_out
from train.previews import Previews, check_captions, due
from train.run import Checkpoints, RunDir, Start
from train.settings import Data, Optimization, Settings, Watching
from train.state import TrainState
from train.step import make_train_step, step_flops


def run(settings: Settings, unet_number: int, layout: Layout | None = None) -> bool:
    """Trains to `settings.steps`. Returns False if a signal stopped it earlier, with all saved.

    `layout` replaces `settings.mesh`. Raises ValueError for wrong settings, and if the loss is not
    finite.
    """
    config = settings.cascade()
    if settings.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return True
    stage = _trained_stage(config, unet_number)
    data, optimization, watching = map(settings.section, (Data, Optimization, Watching))
    run_dir = RunDir.open(settings.run, config, stage, resume=settings.resume)
    if settings.resume and run_dir.newest is None:
        print(f"note: {run_dir.path} has no checkpoint of U-Net {unet_number}: starting at step 0.")
    layout = layout or make_layout(settings.mesh, rows=settings.rows)
    if _finished(run_dir, watching, settings.steps):
        print(
            f"U-Net {unet_number} in {run_dir.path} already has all of its {run_dir.complete} "
            "steps."
        )
        return True
    with distributed.together():
        source = settings.continue_from if run_dir.newest is None else None
        recorded = run_config.read_text_encoder(source or run_dir.path)
        feed = Feed.open(
            config, stage, data, optimization, layout, seed=settings.seed, recorded=recorded
        )
        check_captions(watching, feed)
    record = settings.record() | {
        "pictures": len(feed.train),
        "content": feed.train.fingerprint(),
        "weights_of_sets": list(feed.train.weights),
    }
    with run_dir.metrics(watching, record) as metrics:
        previews = Previews(run_dir, feed, metrics, watching, optimization.compute_dtype)
        announce(feed, run_dir.path, settings.describe(), resumed=settings.resume)
        announced = set(feed.left_out)
        start = run_dir.start(
            optimization,
            layout,
            record,
            seed=settings.seed,
            init_from=settings.init_from,
            continue_from=settings.continue_from,
        )
        began = int(start.state.step)
        if run_dir.newest is None and began >= settings.steps:
            raise UserError(
                f"--continue-from {settings.continue_from} is at step {began}: --steps "
                f"{settings.steps} leaves none to take."
            )
        with (
            run_dir.checkpoints(record, feed.text_encoder, keep=watching.keep) as checkpoints,
            Interrupt(layout) as interrupt,
        ):
            trainer = Trainer(
                feed=feed,
                optimization=optimization,
                steps=settings.steps,
                watching=watching,
                run=run_dir,
                metrics=metrics,
                checkpoints=checkpoints,
                previews=previews,
                interrupt=interrupt,
            )
            step = trainer.train(start)
            saved = step > began or run_dir.newest is not None
            return _report(run_dir, feed, step if saved else None, interrupt.stopped_by, announced)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """One run of the loop: what a step reads, and what is written after it."""

    feed: Feed
    optimization: Optimization
    steps: int
    watching: Watching
    run: RunDir
    metrics: Metrics
    checkpoints: Checkpoints
    previews: Previews
    interrupt: Interrupt

    def train(self, start: Start) -> int:
        """Trains; returns the step at which it ended and saved: the last, or that of a signal."""
        stage, layout, state = self.feed.stage, self.feed.layout, start.state
        key = stream(layout.key(self.feed.seed), "train", stage.unet_number)
        step = int(state.step)
        wanted = due(self.watching, step, last=step == self.steps)
        if step:  # lines for step 0 may be those of another run
            wanted = self.run.missing(wanted, step)
        self.preview(wanted, state, step)
        with (
            self.feed.training(step) as batches,
            self.bar(step) as bar,
            Profile(self.run.path / "profile", self.watching.profile) as profile,
            contextlib.ExitStack() as opened,
        ):
            if self.feed.settings.workers:
                with self.interrupt.kept_from_children():
                    batches = itertools.chain([next(batches)], batches)
            ahead = opened.enter_context(Ahead(self.feed, batches))
            ideal = _ideal_seconds(stage, self.optimization, layout)
            window = Window(self.optimization, ideal, start.measured)
            while step < self.steps and self.interrupt.stopped_by is None:
                step += 1
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    batch = next(ahead)
                    step_fn = make_train_step(self.feed.stage_of(batch), self.optimization, layout)
                    state, measured = step_fn(state, batch, key)
                window.add(step, measured)
                window.waited_for_data = ahead.waited
                profile.after(step, measured)
                bar.update()
                self.interrupt.ask()
                self.after(step, state, window, bar)
        self.checkpoints.wait()
        return step

    def after(self, step: int, state: TrainState, window: Window, bar: tqdm) -> None:
        """Logs, saves and previews what is due after a step."""
        self.checkpoints.poll()
        last, on_line = step == self.steps, step % self.watching.log_every == 0
        if last or on_line:
            values = window.line(step)
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            self.metrics.write(step, "train", values)
        if on_line:
            window.restart()
        if last or self.interrupt.stopped_by or step % self.watching.save_every == 0:
            with window.pause():
                self.checkpoints.save(step, state, window.fetch())
        if wanted := due(self.watching, step, last=last):
            with window.pause():
                self.preview(wanted, state, step)
        if self.interrupt.stopped_by and self.checkpoints.newest != step:
            self.checkpoints.save(step, state, window.fetch())

    def preview(self, wanted: set[str], state: TrainState, step: int) -> None:
        """Evaluates and draws, unless a signal arrives: a resumed run then does it instead."""
        if self.interrupt.stopped_by is None:
            with contextlib.suppress(Stopped):
                self.previews.make(wanted, state.ema, step, self.listen)

    def listen(self, *progress: int) -> None:
        """Called often while an evaluation or sampling runs."""
        self.checkpoints.poll()
        self.interrupt.listen(*progress)

    def bar(self, first: int) -> tqdm:
        return tqdm(
            total=self.steps,
            initial=first,
            desc=f"U-Net {self.feed.stage.unet_number}",
            unit="step",
            dynamic_ncols=True,
            mininterval=commands.bar_interval(),
            disable=not distributed.talks(),
        )


def _trained_stage(config: ImagenConfig, unet_number: int) -> Stage:
    stage = config.stage(unet_number)
    if isinstance(stage.network, NullUnetConfig):
        raise UserError(f"U-Net {unet_number} is a NullUnet: it cannot be trained.")
    if config.only_train_unet_number not in (None, unet_number):
        raise UserError(
            f"only_train_unet_number = {config.only_train_unet_number}: U-Net {unet_number} cannot "
            "be trained."
        )
    return stage


def _finished(run: RunDir, watching: Watching, steps: int) -> bool:
    """Whether all steps are done, and all that is due at the last of them."""
    if run.complete is None or run.complete < steps:
        return False
    return not run.missing(due(watching, run.complete, last=run.complete == steps), run.complete)


def _ideal_seconds(stage: Stage, optimization: Optimization, layout: Layout) -> float | None:
    """How long a step would take at the peak of the devices, if that is known."""
    devices = layout.mesh.devices.flat
    peak = flops.peak(devices[0].device_kind, optimization.compute_dtype)
    return peak and step_flops(stage, optimization) / (peak * len(devices))


def _report(
    run: RunDir, feed: Feed, step: int | None, stopped_by: str | None, announced: set[str]
) -> bool:
    """Prints what was left out during the run and, after a signal, how to resume; then returns
    False. `step` is the last one that was saved."""
    found = {name: why for name, why in feed.left_out.items() if name not in announced}
    for text in distributed.gather(json.dumps(found)):
        for name, reason in json.loads(text).items():
            feed.skip(name, reason)
    report_left_out(feed.left_out, run.path, run.stage.unet_number, resumed=True, known=announced)
    if stopped_by is None:
        print(f"U-Net {run.stage.unet_number} is at step {step}, saved in {run.path}.")
        return True
    where = f"stopped after step {step}, saved in {run.path}"
    if step is None:
        where = "stopped before the first step, nothing to save"
    print(f"{stopped_by}: {where}. Continue with the same command and --resume.")
    return False
