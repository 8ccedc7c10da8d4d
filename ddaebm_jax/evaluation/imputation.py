"""Missing cells of a table's rows, drawn given the known ones.

The reference density (see `reference`) has exact conditionals. Candidates come from
them and are weighted by exp of what the network adds to log p_ref, a few nats at most,
so that many of them count: importance sampling of exp f(·, 0) given the known cells.
Known cells are taken to carry the noise of level 0. So are draws around training rows,
whose kernel it is; those of the Gaussians come without it.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import logsumexp

from ddaebm_jax import reference as reference_lib
from ddaebm_jax.evaluation import inference
from ddaebm_jax.evaluation.particles import systematic
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

# Candidates of every draw.
_CANDIDATES = 4


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
    noise = float(schedule.sigma_cum[0] / schedule.a_cum[0])
    found = _candidates(reference, rows, known, noise, num, seed)
    drawn = np.fromiter(found, (np.float32, (num, dim)), count)
    flat = drawn.reshape(-1, dim)
    run = partial(_residual, experiment.networks)
    added = inference.by_rows(experiment, run, len(flat), (flat,), (variables.energy,))
    added = added.reshape(count, num).astype(np.float64)
    weights = np.exp(added - logsumexp(added, axis=1, keepdims=True))
    uniform = np.random.default_rng((seed, 1)).random(count)
    places = [systematic(*pair) for pair in zip(weights, uniform, strict=True)]
    order = np.random.default_rng((seed, 2)).permutation(num)[:num_draws]
    return np.stack(
        [one[place[order]] for one, place in zip(drawn, places, strict=True)]
    )


def _candidates(
    reference: reference_lib.Reference,
    rows: Float[np.ndarray, "n d"],
    known: Bool[np.ndarray, "n d"],
    noise: float,
    num: int,
    seed: int,
) -> Iterator[Float[np.ndarray, "num d"]]:
    """Yields draws from p_ref of each row given its known cells."""
    points = np.asarray(reference.points, np.float64)
    log_points = np.asarray(reference.log_weights, np.float64)
    points, log_points = (leaf[log_points > -1e20] for leaf in (points, log_points))
    gaussians = reference_lib.in_use(reference.gaussians)
    log_weights, means, variances, axes = gaussians
    every = np.eye(rows.shape[1])
    for i, (row, seen) in enumerate(zip(rows.astype(np.float64), known, strict=True)):
        rng = np.random.default_rng((seed, 0, i))
        hidden = ~seen
        if axes is None:
            residual = row[seen] - means[:, seen]
            inner = variances[:, seen] + noise**2
            terms = residual**2 / inner + np.log(2 * np.pi * inner)
            logs = log_weights - 0.5 * terms.sum(axis=1)
            centres = means[:, hidden]
            spread = np.sqrt(variances[:, hidden])[:, :, None] * np.eye(hidden.sum())
        else:
            given = every[seen], row[seen], noise
            logs, centres, rest = reference_lib.given_measurement(gaussians, *given)
            centres = centres[:, hidden]
            spread = reference_lib.roots(rest[:, hidden][:, :, hidden])
        squares = ((row[seen] - points[:, seen]) ** 2).sum(axis=1) / noise**2
        log_near = -0.5 * (squares + seen.sum() * np.log(2 * np.pi * noise**2))
        total = np.concatenate([logs, log_points + log_near])
        shares = np.exp(total - logsumexp(total))
        chosen = rng.choice(len(total), num, p=shares / shares.sum())
        drawn = np.tile(row, (num, 1))
        of_gaussian = chosen < len(means)
        k = chosen[of_gaussian]
        eps = rng.standard_normal((len(k), int(hidden.sum())))
        moved = np.einsum("nij,nj->ni", spread[k], eps)
        drawn[np.ix_(of_gaussian, hidden)] = centres[k] + moved
        near = chosen[~of_gaussian] - len(means)
        eps = rng.standard_normal((len(near), int(hidden.sum())))
        drawn[np.ix_(~of_gaussian, hidden)] = points[near][:, hidden] + noise * eps
        yield drawn


@partial(jax.jit, static_argnums=0)
def _residual(networks, places, x, energy):
    """Returns f(x, 0) − log p_ref(x_0)."""
    del places
    return networks.residual(energy, x, jnp.zeros(len(x), jnp.int32))
