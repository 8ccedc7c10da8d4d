"""Draws from the reference density given a measurement, in closed form."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from ddaebm_jax import reference
from ddaebm_jax.data.reference_fit import ADDED_VARIANCE
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players
from ddaebm_jax.restoration import Measurement


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
        row = operator.itemgetter(slice(i, i + 1))
        own = jax.tree.map(row, measurement.operator)
        matrix = np.asarray(own.apply(basis), np.float64).reshape(dim, -1).T
        given = matrix, y.reshape(-1).astype(np.float64), float(std)
        logs, means, covariances = reference.given_measurement(gaussians, *given)
        k = rng.choice(len(logs), num_draws, p=softmax(logs))
        eps = rng.standard_normal((num_draws, dim))
        moved = np.einsum("nij,nj->ni", reference.roots(covariances)[k], eps)
        drawn.append((means[k] + moved).reshape(num_draws, *shape))
    return np.array(drawn, np.float32)
