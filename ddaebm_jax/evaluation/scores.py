"""Scores of a trained model that tell inliers from outliers, and their explanation.

A score is larger for a point that is more likely an inlier. The normalised log density
f(x, 0) − log Z is not one of them: it orders points as the energy does.

Two scores are fitted to inliers, which are then used for nothing else: `fit_rows`.
"""

from collections.abc import Callable, Collection
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, Shaped

from ddaebm_jax import diffusion, objective
from ddaebm_jax.data import Source, images, tabular, test_rows
from ddaebm_jax.data.records import Subset
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference, likelihood
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

NUM_DRAWS = 10
_FIT_SEED, _SPLIT_SEED = 1_008, 1_009
# Held-out inliers that scores are fitted to; fewer do not carry a Gaussian.
_MOST_FITTED, _LEAST_FITTED = 500, 30
# Of standardised statistics: a ridge, and where they are cut.
_RIDGE, _FARTHEST = 1e-6, 1e6

LogDensity = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, " n"]]


SCORES = "energy", "gradient norm", "energy over t", "generator bound", "multiscale"
FITTED = "generator bound", "multiscale"
# Of `--mode=score`; points in the plane are scored as tables are.
TABLE_SCORE = IMAGE_SCORE = "energy"


def fit_scores(
    experiment: Experiment,
    variables: Players,
    names: Collection[str] = SCORES,
    fitted: Shaped[np.ndarray, "m *shape"] | None = None,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
) -> Callable[[Shaped[np.ndarray, "n *shape"]], dict[str, Float[np.ndarray, " n"]]]:
    """Returns a function from points to their scores by name, in nats but the second.

    - `energy`: f(x, 0), the unnormalised log density.
    - `gradient norm`: −‖∇_x f(x, 0)‖, Euclidean over all dimensions; the approximate
      mass of Grathwohl et al. 2020 (arXiv 1912.03263), by which typical points have
      a flat density around them.
    - `energy over t`: Σ_{t=0}^{T−1} E_{q(x_t|x_0)} f(x_t, t). Each f(·, t) is known up
      to a constant: the sum ranks points, it is no log density.
    - `generator bound`: `likelihood.generator_bound`; its variances are those of the
      `fitted` points, and its noise depends on a point's number.
    - `multiscale`: the log density of a Gaussian, fitted to the `fitted` points, of
      the 2T statistics of `level_statistics` (after Mahmood et al. 2021, arXiv
      2010.13132).

    Args:
      experiment: the trained experiment.
      variables: of all three networks, usually the averages.
      names: of the scores to compute.
      fitted: inliers for the scores in `FITTED`, as of `fit_rows`; they must not be
        among those by which a score is judged.
      seed: of the noise at the levels.
      num_draws: draws of that noise, and paths of the bound.

    Raises:
      InputError: if the statistics of the `fitted` points are not finite.
    """
    model, num_steps = (experiment, variables), experiment.schedule.num_steps

    def statistics(x: np.ndarray) -> np.ndarray:
        with_norms = "multiscale" in names
        return level_statistics(*model, x, seed, num_draws, with_norms)

    def gradient_norm(x: np.ndarray) -> np.ndarray:
        gradients = inference.gradients(*model, x).reshape(len(x), -1)
        return -np.linalg.norm(gradients, axis=1)

    def generator_bound(*rows: np.ndarray) -> np.ndarray:
        rows = [inference.in_units(experiment, part) for part in rows]
        return likelihood.generator_bound(*model, *rows, num_draws)

    def score(x: np.ndarray) -> dict[str, np.ndarray]:
        if {"energy over t", "multiscale"} & set(names):
            of_levels = statistics(x)
        scores = {
            "energy": lambda: inference.energies(*model, x),
            "gradient norm": lambda: gradient_norm(x),
            "energy over t": lambda: of_levels[:, :num_steps].sum(axis=1),
            "generator bound": lambda: generator_bound(fitted, x),
            "multiscale": lambda: log_density(of_levels),
        }
        return {name: scores[name]() for name in names}

    if "multiscale" in names:
        log_density = fit_gaussian(statistics(fitted))
    return score


def level_statistics(
    experiment: Experiment,
    variables: Players,
    x: Shaped[np.ndarray, "n *shape"],
    seed: int,
    num_draws: int,
    with_norms: bool = True,
) -> Float[np.ndarray, "n statistics"]:
    """Returns E f(x_t, t) of t = 0 … T−1, nats, then E ‖∇f(x_t, t)‖ of the same t.

    Means are over `num_draws` draws of x_t, whose noise is the same for all points
    (common random numbers), so that statistics are functions of the point.
    """
    schedule, key = experiment.schedule, jax.random.key(seed)
    of_level = partial(_of_level, experiment.networks, with_norms)

    def of_rows(places: Array, part: Array, params: Any) -> Array:
        del places
        # One program for all would hold all activations, or scan, slow on a CPU.
        means = [
            sum(of_level(schedule, params, part, key, n, t) for n in range(num_draws))
            / num_draws
            for t in range(schedule.num_steps)
        ]
        return jnp.stack(means, axis=2).reshape(len(part), -1)

    rows, shared = (inference.in_units(experiment, x),), (variables.energy,)
    return inference.by_rows(experiment, of_rows, len(x), rows, shared)


# The networks are functions and so static: one program for all chunks of a run.
@partial(jax.jit, static_argnums=(0, 1))
def _of_level(networks, with_norms, schedule, params, x, key, draw, t):
    """Returns f(x_t, t) and, if asked for, ‖∇f(x_t, t)‖ of one draw: [n, 1 or 2]."""
    times = jnp.full((len(x),), t, jnp.int32)
    eps = jax.random.normal(reduce(jax.random.fold_in, (draw, t), key), x.shape[1:])
    x_t = diffusion.diffuse(schedule, x, times, jnp.broadcast_to(eps, x.shape))
    if not with_norms:
        return networks.energy(params, x_t, times)[:, None]
    f, gradient = objective.energy_and_score(
        lambda points: networks.energy(params, points, times), x_t
    )
    norm = jnp.sqrt(objective.sum_over_dims(gradient**2))
    return jnp.stack([f, norm], axis=1)


def fit_gaussian(rows: Float[np.ndarray, "n d"]) -> LogDensity:
    """Fits a Gaussian with Ledoit and Wolf's covariance (2004) to standardised rows.

    Returns a function from rows to their log densities. What is farther than a million
    standard deviations counts as that far.

    Raises:
      InputError: if a row is not finite.
    """
    from scipy import stats
    from sklearn.covariance import LedoitWolf

    rows = np.asarray(rows, np.float64)
    if not np.isfinite(rows).all():
        raise InputError(
            f"{(~np.isfinite(rows)).any(axis=1).sum()} of {len(rows)} inliers to fit "
            "the score 'multiscale' to have energies or gradients that are not finite; "
            "check the model's training, or try another --checkpoint"
        )
    mean = rows.mean(axis=0)
    std = np.maximum(rows.std(axis=0), 1e-6 * np.abs(mean))  # Above rounding.
    std = np.where(std > 0.0, std, 1.0)
    shrunk = LedoitWolf(assume_centered=True).fit((rows - mean) / std).covariance_
    gaussian = stats.multivariate_normal(cov=shrunk + _RIDGE * np.eye(len(mean)))

    def log_density(points: np.ndarray) -> np.ndarray:
        scaled = np.clip((points - mean) / std, -_FARTHEST, _FARTHEST)
        return np.atleast_1d(gaussian.logpdf(scaled)) - np.log(std).sum()

    return log_density


# Held-out inliers, split.


def fitted_places(num: int) -> Int[np.ndarray, " k"]:
    """Returns to which of `num` held-out inliers scores are fitted, ascending.

    A half, at most 500, the same for every use; none where that were fewer than 30.
    """
    size = min(num // 2, _MOST_FITTED)
    order = np.random.default_rng(_SPLIT_SEED).permutation(num)
    return np.sort(order[: size if size >= _LEAST_FITTED else 0])


def unseen_places(num: int) -> Int[np.ndarray, " k"]:
    """Returns which of `num` held-out inliers are not `fitted_places`, ascending."""
    return np.setdiff1d(np.arange(num), fitted_places(num))


def fit_rows(source: Source) -> Shaped[np.ndarray, "n *shape"]:
    """Returns the inliers that scores are fitted to.

    Draws of a distribution, `fitted_places` of other held-out inliers, or, where these
    are none, at most 500 points that training has seen.
    """
    if source.distribution is not None:
        return source.held_out(_MOST_FITTED, _FIT_SEED)
    num = _num_held_out(source)
    if len(places := fitted_places(num)):
        return _take(source, places)
    logging.info(
        "scores are fitted to training data: of %d held-out inliers half is less than "
        "%d",
        *(num, _LEAST_FITTED),
    )
    return likelihood.training_rows(source, _MOST_FITTED)


def calibration_rows(
    source: Source, most: int, name: str
) -> Shaped[np.ndarray, "n *shape"]:
    """Returns at most `most` held-out inliers that a score was not fitted to."""
    if source.distribution is not None:
        return source.held_out(most, inference.HELD_OUT_SEED)
    num = _num_held_out(source)
    places = unseen_places(num) if name in FITTED else np.arange(num)
    order = np.random.default_rng(inference.HELD_OUT_SEED).permutation(len(places))
    return _take(source, places[np.sort(order[:most])])


def _num_held_out(source: Source) -> int:
    if source.image_set is not None:
        return len(source.image_set.test)
    return len(test_rows(source.table, tabular.INLIER))


def _take(source: Source, places: np.ndarray) -> np.ndarray:
    if source.image_set is not None:
        chosen = Subset(source.image_set.test, places)
        return images.stack(chosen)
    return test_rows(source.table, tabular.INLIER)[places]


# Explanations.


def leading_columns(
    experiment: Experiment,
    variables: Players,
    rows: Float[np.ndarray, "n d"],
    num: int = 3,
) -> list[str]:
    """Returns the columns that contribute most to the energy of a table's rows.

    For each standardised row the names of the `num` columns with the largest
    |∂f(x, 0)/∂x_j|, x_j in standard deviations of the column, the largest first and
    separated by `;`.
    """
    table = experiment.source.table
    # Squares of larger numbers overflow, and gradients are NaN.
    rows = np.clip(rows, -1e9, 1e9)
    gradients = inference.gradients(experiment, variables, rows)
    if table.standardizer.whitening is not None:
        gradients = gradients @ table.standardizer.whitening.T
    first = np.argsort(-np.abs(gradients), axis=1, kind="stable")[:, :num]
    return [";".join(table.columns[j] for j in row) for row in first]
