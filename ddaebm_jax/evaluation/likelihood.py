"""Likelihoods of a trained model, beside baselines, the truth and its own bound.

The mathematics is in `density`; rows are taken in chunks over the mesh.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float
from scipy.special import logsumexp

from ddaebm_jax import density, diffusion, objective
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import detectors, inference, plane
from ddaebm_jax.evaluation.particles import measure, proposal_noise, row_normals
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

_PATHS_SEED, _CONSISTENCY_SEED, _TRAIN_SEED = 1_005, 1_006, 1_007
# Most rows that likelihoods are measured on, and that baselines are fitted to.
_MOST_ROWS = 10_000


def metrics(experiment: Experiment, variables: Players) -> dict[str, Any]:
    """Returns log Z and likelihoods of a model in the plane or of a table, nats.

    Likelihoods are means over held-out data, per row in the data's own units, beside
    those of baselines that were tuned on training data, and in the plane of the truth.
    Where too few particles count the likelihood is left out, and `refused` says why.
    """
    source = experiment.source
    shift = 0.0 if source.table is None else source.table.standardizer.log_det
    held_out = _some(source.held_out(_MOST_ROWS, inference.HELD_OUT_SEED))
    if source.distribution is None:
        train = _some(source.table.train)
    else:
        train = source.held_out(_MOST_ROWS, _TRAIN_SEED)
    samples, found = measure(experiment, variables)
    figures: dict[str, Any] = {
        "log_z": found.log_z,
        "log_z_error": found.error,
        "effective_share": list(found.effective),
        "consistency": list(consistency(experiment, variables, held_out)),
    }
    if found.acceptance is not None:
        figures["langevin_acceptance"] = list(found.acceptance)

    def add(name: str, log_densities: np.ndarray, error: float = 0.0) -> None:
        values = np.asarray(log_densities, np.float64) + shift
        spread = values.std() / math.sqrt(len(values))
        figures[f"log_likelihood{name}"] = float(values.mean())
        figures[f"log_likelihood{name}_error"] = math.hypot(spread, error)

    if found.refusal is None:
        f = inference.energies(experiment, variables, held_out)
        add("", f - found.log_z, found.error)
    else:
        figures["log_likelihood_refused"] = found.refusal
    add("_bound", generator_bound(experiment, variables, train, held_out))
    if source.distribution is not None:
        truth = source.distribution
        points = density.grid_points(truth.extent, truth.cells)
        log_p = inference.energies(experiment, variables, points)
        area = (2.0 * truth.extent / truth.cells) ** 2
        log_sum = logsumexp(log_p.astype(np.float64))
        if truth.modes is not None:
            coverage = plane.mode_coverage(samples, truth.modes, truth.mode_std)
            figures["energy_samples_high_quality"] = coverage.high_quality
        figures["log_z_quadrature"] = float(log_sum + math.log(area))
        of_truth = density.evaluate_in_chunks(jax.jit(truth.log_density), held_out)
        add("_true", of_truth)
    try:
        fitted = detectors.density_baselines(train, experiment.config.seed)
    except InputError as error:
        logging.warning("no density baselines: %s", error)
        return figures
    for name, log_density in fitted.items():
        add(f"_{name}", log_density(held_out))
    return figures


def _some(rows: np.ndarray) -> np.ndarray:
    """Returns at most `_MOST_ROWS` of the rows, chosen at random."""
    order = np.random.default_rng(_TRAIN_SEED).permutation(len(rows))
    return rows[np.sort(order[:_MOST_ROWS])]


def consistency(
    experiment: Experiment, variables: Players, rows: np.ndarray, num_draws: int = 64
) -> tuple[float, ...]:
    """Returns how far the T energies are from describing one process, by level.

    For t = 0 … T−1 the standard deviation over x_{t+1}, nats, of
    log ∫ exp f(x, t) q(x_{t+1}|x) dx − f(x_{t+1}, t+1), which is constant if they do.
    The integral is estimated by `num_draws` draws; x_{t+1} are diffused `rows`.
    """
    values = []
    for t in range(experiment.schedule.num_steps):
        step = partial(
            _marginal_gap, experiment.networks, experiment.game.proposal, num_draws
        )
        key = jax.random.key(_CONSISTENCY_SEED)
        shared = key, variables, experiment.schedule, np.int32(t)
        gaps = inference.by_rows(experiment, step, len(rows), (rows,), shared)
        values.append(float(gaps.std(dtype=np.float64)))
    return tuple(values)


def generator_bound(
    experiment: Experiment,
    variables: Players,
    train_rows: np.ndarray,
    rows: np.ndarray,
    num_paths: int = 64,
) -> Float[np.ndarray, " n"]:
    """Returns a lower bound on log p_φ(x) of each row, nats, without a normaliser.

    The bound of K paths, E log (1/K)Σ w, of which one draw is returned. The variances
    of the generator's Gaussians are fitted to its reconstruction errors on
    `train_rows`.
    """
    key = jax.random.key(_PATHS_SEED)
    networks, schedule = experiment.networks, experiment.schedule
    common = partial(_path, networks, experiment.game.proposal)
    num_steps = schedule.num_steps
    unit = np.zeros(num_steps, np.float32)
    shared = key, variables, schedule, unit, np.int32(0)
    squares, _ = inference.by_rows(
        experiment, common, len(train_rows), (train_rows,), shared
    )
    log_var = np.log(squares.mean(axis=0) / math.prod(networks.event_shape))
    total = np.full(len(rows), -np.inf)
    for path in range(num_paths):
        shared = key, variables, schedule, log_var, np.int32(path + 1)
        _, log_weight = inference.by_rows(
            experiment, common, len(rows), (rows,), shared
        )
        total = np.logaddexp(total, log_weight)
    return total - math.log(num_paths)


# Networks are functions and so static: one program for all chunks of a run.


@partial(jax.jit, static_argnums=(0, 1, 2))
def _marginal_gap(
    networks, proposal, num_draws, places, x, key, variables, schedule, t
):
    times = jnp.full(places.shape, t)
    (eps,) = row_normals(key, places, networks.event_shape)
    x_next = diffusion.diffuse(schedule, inference.as_float(x), times + 1, eps)
    f_next = networks.energy(variables.energy, x_next, times + 1)
    is_last = t + 1 == schedule.num_steps
    f_next = jnp.where(is_last, objective.log_standard_normal(x_next), f_next)

    def add(total, number):
        own = jax.random.fold_in(jax.random.fold_in(key, 1 + number), t)
        noise = proposal_noise(networks, proposal, own, places)
        move = density.denoise_weighted(
            proposal, schedule, networks, variables, x_next, f_next, times, noise
        )
        return jnp.logaddexp(total, move.log_weight), None

    zero = jnp.full(places.shape, -jnp.inf)
    total, _ = jax.lax.scan(add, zero, jnp.arange(num_draws))
    return total - jnp.log(num_draws)


@partial(jax.jit, static_argnums=(0, 1))
def _path(networks, proposal, places, x, key, variables, schedule, log_var, number):
    """Returns squared residuals by t and the log weight of one path from each row."""
    x = inference.as_float(x)
    log_weight, squares = jnp.zeros(places.shape), []
    for t in range(schedule.num_steps):
        own = jax.random.fold_in(jax.random.fold_in(key, number), t)
        eps, eps_z = row_normals(own, places, networks.event_shape, (networks.nz,))
        times = jnp.full(places.shape, t)
        x_next, residual, ratio = density.reconstruction_error(
            proposal, schedule, networks, variables, x, times, eps, eps_z
        )
        squares.append(objective.sum_over_dims(residual**2))
        log_weight += ratio + objective.gaussian_log_prob(
            residual, jnp.zeros_like(residual), jnp.full(places.shape, log_var[t])
        )
        x = x_next
    log_weight += objective.log_standard_normal(x)
    return jnp.stack(squares, axis=1), log_weight
