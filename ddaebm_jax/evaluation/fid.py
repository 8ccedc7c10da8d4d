"""FID and its kin: distances between sets of features.

Pure functions of features and logits, whatever network they come from; float64.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Disjoint subsets of the kernel distance.
_SUBSET_SIZE, _MAX_SUBSETS = 1_000, 100
# Nearest neighbours: of precision and recall, as Kynkäänniemi et al. 2019; of density
# and coverage, as Naeem et al. 2020.
_K, MOST_NEIGHBOURS = 3, 5
# Memory of the distances that are held at once.
_DISTANCES_MIB = 128


class Moments(NamedTuple):
    """Number, mean and scatter Σ (x − mean)(x − mean)ᵀ of points, in float64."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance, which divides by count − 1."""
        return self.scatter / (self.count - 1)


def moments(points: Float[np.ndarray, "n d"]) -> Moments:
    """Returns the moments of at least one point."""
    points = np.asarray(points, np.float64)
    mean = points.mean(axis=0)
    centred = points - mean
    return Moments(len(points), mean, centred.T @ centred)


def add(first: Moments | None, second: Moments) -> Moments:
    """Returns the moments of two sets together (Chan et al. 1979); None: no points.

    Free of cancellation: the order of the sets changes the result by rounding only.
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
    compare between equal numbers of samples only. Singular covariances are allowed;
    either set needs at least two points.
    """
    factors = []
    for one in (first, second):
        values, vectors = np.linalg.eigh(one.covariance)
        # Rounding can make eigenvalues of a singular covariance negative.
        factors.append(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)
    # With Σ_a = AᵀA and Σ_b = BᵀB the eigenvalues of Σ_a Σ_b are the squared singular
    # values of A Bᵀ. Unlike scipy.linalg.sqrtm this never roots a singular product.
    a, b = factors
    root_trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    traces = (a**2).sum() + (b**2).sum()
    distance = ((first.mean - second.mean) ** 2).sum() + traces - 2.0 * root_trace
    return max(float(distance), 0.0)


class Score(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n classes"], num_splits: int = 10
) -> Score:
    """Returns exp E KL(p(y|x) ‖ p(y)) over splits (Salimans et al. 2016, eq. 1).

    Logits are of samples in random order, at least one a split; splits are consecutive.
    """
    from scipy.special import log_softmax, logsumexp

    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), num_splits):
        log_p = log_softmax(part, axis=1)
        log_marginal = logsumexp(log_p, axis=0) - np.log(len(part))
        divergences = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


class KernelDistance(NamedTuple):
    """A kernel Inception distance, and its standard error; None for one subset."""

    value: float
    error: float | None


def kernel_distance(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    subset_size: int = _SUBSET_SIZE,
    seed: int = 0,
) -> KernelDistance:
    """Returns the kernel Inception distance and its standard error.

    The unbiased squared maximum mean discrepancy with k(a, b) = (a·b/d + 1)³ (Bińkowski
    et al. 2018), averaged over at most 100 random subsets; it can be negative. Subsets
    are disjoint and so independent: their scatter gives the mean's error. Either set
    needs at least two points.
    """
    least = min(len(real), len(fake))
    size = min(subset_size, least)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(points)) for points in (real, fake)]
    distances = []
    for start in range(0, size * min(_MAX_SUBSETS, least // size), size):
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
    """Overlap of the supports of two sets, estimated from nearest neighbours.

    Attributes:
      precision: share of the samples within the data's support.
      recall: share of the data within the samples' support (Kynkäänniemi et al. 2019).
      density: number of the data's balls around a sample, over k; 1 on average for
        equal distributions.
      coverage: share of the data's balls that hold a sample (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"]
) -> Neighbours:
    """Returns precision and recall (k = 3), density and coverage (k = 5).

    A set's support is the union of balls around its points, each reaching to the
    point's k-th nearest neighbour in the set.

    Raises:
      ValueError: for at most 5 points in either set.
      ModuleNotFoundError: without scikit-learn.
    """
    from sklearn.metrics import pairwise_distances_chunked

    # Squared distances are differences of squares: near the origin they round least.
    origin = np.mean(real, axis=0, dtype=np.float64)
    real, fake = real - origin, fake - origin
    radius, coverage_radius = _radii(real, (_K, MOST_NEIGHBOURS))
    (fake_radius,) = _radii(fake, (_K,))
    precise, recalled = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    covered, num_inside, start = np.zeros(len(real), bool), 0, 0
    chunks = pairwise_distances_chunked(real, fake, working_memory=_DISTANCES_MIB)
    for distances in chunks:
        rows = slice(start, start + len(distances))
        precise |= (distances <= radius[rows, None]).any(axis=0)
        recalled[rows] = (distances <= fake_radius).any(axis=1)
        inside = distances <= coverage_radius[rows, None]
        covered[rows] = inside.any(axis=1)
        num_inside += inside.sum()
        start = rows.stop
    return Neighbours(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=float(num_inside / (MOST_NEIGHBOURS * len(fake))),
        coverage=float(covered.mean()),
    )


def _radii(
    points: Float[np.ndarray, "n d"], ks: tuple[int, ...]
) -> Float[np.ndarray, "radii n"]:
    """Returns each point's distance to its k-th nearest other point, for each k."""
    from sklearn.metrics import pairwise_distances_chunked

    # Place 0 is the point itself, at a distance of exactly 0.
    chunks = pairwise_distances_chunked(
        points,
        reduce_func=lambda table, _: np.partition(table, ks, axis=1)[:, ks],
        working_memory=_DISTANCES_MIB,
    )
    return np.concatenate(list(chunks)).T
