"""Evaluation during training: the loss on fixed noise, a grid of samples, a composition test.

All use the averaged weights, and give the same for the same weights: if one is interrupted, the
resumed run does it again.
"""

import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jax.typing import DTypeLike

from imagen_jax import distributed, sampling, storage
from imagen_jax.data import Record, labelled_grid, scenes
from imagen_jax.diffusion import samplers
from imagen_jax.diffusion.guidance import Guidance
from imagen_jax.errors import UserError
from imagen_jax.evaluation import LOG_SNR_EDGES, bin_labels, make_eval_step
from imagen_jax.metrics import composition
from imagen_jax.sampling import Progress
from imagen_jax.stage import SamplingDefaults, to_float
from imagen_jax.streams import row_keys, stream
from imagen_jax.training import shrink
from imagen_jax.types import AnyArray, Params
from train.feed import Feed
from train.log import Metrics
from train.run import RunDir
from train.settings import Watching

SHOWN = 8


def due(settings: Watching, step: int, *, last: bool) -> set[str]:
    """What is due after a step: "evaluation", "samples", "composition"."""
    found = set()
    if settings.eval_every and (last or step % settings.eval_every == 0):
        found.add("evaluation")
    for name, every in dict(
        samples=settings.sample_every, composition=settings.compose_every
    ).items():
        if every and step and (last or step % every == 0):
            found.add(name)
    return found


def check_captions(settings: Watching, feed: Feed) -> None:
    """Raises UserError if the captions of the composition test cannot be drawn."""
    if not settings.compose_every:
        return
    if not feed.reads_captions or feed.config.channels != 3:
        raise UserError("--compose-every needs a cascade with captions and three channels.")
    if feed.embeddings is not None:
        for kind in scenes.KINDS:
            chosen = scenes.examples(kind, settings.compose_images)
            feed.embeddings.check([scene.caption for scene in chosen])


@dataclasses.dataclass(frozen=True)
class Previews:
    """Evaluates and draws. `listen` is called meanwhile, and may raise to stop it."""

    run: RunDir
    feed: Feed
    metrics: Metrics
    settings: Watching
    dtype: DTypeLike

    @property
    def defaults(self) -> SamplingDefaults:
        return self.run.config.sampling_defaults(self.run.stage.unet_number)

    def make(
        self, wanted: set[str], params: Params, step: int, listen: Callable[..., None]
    ) -> None:
        """`wanted` is a subset of what is `due`."""
        if "evaluation" in wanted:
            self.evaluate(params, step, listen)
        if "samples" in wanted:
            self.write_samples(params, step, listen)
        if "composition" in wanted:
            self.compose(params, step, listen)

    def evaluate(self, params: Params, step: int, listen: Callable[[], None]) -> None:
        """Loss per log-SNR bin, with the same noise every time."""
        feed = self.feed
        evaluate = make_eval_step(feed.stage, self.dtype, feed.layout)
        for name, source in (("heldout", feed.heldout), ("train", feed.train)):
            if not len(source):
                continue
            sums = counts = np.zeros(len(LOG_SNR_EDGES) + 1)
            for i, batch in enumerate(feed.evaluation(source, self.settings.eval_batches)):
                key = stream(feed.layout.key(0), "evaluation", feed.stage.unet_number, i)
                more = evaluate(params, batch, key)
                sums, counts = sums + np.asarray(more[0]), counts + np.asarray(more[1])
                listen()
            values = {"loss": float(sums.sum() / counts.sum())}
            for label, total, count in zip(bin_labels(), sums, counts, strict=True):
                values[f"loss[{label}]"] = float(total / count) if count else None
            self.metrics.write(step, f"eval/{name}", values)

    def write_samples(self, params: Params, step: int, progress: Progress) -> None:
        """RUN/samples/unetN-STEP.png: samples for the first captions, above the real pictures.

        Super-resolution starts from the real images, downsampled.
        """
        feed = self.feed
        records, pictures = zip(*itertools.islice(feed.usable(feed.train), SHOWN), strict=True)
        given = self._given(records, np.stack(pictures))
        images = self._sample(params, len(records), given, progress)
        path = self.run.picture_path(step)
        self._check_finite(images, step, f"{path.name} is not written", "sample")
        captions = [record.caption or "" for record in records]
        rows = [("sampled", list(images), captions), ("real", list(pictures), captions)]
        if not distributed.talks():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        labelled_grid(rows).save(file, format="png")
        storage.write_bytes(path, file.getvalue())

    def compose(self, params: Params, step: int, progress: Progress) -> None:
        """How much of held-out captions, and of seen ones, the U-Net draws right, by kind and by
        relation."""
        values = {}
        for kind in scenes.KINDS:
            chosen = scenes.examples(kind, self.settings.compose_images)
            real = np.stack([scene.draw(self.feed.stage.size) for scene in chosen])
            records = [
                Record(f"{kind} {i}", scene.draw, scene.caption) for i, scene in enumerate(chosen)
            ]
            images = self._sample(params, len(chosen), self._given(records, real), progress)
            self._check_finite(images, step, "they cannot be judged", "compose")
            contents = [scene.content for scene in chosen]
            verdicts = composition.verdicts(contents, images)
            shares = composition.summary(contents, verdicts)
            values |= {f"{kind}[{name}]": one.share for name, one in shares.items() if one.count}
            for relation, shares in composition.by_relation(contents, verdicts).items():
                values[f"{kind}[{relation}]"] = shares["right"].share
        self.metrics.write(step, "eval/composition", values)

    def _check_finite(self, images: AnyArray, step: int, so: str, flag: str) -> None:
        if not np.isfinite(images).all():
            raise UserError(
                f"the samples of U-Net {self.feed.stage.unet_number} at step {step} hold NaN or "
                f"infinity: {so}. --dtype float32 may help, or --{flag}-every 0."
            )

    def _given(self, records: Sequence[Record], real: AnyArray) -> sampling.Given:
        """What the samples are conditioned on: the records' text and downsampled pictures."""
        feed, given = self.feed, sampling.Given()
        if feed.stage.condition_on_text:
            embeds, masks = feed.embeds(records)
            given = given._replace(text_embeds=embeds, text_masks=masks)
            guided = self.settings.cond_scale != 1
            if feed.config.encodes_blank_text and feed.reads_captions and guided:
                empty = feed.layout.fetch(feed.empty_text(len(records), embeds.shape[1]))
                given = given._replace(negative_embeds=empty, negative_masks=np.ones_like(masks))
        if feed.stage.lowres is not None:
            given = given._replace(
                previous=shrink(feed.stage, to_float(real)),
                lowres_noise_level=np.float32(self.defaults.lowres_noise_level),
            )
        return given

    def _sample(
        self, params: Params, count: int, given: sampling.Given, progress: Progress
    ) -> np.ndarray:
        stage, layout, cond_scale = self.feed.stage, self.feed.layout, self.settings.cond_scale
        key = stream(layout.key(self.feed.seed), "preview", stage.unet_number)
        images = sampling.sample_stage(
            params,
            sampling.Program(
                stage=stage,
                dtype=self.dtype,
                guided=stage.condition_on_text and cond_scale != 1,
                sampler=stage.process.sampler,
            ),
            given,
            sampling.Randomness(keys=row_keys(key, count)),
            batch_size=count,
            grid=samplers.make_grid(stage.process, self.settings.sample_steps),
            numbers=sampling.numbers_for(self.defaults, Guidance(cond_scale)),
            layout=layout,
            progress=progress,
        )
        return layout.fetch(images)
