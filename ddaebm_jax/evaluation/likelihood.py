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

from ddaebm_jax import density, diffusion, objective, progress
from ddaebm_jax.data import Source
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import detectors, inference, plane
from ddaebm_jax.evaluation.particles import measure, proposal_noise, row_normals
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

_PATHS_SEED, _CONSISTENCY_SEED, _TRAIN_SEED = 1_005, 1_006, 1_007
# Most rows that likelihoods are measured on, and that baselines are fitted to.
_MOST_ROWS = 10_000
# Cells per side of the grid that log Z is summed over in the plane.
_QUADRATURE_CELLS = 1_200


def metrics(experiment: Experiment, variables: Players) -> dict[str, Any]:
    """Returns log Z and likelihoods of a model, nats.

    Likelihoods are means over held-out data, per row or image, in the data's own units
    (images: pixels in [−1, 1]), beside those of baselines that were tuned on training
    data, and in the plane of the truth. Where too few particles count the likelihood
    is left out, and `refused` says why.
    """
    source = experiment.source
    shift = source.log_det
    held_out = source.held_out(_MOST_ROWS, inference.HELD_OUT_SEED)
    held_out = inference.in_units(experiment, _some(held_out))
    train = training_rows(source)
    flat_train, flat_held_out = (x.reshape(len(x), -1) for x in (train, held_out))
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
        figures |= _of_plane(experiment, variables, samples, held_out)
        truth = jax.jit(source.distribution.log_density)
        add("_true", density.evaluate_in_chunks(truth, held_out))
    try:
        fitted = detectors.density_baselines(flat_train, experiment.config.seed)
    except InputError as error:
        logging.warning("no density baselines: %s", error)
        return figures
    for name, log_density in fitted.items():
        add(f"_{name}", log_density(flat_held_out))
    return figures


def _of_plane(
    experiment: Experiment,
    variables: Players,
    samples: np.ndarray,
    held_out: np.ndarray,
) -> dict[str, float]:
    """Returns log Z by quadrature, and figures of samples of the energy."""
    truth = experiment.source.distribution
    # Wider than the picture, as what lies outside it is of Z, too; and finer, for
    # densities with edges.
    extent, cells = 1.5 * truth.extent, _QUADRATURE_CELLS
    points = density.grid_points(extent, cells)
    log_p = inference.energies(experiment, variables, points).astype(np.float64)
    area = (2.0 * extent / cells) ** 2
    order = np.random.default_rng(_TRAIN_SEED).permutation(len(samples))
    num = min(len(samples), len(held_out))
    figures = {
        "log_z_quadrature": float(logsumexp(log_p) + math.log(area)),
        "energy_samples_sliced_wasserstein": plane.sliced_wasserstein(
            samples[order[:num]], held_out[:num], jax.random.key(plane.PROJECTION_SEED)
        ),
    }
    if truth.modes is not None:
        coverage = plane.mode_coverage(samples, truth.modes, truth.mode_std)
        figures["energy_samples_high_quality"] = coverage.high_quality
    return figures


def training_rows(source: Source, num: int = _MOST_ROWS) -> np.ndarray:
    """Returns at most `num` points that training may see, chosen at random."""
    if source.distribution is not None:
        return source.held_out(num, _TRAIN_SEED)
    if source.table is not None:
        return _some(source.table.train, num)
    return source.some_training_images(num, _TRAIN_SEED)


def _some(rows: np.ndarray, num: int = _MOST_ROWS) -> np.ndarray:
    """Returns at most `num` of the rows, chosen at random."""
    order = np.random.default_rng(_TRAIN_SEED).permutation(len(rows))
    return rows[np.sort(order[:num])]


def consistency(
    experiment: Experiment, variables: Players, rows: np.ndarray, num_draws: int = 64
) -> tuple[float, ...]:
    """Returns how far the T energies are from describing one process, by level.

    For t = 0 … T−1 the standard deviation over x_{t+1}, nats, of
    log ∫ exp f(x, t) q(x_{t+1}|x) dx − f(x_{t+1}, t+1), which is constant if they do.
    The integral is estimated by `num_draws` draws; x_{t+1} are diffused `rows`.
    """
    key = jax.random.key(_CONSISTENCY_SEED)
    diffused = partial(_diffused, experiment.networks)
    step = partial(_marginal_gap, experiment.networks, experiment.game.proposal)
    steps, values = experiment.schedule.num_steps, []
    with progress.loop_bar(steps * num_draws, "draw", "consistency") as bar:
        for t in range(steps):
            total, num = np.full(len(rows), -np.inf), len(rows)
            shared = key, variables, experiment.schedule, np.int32(t)
            above = inference.by_rows(experiment, diffused, num, (rows,), shared)
            for number in map(np.int32, range(num_draws)):
                how = num, above, (*shared, number)
                total = np.logaddexp(total, inference.by_rows(experiment, step, *how))
                bar.update()
            values.append(float(total.std(dtype=np.float64)))
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
    `train_rows`. The noise of row i depends on i.
    """
    num_steps = experiment.schedule.num_steps
    squares, _ = _climb(experiment, variables, np.zeros(num_steps), train_rows, 0)
    log_var = np.log(squares / math.prod(experiment.networks.event_shape))
    total = np.full(len(rows), -np.inf)
    with progress.loop_bar(num_paths, "path", "generator's bound") as bar:
        for path in range(num_paths):
            _, log_weight = _climb(experiment, variables, log_var, rows, path + 1)
            total = np.logaddexp(total, log_weight)
            bar.update()
    return total - math.log(num_paths)


def _climb(
    experiment: Experiment,
    variables: Players,
    log_var: Float[np.ndarray, " steps"],
    rows: np.ndarray,
    number: int,
) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " n"]]:
    """Returns mean squared residuals by t, and the log weight of a path of each row.

    Level by level: a scan of convolutions is slow on a CPU.
    """
    step = partial(_up, experiment.networks, experiment.game.proposal)
    key = jax.random.fold_in(jax.random.key(_PATHS_SEED), number)
    x, total, squares = rows, np.zeros(len(rows)), []
    for t, level in enumerate(log_var.astype(np.float32)):
        shared = key, variables, experiment.schedule, level, np.int32(t)
        inputs = len(rows), (x,), shared
        x, residuals, log_weight = inference.by_rows(experiment, step, *inputs)
        squares.append(residuals.mean(dtype=np.float64))
        total += log_weight
    start = np.asarray(objective.log_standard_normal(jnp.asarray(x)))
    return np.array(squares), total + start


# Networks are functions and so static: one program for all chunks of a run.


@partial(jax.jit, static_argnums=0)
def _diffused(networks, places, x, key, variables, schedule, t):
    """Returns x_{t+1} and f(x_{t+1}, t+1)."""
    times = jnp.full(places.shape, t)
    (eps,) = row_normals(key, places, networks.event_shape)
    x_next = diffusion.diffuse(schedule, x, times + 1, eps)
    f_next = networks.energy(variables.energy, x_next, times + 1)
    is_last = t + 1 == schedule.num_steps
    f_next = jnp.where(is_last, objective.log_standard_normal(x_next), f_next)
    return x_next, f_next


@partial(jax.jit, static_argnums=(0, 1))
def _marginal_gap(
    networks, proposal, places, x_next, f_next, key, variables, schedule, t, number
):
    times = jnp.full(places.shape, t)
    own = jax.random.fold_in(jax.random.fold_in(key, 1 + number), t)
    noise = proposal_noise(networks, proposal, own, places)
    move = density.denoise_weighted(
        proposal, schedule, networks, variables, x_next, f_next, times, noise
    )
    return move.log_weight


@partial(jax.jit, static_argnums=(0, 1))
def _up(networks, proposal, places, x, key, variables, schedule, log_var, t):
    """Returns x_{t+1}, the squared residual of x_t, and its part of the log weight."""
    own = jax.random.fold_in(key, t)
    eps, eps_z = row_normals(own, places, networks.event_shape, (networks.nz,))
    times = jnp.full(places.shape, t)
    x_next, residual, ratio = density.reconstruction_error(
        proposal, schedule, networks, variables, x, times, eps, eps_z
    )
    log_weight = ratio + objective.gaussian_log_prob(
        residual, jnp.zeros_like(residual), jnp.full(places.shape, log_var)
    )
    return x_next, objective.sum_over_dims(residual**2), log_weight
