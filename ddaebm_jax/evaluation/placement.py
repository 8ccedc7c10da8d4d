"""Costs of the diffusion's steps, and levels between which they are equal.

The cost of step t is its term of the generator's variational bound (Kingma et al. 2021,
arXiv 2107.00630): E KL(q(x_t | x_{t+1}, x_0) ‖ p_φ(x_t | x_{t+1})), bounded through the
latent, where the generator's Gaussian has the variance σ̂² of its reconstruction errors:
½ D log(σ̂²/s_t²) + KL(q_ψ(z | x_t, x_{t+1}) ‖ N(0, I)).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ddaebm_jax import density, diffusion, levels, objective
from ddaebm_jax.errors import DivergedError
from ddaebm_jax.evaluation import inference, likelihood
from ddaebm_jax.evaluation.particles import row_normals
from ddaebm_jax.experiment import Experiment, with_times
from ddaebm_jax.models import Players

_SEED = 1_008
_ROWS = 4_000  # Training points that costs are measured on.


def step_costs(
    experiment: Experiment, variables: Players
) -> Float[np.ndarray, " steps"]:
    """Returns the cost of each step on training data, t = 0 … T−1, nats.

    The noise of a point depends on its place alone, so that a resumed run measures what
    an unbroken one does.
    """
    rows = likelihood.training_rows(experiment.source, _ROWS)
    schedule, key = experiment.schedule, jax.random.key(_SEED)
    step = partial(_reconstruct, experiment.networks, experiment.game.proposal)
    variables = variables._replace(energy=None)
    size, costs = math.prod(experiment.networks.event_shape), []
    for t, own in enumerate(np.asarray(schedule.posterior_var, np.float64)):
        shared = key, variables, schedule, np.int32(t)
        inputs = len(rows), (rows,), shared
        squares, divergence = inference.by_rows(experiment, step, *inputs)
        variance = squares.mean(dtype=np.float64) / size
        divergence = divergence.mean(dtype=np.float64)
        costs.append(0.5 * size * math.log(variance / own) + divergence)
    return np.array(costs)


def equal_cost_times(
    experiment: Experiment,
    variables: Players,
    num_steps: int,
    limit: float | None = None,
) -> tuple[float, ...]:
    """Returns the times τ_0 … τ_T between which all steps cost the same.

    Those of levels 0 and T stay. Of the others six digits are kept, so that they are
    alike on any device and can be read in the config.

    Args:
      experiment: with the levels that costs are measured between.
      variables: its networks.
      num_steps: T of the new levels.
      limit: most that a level moves, in log σ, from the experiment's, which must be as
        many; None: any way.

    Raises:
      DivergedError: if the costs are not finite.
    """
    process = experiment.config.diffusion
    sigma, times = noise_levels(experiment), diffusion.level_times(**process)
    costs = step_costs(experiment, variables)
    try:
        found = levels.equal_cost(sigma, costs, num_steps)
    except ValueError as error:
        raise DivergedError(
            f"levels of equal cost cannot be found: {error}; lower "
            "optimizer.learning_rate, or leave the levels where they are "
            "(diffusion.time, levels.move_at)"
        ) from error
    if limit is not None:
        found = levels.moved(sigma, found, limit)
    limits = process.variance, process.beta_min, process.beta_max
    inner = diffusion.times_of_noise(found[1:-1], *limits)
    rounded = (float(f"{time:.6g}") for time in inner)
    first, last = (float(f"{time:.12g}") for time in times[[0, -1]])
    return first, *rounded, last


def noise_levels(experiment: Experiment) -> Float[np.ndarray, " levels"]:
    """Returns σ_0 … σ_T, in units of the data, at most 80: a cosine ends in noise."""
    process = experiment.config.diffusion
    limits = process.variance, process.beta_min, process.beta_max
    sigma = diffusion.noise_of_times(diffusion.level_times(**process), *limits)
    return np.minimum(sigma, diffusion.LARGEST_NOISE)


def levels_to_report(experiment: Experiment) -> dict[str, float]:
    """Returns the noise of each level, as metrics: `levels/noise_0`, …."""
    noise = noise_levels(experiment)
    return {f"levels/noise_{k}": float(sigma) for k, sigma in enumerate(noise)}


def with_moved_levels(experiment: Experiment, variables: Players) -> Experiment:
    """Returns an experiment whose levels have moved towards equal cost.

    Each by at most `levels.move_limit` in log σ.

    Raises:
      DivergedError: if the costs are not finite.
    """
    config = experiment.config
    found = equal_cost_times(
        experiment, variables, config.diffusion.num_steps, config.levels.move_limit
    )
    return with_times(experiment, found)


# Networks are functions and so static: one program for all chunks of a run.
@partial(jax.jit, static_argnums=(0, 1))
def _reconstruct(networks, proposal, places, rows, key, variables, schedule, t):
    """Returns the squared residual of x_t, and log q_ψ(z|x_t, x_{t+1}) − log N(z)."""
    own = jax.random.fold_in(key, t)
    shapes = networks.event_shape, networks.event_shape, (networks.nz,)
    eps_t, eps, eps_z = row_normals(own, places, *shapes)
    times = jnp.full(places.shape, t)
    x_t = diffusion.diffuse(schedule, rows, times, eps_t)
    x_next, residual, log_weight = density.reconstruction_error(
        proposal, schedule, networks, variables, x_t, times, eps, eps_z
    )
    divergence = -log_weight - diffusion.log_q(schedule, x_next, x_t, times)
    return objective.sum_over_dims(residual**2), divergence
