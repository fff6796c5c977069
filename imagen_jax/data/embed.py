"""Encodes the captions of a set once, for training without a text encoder.

    python -m imagen_jax.data.embed --data SRC --t5 google/t5-v1_1-xxl --out DIR
    python -m train.base --data SRC --embeddings DIR

The encoder is most of a small step and 39 % of a paper-sized one. Equal captions are stored once.
The same command resumes after an interruption, and adds captions that are new in the set. Several
machines can share the work if DIR is on a disk that all of them see: start the command once on
each, with --part 0/4 to --part 3/4.
"""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from imagen_jax import nn, storage, text
from imagen_jax.config import ImagenConfig
from imagen_jax.data import embeddings
from imagen_jax.data.embeddings import Embeddings, Form, Stored
from imagen_jax.data.sources import Opening, gathered
from imagen_jax.errors import UserError, parse, run
from imagen_jax.sharding import make_layout
from imagen_jax.unet_config import TEXT_LENGTH

SHARD_BYTES = 64 * 2**20  # about what one interruption loses
BAR_INTERVAL = 1.0  # seconds between updates of the bar
SURVEYED = 10_000  # captions from which the sizes of all are estimated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Opening):
    """Encodes the captions of a set once; `train.base --embeddings DIR` reads them."""

    data: tuple[str, ...] = dataclasses.field()
    """The images whose captions are encoded, as in training."""
    out: Path
    """Folder to write to. Captions that it already has are kept and not encoded again."""
    t5: str | None = None
    """Text encoder: folder or name of a T5, or `demo`. Default: that of --config."""
    config: Path | None = None
    """JSON file of a cascade, or a run directory: encode as this cascade does. Needed for DeepFloyd
    IF, which cleans captions and reads padding."""
    store: Stored = "bfloat16"
    """Dtype of the stored embeddings. `int8`, with a scale for each token, takes half the space of
    bfloat16; the command prints its error."""
    limit: int | None = None
    """Encode only the captions of the first N training images, the same as with training's --limit,
    and those of the held-out images."""
    batch_size: int = 64
    """Captions at once."""
    mesh: str = "auto"
    """Device mesh as DATAxMODEL, such as 8x1; `auto` uses all devices."""
    compute: str = "auto"
    """Compute dtype of the encoder; `auto` is bfloat16 on accelerators and float32 on a CPU."""
    part: str = "0/1"
    """As I/N: encode every N-th caption from the I-th on; other processes encode the others."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1.")
        if not re.fullmatch(r"\d{1,5}/\d{1,5}", self.part) or self.own[0] >= self.own[1]:
            raise UserError(f"--part {self.part}: write I/N, from 0/4 to 3/4 for four processes.")

    @property
    def own(self) -> tuple[int, int]:
        """Which part this process encodes, of how many."""
        number, count = map(int, self.part.split("/"))
        return number, count


def main() -> None:
    arguments = gathered(sys.argv[1:])
    program = "python -m imagen_jax.data.embed"
    given = parse(Settings, prog=program, description=__doc__, args=arguments)
    embed(given)


def embed(given: Settings) -> Embeddings:
    """Encodes what `given.out` does not have yet. Raises UserError if the folder is of another
    encoder, if captions cannot be encoded, or if the disk is too small."""
    folder = storage.folder(given.out)
    if storage.is_remote(folder):
        raise UserError(f"--out {folder}: must be a local folder; copy it to the store afterwards.")
    storage.check_writable(folder)
    encoder, length = _encoder(given)
    form = Form(
        width=encoder.width,
        dtype=given.store,
        keeps_padding=encoder.keeps_padding,
        cleans=encoder.cleans,
    )
    _begin(folder, form, encoder)
    there = Embeddings.open(folder)
    number, parts = given.own
    captions = [one for one in _captions(given, encoder)[number::parts] if one not in there]
    print(f"{len(there):,} captions are already stored in {folder}, {len(captions):,} are not")
    if not captions:
        return there
    per_shard = _plan(folder, form, encoder, captions)
    errors = []
    with tqdm(total=len(captions), unit="caption", mininterval=BAR_INTERVAL) as bar:
        for first in range(0, len(captions), per_shard):
            part = captions[first : first + per_shard]
            with jax.default_matmul_precision("highest"):  # float32 stays float32
                encoded, tokens = _encode(encoder, part, length, given.batch_size, bar)
            embeddings.write_shard(folder, form, part, encoded, tokens, given.own)
            errors += [_error(form, one) for one in encoded[:SURVEYED]]
    print(
        f"stored as {form.dtype}: error {100 * np.sqrt(np.mean(np.square(errors))):.2g} % "
        "(root mean square, relative to a token's norm)"
    )
    return Embeddings.open(folder)


def _encoder(given: Settings) -> tuple[text.TextEncoder, int]:
    """The encoder, and how many tokens it reads."""
    # Processes do not wait for each other: each has the devices of its own machine.
    layout = make_layout(given.mesh, rows=given.batch_size, devices=jax.local_devices())
    dtype = nn.compute_dtype(None if given.compute == "auto" else given.compute)
    if given.config is None:
        if given.t5 is None:
            raise UserError("give --t5 or --config to choose the text encoder.")
        return text.load_encoder(given.t5, dtype=dtype, layout=layout), TEXT_LENGTH
    path = storage.folder(given.config)
    data = storage.read_object(path / "config.json" if path.is_dir() else path)
    config = ImagenConfig.from_dict(data.get("imagen", data))
    encoder = text.cascade_encoder(config, name=given.t5, dtype=dtype, layout=layout)
    return encoder, config.text_len if encoder.keeps_padding else TEXT_LENGTH


def _begin(folder: epath.Path, form: Form, encoder: text.TextEncoder) -> None:
    """Writes the form and the encoder to a new folder, or checks that they match an old one's."""
    folder.mkdir(parents=True, exist_ok=True)
    with storage.alone(folder):  # every part does this
        there = embeddings.read_form(folder)
        if there is None:
            encoder.identity.write(folder)
            storage.write_text(folder / embeddings.FORM, json.dumps(form.to_dict()) + "\n")
        elif there != form:
            raise UserError(f"{folder} contains embeddings stored as {there}, not {form}.")
    encoder.identity.check(text.read_beside([folder]), f"{folder}")


def _captions(given: Settings, encoder: text.TextEncoder) -> list[str]:
    """Every caption of the set once, in order. Prints how many records have none."""
    source = given.open()
    for note in source.notes:
        print(note)
    parts = [source]
    if given.limit is not None:
        parts = [source.split("train").take(given.limit), source.split("heldout")]
    found: dict[str, None] = {"": None} if encoder.keeps_padding else {}
    without: list[str] = []
    every = itertools.chain.from_iterable(part.every_caption() for part in parts)
    for captions in tqdm(every, "captions", unit="image", mininterval=BAR_INTERVAL):
        if isinstance(captions, UserError):
            without.append(str(captions))
        else:
            found |= dict.fromkeys(captions)
    if without:
        print(f"{len(without):,} images have no caption; the first: {without[0]}")
    return list(found)


def _plan(
    folder: epath.Path, form: Form, encoder: text.TextEncoder, captions: Sequence[str]
) -> int:
    """How many captions make a shard. Prints how much space all need and checks that it is free."""
    some = captions[:: max(1, len(captions) // SURVEYED)]
    tokens = np.mean([max(1, np.count_nonzero(encoder.tokenize([one]))) for one in some])
    one = form.size(float(tokens)) + 40
    needed, free = one * len(captions), shutil.disk_usage(folder).free
    size = f"about {_bytes(needed)} in {folder}: {len(captions):,} captions of {tokens:.0f} tokens"
    if needed > free:
        raise UserError(f"{size} do not fit, {_bytes(free)} are free. --store int8 takes less.")
    print(f"{size}, {_bytes(one)} each; {_bytes(free)} are free")
    return max(1, int(SHARD_BYTES / one))


def _encode(
    encoder: text.TextEncoder, captions: Sequence[str], length: int, batch_size: int, bar: tqdm
) -> tuple[list[np.ndarray], list[int]]:
    """Embeddings of the captions, without padding unless it is kept, and their numbers of tokens.
    Captions of similar length are encoded together."""
    lengths = np.array([np.count_nonzero(encoder.tokenize([one])) for one in captions])
    encoded: list[np.ndarray] = [np.zeros(0)] * len(captions)
    tokens = [0] * len(captions)
    for rows in _batches(np.argsort(lengths, kind="stable"), batch_size):
        texts = [captions[row] for row in rows]
        # The last batch is padded, so that one compiled program is enough.
        embeds, masks = encoder(texts + texts[-1:] * (batch_size - len(texts)), length=length)
        for row, one, mask in zip(rows, embeds, masks, strict=False):
            encoded[row] = one if encoder.keeps_padding else one[mask]
            tokens[row] = int(np.count_nonzero(mask))
        bar.update(len(rows))
    return encoded, tokens


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _error(form: Form, embeds: np.ndarray) -> float:
    """Root mean square error of the stored embedding, relative to its root mean square."""
    stored = form.unpack(form.pack(embeds)).astype(np.float32)
    return float(np.linalg.norm(stored - embeds) / max(np.linalg.norm(embeds), 1e-30))


def _bytes(count: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    run(main)
