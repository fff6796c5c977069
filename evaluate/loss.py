"""Measures the loss of a cascade's U-Nets by noise level, on images not used in training.

    python -m evaluate.loss --checkpoint RUN --data SRC

The noise is the same for all runs, so that two runs differ only by their weights and can be
compared long before their samples look different. Losses at one noise level are comparable between
runs with the same objective; the mean over all levels only if the schedules are the same too.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import trange

import commands
from imagen_jax import checkpoint, nn, run_config, storage, text
from imagen_jax.config import NullUnetConfig
from imagen_jax.data import Opening, Source, make_batches
from imagen_jax.data.sources import gathered
from imagen_jax.errors import UserError, parse
from imagen_jax.evaluation import LOG_SNR_EDGES, bin_labels, make_eval_step
from imagen_jax.pipeline import Pipeline
from imagen_jax.sharding import make_layout
from imagen_jax.streams import stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Opening):
    """Measures the loss by noise level on held-out images."""

    data: tuple[str, ...] = dataclasses.field()
    """Images with captions, as in training; only their held-out part is used."""
    checkpoint: Path
    """Run directory of the cascade: what training calls --workdir."""
    num_images: int = 1024
    """Number of images, each at one noise level; a smaller set is reused at other levels."""
    batch_size: int = 32
    """Images per batch. Another batch size gives the images other noise."""
    weights: checkpoint.Weights = "ema"
    """`ema`: the running average of the parameters; `online`: the parameters themselves."""
    t5: str | None = None
    """Folder or name of the text encoder. Default: the cascade's text_encoder_name."""
    seed: int = 0
    """Seed of the noise."""
    mesh: str = "1x1"
    """Device mesh as DATAxMODEL, such as 8x1, or `auto` for all devices."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; `auto` is bfloat16 on accelerators and float32 on a CPU."""
    out: Path | None = None
    """Folder for loss.json. Default: evaluation in the run directory."""

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{commands.flag(name)} {getattr(self, name)}: must be at least 1.")


def main() -> None:
    given = parse(
        Settings, prog="python -m evaluate.loss", description=__doc__, args=gathered(sys.argv[1:])
    )
    run = storage.folder(given.checkpoint)
    folder = storage.folder(given.out or run / "evaluation")
    storage.check_writable(folder)
    dtype = nn.compute_dtype(None if given.dtype == "auto" else given.dtype)
    commands.use_precision(dtype)
    source = given.open("heldout")
    if not len(source):
        raise UserError(f"{source.name}: no image is held out; see --heldout-fraction.")
    pipeline = Pipeline.load(
        run,
        mesh=make_layout(given.mesh),
        dtype=dtype,
        weights=given.weights,
        t5=given.t5,
        memory="resident",
    )
    numbers = [n for n in pipeline.choices if not is_null(pipeline, n)]
    if not numbers:
        raise UserError(f"{run} has no weights.")
    if source.has_embeds:
        stored = text.stored_encoder(pipeline.config, source.name, given.folders)
        if stored is not None:
            stored.check(run_config.read_text_encoder(run), "this run")
    results = {}
    for number in numbers:
        for note in pipeline.choices[number].notes:
            print(f"note: {note}")
        results[f"unet{number}"] = losses(pipeline, number, source, given)
    print(table(results))
    folder.mkdir(parents=True, exist_ok=True)
    about = {"data": source.name, "num_images": given.num_images, "seed": given.seed}
    about["checkpoint_steps"] = {f"unet{n}": pipeline.choices[n].step for n in numbers}
    (folder / "loss.json").write_text(json.dumps(about | {"loss": results}, indent=1) + "\n")
    print(folder / "loss.json")


def is_null(pipeline: Pipeline, number: int) -> bool:
    return isinstance(pipeline.config.unets[number - 1], NullUnetConfig)


def losses(
    pipeline: Pipeline, number: int, source: Source, given: Settings
) -> dict[str, float | None]:
    """Mean losses of a U-Net: over all images, and by bin of the log-SNR."""
    config, layout = pipeline.config, pipeline.layout
    stage = config.stage(number)
    params = nn.params_of(pipeline.imagen.unets[number - 1])
    evaluate = make_eval_step(stage, pipeline.dtype, layout)
    size = layout.split_rows(given.batch_size)
    needed = not source.has_embeds or config.encodes_blank_text
    encoder = pipeline.encoder if config.condition_on_text and needed else None
    sums = counts = np.zeros(len(LOG_SNR_EDGES) + 1)
    batches = make_batches(
        source,
        image_size=stage.size,
        batch_size=size,
        seed=given.seed,
        tokenize=None if encoder is None or source.has_embeds else encoder.tokenize,
        channels=config.channels,
        shuffle=False,
        text_len=stage.network.text_len,
        rows=layout.own_rows(size),
    )
    with batches:
        for i in trange(
            math.ceil(given.num_images / size),
            desc=f"U-Net {number}",
            unit="batch",
            leave=False,
            mininterval=commands.bar_interval(),
        ):
            host = next(batches)
            if not config.condition_on_text:
                host = {"images": host["images"]}
            batch = layout.to_batch(host, size)
            if "tokens" in batch:
                embeds, masks = encoder.embed(batch.pop("tokens"), length=stage.network.text_len)
                batch |= {"text_embeds": embeds, "text_masks": masks}
            if config.encodes_blank_text:
                shape = batch["text_embeds"].shape[:2]
                batch["null_text_embeds"] = text.empty_text(encoder, *shape, layout)
            key = stream(layout.key(given.seed), "evaluation", number, i)
            more = evaluate(params, batch, key)
            sums, counts = sums + np.asarray(more[0]), counts + np.asarray(more[1])
    values: dict[str, float | None] = {"all": float(sums.sum() / counts.sum())}
    for label, total, count in zip(bin_labels(), sums, counts, strict=True):
        values[label] = float(total / count) if count else None
    return values


def table(results: dict[str, dict[str, float | None]]) -> str:
    """A row for each bin of the log-SNR, a column for each U-Net."""
    lines = [["log-SNR", *results]]
    for label in ("all", *bin_labels()):
        values = [result[label] for result in results.values()]
        lines.append([label, *("-" if value is None else f"{value:.5f}" for value in values)])
    return "\n".join("  ".join(cell.ljust(12) for cell in line).rstrip() for line in lines)


if __name__ == "__main__":
    commands.run(main)
