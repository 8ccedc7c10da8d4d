"""How far samples are from data in the features of a network: FID and its kin.

Pure functions of features and logits; where those come from is of no concern here.
Statistics are of float64. Squared distances between features are of float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Rows of a table of distances that are computed at once.
_DISTANCE_ROWS = 512


class Moments(NamedTuple):
    """Mean and scatter of points; grows by `add`.

    Attributes:
      count: of points.
      mean: of them, float64.
      scatter: Σ (x − mean)(x − mean)ᵀ, float64.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance, which divides by count − 1."""
        return self.scatter / (self.count - 1)


def moments(points: Float[np.ndarray, "n d"]) -> Moments:
    """Returns the moments of points, at least one."""
    points = np.asarray(points, np.float64)
    mean = points.mean(axis=0)
    centred = points - mean
    return Moments(len(points), mean, centred.T @ centred)


def add(first: Moments | None, second: Moments) -> Moments:
    """Returns the moments of two sets together (Chan et al. 1979); None: no points.

    Nothing large is ever subtracted, so the order of the sets changes the result by
    rounding only.
    """
    if first is None:
        return second
    count = first.count + second.count
    shift = second.mean - first.mean
    weight = first.count * second.count / count
    return Moments(
        count,
        first.mean + shift * (second.count / count),
        first.scatter + second.scatter + np.outer(shift, shift) * weight,
    )


def frechet_distance(first: Moments, second: Moments) -> float:
    """Returns the Fréchet distance of two sets of points, each taken as a Gaussian.

    |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^{1/2}), the squared 2-Wasserstein
    distance of N(μ_a, Σ_a) and N(μ_b, Σ_b) (Dowson and Landau 1982); in Inception's
    features the FID (Heusel et al. 2017). Biased upwards, more for fewer points: FIDs
    compare between equal numbers of samples only.

    Exact for singular covariances too: no product of them is ever rooted.

    Raises:
      ValueError: for fewer than two points in either, or moments that are not finite.
    """
    factors = []
    for name, one in (("first", first), ("second", second)):
        if one.count < 2:
            raise ValueError(
                f"the {name} set has {one.count} points; a covariance needs at least "
                "2: give more"
            )
        if not (np.isfinite(one.mean).all() and np.isfinite(one.scatter).all()):
            raise ValueError(
                f"the {name} set's moments are not finite; check what its features "
                "were computed from"
            )
        values, vectors = np.linalg.eigh(one.covariance)
        # Rounding leaves a singular covariance's least eigenvalues around nothing.
        factors.append(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)
    return _distance(first.mean, factors[0], second.mean, factors[1])


def frechet_distance_of_points(
    first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]
) -> float:
    """Returns `frechet_distance` of two sets of points that are held whole.

    Any number of points from two on will do, also fewer than d: the trace of the root
    comes from the points' triangular factors, no root of a covariance is taken.

    Args:
      first: points, one a row.
      second: points of the same width.

    Raises:
      ValueError: for fewer than two points in either, or one that is not finite.
    """
    means, factors = [], []
    for name, points in (("first", first), ("second", second)):
        if len(points) < 2:
            raise ValueError(
                f"the {name} set has {len(points)} points; a covariance needs at "
                "least 2: give more"
            )
        bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(points)} points of the {name} set are not finite, "
                f"the first at {bad[0]}; check what they were computed from"
            )
        points = np.asarray(points, np.float64)
        means.append(points.mean(axis=0))
        centred = (points - means[-1]) / np.sqrt(len(points) - 1)
        factors.append(np.linalg.qr(centred, mode="r"))
    return _distance(means[0], factors[0], means[1], factors[1])


def _distance(
    first_mean: np.ndarray,
    first: np.ndarray,
    second_mean: np.ndarray,
    second: np.ndarray,
) -> float:
    """Fréchet distance from means and factors, Σ_a = AᵀA and Σ_b = BᵀB."""
    # The eigenvalues of Σ_a Σ_b are those of (A Bᵀ)(A Bᵀ)ᵀ, and so their roots are
    # the singular values of A Bᵀ.
    root_trace = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    traces = (first**2).sum() + (second**2).sum()
    distance = ((first_mean - second_mean) ** 2).sum() + traces - 2.0 * root_trace
    # Rounding can leave a little less than nothing.
    return max(float(distance), 0.0)


class Score(NamedTuple):
    """An Inception score.

    Attributes:
      mean: over the splits.
      std: over the splits.
    """

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n classes"], num_splits: int = 10
) -> Score:
    """Returns exp E KL(p(y|x) ‖ p(y)) over splits: mean and standard deviation.

    Salimans et al. 2016, eq. 1; consecutive splits as there, the standard deviation
    dividing by their number.

    Args:
      logits: of a classifier, on samples in random order.
      num_splits: of the samples, of equal size but for one.

    Raises:
      ValueError: for fewer samples than splits.
    """
    if len(logits) < num_splits:
        raise ValueError(
            f"there are {len(logits)} samples for {num_splits} splits of the Inception "
            "score; draw more samples"
        )
    scores = []
    for part in np.array_split(np.asarray(logits), num_splits):
        part = part.astype(np.float64)
        log_p = part - part.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        marginal = p.mean(axis=0, keepdims=True)
        # Where p is 0, p log p is too; there log_p is finite, so no care is needed.
        log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


class KernelDistance(NamedTuple):
    """A kernel Inception distance.

    Attributes:
      value: the mean over subsets.
      error: its standard error; None where there is one subset only.
    """

    value: float
    error: float | None


def kernel_distance(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    subset_size: int = 1_000,
    most_subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Returns the kernel Inception distance and its standard error.

    The unbiased squared maximum mean discrepancy with k(a, b) = (a·b/d + 1)³ (Bińkowski
    et al. 2018), the mean over subsets. It can be negative. Subsets are disjoint, so
    that they are independent and their scatter tells the mean's error.

    Args:
      real: features of data.
      fake: features of samples.
      subset_size: points a subset; less where there are fewer.
      most_subsets: of either set; less where the points do not suffice.
      seed: of the subsets.

    Raises:
      ValueError: for fewer than two points in either set.
    """
    least = min(len(real), len(fake))
    size = min(subset_size, least)
    if size < 2:
        raise ValueError(
            f"there are {len(real)} real and {len(fake)} generated features; the "
            "kernel distance needs at least 2 of each"
        )
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(points)) for points in (real, fake)]
    distances = []
    for start in range(0, size * min(most_subsets, least // size), size):
        a, b = (
            points[order[start : start + size]].astype(np.float64)
            for points, order in zip((real, fake), orders, strict=True)
        )
        distances.append(_unbiased_mmd(a, b))
    error = None
    if len(distances) > 1:
        error = float(np.std(distances, ddof=1) / np.sqrt(len(distances)))
    return KernelDistance(float(np.mean(distances)), error)


def _unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        table = kernel(x, x)
        return (table.sum() - np.trace(table)) / (len(x) * (len(x) - 1))

    return mean_of_pairs(a) + mean_of_pairs(b) - 2.0 * kernel(a, b).mean()


class Neighbours(NamedTuple):
    """Figures of two sets' supports, each told by its points' neighbours.

    Attributes:
      precision: share of the samples that lie within the data's support.
      recall: share of the data that lie within the samples' support (Kynkäänniemi et
        al. 2019).
      density: number of the data's balls around a sample, over k; 1 on average for
        equal distributions.
      coverage: share of the data's balls that hold a sample (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    k: int = 3,
    k_coverage: int = 5,
) -> Neighbours:
    """Returns precision, recall, density and coverage.

    A set's support is the union of balls around its points, each reaching to the
    point's k-th nearest neighbour in the set.

    Args:
      real: features of data.
      fake: features of samples.
      k: of precision and recall; 3 as in Kynkäänniemi et al.
      k_coverage: of density and coverage; 5 as in Naeem et al.

    Raises:
      ValueError: for at most k points in either set.
    """
    least = max(k, k_coverage) + 1
    if min(len(real), len(fake)) < least:
        raise ValueError(
            f"there are {len(real)} real and {len(fake)} generated features; at least "
            f"{least} of each are needed for their {least - 1} nearest neighbours"
        )
    # Distances do not depend on the origin, and near it they are rounded least.
    origin = np.asarray(real, np.float64).mean(axis=0)
    a, b = (jnp.asarray(np.asarray(x) - origin, jnp.float32) for x in (real, fake))
    real_radii = _radii(a, (k, k_coverage))
    fake_radii = _radii(b, (k,))
    in_real, density, covered = [], [], np.zeros(len(real), bool)
    for rows in _chunks(b):
        near = _squared_distances(rows, a)
        in_real.append(np.asarray((near <= real_radii[0]).any(axis=1)))
        inside = near <= real_radii[1]
        density.append(np.asarray(inside.sum(axis=1)))
        covered |= np.asarray(inside.any(axis=0))
    in_fake = [
        np.asarray((_squared_distances(rows, b) <= fake_radii[0]).any(axis=1))
        for rows in _chunks(a)
    ]
    return Neighbours(
        precision=_mean(in_real),
        recall=_mean(in_fake),
        density=_mean(density) / k_coverage,
        coverage=float(covered.mean()),
    )


def _mean(parts: list[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean(dtype=np.float64))


def _chunks(points: Array) -> list[Array]:
    return [
        points[start : start + _DISTANCE_ROWS]
        for start in range(0, len(points), _DISTANCE_ROWS)
    ]


@jax.jit
def _squared_distances(
    a: Float[Array, "n d"], b: Float[Array, "m d"]
) -> Float[Array, "n m"]:
    inner = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * inner


def _radii(points: Float[Array, "n d"], ks: tuple[int, ...]) -> list[Array]:
    """Squared distances to the k-th nearest other point, each [1, n]."""
    found, start = [], 0
    for rows in _chunks(points):
        own = jnp.arange(start, start + len(rows))
        distances = _without_self(_squared_distances(rows, points), own)
        found.append(-jax.lax.top_k(-distances, max(ks))[0])
        start += len(rows)
    nearest = jnp.concatenate(found)
    return [nearest[None, :, k - 1] for k in ks]


@jax.jit
def _without_self(
    distances: Float[Array, "n m"], own: Int[Array, " n"]
) -> Float[Array, "n m"]:
    return jnp.where(
        own[:, None] == jnp.arange(distances.shape[1])[None, :], jnp.inf, distances
    )
