"""Missing cells of a table's rows, drawn given the known ones.

Both halves of the reference density (see `reference`) have exact conditionals.
Candidates come from the one or the other and are weighted by exp of what the network
adds to log p_ref, a few nats at most, so that many of them count. How many come from
which half is chosen by the training rows that the reference holds: by the squared error
of the mean in cells that are hidden in a part of them. The density of the known cells,
which would tell it as well, prefers the window wherever a row is odd in any of its many
columns, and the window knows little of how columns depend on each other.

Known cells are exact. Draws around training rows carry the noise of level 0, the width
of the window; those of the Gaussians come without it.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import logsumexp, softmax

from ddaebm_jax import reference as reference_lib
from ddaebm_jax.data import reference_fit
from ddaebm_jax.evaluation import inference
from ddaebm_jax.evaluation.particles import systematic
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

# Candidates of every draw; parts of the training rows in which cells are hidden, and
# most rows of each; noise of known cells, which keeps matrices regular.
_CANDIDATES, _PARTS, _MOST_ROWS, _EXACT = 4, 5, 50, 0.01


class _Halves(NamedTuple):
    """The reference: Gaussians of clean rows, and windows of a width around others."""

    gaussians: reference_lib.Gaussians
    points: Float[np.ndarray, "m d"]
    width: float


def draw_cells(
    experiment: Experiment,
    variables: Players,
    rows: Float[np.ndarray, "n d"],
    known: Bool[np.ndarray, "n d"],
    num_draws: int,
    seed: int,
) -> Float[np.ndarray, "n draws d"]:
    """Returns rows whose unknown cells are draws given the known ones.

    Args:
      experiment: the trained experiment, whose energy has a reference.
      variables: of its networks.
      rows: standardised; unknown cells may hold anything.
      known: which cells are.
      num_draws: of each row.
      seed: of everything that is drawn.
    """
    num, (count, dim) = _CANDIDATES * num_draws, rows.shape
    reference = reference_lib.read(variables.energy)
    schedule = experiment.schedule
    used = np.asarray(reference.log_weights) > -1e20
    halves = _Halves(
        reference_lib.in_use(reference.gaussians),
        np.asarray(reference.points, np.float64)[used],
        float(schedule.sigma_cum[0] / schedule.a_cum[0]),
    )
    share = _share(halves, known, seed)
    found = _candidates(halves, share, rows.astype(np.float64), known, num, seed)
    drawn = np.fromiter(found, (np.float32, (num, dim)), count)
    flat = drawn.reshape(-1, dim)
    run = partial(_residual, experiment.networks)
    added = inference.by_rows(experiment, run, len(flat), (flat,), (variables.energy,))
    added = added.reshape(count, num).astype(np.float64)
    weights = np.exp(added - logsumexp(added, axis=1, keepdims=True))
    uniform = np.random.default_rng((seed, 1)).random(count)
    places = [systematic(*pair) for pair in zip(weights, uniform, strict=True)]
    order = np.random.default_rng((seed, 2)).permutation(num)[:num_draws]
    return np.stack([one[kept[order]] for one, kept in zip(drawn, places, strict=True)])


def _share(halves: _Halves, known: Bool[np.ndarray, "n d"], seed: int) -> float:
    """Returns the share of candidates that come from the Gaussians.

    Each fifth of the points is seen with the holes of some of the rows to be filled,
    by both halves of a reference of the other points. The share is that of the mean
    with the least squared error.
    """
    rng = np.random.default_rng((seed, 3))
    points = rng.permutation(halves.points)
    if len(points) < 2 * _PARTS:
        return 0.5
    products, squares = 0.0, 0.0
    for part in range(_PARTS):
        chosen = np.arange(len(points)) % _PARTS == part
        others = points[~chosen]
        gaussians = reference_fit.refitted(halves.gaussians, others)
        fitted = _Halves(gaussians, others, halves.width)
        seen_rows = rng.permutation(points[chosen])[:_MOST_ROWS]
        for row in seen_rows:
            seen = known[rng.integers(len(known))]
            logs, centres, _ = _of_gaussians(fitted, row, seen)
            of_gaussians = softmax(logs) @ centres
            of_window = (_of_window(fitted, row, seen) @ others)[~seen]
            apart = of_gaussians - of_window
            products += apart @ (row[~seen] - of_window)
            squares += apart @ apart
    return float(np.clip(products / squares, 0.0, 1.0)) if squares else 0.5


def _of_gaussians(
    halves: _Halves, row: Float[np.ndarray, " d"], seen: Bool[np.ndarray, " d"]
) -> tuple[np.ndarray, Float[np.ndarray, "k h"], Float[np.ndarray, "k h h"]]:
    """Returns log weights, means and covariances of the hidden cells."""
    log_weights, means, variances, axes = halves.gaussians
    hidden = ~seen
    if axes is None:
        terms = (row[seen] - means[:, seen]) ** 2 / variances[:, seen]
        terms = terms + np.log(2 * np.pi * variances[:, seen])
        logs = log_weights - 0.5 * terms.sum(axis=1)
        return logs, means[:, hidden], variances[:, hidden, None] * np.eye(hidden.sum())
    given = np.eye(len(row))[seen], row[seen], _EXACT
    logs, centres, rest = reference_lib.given_measurement(halves.gaussians, *given)
    return logs, centres[:, hidden], rest[:, hidden][:, :, hidden]


def _of_window(
    halves: _Halves, row: Float[np.ndarray, " d"], seen: Bool[np.ndarray, " d"]
) -> Float[np.ndarray, " m"]:
    """Returns how probable it is that each point is the one around which the row is."""
    squares = ((row[seen] - halves.points[:, seen]) ** 2).sum(axis=1)
    return softmax(-0.5 * squares / halves.width**2)


def _candidates(
    halves: _Halves,
    share: float,
    rows: Float[np.ndarray, "n d"],
    known: Bool[np.ndarray, "n d"],
    num: int,
    seed: int,
) -> Iterator[Float[np.ndarray, "num d"]]:
    """Yields draws of each row given its known cells."""
    of_gaussians = round(share * num)
    for i, (row, seen) in enumerate(zip(rows, known, strict=True)):
        rng = np.random.default_rng((seed, 0, i))
        logs, centres, covariances = _of_gaussians(halves, row, seen)
        spread = reference_lib.roots(covariances)
        eps = rng.standard_normal((num, int((~seen).sum())))
        k = rng.choice(len(logs), of_gaussians, p=softmax(logs))
        moved = np.einsum("nij,nj->ni", spread[k], eps[:of_gaussians])
        near = _of_window(halves, row, seen)
        places = rng.choice(len(near), num - of_gaussians, p=near)
        around = halves.points[places][:, ~seen] + halves.width * eps[of_gaussians:]
        drawn = np.tile(row, (num, 1))
        drawn[:, ~seen] = np.concatenate([centres[k] + moved, around])
        yield drawn


@partial(jax.jit, static_argnums=0)
def _residual(networks, places, x, energy):
    """Returns f(x, 0) − log p_ref(x_0)."""
    del places
    return networks.residual(energy, x, jnp.zeros(len(x), jnp.int32))
