"""Distances between two sets of images by their features: FID, KID, precision and recall.

    FID = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))      of means m and covariances C      (1)
    KID = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = (x . y / d + 1)^3, unbiased      (2)

(1) Heusel et al. 2017. (2) Bińkowski et al. 2018. Precision and recall: Kynkäänniemi et al. 2019.
All in float64: covariances of 2048 features from few images are close to singular.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from imagen_jax.errors import UserError

Features = Float[np.ndarray, "_ d"]
ROWS = 512  # of a distance matrix, computed at once


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, and their number (None if a file does not say)."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]
    count: int | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz in the usual layout: `mu` and `sigma`."""
        extra = {} if self.count is None else {"count": np.array(self.count)}
        np.savez(path, mu=self.mean, sigma=self.covariance, **extra)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Reads an .npz of pytorch-fid, clean-fid, EDM or `save`. Raises UserError."""
        try:
            with np.load(path) as data:
                arrays = {name: data[name] for name in data.files}
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is not a statistics file: {error}") from error
        if not {"mu", "sigma"} <= arrays.keys():
            raise UserError(f"{path} must hold mu and sigma; it holds {', '.join(arrays)}.")
        mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        if covariance.shape != 2 * mean.shape:
            raise UserError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}.")
        return cls(mean, covariance, int(arrays["count"]) if "count" in arrays else None)


def statistics(batches: Iterable[Features]) -> Statistics:
    """The statistics of features that come in batches, none of which is kept.

    Sums deviations from the first batch's mean: sums of the features themselves would lose digits
    if the mean is large.
    """
    count, shift, total, squares = 0, None, 0.0, 0.0
    for batch in batches:
        batch = np.asarray(batch, np.float64)
        shift = batch.mean(0) if shift is None else shift
        deviation = batch - shift
        count += len(batch)
        total = total + deviation.sum(0)
        squares = squares + deviation.T @ deviation
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, not {count}.")
    mean = total / count
    covariance = (squares - count * np.outer(mean, mean)) / (count - 1)
    return Statistics(shift + mean, covariance, count)


def fid(one: Statistics, two: Statistics) -> float:
    """Equation (1).

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): this needs
    only symmetric roots, so that it is real and exists for singular covariances too.
    """
    if one.mean.shape != two.mean.shape:
        raise UserError(
            f"features of widths {len(one.mean)} and {len(two.mean)} cannot be compared."
        )
    roots = _root(one.covariance) @ _root(two.covariance)
    trace = np.linalg.svd(roots, compute_uv=False).sum()
    apart = np.sum((one.mean - two.mean) ** 2)
    return float(apart + np.trace(one.covariance) + np.trace(two.covariance) - 2 * trace)


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


class Kid(NamedTuple):
    """The mean over subsets, and their standard deviation."""

    mean: float
    std: float


def kid(
    one: Features, two: Features, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Kid:
    """Equation (2), over random subsets of `size` features of each, or all if there are fewer."""
    size = min(size, len(one), len(two))
    if size < 2:
        raise UserError("KID needs at least 2 images of each set.")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        parts = (x[rng.choice(len(x), size, replace=False)] for x in (one, two))
        values.append(_mmd(*parts))
    return Kid(float(np.mean(values)), float(np.std(values)))


def _mmd(one: Features, two: Features) -> float:
    """The unbiased estimate from two sets of m features."""
    m, d = one.shape
    one, two = one.astype(np.float64), two.astype(np.float64)
    kernel = lambda a, b: (a @ b.T / d + 1) ** 3  # noqa: E731
    inside = sum(
        (k.sum() - np.trace(k)) / (m * (m - 1)) for k in (kernel(x, x) for x in (one, two))
    )
    return float(inside - 2 * kernel(one, two).mean())


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(samples: Features, reference: Features, *, k: int = 3) -> PrecisionRecall:
    """The share of the samples that lie within the reference's manifold, and the reverse.

    A set's manifold is the union of the balls around its features that reach to their k-th
    neighbour in it.
    """
    if min(len(samples), len(reference)) <= k:
        raise UserError(f"precision and recall need more than {k} images of each set.")
    return PrecisionRecall(
        float(_within(samples, reference, k).mean()), float(_within(reference, samples, k).mean())
    )


def _within(points: Features, of: Features, k: int) -> Bool[np.ndarray, "n"]:
    radii = np.concatenate(
        [np.partition(_distances(of[i : i + ROWS], of), k, axis=1)[:, k] for i in _starts(of)]
    )
    return np.concatenate(
        [(_distances(points[i : i + ROWS], of) <= radii).any(1) for i in _starts(points)]
    )


def _starts(of: Features) -> range:
    return range(0, len(of), ROWS)


def _distances(a: Features, b: Features) -> Float[np.ndarray, "n m"]:
    """Squared distances from each of `a` to each of `b`."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.maximum((a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1), 0)
