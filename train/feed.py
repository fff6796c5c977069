"""From `--data` to batches on the device: pictures, and the text as the frozen T5 sees it."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imagen_jax import text
from imagen_jax.cascade import check_text
from imagen_jax.config import ImagenConfig
from imagen_jax.data import (
    Batches,
    Embeddings,
    Record,
    Source,
    check,
    decode,
    make_batches,
    pad_embeds,
    read_lines,
)
from imagen_jax.distributed import Agreement
from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.sharding import Layout
from imagen_jax.stage import Stage
from imagen_jax.types import Size
from train.settings import Data, Optimization
from train.step import Batch

SURVEYED = 10_000  # records of a set that are looked at before training
KEPT_BYTES = 256 * 2**20  # of decoded evaluation batches


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
    embeddings: Embeddings | None  # of captions, instead of an encoder
    text_encoder: text.Identity | None  # of captions, or of stored embeddings if they name it
    left_out: dict[str, str]  # key or file name -> why it is not trained on, as far as known
    kept: dict[str, list[dict]] = dataclasses.field(default_factory=dict)  # evaluation batches

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
        """Raises UserError for data that does not exist, and for an encoder that does not fit or is
        not the `recorded` one."""
        source = settings.open()
        train, heldout = source.split("train"), source.split("heldout")
        if not len(train):
            raise UserError(
                f"{source.name}: all of its pictures ({len(heldout)} of {len(source)}) are held "
                "out for evaluation: --heldout-fraction 0 trains on them."
            )
        train = _chosen(train, settings)
        encoder = embeddings = text_encoder = None
        if config.condition_on_text and source.has_embeds:
            if settings.embeddings is not None:
                raise UserError(
                    f"{source.name} already has embeddings: --embeddings {settings.embeddings} is "
                    "not used. Leave it out, or move the .npy files."
                )
            text_encoder = text.stored_encoder(config, source.name, settings.folders)
        elif config.condition_on_text and settings.embeddings is not None:
            embeddings, text_encoder = _stored(config, stage, settings.embeddings)
        elif config.condition_on_text:
            encoder = text.cascade_encoder(
                config, dtype=optimization.compute_dtype, layout=layout, recorded=recorded
            )
            text_encoder = encoder.identity
        if text_encoder is not None:
            text_encoder.check(recorded, "this run")
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
            embeddings=embeddings,
            text_encoder=text_encoder,
            left_out=dict(source.left_out),
        )
        for size in feed.buckets:
            config.with_size(stage.unet_number, size).stage(stage.unet_number)
        feed.survey()
        if next(feed.usable(heldout), None) is not None:
            return feed
        nothing = dataclasses.replace(heldout, rows=heldout.rows[:0])
        return dataclasses.replace(feed, heldout=nothing)

    def training(self, start_step: int) -> Batches:
        """The batches to train on, from `start_step` on."""
        return self.batches(
            self.train,
            self.batch_size,
            start_step=start_step,
            flip=self.settings.flip,
            crop=self.settings.crop,
            buckets=self.buckets,
            workers=self.settings.workers,
        )

    def batches(
        self,
        source: Source,
        batch_size: int,
        *,
        start_step: int = 0,
        shuffle: bool = True,
        flip: bool = False,
        crop: Literal["center", "random"] = "center",
        buckets: Sequence[Size] = (),
        workers: int = 0,
    ) -> Batches:
        """This process's rows of the batches, from `start_step` on."""
        return make_batches(
            source,
            image_size=self.stage.size,
            batch_size=batch_size,
            seed=self.seed,
            start_step=start_step,
            tokenize=None if self.encoder is None else self.encoder.tokenize,
            channels=self.config.channels,
            shuffle=shuffle,
            text_len=self.stage.network.max_text_len,
            flip=flip,
            crop=crop,
            upsample=self.upsample if buckets else self.enlarges,
            buckets=buckets,
            embeddings=self.embeddings,
            cache_bytes=self.settings.cache_mb * 2**20,
            max_damaged=self.settings.max_damaged,
            rows=self.layout.own_rows(batch_size),
            threads=self.settings.threads,
            workers=workers,
            on_skip=self.skip,
        )

    def survey(self) -> None:
        """Looks for records that cannot be used, by their captions and the headers of their images,
        among the first `SURVEYED`: others are found when they are decoded."""
        for source in (self.train, self.heldout):
            for i in range(min(len(source), SURVEYED)):
                try:
                    record = source[i]
                    self._check_captions(record)
                    check(record.image, image_size=self.stage.size, upsample=self.enlarges)
                except UserError as error:
                    self.skip(source.key(i), str(error))

    def usable(self, source: Source) -> Iterator[tuple[Record, np.ndarray]]:
        """The records that can be trained on, and their pictures."""
        size = self.stage.size
        for i in range(len(source)):
            try:
                record = source[i]
                self._check_captions(record)
                picture = decode(
                    record.image,
                    image_size=size,
                    channels=self.config.channels,
                    upsample=self.enlarges,
                )
            except UserError as error:
                self.skip(source.key(i), str(error))
            else:
                yield record, picture

    @property
    def upsample(self) -> bool:
        return self.settings.small == "upsample"

    @property
    def enlarges(self) -> bool:
        """Whether evaluation and samples upsample pictures smaller than the stage: also with
        buckets, as these may be smaller too."""
        return self.upsample or bool(self.settings.buckets)

    @property
    def buckets(self) -> list[Size]:
        """The sizes of the batches, if they are not all the stage's."""
        return [tuple(map(int, bucket.split("x"))) for bucket in self.settings.buckets]

    def stage_of(self, batch: Batch) -> Stage:
        """The stage, at the size of a batch."""
        height, width = batch["images"].shape[1:3]
        return self.config.with_size(self.stage.unet_number, (height, width)).stage(
            self.stage.unet_number
        )

    @property
    def reads_captions(self) -> bool:
        """False for an unconditional cascade, and for records that come with embeddings."""
        return self.encoder is not None or self.embeddings is not None

    def _check_captions(self, record: Record) -> None:
        if not self.reads_captions:
            return
        captions = record.captions
        if self.embeddings is not None:
            self.embeddings.check(captions)

    def embeds(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and masks of the (first) captions of records, on the host."""
        if self.encoder is not None:
            captions = [record.caption for record in records]
            return self.encoder(captions, length=self.stage.network.text_len)
        stored = [
            record.embeds if self.embeddings is None else self.embeddings[record.caption]
            for record in records
        ]
        embeds, masks = pad_embeds(stored, self.stage.network.max_text_len)
        return embeds.astype(np.float32), masks

    def empty_text(self, count: int, length: int) -> Array:
        """The embeddings of the empty text as rows of a batch (`config.encodes_blank_text`)."""
        if self.encoder is not None:
            return text.empty_text(self.encoder, count, length, self.layout)
        one, _ = pad_embeds([self.embeddings[""]], length)
        rows = len(self.layout.own_rows(count))
        return self.layout.to_batch(np.broadcast_to(one, (rows, *one.shape[1:])), count)

    def skip(self, key: str, reason: str) -> None:
        """Notes a picture that cannot be used."""
        self.left_out.setdefault(key, reason)

    def put(self, batch: dict, batch_size: int, agreement: Agreement) -> Batch:
        """The rows of all processes as one batch on the devices, without most of the padding that
        all texts have. Nothing is computed there. All processes must put their batches in the same
        order; `agreement` is on the length."""
        images, texts = {"images": batch["images"]}, {}
        if self.config.condition_on_text:
            texts = {name: x for name, x in batch.items() if name != "images"}
            mask = texts["tokens"] != 0 if "tokens" in texts else texts["text_masks"]
            length = agreement.most(text.columns(mask))
            texts = {name: x[:, :length] for name, x in texts.items()}
        return self.layout.to_batch(images | texts, batch_size)

    def with_embeds(self, batch: Batch) -> Batch:
        """A batch on the devices with embeddings for its tokens, of the length that the network
        reads. Pictures stay uint8."""
        network = self.stage.network
        if "tokens" in batch:
            batch = dict(batch)
            batch["text_embeds"], batch["text_masks"] = self.encoder.embed(
                batch.pop("tokens"), length=network.text_len
            )
        elif "text_embeds" in batch:
            pad = _padding(self.layout, network.max_text_len)
            batch = batch | pad({name: batch[name] for name in ("text_embeds", "text_masks")})
        if self.config.encodes_blank_text and self.reads_captions:
            batch = {**batch, "null_text_embeds": self.empty_text(*batch["text_embeds"].shape[:2])}
        check_text(self.config, batch.get("text_embeds"), None)
        return batch

    def evaluation(self, source: Source, count: int) -> Iterator[Batch]:
        """The first `count` batches, always the same. If the set is smaller than a batch, they have
        as many rows as the set, or the fewest that the mesh needs. Decoded once, if they fit."""
        size = min(self.batch_size, self.layout.split_rows(len(source)))
        agreement = Agreement()
        with contextlib.ExitStack() as stack:
            host = self.kept.get(source.name)
            if host is None:
                batches = stack.enter_context(self.batches(source, size, shuffle=False))
                host = itertools.islice(batches, count)
                first = next(host)
                host = itertools.chain([first], host)
                if count * sum(x.nbytes for x in first.values()) <= KEPT_BYTES:
                    host = self.kept[source.name] = list(host)
            for batch in host:
                yield self.with_embeds(self.put(batch, size, agreement))


class Ahead(Iterator[Batch]):
    """The batches of a run on the devices, each made by a thread while the previous one is used.

    The thread decodes, tokenises and copies, but starts no computation: all processes must start
    theirs in the same order, which only the training loop ensures. `waited` is the number of
    seconds that the loop has waited for batches. Use it as a context.
    """

    def __init__(self, feed: Feed, batches: Iterator[dict]):
        self.waited = 0.0
        self._agreement = Agreement()
        self._feed, self._batches = feed, batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")

    def _make(self) -> Batch:
        return self._feed.put(next(self._batches), self._feed.batch_size, self._agreement)

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        batch = self._next.result()
        self.waited += time.perf_counter() - asked
        self._next = self._thread.submit(self._make)
        return self._feed.with_embeds(batch)

    def __enter__(self) -> "Ahead":
        self._next = self._thread.submit(self._make)
        return self

    def __exit__(self, *_) -> None:
        # Finishes the batch that is being made: other processes may wait for its length.
        self._thread.shutdown()


@functools.cache
def _padding(layout: Layout, length: int) -> Callable[[Batch], Batch]:
    """A function that pads the second axis of a batch's arrays to `length` with zeros."""

    def pad(arrays: Batch) -> Batch:
        return {
            name: jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            for name, x in arrays.items()
        }

    return jax.jit(pad, out_shardings=layout.batch)


def _stored(
    config: ImagenConfig, stage: Stage, folder: Path
) -> tuple[Embeddings, text.Identity | None]:
    """The embeddings in a folder, as the stage reads them, and the encoder that made them. Raises
    UserError if the cascade needs others."""
    embeddings = Embeddings.open(folder, padding=isinstance(stage.network, IFUnetConfig))
    form = embeddings.form
    if form.width != config.text_embed_dim:
        raise UserError(
            f"{folder} has embeddings of width {form.width}, the cascade text_embed_dim = "
            f"{config.text_embed_dim}."
        )
    if (form.keeps_padding, form.cleans) != (config.reads_padding, config.encodes_blank_text):
        raise UserError(
            f"{folder}: the captions were not encoded as this cascade reads them; encode them with "
            "`python -m imagen_jax.data.embed --config`."
        )
    return embeddings, text.read_beside([folder])


def _chosen(source: Source, settings: Data) -> Source:
    """The records with captions of `--captions-from`, and no more than `--limit`."""
    if settings.captions_from is not None:
        captions = read_lines(settings.captions_from)
        if not captions:
            raise UserError(f"--captions-from {settings.captions_from} contains no captions.")
        source = source.with_captions(captions)
        if len(source) > len(set(captions)):
            print(
                f"captions: {len(source)} pictures have the {len(set(captions))} captions of "
                f"{settings.captions_from}; all pictures with equal captions are used."
            )
    return source if settings.limit is None else source.take(settings.limit)
