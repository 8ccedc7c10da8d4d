"""The fit of a reference density, and of a table's noise at level 0, to the data."""

import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from ddaebm_jax import reference as reference_lib
from ddaebm_jax.diffusion import Schedule

# Most rows, and most small images, that are used; least rows for each Gaussian, the
# share of rows by whose likelihood their number is chosen, what is added to variances,
# and the variance of a table's constant columns.
_MAX_ROWS, _MAX_SMALL, _ROWS_EACH, _HELD_OUT = 5_000, 20_000, 5, 0.2
ADDED_VARIANCE, _CONSTANT = 0.01, 1e-4
# Noise of level 0, in units of Scott's bandwidth.
_BANDWIDTHS = 0.35, 0.5, 0.75, 1.0
# Variances of windows around images in [−1, 1]; float32 does not do for smaller ones.
_WINDOW_VARIANCES = np.geomspace(0.01, 1.0, 17)


def fit(
    data: Float[np.ndarray, "n *shape"],
    schedule: Schedule,
    num: int,
    kind: str = "mixture",
) -> reference_lib.Reference:
    """Returns the reference of a table's rows, or of images, a pure function of them.

    How many Gaussians there are, a power of 2, and whether their covariances are full
    or diagonal, is chosen by the likelihood, with the noise of level 0, of a fifth of
    the data that they are not fitted to; so is the variance of windows around images.
    A table's window is over at most 1,000 rows.

    Args:
      data: standardised training rows, or training images in [−1, 1]; at most
        `most_fitted`, drawn at random, are used.
      schedule: the diffusion, for the noise of level 0.
      num: most Gaussians.
      kind: of images, `mixture` or `windows`.
    """
    shape = data.shape[1:]
    rows = _some(data.reshape(len(data), -1), most_fitted(shape))
    if kind == "windows":
        return _windows(rows[:num], schedule, reference_lib.empty(num, shape, kind))
    cut = round(len(rows) * _HELD_OUT)
    a, s = float(schedule.a_cum[0]), float(schedule.sigma_cum[0])
    noise = np.random.default_rng(0).standard_normal((cut, rows.shape[1]))
    noisy = jnp.asarray(a * rows[:cut] + s * noise, jnp.float32)
    level = jnp.zeros(1, jnp.int32)

    def likelihood(kind: str, k: int) -> float:
        found = reference_lib.gaussians_at_level(
            _fitted(rows[cut:], shape, kind, k, k), schedule, level
        )
        parts = reference_lib.log_parts(found, noisy)
        return float(jax.scipy.special.logsumexp(parts, axis=1).mean())

    choices = list(_choices(len(rows) - cut, shape, num))
    best = max(choices, key=lambda choice: likelihood(*choice)) if cut else choices[0]
    gaussians = _fitted(rows, shape, *best, num)
    reference = reference_lib.empty(num, shape)
    if len(shape) > 1:
        return reference._replace(gaussians=gaussians)
    kept = rows[: reference_lib.NUM_POINTS]
    reference.points[: len(kept)] = kept
    reference.log_weights[: len(kept)] = -np.log(2 * len(kept))
    log_weights = gaussians.log_weights - np.float32(np.log(2))
    gaussians = gaussians._replace(log_weights=log_weights)
    return reference._replace(gaussians=gaussians)


def most_fitted(shape: tuple[int, ...]) -> int:
    """Returns how many rows or images of a shape `fit` uses at most."""
    small = len(shape) > 1 and reference_lib.has_axes(shape)
    return _MAX_SMALL if small else _MAX_ROWS


def _windows(
    rows: np.ndarray, schedule: Schedule, empty: reference_lib.Reference
) -> reference_lib.Reference:
    """Returns equal windows around rows, filled up to as many as `empty` has."""
    cut = max(1, round(len(rows) * _HELD_OUT))
    seen = rows[cut:] if len(rows) > 1 else rows
    distances = _squared_distances(rows[:cut], seen)
    a, s = float(schedule.a_cum[0]), float(schedule.sigma_cum[0])

    def likelihood(variance: float) -> float:
        """Approximately that of noisy rows: noise moves all distances alike."""
        whole, dim = a**2 * variance + s**2, rows.shape[1]
        logs = -(a**2 * distances + dim * s**2) / (2 * whole)
        return logsumexp(logs, axis=1).mean() - dim / 2 * np.log(whole)

    empty.points[: len(rows)] = rows
    empty.log_weights[: len(rows)] = -np.log(len(rows))
    variance = max(_WINDOW_VARIANCES, key=likelihood)
    return empty._replace(variance=np.float32(variance))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    from sklearn.metrics.pairwise import euclidean_distances

    return euclidean_distances(x, y, squared=True)


def _some(rows: np.ndarray, most: int = _MAX_ROWS) -> np.ndarray:
    """Returns at most `most` rows in random order, in double precision."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:most]
    return np.asarray(rows[chosen], np.float64)


def _choices(
    num_rows: int, shape: tuple[int, ...], num: int
) -> Iterator[tuple[str, int]]:
    for k in (2**power for power in range(num.bit_length())):
        enough = k * _ROWS_EACH <= num_rows
        if enough or k == 1:
            yield "diag", k
        if enough and reference_lib.has_axes(shape):
            yield "full", k


def _fitted(
    rows: np.ndarray, shape: tuple[int, ...], kind: str, k: int, num: int
) -> reference_lib.Gaussians:
    """Returns a mixture of k Gaussians fitted to flat rows, filled up to `num`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    if len(rows) == 1:  # It takes two rows to fit.
        rows = np.repeat(rows, 2, axis=0)
    with threadpool_limits(1), warnings.catch_warnings():
        # A hundred iterations do, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = GaussianMixture(
            k, covariance_type=kind, reg_covar=ADDED_VARIANCE, random_state=0
        ).fit(rows)
    if len(shape) == 1:  # Windows add no variance to a table's constant columns.
        (at,) = np.nonzero((rows == rows[:1]).all(axis=0))
        diagonal = (at, at) if kind == "full" else (at,)
        found.covariances_[:, *diagonal] = _CONSTANT
    gaussians = reference_lib.empty(num, shape).gaussians
    gaussians.log_weights[:k] = np.log(found.weights_)
    gaussians.means[:k] = found.means_
    if kind == "full":
        gaussians.variances[:k], gaussians.axes[:k] = np.linalg.eigh(found.covariances_)
        return gaussians
    gaussians.variances[:k] = found.covariances_
    if gaussians.axes is not None:
        gaussians.axes[:] = np.eye(rows.shape[1])
    return gaussians


def refitted(
    gaussians: reference_lib.Gaussians, rows: Float[np.ndarray, "n d"]
) -> reference_lib.Gaussians:
    """Returns as many Gaussians of the same kind fitted to other rows, if they do."""
    axes = gaussians.axes
    full = axes is not None and (axes != np.eye(rows.shape[1])).any()
    k = min(len(gaussians.log_weights), max(1, len(rows) // _ROWS_EACH))
    kind = "full" if full else "diag"
    return reference_lib.in_use(_fitted(rows, rows.shape[1:], kind, k, k))


def bandwidth(rows: Float[np.ndarray, "n d"]) -> float:
    """Returns the noise at which a window over rows predicts each from the others best.

    It is a standard deviation in units of the columns: 0.35, 0.5, 0.75 or 1 times
    Scott's n^(−1/(d+4)), by the leave-one-out likelihood of the n rows of a window, at
    most 1,000. Equal rows count once: they would be predicted best without any noise.
    Constant columns do not count.
    """
    rows = np.unique(_some(rows)[:, (rows != rows[:1]).any(axis=0)], axis=0)
    order = np.random.default_rng(0).permutation(len(rows))
    rows = rows[order[: reference_lib.NUM_POINTS]]
    num, dim = rows.shape
    scott = num ** (-1 / (dim + 4))
    if num < 2:
        return _BANDWIDTHS[-1] * scott
    distances = _squared_distances(rows, rows)
    np.fill_diagonal(distances, np.inf)

    def likelihood(factor: float) -> float:
        h = factor * scott
        logs = -distances / (2 * h**2)
        return float(logsumexp(logs, axis=1).mean() - dim * np.log(h))

    # Rounded, so that the noise of a run is the same wherever it is read.
    return round(max(_BANDWIDTHS, key=likelihood) * scott, 6)
