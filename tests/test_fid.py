"""Metrics of features: against closed forms, other implementations, and each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from ddaebm_jax.evaluation import fid


def normals(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def gaussian(seed: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """A mean and a covariance far from a multiple of the identity."""
    factor = normals(seed, dim, dim) * np.geomspace(0.01, 3.0, dim)
    return normals(seed + 1, dim), factor @ factor.T


def textbook(first, second) -> float:
    """The formula of Heusel et al. 2017, its root by SciPy."""
    root = linalg.sqrtm(first[1] @ second[1])
    traces = np.trace(first[1] + second[1] - 2.0 * np.real(root))
    return float(((first[0] - second[0]) ** 2).sum() + traces)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10**6))
def test_moments_are_numpys_whatever_the_batches(sizes: list[int], seed: int):
    # A large mean: sums of squares would lose nine digits to it.
    points = (normals(seed, sum(sizes), 4) + 1e4).astype(np.float32)
    parts = np.split(points, np.cumsum(sizes)[:-1])
    np.random.default_rng(seed).shuffle(parts)
    total = None
    for part in parts:
        total = fid.add(total, fid.moments(part))
    points = points.astype(np.float64)
    scatter = len(points) * np.cov(points, rowvar=False, bias=True)
    assert total.count == len(points)
    np.testing.assert_allclose(total.mean, points.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.scatter, scatter, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_frechet_distance_is_the_textbooks(seed: int, dim: int):
    pair = gaussian(seed, dim), gaussian(seed + 7, dim)
    a, b = (fid.Moments(1_001, mean, 1_000 * covariance) for mean, covariance in pair)
    found = fid.frechet_distance(a, b)
    assert found == pytest.approx(textbook(*pair), rel=1e-5, abs=1e-6)
    assert fid.frechet_distance(b, a) == pytest.approx(found, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("num", [2, 5, 40])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_frechet_distance_of_singular_covariances(num: int, spread: float):
    """Fewer points than columns: a copy, a shift and an enlargement are exact."""
    points = spread * normals(num, num, 20)
    power = points.var(axis=0, ddof=1).sum()
    shift = spread * normals(num + 1, 20)
    centre = points.mean(axis=0)
    for other, expected in (
        (points, 0.0),
        (points + shift, shift @ shift),
        (centre + 3 * (points - centre), 4 * power),
    ):
        found = fid.frechet_distance(fid.moments(points), fid.moments(other))
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * power)


def test_inception_score_by_hand():
    logits = normals(1, 47, 5).astype(np.float32)
    scores = []
    for part in np.array_split(logits.astype(np.float64), 10):
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        divergence = (p * np.log(p / p.mean(axis=0, keepdims=True))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    found = fid.inception_score(logits)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert found.std == pytest.approx(np.std(scores), rel=1e-8)
    sure = 60.0 * np.eye(5, dtype=np.float32)
    # Each split sees every class as often, or one class only.
    assert fid.inception_score(np.tile(sure, (20, 1))) == pytest.approx((5.0, 0.0))
    assert fid.inception_score(sure[:1].repeat(40, axis=0)).mean == pytest.approx(1.0)
    # An offset of all logits, however large, says nothing.
    assert fid.inception_score(logits + 1e4).mean == pytest.approx(found.mean, rel=1e-2)


def test_kernel_distance_by_hand():
    """Of one subset that is the whole sets, against sums over pairs."""
    a, b = normals(0, 7, 3), normals(1, 7, 3) + 0.5

    def kernel(x, y):
        return (x @ y / 3 + 1.0) ** 3

    own = [
        np.mean([kernel(s[i], s[j]) for i in range(7) for j in range(7) if i != j])
        for s in (a, b)
    ]
    cross = np.mean([kernel(x, y) for x in a for y in b])
    found = fid.kernel_distance(a, b, subset_size=7)
    assert found.value == pytest.approx(sum(own) - 2 * cross, rel=1e-10)
    assert found.error is None  # One subset does not tell it.


def test_kernel_distance_is_unbiased():
    """Of equal distributions it is nothing on average, for small sets too."""
    found = [
        fid.kernel_distance(normals(2 * i, 20, 4), normals(2 * i + 1, 20, 4)).value
        for i in range(1_000)
    ]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    # The biased estimate, with the pairs of a point and itself, would be seen.
    self_pairs = np.mean([((x @ x) / 4 + 1) ** 3 for x in normals(0, 500, 4)])
    assert error < 0.07 * self_pairs * 2 / 20


def test_kernel_distance_knows_its_error():
    """Over data sets drawn anew, against the error that each of them reports."""
    pairs = ((normals(2 * i, 400, 4), normals(2 * i + 1, 400, 4)) for i in range(100))
    found = [fid.kernel_distance(a, b + 0.3, 40) for a, b in pairs]
    scatter = np.std([one.value for one in found])
    reported = np.sqrt(np.mean([one.error**2 for one in found]))
    assert reported == pytest.approx(scatter, rel=0.3)


def test_neighbours_of_one_cloud_and_of_two():
    cloud = normals(0, 400, 5)
    assert fid.neighbours(cloud, cloud) == (1.0, 1.0, pytest.approx(1.2), 1.0)
    assert fid.neighbours(cloud, cloud + 100.0) == (0.0, 0.0, 0.0, 0.0)
    equal = fid.neighbours(normals(1, 3_000, 3), normals(2, 3_000, 3))
    assert equal.density == pytest.approx(1.0, abs=0.05)
    # The chance that one of k balls' worth of points falls in: 1 − 2^−k (Naeem).
    assert equal.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_neighbours_in_chunks_and_far_from_the_origin(monkeypatch: pytest.MonkeyPatch):
    real, fake = normals(0, 50, 6), normals(1, 40, 6) + 0.3
    whole = fid.neighbours(real, fake)
    assert fid.neighbours(real + 1e3, fake + 1e3) == whole
    monkeypatch.setattr(fid, "_DISTANCES_MIB", 7 * 40 * 8 / 2**20)
    assert fid.neighbours(real, fake) == whole
