"""Draws from the reference density given a measurement, alone or beside others."""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from ddaebm_jax import reference
from ddaebm_jax.data.reference_fit import ADDED_VARIANCE
from ddaebm_jax.evaluation import restoring
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players
from ddaebm_jax.restoration import Measurement

# Chains of each held-out example that say how much the generator's draws count.
_SHARE_CHAINS = 4


def are_possible(variables: Players) -> bool:
    """Returns whether the energy has a reference with full covariances."""
    found = reference.read(variables.energy)
    return found is not None and found.gaussians.axes is not None


def draws(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    num_draws: int,
    seed: int,
) -> Float[np.ndarray, "n draws *shape"]:
    """Returns draws of p_ref(x_0 | y), in closed form.

    The variance that the fit adds to every direction is taken off but for a tenth:
    smooth images vary less in most.

    Args:
      experiment: the trained experiment.
      variables: those of the energy have a reference with full covariances.
      measurement: of n examples, in the networks' units.
      num_draws: of each example.
      seed: of everything that is drawn.
    """
    gaussians = reference.in_use(reference.read(variables.energy).gaussians)
    own = np.maximum(gaussians.variances - ADDED_VARIANCE, 0.0)
    gaussians = gaussians._replace(variances=own + 0.1 * ADDED_VARIANCE)
    shape, dim = experiment.networks.event_shape, gaussians.means.shape[1]
    basis, drawn = jnp.eye(dim).reshape(dim, *shape), []
    for i, (y, std) in enumerate(zip(*measurement[1:], strict=True)):
        rng = np.random.default_rng((seed, i))
        row = itemgetter(slice(i, i + 1))
        own = jax.tree.map(row, measurement.operator)
        matrix = np.asarray(own.apply(basis), np.float64).reshape(dim, -1).T
        given = matrix, y.reshape(-1).astype(np.float64), float(std)
        logs, means, covariances = reference.given_measurement(gaussians, *given)
        k = rng.choice(len(logs), num_draws, p=softmax(logs))
        eps = rng.standard_normal((num_draws, dim))
        moved = np.einsum("nij,nj->ni", reference.roots(covariances)[k], eps)
        drawn.append((means[k] + moved).reshape(num_draws, *shape))
    return np.array(drawn, np.float32)


def averaged(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    num_chains: int,
    seed: int,
    search: restoring.Search,
    error: Float[np.ndarray, "*shape"] | None = None,
    share: float = 0.5,
) -> Float[np.ndarray, "n draws *shape"]:
    """Returns draws of two models' posteriors: `restoring.noise_space`, and p_ref's.

    Their mean can be nearer to the truth than either's (docs/restoration.md). `share`
    of the draws come from the noise space (see `generator_share`); for the other
    arguments see `restoring.noise_space`.
    """
    model = experiment, variables, measurement
    num = num_chains * (search.num_moves - search.num_moves // 2)
    kept = np.linspace(0, num - 1, round(share * num)).round().astype(int)
    parts = [draws(*model, num - len(kept), seed)]
    if len(kept):
        found = restoring.noise_space(*model, num_chains, seed, search, error)
        parts.append(found[:, kept])
    order = np.random.default_rng(seed).permutation(num)
    return np.concatenate(parts, axis=1)[:, order]


def generator_share(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    x: Float[np.ndarray, "m *shape"],
    seed: int,
    search: restoring.Search,
    error: Float[np.ndarray, "*shape"] | None = None,
) -> float:
    """Returns the `share` of `averaged` whose mean restores held-out data best.

    They are measured as the n examples are, and restored by both models. Best is the
    largest mean PSNR: a squared error would be that of a few examples.

    Args:
      experiment: the trained experiment.
      variables: of its networks.
      measurement: of n examples.
      x: data that training did not see, in the networks' units.
      seed: of everything that is drawn.
      search: settings.
      error: τ of each pixel; see `restoring.generator_error`.
    """
    places = np.arange(len(x)) % len(measurement.y)
    operator, std = jax.tree.map(
        itemgetter(places), (measurement.operator, measurement.std)
    )
    y = np.asarray(operator.apply(jnp.asarray(x)))
    eps = np.random.default_rng(seed).standard_normal(y.shape, np.float32)
    y = y + std.reshape(-1, *[1] * (y.ndim - 1)) * eps
    model = experiment, variables, Measurement(operator, y, std)
    first = restoring.noise_space(*model, _SHARE_CHAINS, seed, search, error)
    second = draws(*model, first.shape[1], seed).mean(axis=1)
    apart = first.mean(axis=1) - second

    def error_of(share: float) -> float:
        squares = (second + share * apart - x) ** 2
        means = squares.reshape(len(x), -1).mean(axis=1)
        return float(np.log(means + 1e-12).mean())

    return min(np.linspace(0.0, 1.0, 21).tolist(), key=error_of)
