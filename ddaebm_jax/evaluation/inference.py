"""Samples and scores of a trained model, computed in chunks over the mesh.

Several processes call these functions together, and each gets the whole result.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from ddaebm_jax import density, diffusion, sampling, sharding
from ddaebm_jax.data import images
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

# The same for every model, so that its metrics and pictures compare with others'.
SAMPLE_SEED, HELD_OUT_SEED = 1_001, 1_002

# Rows of points or of a table that a network takes at once.
_ROWS = 20_000


def evaluation_mesh(experiment: Experiment) -> Mesh:
    """Returns the mesh over which sampling and scoring are split."""
    return sharding.mesh_for_evaluation(experiment.config.parallel.num_devices)


def draw_samples(
    experiment: Experiment,
    variables: Players,
    num_samples: int,
    seed: int = SAMPLE_SEED,
) -> Float[np.ndarray, "n *shape"]:
    """Returns samples of the data, in the networks' units.

    Args:
      experiment: what the config describes.
      variables: of the networks, usually the averages.
      num_samples: how many, at least 1.
      seed: sample i depends on (seed, i) only.
    """
    drawn = _draw(experiment, variables, num_samples, seed, sampling.sample)
    return np.concatenate(list(drawn))


def draw_trajectories(
    experiment: Experiment,
    variables: Players,
    num_samples: int,
    seed: int = SAMPLE_SEED,
) -> Float[np.ndarray, "n levels *shape"]:
    """Returns x_T, …, x_0 of the samples that `draw_samples` returns."""
    drawn = _draw(experiment, variables, num_samples, seed, _trajectories_by_sample)
    return np.concatenate(list(drawn))


def draw_images(
    experiment: Experiment,
    variables: Players,
    num_samples: int,
    seed: int = SAMPLE_SEED,
) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
    """Yields the samples that `draw_samples` returns as images, a chunk at a time."""
    for part in _draw(experiment, variables, num_samples, seed, sampling.sample):
        yield np.asarray(images.to_uint8(part))


def energies(
    experiment: Experiment,
    variables: Players,
    x: Shaped[Array | np.ndarray, "n *shape"],
) -> Float[np.ndarray, " n"]:
    """Returns f(x, 0), the unnormalised log density of points, nats.

    Args:
      experiment: what the config describes.
      variables: of the networks, usually the averages.
      x: at least one point in the networks' units, or uint8 images.
    """
    networks = experiment.networks
    params = _replicated(experiment, variables.energy)
    return _score(experiment, x, lambda part, _: _energy(networks, params, part))


def outlier_scores(
    experiment: Experiment,
    variables: Players,
    x: Shaped[Array | np.ndarray, "n *shape"],
    seed: int,
    num_draws: int,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Returns three scores of each point, by name; larger: more likely an inlier.

    - `energy`: f(x, 0), the unnormalised log density, nats.
    - `gradient norm`: −‖∇_x f(x, 0)‖, Euclidean over all dimensions; the approximate
      mass of Grathwohl et al. 2020 (arXiv 1912.03263), by which typical points have
      a flat density around them.
    - `energy over t`: Σ_{t=0}^{T−1} E_{q(x_t|x_0)} f(x_t, t), the mean over
      `num_draws` draws of the noise. Each f(·, t) is known up to a constant: the sum
      ranks points, it is no log density.

    Args:
      experiment: what the config describes.
      variables: of the networks, usually the averages.
      x: at least one point in the networks' units, or uint8 images.
      seed: of the noise: draw j of point i at t depends on (seed, i, j, t) only.
      num_draws: at least 1.
    """
    networks, schedule = experiment.networks, experiment.schedule
    params = _replicated(experiment, variables.energy)
    key = jax.random.key(seed)

    def gradient_norm(part: Array, _: Array) -> Array:
        return _gradient_norm(networks, params, part)

    def energy_over_t(part: Array, places: Array) -> Array:
        # One program for all would hold all activations, or scan, slow on a CPU.
        diffused = (
            _diffused_energy(networks, schedule, params, part, key, places, draw, t)
            for draw in range(num_draws)
            for t in range(schedule.num_steps)
        )
        return sum(diffused) / num_draws

    return {
        "energy": energies(experiment, variables, x),
        "gradient norm": _score(experiment, x, gradient_norm),
        "energy over t": _score(experiment, x, energy_over_t),
    }


def _replicated(experiment: Experiment, variables: dict) -> dict:
    return jax.device_put(variables, sharding.replicated(evaluation_mesh(experiment)))


def _in_chunks(
    experiment: Experiment, num: int, compute: Callable[[np.ndarray], Array]
) -> Iterator[np.ndarray]:
    """Yields compute(row numbers) of 0 … num − 1, a chunk at a time, on the host.

    All chunks have one size, so that one program serves them: the last one's numbers
    go beyond `num`, and what is computed of those is dropped.
    """
    if num < 1:
        raise ValueError("there are no rows to compute; give at least one")
    mesh = evaluation_mesh(experiment)
    most = _ROWS
    if experiment.source.holds_images:
        most = experiment.config.evaluation.batch_size
    size = sharding.whole_rows(mesh, min(num, most))
    for start in range(0, num, size):
        places = np.arange(start, start + size, dtype=np.int32)
        # Whole on every device, so that every process can read it.
        whole = jax.device_put(compute(places), sharding.replicated(mesh))
        yield np.asarray(whole)[: num - start]


def _draw(
    experiment: Experiment,
    variables: Players,
    num: int,
    seed: int,
    sampler: Callable[..., Array],
) -> Iterator[np.ndarray]:
    mesh = evaluation_mesh(experiment)
    params = _replicated(experiment, variables.generator)

    def draw(places: np.ndarray) -> Array:
        return _draw_chunk(
            sampler,
            experiment.networks,
            experiment.game.latent,
            experiment.schedule,
            params,
            jax.random.key(seed),
            sharding.split_rows(mesh, places),
        )

    yield from _in_chunks(experiment, num, draw)


def _score(
    experiment: Experiment,
    x: Array | np.ndarray,
    score: Callable[[Array, Array], Array],
) -> np.ndarray:
    """Returns score(points, their numbers) of all points."""
    mesh, x = evaluation_mesh(experiment), np.asarray(x)

    def of_places(places: np.ndarray) -> Array:
        part = x[np.minimum(places, len(x) - 1)]
        return score(sharding.split_rows(mesh, part), sharding.split_rows(mesh, places))

    return np.concatenate(list(_in_chunks(experiment, len(x), of_places)))


def _trajectories_by_sample(*args) -> Array:
    return jnp.swapaxes(sampling.sample_trajectory(*args), 0, 1)


# The networks are functions and so static: one program for all chunks of a run.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw_chunk(sampler, networks, latent, schedule, params, key, places):
    return sampler(schedule, networks, params, key, len(places), latent, places)


@partial(jax.jit, static_argnums=0)
def _energy(networks, params, x):
    return density.energy_at_data(networks, params, _as_float(x))


@partial(jax.jit, static_argnums=0)
def _gradient_norm(networks, params, x):
    score = density.score_at_data(networks, params, _as_float(x))
    return -jnp.linalg.norm(score.reshape(len(score), -1), axis=1)


@partial(jax.jit, static_argnums=0)
def _diffused_energy(networks, schedule, params, x, key, places, draw, t):
    """Returns f(x_t, t) of one draw of x_t."""
    x0 = _as_float(x)

    def noise(place: Array) -> Array:
        own = jax.random.fold_in(key, place)
        own = jax.random.fold_in(jax.random.fold_in(own, draw), t)
        return jax.random.normal(own, x0.shape[1:])

    times = jnp.full(places.shape, t, jnp.int32)
    x_t = diffusion.diffuse(schedule, x0, times, jax.vmap(noise)(places))
    return networks.energy(params, x_t, times)


def _as_float(x: Array) -> Array:
    return images.to_float(x) if x.dtype == jnp.uint8 else x
