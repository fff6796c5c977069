"""Distances of feature sets against their definitions, written again, and closed forms."""

import numpy as np
import pytest
import scipy.linalg

from imagen_jax.errors import UserError
from imagen_jax.metrics import fid
from imagen_jax.metrics.fid import Statistics


def features(count: int, seed: int, d: int = 24, mean: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(seed // 10).normal(size=(d, d)) / d**0.5
    return (rng.normal(size=(count, d)) @ mix + mean).astype(np.float32)


def reference_fid(one: np.ndarray, two: np.ndarray) -> float:
    """As pytorch-fid computes it: scipy's root of the product of the covariances."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (one, two))
    root = scipy.linalg.sqrtm(c1.dot(c2)).real
    return (m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(root)


@pytest.mark.parametrize("count", [500, 25])
def test_fid_is_the_reference_implementations(count):
    one, two = features(count, 0).astype(np.float64), features(count, 11, mean=0.3)
    two = two.astype(np.float64)
    ours = fid.fid(*(fid.statistics([x]) for x in (one, two)))
    np.testing.assert_allclose(ours, reference_fid(one, two), rtol=1e-5)


def test_fid_of_gaussians_with_diagonal_covariances():
    """sum (m1 - m2)^2 + sum (s1 - s2)^2; singular ones included, and 0 of a set with itself."""
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.uniform(0, 2, (4, 12))
    s1[:5] = 0
    one, two = Statistics(m1, np.diag(s1**2)), Statistics(m2, np.diag(s2**2))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    np.testing.assert_allclose(fid.fid(one, two), expected, rtol=1e-10)
    assert abs(fid.fid(one, one)) < 1e-10
    few = fid.statistics([features(10, 0)])  # of rank 9
    assert abs(fid.fid(few, few)) < 1e-5


def test_statistics_do_not_depend_on_the_batches():
    """Nor on a large mean, which sums of squares would not survive in float32."""
    x = features(300, 0, mean=1000.0)
    whole = fid.statistics([x])
    parts = fid.statistics(np.split(x, [1, 7, 120]))
    for found in (whole, parts):
        np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-12)
        expected = np.cov(x.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(found.covariance, expected, atol=1e-9)
    assert parts.count == 300
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        fid.statistics([x[:1]])


def test_files_are_the_communitys(tmp_path):
    found = fid.statistics([features(50, 0)])
    found.save(tmp_path / "a.npz")
    again = Statistics.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.covariance, found.covariance)
    assert again.count == 50
    np.savez(tmp_path / "other.npz", mu=found.mean, sigma=found.covariance)
    assert Statistics.load(tmp_path / "other.npz").count is None
    np.savez(tmp_path / "bad.npz", mean=found.mean)
    with pytest.raises(UserError, match="must hold mu and sigma; it holds mean"):
        Statistics.load(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match="is not a statistics file"):
        Statistics.load(tmp_path / "text.npz")


def test_kid_is_the_unbiased_estimate():
    """Of all pairs, by loops; its mean over sets of one distribution is 0."""
    one, two = features(8, 0, d=3), features(8, 11, d=3)
    k = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    expected = sum(k(one[i], one[j]) + k(two[i], two[j]) for i, j in pairs) / len(pairs)
    expected -= 2 * np.mean([k(x, y) for x in one for y in two])
    found = fid.kid(one, two, subsets=1)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)
    same = [fid.kid(features(64, 2 * i), features(64, 2 * i + 1), subsets=1).mean for i in range(5)]
    far = fid.kid(features(64, 0), features(64, 1, mean=0.5), subsets=1).mean
    assert abs(np.mean(same)) < far / 10
    first = fid.kid(features(64, 0), features(64, 1), subsets=4, size=32)
    assert first == fid.kid(features(64, 0), features(64, 1), subsets=4, size=32)


def test_precision_and_recall_by_brute_force(monkeypatch):
    monkeypatch.setattr(fid, "ROWS", 7)  # in blocks
    samples, reference = features(40, 0, d=4), features(60, 1, d=4, mean=0.7)

    def share(points, of):
        distance = lambda a, b: np.linalg.norm(a.astype(np.float64) - b)  # noqa: E731
        radii = [sorted(distance(x, y) for y in of)[3] for x in of]  # 0 is itself
        return np.mean(
            [any(distance(p, x) <= r for x, r in zip(of, radii, strict=True)) for p in points]
        )

    found = fid.precision_recall(samples, reference)
    assert found == (share(samples, reference), share(reference, samples))
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    assert fid.precision_recall(samples, samples) == (1, 1)
    assert fid.precision_recall(samples, reference + 100) == (0, 0)
    with pytest.raises(UserError, match="more than 3 images"):
        fid.precision_recall(samples[:3], reference)
