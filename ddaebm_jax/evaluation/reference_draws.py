"""Draws from the reference density given a measurement, alone or beside others."""

from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

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

# Chains of each held-out example that say how much the generator's draws count, and
# shares of the variance that the fit adds that may be kept.
_CHAINS, _KEPT = 4, (0.1, 0.3, 1.0)


class Mix(NamedTuple):
    """How the draws of `averaged` come about.

    Attributes:
      generator: the share of them that comes from the noise space.
      kept: the share of the variance that the fit of p_ref adds to every direction
        (`reference_fit.ADDED_VARIANCE`) that is kept; smooth images vary less in most.
    """

    generator: float = 0.5
    kept: float = 1.0


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
    kept: float = 1.0,
) -> Float[np.ndarray, "n draws *shape"]:
    """Returns draws of p_ref(x_0 | y), in closed form.

    They come in pairs on both sides of a Gaussian's mean, and each Gaussian has as many
    as its weight says, so that their mean is close to E[x_0 | y].

    Args:
      experiment: the trained experiment.
      variables: those of the energy have a reference with full covariances.
      measurement: of n examples, in the networks' units.
      num_draws: of each example.
      seed: of everything that is drawn.
      kept: see `Mix`.
    """
    drawn = []
    for i, given in enumerate(_given(experiment, variables, measurement, kept)):
        (logs, means, covariances), rng = given, np.random.default_rng((seed, i))
        pairs = (num_draws + 1) // 2
        at = rng.permutation(np.arange(pairs) + rng.random()) / pairs
        k = np.searchsorted(softmax(logs).cumsum()[:-1], at)
        eps = rng.standard_normal((pairs, means.shape[1]))
        k, eps = np.tile(k, 2)[:num_draws], np.concatenate([eps, -eps])[:num_draws]
        moved = np.einsum("nij,nj->ni", reference.roots(covariances)[k], eps)
        drawn.append(means[k] + moved)
    shape = len(drawn), num_draws, *experiment.networks.event_shape
    return np.array(drawn, np.float32).reshape(shape)


def _given(
    experiment: Experiment, variables: Players, measurement: Measurement, kept: float
) -> Iterator[tuple[np.ndarray, Float[np.ndarray, "k d"], Float[np.ndarray, "k d d"]]]:
    """Yields log weights, means and covariances of p_ref(x_0 | y) of each example."""
    gaussians = reference.in_use(reference.read(variables.energy).gaussians)
    own = np.maximum(gaussians.variances - ADDED_VARIANCE, 0.0)
    gaussians = gaussians._replace(variances=own + kept * ADDED_VARIANCE)
    dim = gaussians.means.shape[1]
    basis = jnp.eye(dim).reshape(dim, *experiment.networks.event_shape)
    for i, (y, std) in enumerate(zip(*measurement[1:], strict=True)):
        row = itemgetter(slice(i, i + 1))
        operator = jax.tree.map(row, measurement.operator)
        matrix = np.asarray(operator.apply(basis), np.float64).reshape(dim, -1).T
        given = matrix, y.reshape(-1).astype(np.float64), float(std)
        yield reference.given_measurement(gaussians, *given)


def averaged(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    num_chains: int,
    seed: int,
    search: restoring.Search,
    error: Float[np.ndarray, "*shape"] | None,
    mix: Mix,
) -> Float[np.ndarray, "n draws *shape"]:
    """Returns draws of two models' posteriors: `restoring.noise_space`, and p_ref's.

    Their mean can be nearer to the truth than either's (docs/restoration.md). `mix`
    says how many come from which (see `best_mix`); for the other arguments see
    `restoring.noise_space`.
    """
    model = experiment, variables, measurement
    num = num_chains * (search.num_moves - search.num_moves // 2)
    chosen = np.linspace(0, num - 1, round(mix.generator * num)).round().astype(int)
    parts = [draws(*model, num - len(chosen), seed, mix.kept)]
    if len(chosen):
        found = restoring.noise_space(*model, num_chains, seed, search, error)
        parts.append(found[:, chosen])
    order = np.random.default_rng(seed).permutation(num)
    return np.concatenate(parts, axis=1)[:, order]


def best_mix(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    x: Float[np.ndarray, "m *shape"],
    seed: int,
    search: restoring.Search,
    error: Float[np.ndarray, "*shape"] | None = None,
) -> Mix:
    """Returns how `averaged` restores held-out data best, by their mean PSNR.

    The held-out data `x`, in the networks' units, are measured like the n examples and
    restored by both models. For the other arguments see `restoring.noise_space`.
    """
    places = np.arange(len(x)) % len(measurement.y)
    operator, std = jax.tree.map(
        itemgetter(places), (measurement.operator, measurement.std)
    )
    y = np.asarray(operator.apply(jnp.asarray(x)))
    eps = np.random.default_rng(seed).standard_normal(y.shape, np.float32)
    y = y + std.reshape(-1, *[1] * (y.ndim - 1)) * eps
    model = experiment, variables, Measurement(operator, y, std)
    first = restoring.noise_space(*model, _CHAINS, seed, search, error).mean(axis=1)
    second = {}
    for kept in _KEPT:
        means = [softmax(logs) @ means for logs, means, _ in _given(*model, kept)]
        second[kept] = np.array(means, np.float32).reshape(x.shape)

    def error_of(mix: Mix) -> float:
        mean = mix.generator * first + (1 - mix.generator) * second[mix.kept]
        squares = ((mean - x) ** 2).reshape(len(x), -1).mean(axis=1)
        return float(np.log(squares + 1e-12).mean())

    shares = np.linspace(0.0, 1.0, 21).tolist()
    return min((Mix(share, k) for share in shares for k in _KEPT), key=error_of)
