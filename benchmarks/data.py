"""Speed of reading images, compared with webdataset and torch's DataLoader, and cost of an index.

    pip install webdataset
    taskset -c 0 python -m benchmarks.data            # images a second, on one core
    python -m benchmarks.data --records 10000000      # the index of a set that does not exist

Both sides read the same JPEG shards, which are made first: 512 x 384 pixels, 40 kB each. Both
decode with pillow, downscale with its bicubic filter, and crop the centre. The sides take turns,
several times; medians are printed.
"""

import argparse
import io
import json
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from imagen_jax.data import make_batches, open_source, records, tar_index
from imagen_jax.data.files import State

SHARDS, EACH, SHAPE = 4, 250, (384, 512)
BATCH, ROUNDS = 32, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--records", type=int, help="instead, measure an index of this many records"
    )
    parser.add_argument(
        "--minutes", type=float, help="instead, read for this many minutes and watch the memory"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.records:
            index(Path(folder), args.records)
            return
        make_shards(Path(folder))
        if args.minutes:
            memory(folder, args.minutes)
            return
        overhead(folder)
        for size in (64, 256):
            compare(folder, size)


def make_shards(folder: Path) -> None:
    """Smooth noise with edges, which compresses about as photographs do."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(EACH):
                coarse = rng.integers(0, 255, (24, 32, 3), np.uint8)
                picture = Image.fromarray(coarse).resize(SHAPE[::-1], Image.Resampling.BICUBIC)
                pixels = np.asarray(picture) + rng.normal(0, 6, (*SHAPE, 3))
                out = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=85)
                about = {"caption": f"picture {i} of {shard}"}
                for kind, data in (
                    ("jpg", out.getvalue()),
                    ("txt", about["caption"].encode()),
                    ("json", json.dumps(about).encode()),
                ):
                    member = tarfile.TarInfo(f"{i:09}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def ours(folder: str, size: int) -> Iterator[int]:
    source = open_source(folder, heldout_fraction=0.0)
    tokenize = lambda texts: np.zeros((len(texts), 1), np.int32)  # noqa: E731
    with make_batches(
        source, image_size=size, batch_size=BATCH, seed=0, tokenize=tokenize, threads=1,
        cache_bytes=0,
    ) as batches:  # fmt: skip
        for batch in batches:
            yield len(batch["images"])


def cover(picture: Image.Image, size: int) -> np.ndarray:
    """As a webdataset pipeline does it."""
    picture = picture.convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def theirs(folder: str, size: int) -> Iterator[int]:
    import webdataset

    urls = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .repeat()
        .shuffle(500)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(lambda picture: cover(picture, size), lambda text: text)
        .batched(BATCH)
    )
    for images, _ in pipeline:
        yield len(images)


def torchs(folder: str, size: int) -> Iterator[int]:
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __init__(self):
            self.source = open_source(folder, heldout_fraction=0.0)

        def __len__(self):
            return len(self.source)

        def __getitem__(self, i):
            record = self.source[i]
            return cover(Image.open(io.BytesIO(record.image)), size), record.caption

    while True:
        for images, _ in torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True):
            yield len(images)


SIDES = {"ours": ours, "webdataset": theirs, "torch DataLoader": torchs}


def compare(folder: str, size: int) -> None:
    opened = {name: side(folder, size) for name, side in SIDES.items()}
    for side in opened.values():
        next(side)
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(ROUNDS):
        for name, side in opened.items():
            began, count = time.perf_counter(), 0
            while count < 8 * BATCH:
                count += next(side)
            found[name].append(count / (time.perf_counter() - began))
    rates = {name: statistics.median(values) for name, values in found.items()}
    print(f"{size} pixels: " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))
    print(f"    {rates['ours'] / rates['webdataset']:.2f} times webdataset")


def overhead(folder: str) -> None:
    """What a record costs besides its decoding: the order, the tar, the caption, the batch."""
    source = open_source(folder, heldout_fraction=0.0)
    small = np.zeros((8, 8, 3), np.uint8)

    def read(i: int) -> records.Record:
        return source.read(i)._replace(image=small)

    import dataclasses

    tokenize = lambda texts: np.zeros((len(texts), 1), np.int32)  # noqa: E731
    # grain's permutation of a thousand records costs more than that of millions.
    rows = np.resize(source.rows, 10**6)
    with make_batches(
        dataclasses.replace(source, read=read, rows=rows), image_size=8, batch_size=BATCH, seed=0,
        tokenize=tokenize, threads=1, cache_bytes=0,
    ) as batches:  # fmt: skip
        next(batches)
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(100):
                next(batches)
            times.append((time.perf_counter() - began) / (100 * BATCH))
    print(f"without decoding: {1e6 * statistics.median(times):.0f} microseconds a record")


def index(folder: Path, count: int) -> None:
    """An index of `count` records in shards of 10,000, saved and opened again."""
    each = 10_000
    shards = -(-count // each)
    paths = [str(folder / f"{i:05}.tar") for i in range(shards)]
    names = [f"{i:05}/{j:09}" for i in range(shards) for j in range(each)][:count]
    numbers = np.arange(count)
    made = tar_index.Index(
        keys=records.Strings.of(names),
        hashes=records.key_hashes(names),
        shards=(numbers // each).astype(np.uint32),
        offsets={kind: numbers * 65536 for kind in ("picture", "txt", "json")},
        sizes={kind: (numbers % 65536).astype(np.uint32) for kind in ("picture", "txt", "json")},
        states=tuple(State(each * 65536, "0") for _ in paths),
        left_out={},
        damage={},
    )
    tar_index._save(folder / "kept", paths, made)
    del made, names
    size = sum(path.stat().st_size for path in (folder / "kept").iterdir())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    found = tar_index._load(folder / "kept")
    source = records.Source(
        name="synthetic",
        keys=found.keys,
        read=lambda i: records.Record(found.keys[i], b"", None),
        heldout=records.hashed_heldout(found.hashes, 0.02),
        rows=np.arange(count),
        hashes=found.hashes,
    )
    train = source.split("train")
    print(f"{count:,} records: {size / 1e6:.0f} MB on disk")
    print(f"opened and split in {time.perf_counter() - began:.2f} s ({len(train):,} to train on)")
    began = time.perf_counter()
    train.fingerprint()
    print(f"fingerprint in {time.perf_counter() - began:.2f} s")
    arrays = [*found.offsets.values(), *found.sizes.values(), found.keys.letters, found.keys.ends]
    arrays += [found.hashes, found.shards, source.heldout, source.rows, train.rows]
    print(f"{sum(array.nbytes for array in arrays) / 1e6:.0f} MB of arrays, most memory-mapped")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the process, with making it: {before // 1024} -> {after // 1024} MB")


def memory(folder: str, minutes: float) -> None:
    """Reads on, and prints the memory of the process ten times."""
    read, count, began, shown = ours(folder, 64), 0, time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < 60 * minutes:
        count += next(read)
        if passed > 6 * minutes * shown:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used = pages * resource.getpagesize() / 1e6
            print(f"{passed / 60:.1f} minutes, {count:,} images: {used:.0f} MB", flush=True)
            shown += 1


if __name__ == "__main__":
    main()
