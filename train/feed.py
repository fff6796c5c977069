"""From `--data` to batches on the device: pictures, and the text as the frozen T5 sees it."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from imagen_jax import text
from imagen_jax.cascade import check_text
from imagen_jax.config import ImagenConfig
from imagen_jax.data import Batches, Record, Source, decode, make_batches, open_source
from imagen_jax.errors import UserError
from imagen_jax.sharding import Layout
from imagen_jax.stage import Stage
from train.settings import Data, Optimization
from train.step import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed:
    """The pictures of a run, training and held out, and the encoder of their captions."""

    config: ImagenConfig
    stage: Stage
    settings: Data
    layout: Layout
    batch_size: int
    seed: int
    train: Source
    heldout: Source
    encoder: text.TextEncoder | None
    text_encoder: text.Identity | None  # of captions, or of stored embeddings if they tell
    count: int  # of all pictures, usable or not
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # key -> reason

    @classmethod
    def open(
        cls,
        config: ImagenConfig,
        stage: Stage,
        settings: Data,
        optimization: Optimization,
        layout: Layout,
        *,
        seed: int,
        recorded: text.Identity | None = None,
    ) -> "Feed":
        """Raises UserError for data that is not there, or an encoder that does not fit, or is not
        the `recorded` one."""
        source = open_source(settings.data, heldout_fraction=settings.heldout_fraction)
        train, heldout = _chosen(source.split("train"), settings), source.split("heldout")
        encoder = text_encoder = None
        if config.condition_on_text and source.has_embeds:
            text_encoder = text.read_beside(settings.data)
            if text_encoder is not None:
                text_encoder.check(recorded, "this run")
        elif config.condition_on_text:
            encoder = text.cascade_encoder(
                config, dtype=optimization.compute_dtype, layout=layout, recorded=recorded
            )
            text_encoder = encoder.identity
        feed = cls(
            config=config,
            stage=stage,
            settings=settings,
            layout=layout,
            batch_size=optimization.batch_size,
            seed=seed,
            train=train,
            heldout=heldout,
            encoder=encoder,
            text_encoder=text_encoder,
            count=len(train) + len(heldout),
        )
        if next(feed.usable(heldout), None) is not None:
            return feed
        nothing = dataclasses.replace(heldout, rows=heldout.rows[:0])
        return dataclasses.replace(feed, heldout=nothing)

    def training(self, start_step: int) -> Batches:
        """The batches to train on, from `start_step` on."""
        flip, workers = self.settings.flip, self.settings.workers
        return self.batches(self.train, start_step=start_step, flip=flip, workers=workers)

    def batches(
        self, source: Source, *, start_step: int = 0, shuffle: bool = True, **options
    ) -> Batches:
        """This process's rows of the batches, from `start_step` on."""
        return make_batches(
            source,
            image_size=self.stage.size,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=start_step,
            tokenize=None if self.encoder is None else self.encoder.tokenize,
            channels=self.config.channels,
            shuffle=shuffle,
            text_len=self.stage.network.max_text_len,
            rows=self.layout.own_rows(self.batch_size),
            on_skip=self.skip,
            **options,
        )

    def usable(self, source: Source) -> Iterator[tuple[Record, np.ndarray]]:
        """The records that can be trained on, and their pictures."""
        size = self.stage.size
        for i in range(len(source)):
            try:
                record = source[i]
                if self.encoder is not None and not record.caption:
                    raise UserError("no caption")
                yield record, decode(record.image, image_size=size, channels=self.config.channels)
            except ValueError as error:
                self.skip(source.key(i), str(error))

    def skip(self, key: str, reason: str) -> None:
        """Names a picture that cannot be used, once."""
        if key not in self.skipped:
            self.skipped[key] = reason
            tqdm.write(f"skipped {key}: {reason}")

    def to_device(self, batch: dict) -> Batch:
        """The rows of all processes as one batch. Pictures stay uint8; tokens become embeddings."""
        if not self.config.condition_on_text:
            batch = {"images": batch["images"]}
        if "tokens" in batch and jax.process_count() == 1:  # others may have longer captions
            batch["tokens"] = text.trim(batch["tokens"])
        batch = self.layout.to_batch(batch, self.batch_size)
        if "tokens" in batch:
            batch["text_embeds"], batch["text_masks"] = self.encoder.embed(
                batch.pop("tokens"), length=self.stage.network.text_len
            )
        check_text(self.config, batch.get("text_embeds"), None)
        return batch

    def evaluation(self, source: Source, count: int) -> Iterator[Batch]:
        """The first `count` batches, always the same."""
        with self.batches(source, shuffle=False) as batches:
            for _ in range(count):
                yield self.to_device(next(batches))


def _chosen(source: Source, settings: Data) -> Source:
    """With the captions of `--captions-from`, and no more than `--limit`."""
    if settings.captions_from is not None:
        lines = settings.captions_from.read_text().splitlines()
        source = source.with_captions([line.strip() for line in lines if line.strip()])
    return source if settings.limit is None else source.take(settings.limit)
