"""The fit of a table's reference density, and of the noise at level 0, to its rows."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ddaebm_jax import reference as reference_lib
from ddaebm_jax.diffusion import Schedule

# Most rows that a mixture is fitted to, least rows for each Gaussian, the share of rows
# by whose likelihood their number is chosen, and what is added to variances.
_MAX_ROWS, _ROWS_EACH, _HELD_OUT, _LEAST_VARIANCE = 20_000, 5, 0.2, 0.01
# Noise of level 0, in units of Scott's bandwidth.
_BANDWIDTHS, _BANDWIDTH_ROWS = (0.35, 0.5, 0.75, 1.0), 1_500


def fit(
    rows: Float[np.ndarray, "n d"], schedule: Schedule, num: int
) -> reference_lib.Reference:
    """Returns the reference of a table's rows, a pure function of them.

    How many Gaussians there are, a power of 2, and whether their covariances are full
    or diagonal, is chosen by the likelihood, with the noise of level 0, of a fifth of
    the rows that they are not fitted to. The window is over at most 1,000 rows.

    Args:
      rows: standardised training rows; at most 20,000, drawn at random, are used.
      schedule: the diffusion, for the noise of level 0.
      num: most Gaussians.
    """
    rows = np.asarray(rows, np.float64)
    rng = np.random.default_rng(0)
    rows = rows[rng.permutation(len(rows))[:_MAX_ROWS]]
    cut = round(len(rows) * _HELD_OUT)
    a, s = float(schedule.a_cum[0]), float(schedule.sigma_cum[0])
    noise = rng.standard_normal((cut, rows.shape[1]))
    noisy = jnp.asarray(a * rows[:cut] + s * noise, jnp.float32)
    level = jnp.zeros(cut, jnp.int32)

    def likelihood(kind: str, k: int) -> float:
        found = reference_lib.gaussians_at_level(
            _fitted(rows[cut:], kind, k, k), schedule, level
        )
        parts = reference_lib.log_parts(found, noisy)
        return float(jax.scipy.special.logsumexp(parts, axis=1).mean())

    choices = list(_choices(len(rows) - cut, rows.shape[1], num))
    best = max(choices, key=lambda choice: likelihood(*choice)) if cut else choices[0]
    gaussians = _fitted(rows, *best, num)
    reference = reference_lib.empty(num, rows.shape[1])
    kept = rows[: reference_lib.NUM_POINTS]
    reference.points[: len(kept)] = kept
    reference.log_weights[: len(kept)] = -np.log(2 * len(kept))
    log_weights = gaussians.log_weights - np.float32(np.log(2))
    gaussians = gaussians._replace(log_weights=log_weights)
    return reference._replace(gaussians=gaussians)


def _choices(num_rows: int, dim: int, num: int) -> Iterator[tuple[str, int]]:
    yield "diag", 1
    for k in (2**power for power in range(num.bit_length())):
        if k * _ROWS_EACH <= num_rows:
            yield "diag", k
            if dim <= reference_lib.MAX_ROTATED:
                yield "full", k


def _fitted(rows: np.ndarray, kind: str, k: int, num: int) -> reference_lib.Gaussians:
    """Returns a mixture of k Gaussians fitted to rows, filled up to `num`."""
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    if len(rows) == 1:  # It takes two rows to fit.
        rows = np.repeat(rows, 2, axis=0)
    with threadpool_limits(1):
        found = GaussianMixture(
            k, covariance_type=kind, reg_covar=_LEAST_VARIANCE, random_state=0
        ).fit(rows)
    gaussians = reference_lib.empty(num, rows.shape[1]).gaussians
    gaussians.log_weights[:k] = np.log(found.weights_)
    gaussians.means[:k] = found.means_
    if kind == "full":
        gaussians.variances[:k], gaussians.axes[:k] = np.linalg.eigh(found.covariances_)
        return gaussians
    gaussians.variances[:k] = found.covariances_
    if gaussians.axes is not None:
        gaussians.axes[:] = np.eye(rows.shape[1])
    return gaussians


def bandwidth(rows: Float[np.ndarray, "n d"]) -> float:
    """Returns the noise at which a window over rows predicts each from the others best.

    It is a standard deviation in units of the columns: 0.35, 0.5, 0.75 or 1 times
    Scott's n^(−1/(d+4)), by the leave-one-out likelihood of at most 1,500 rows. Equal
    rows count once: they would be predicted best without any noise.
    """
    rows = np.unique(np.asarray(rows, np.float64), axis=0)
    num, dim = rows.shape
    scott = num ** (-1 / (dim + 4))
    if num < 2:
        return _BANDWIDTHS[-1] * scott
    chosen = np.random.default_rng(0).permutation(num)[:_BANDWIDTH_ROWS]
    left_out = rows[chosen]
    distances = (left_out**2).sum(1)[:, None] + (rows**2).sum(1)
    distances = np.maximum(distances - 2 * left_out @ rows.T, 0.0)
    distances[np.arange(len(chosen)), chosen] = np.inf

    def likelihood(factor: float) -> float:
        h = factor * scott
        logs = -distances / (2 * h**2)
        largest = logs.max(axis=1, keepdims=True)
        sums = largest[:, 0] + np.log(np.exp(logs - largest).sum(axis=1))
        return float(sums.mean() - dim * np.log(h))

    return max(_BANDWIDTHS, key=likelihood) * scott
