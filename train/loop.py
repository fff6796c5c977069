"""The training loop: restore, step, measure, save; stopped by a signal, it goes on exactly.

Everything that a step depends on is a function of the seed and the step number: the batch, the
noise, the learning rate. So a checkpoint is the train state and one integer.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from imagen_jax import checkpoint, nn
from imagen_jax.config import ImagenConfig, NullUnetConfig
from train.feed import Feed
from train.interrupt import Interrupt
from train.metrics import Metrics
from train.optimizer import learning_rate, make_optimizer
from train.samples import write_samples
from train.settings import Settings
from train.state import TrainState
from train.step import LOG_SNR_EDGES, make_eval_step, make_train_step


def run(settings: Settings, unet_number: int) -> bool:
    """Trains to `settings.steps`. Returns False if a signal stopped it before, all saved.

    Raises ValueError for mistaken settings, and when the loss is not finite.
    """
    config = settings.cascade()
    if settings.print_config:
        print(json.dumps(config.to_dict(), indent=2))
        return True
    _check_stage(config, unet_number)
    existing = checkpoint.latest_step(settings.run, unet_number)
    if existing is not None and not settings.resume:
        raise ValueError(
            f"{settings.run}/unet{unet_number} is at step {existing}: continue with --resume, or "
            "choose another --workdir."
        )
    if existing is not None and existing >= settings.steps:
        print(f"U-Net {unet_number} in {settings.run} has all of its {existing} steps.")
        return True
    feed = Feed.open(config, unet_number, settings)
    checkpoint.write_config(settings.run, config, {f"unet{unet_number}": settings.record()})
    _announce(config, unet_number, settings, feed)
    state = _restore(config, unet_number, settings, existing)
    with (
        checkpoint.open_manager(settings.run, unet_number, keep=settings.keep) as manager,
        Metrics(
            settings.run,
            unet_number,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            settings=settings.record(),
        ) as metrics,
        Interrupt() as interrupt,
    ):
        trainer = Trainer(config, unet_number, settings, feed, metrics, manager)
        return trainer.train(state, interrupt)


@dataclasses.dataclass
class Trainer:
    """One run of the loop, and what it needs at hand."""

    config: ImagenConfig
    unet_number: int
    settings: Settings
    feed: Feed
    metrics: Metrics
    manager: ocp.CheckpointManager

    def train(self, state: TrainState, interrupt: Interrupt) -> bool:
        settings = self.settings
        step_fn = make_train_step(self.config, self.unet_number, settings)
        self.evaluate_fn = make_eval_step(self.config, self.unet_number, settings)
        key = jax.random.key(settings.seed)
        first = int(state.step)
        if first == 0:
            self.evaluate(state, 0)
        window = Window(settings)
        options = dict(flip=settings.flip, workers=settings.workers, on_skip=_say_skipped)
        with (
            self.feed.batches(self.feed.train, start_step=first, **options) as batches,
            tqdm(
                total=settings.steps,
                initial=first,
                desc=f"U-Net {self.unet_number}",
                unit="step",
                dynamic_ncols=True,
            ) as bar,
        ):
            for step in range(first + 1, settings.steps + 1):
                state, measured = step_fn(state, self.feed.to_device(next(batches)), key)
                window.add(step, measured)
                bar.update()
                stopped_by = interrupt.received  # asked once: a signal may come at any line
                last = step == settings.steps or stopped_by is not None
                saves = last or step % settings.save_every == 0
                if saves or step % settings.log_every == 0:
                    values = window.close()
                    bar.set_postfix(loss=f"{values['loss']:.4f}")
                    self.metrics.write(step, "train", values)
                if saves:
                    self.save(step, state)
                if stopped_by is not None:
                    break
                if step % settings.eval_every == 0 or last:
                    self.evaluate(state, step)
                if settings.sample_every and (step % settings.sample_every == 0 or last):
                    write_samples(
                        self.config, self.unet_number, settings, self.feed, state.ema, step
                    )
                    window.restart()
        self.wait(step)
        if batches.skipped:
            print(f"skipped {len(batches.skipped)} of {len(self.feed.train)} pictures")
        if stopped_by is None:
            return True
        print(
            f"{stopped_by}: stopped after step {step}, saved in {settings.run}. "
            "Go on with the same command and --resume."
        )
        return False

    def evaluate(self, state: TrainState, step: int) -> None:
        """Loss of the averaged weights per log-SNR bin, with the same noise every time."""
        for name, source in (("heldout", self.feed.heldout), ("train", self.feed.train)):
            if not len(source):
                continue
            sums = counts = np.zeros(len(LOG_SNR_EDGES) + 1)
            for i, batch in enumerate(self.feed.evaluation(source)):
                key = jax.random.fold_in(jax.random.key(0), i)
                more = self.evaluate_fn(state.ema, batch, key)
                sums, counts = sums + np.asarray(more[0]), counts + np.asarray(more[1])
            values = {"loss": float(sums.sum() / counts.sum())}
            for label, total, count in zip(bin_labels(), sums, counts, strict=True):
                values[f"loss[{label}]"] = float(total / count) if count else None
            self.metrics.write(step, f"eval/{name}", values)

    def save(self, step: int, state: TrainState) -> None:
        trees = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
        meta = {"step": step, "data_position": step, "settings": self.settings.record()}
        self._writing(step, lambda: checkpoint.save_step(self.manager, step, trees, meta))

    def wait(self, step: int) -> None:
        self._writing(step, self.manager.wait_until_finished)

    def _writing(self, step: int, write: Callable[[], None]) -> None:
        """A failed write (a full disk, say) in one line; whole checkpoints stay as they are."""
        try:
            write()
        except Exception as error:  # Orbax and TensorStore each have their own kinds
            kept = checkpoint.latest_step(self.settings.run, self.unet_number)
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"could not save step {step} in {self.settings.run}: {reason}. "
                + ("Nothing was saved before." if kept is None else f"Step {kept} is whole.")
            ) from error


class Window:
    """Metrics of the steps since the last log line, fetched from the device all at once."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.learning_rate = learning_rate(settings)
        self.restart()

    def restart(self) -> None:
        self.steps: list[tuple[int, dict]] = []
        self.began = time.perf_counter()

    def add(self, step: int, measured: dict) -> None:
        self.steps.append((step, measured))

    def close(self) -> dict[str, float]:
        """Means and speed. Raises ValueError naming the first step whose loss is not finite."""
        if not self.steps:
            return {"loss": float("nan")}
        numbers = [step for step, _ in self.steps]
        fetched = jax.device_get([measured for _, measured in self.steps])
        for number, measured in zip(numbers, fetched, strict=True):
            if not np.isfinite(measured["loss"]):
                raise ValueError(
                    f"the loss is {measured['loss']} at step {number}: nothing was saved since. "
                    "A smaller --lr, --max-grad-norm or --dtype float32 may help."
                )
        seconds = time.perf_counter() - self.began
        values = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        values["learning_rate"] = float(self.learning_rate(numbers[-1] - 1))
        values["steps_per_second"] = len(numbers) / seconds
        values["images_per_second"] = len(numbers) * self.settings.batch_size / seconds
        self.restart()
        return values


def bin_labels() -> list[str]:
    """Names of the log-SNR bins: `..-10`, `-10..-7.5`, ..., `10..`."""
    edges = [f"{edge:g}" for edge in LOG_SNR_EDGES]
    return [f"{a}..{b}" for a, b in zip(["", *edges], [*edges, ""], strict=True)]


def _check_stage(config: ImagenConfig, unet_number: int) -> None:
    if isinstance(config.stage(unet_number).unet, NullUnetConfig):
        raise ValueError(f"U-Net {unet_number} is a NullUnet: it cannot be trained.")
    if config.only_train_unet_number not in (None, unet_number):
        raise ValueError(
            f"only_train_unet_number is {config.only_train_unet_number}, not {unet_number}."
        )


def _restore(
    config: ImagenConfig, unet_number: int, settings: Settings, step: int | None
) -> TrainState:
    """The state to go on from: saved, begun from another run's weights, or fresh."""
    unet, optimizer = config.stage(unet_number).unet, make_optimizer(settings)
    shapes = jax.eval_shape(lambda p: TrainState.create(p, optimizer), nn.abstract(unet)[1])
    if step is not None:
        there = checkpoint.read_meta(settings.run, unet_number, step)["settings"]
        for name in ("seed", "batch_size", "data", "optimizer"):
            if there[name] != settings.record()[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} was {there[name]} and is "
                    f"{settings.record()[name]}: that would not continue the run. "
                    "Start another with --init-from."
                )
        names = ("params", "ema", "opt_state")
        trees = {
            name: checkpoint.restore(
                settings.run, unet_number, step, name, checkpoint.placed(getattr(shapes, name))
            )
            for name in names
        }
        return TrainState(step=jnp.int32(step), **trees)
    if settings.init_from is not None:
        source = checkpoint.read_config(settings.init_from)
        difference = checkpoint.first_difference(
            source.stage(unet_number).unet, unet, f"unets.{unet_number - 1}"
        )
        if difference:
            raise ValueError(f"--init-from {settings.init_from}: {difference}.")
        params = checkpoint.load_params(settings.init_from, unet_number)
        if params is None:
            raise ValueError(f"{settings.init_from} has no weights of U-Net {unet_number}.")
        return jax.jit(lambda p: TrainState.create(p, optimizer))(params)
    init = jax.jit(lambda key: TrainState.create(nn.init_params(unet, key), optimizer))
    return init(jax.random.fold_in(jax.random.key(settings.seed), unet_number))


def _announce(config: ImagenConfig, unet_number: int, settings: Settings, feed: Feed) -> None:
    stage = config.stage(unet_number)
    count = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(nn.abstract(stage.unet)[1]))
    size = f"{stage.image_size} pixels"
    if stage.previous_image_size is not None:
        size = f"{stage.previous_image_size} -> {size}"
        if stage.pred_objective == "noise" and stage.unet.memory_efficient:
            print(
                "note: memory-efficient super-resolution drifts in colour when it predicts noise; "
                "pred_objectives 'v' does not."
            )
    print(f"U-Net {unet_number} of {len(config.unets)}: {size}, {count:,} parameters")
    print(f"data: {len(feed.train)} pictures of {settings.data}, {len(feed.heldout)} held out")
    if feed.encoder is not None and feed.encoder.is_demo:
        print(
            "text: the demo encoder, a small T5 with random frozen weights: it tells captions "
            "apart and knows no language. --t5 google/t5-v1_1-base uses a real one."
        )
    print(f"run: {settings.run} (configuration in config.json)")
    print(json.dumps(settings.record()))


def _say_skipped(key: str, reason: str) -> None:
    tqdm.write(f"skipped {key}: {reason}")
