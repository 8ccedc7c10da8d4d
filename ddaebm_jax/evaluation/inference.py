"""Samples and scores of a trained model, computed in chunks over the mesh.

Several processes call these functions together, and each gets the whole result.
`variables` are usually the averages. Points are in the networks' units.
"""

import itertools
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from ddaebm_jax import data, density, progress, sampling, sharding
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
    experiment: Experiment, variables: Players, num: int, seed: int = SAMPLE_SEED
) -> Float[np.ndarray, "n *shape"]:
    """Returns samples of the data; sample i depends on (seed, i) only."""
    return np.concatenate(list(_draw(experiment, variables, num, seed)))


def draw_trajectories(
    experiment: Experiment, variables: Players, num: int, seed: int = SAMPLE_SEED
) -> Float[np.ndarray, "n levels *shape"]:
    """Returns x_T, …, x_0 of the samples of `draw_samples`."""
    drawn = _draw(experiment, variables, num, seed, _trajectories_by_sample)
    return np.concatenate(list(drawn))


def draw_images(
    experiment: Experiment, variables: Players, num: int, seed: int = SAMPLE_SEED
) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
    """Yields the samples of `draw_samples` as images, a chunk at a time."""
    convert = partial(data.pixels, experiment.source.colour)
    return _draw(experiment, variables, num, seed, convert=convert)


def energies(
    experiment: Experiment,
    variables: Players,
    x: Shaped[Array | np.ndarray, "n *shape"],
) -> Float[np.ndarray, " n"]:
    """Returns f(x, 0), the unnormalised log density of points or uint8 images, nats."""
    return _of_energy(experiment, variables, x, _energy)


def gradients(
    experiment: Experiment,
    variables: Players,
    x: Shaped[Array | np.ndarray, "n *shape"],
) -> Float[np.ndarray, "n *shape"]:
    """Returns ∇f(x, 0) of points, or of uint8 images with pixels in [−1, 1]."""
    return _of_energy(experiment, variables, x, _gradient)


def _in_chunks(
    experiment: Experiment,
    num: int,
    compute: Callable[[Mesh, np.ndarray], Any],
    what: str,
) -> Iterator[Any]:
    """Yields compute(mesh, row numbers) of 0 … num − 1 in chunks, on the host.

    All chunks have one size, so that one program serves them: the last one's numbers
    go beyond `num`, and what is computed of those is dropped. While the caller works on
    a chunk, the devices compute the next one.
    """
    mesh = evaluation_mesh(experiment)
    batch_size = experiment.config.evaluation.batch_size
    is_image = experiment.source.holds_images
    limit, unit = (batch_size, "image") if is_image else (_ROWS, "row")
    size = sharding.whole_rows(mesh, min(num, limit))

    def started(start: int) -> Any:
        chunk = compute(mesh, np.arange(start, start + size, dtype=np.int32))
        # Whole on every device, so that every process can read it.
        return _replicate(mesh, chunk)

    starts = range(0, num, size)
    chunks = itertools.chain(map(started, starts), [None])
    with progress.loop_bar(num, unit, what) as bar:
        for start, (chunk, _) in zip(starts, itertools.pairwise(chunks), strict=True):
            whole = jax.tree.map(np.asarray, chunk)
            bar.update(min(size, num - start))
            yield jax.tree.map(operator.itemgetter(slice(num - start)), whole)


def by_rows(
    experiment: Experiment,
    function: Callable[..., Any],
    num: int,
    rows: tuple[np.ndarray, ...] = (),
    shared: tuple[Any, ...] = (),
    what: str = "computing",
) -> Any:
    """Returns function(row numbers, *rows, *shared) of `num` rows, on the host.

    Args:
      experiment: whose mesh and chunks are used.
      function: jitted, row by row; a pytree of arrays [rows, …].
      num: number of rows.
      rows: arrays of `num` rows.
      shared: pytrees, the same for all rows, placed on every device.
      what: the name of the bar.
    """
    shared = _replicate(evaluation_mesh(experiment), shared)

    def compute(mesh: Mesh, places: np.ndarray) -> Any:
        kept = np.minimum(places, num - 1)
        parts = [sharding.split_rows(mesh, leaf[kept]) for leaf in rows]
        return function(sharding.split_rows(mesh, places), *parts, *shared)

    chunks = list(_in_chunks(experiment, num, compute, what))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


def _replicate(mesh: Mesh, tree):
    return jax.device_put(tree, sharding.replicated(mesh))


def _draw(
    experiment: Experiment,
    variables: Players,
    num: int,
    seed: int,
    sampler: Callable = sampling.sample,
    convert: Callable[[Array], Array] = lambda x: x,
) -> Iterator[np.ndarray]:
    """Yields `convert`, a program of its own, of what the sampler draws."""
    params = _replicate(evaluation_mesh(experiment), variables.generator)

    def draw(mesh: Mesh, places: np.ndarray) -> Array:
        rows = sharding.split_rows(mesh, places)
        networks, latent = experiment.networks, experiment.game.latent
        inputs = experiment.schedule, params, jax.random.key(seed), rows
        return convert(_draw_chunk(sampler, networks, latent, *inputs))

    return _in_chunks(experiment, num, draw, "drawing")


def _of_energy(
    experiment: Experiment,
    variables: Players,
    x: Array | np.ndarray,
    function: Callable[..., Array],
) -> np.ndarray:
    """Returns function(networks, params, points) of all points."""
    networks, rows = experiment.networks, (in_units(experiment, x),)

    def of_rows(places: Array, part: Array, params: Any) -> Array:
        del places
        return function(networks, params, part)

    return by_rows(experiment, of_rows, len(x), rows, (variables.energy,), "scoring")


def _trajectories_by_sample(*args) -> Array:
    return jnp.swapaxes(sampling.sample_trajectory(*args), 0, 1)


# The networks are functions and so static: one program for all chunks of a run.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw_chunk(sampler, networks, latent, schedule, params, key, places):
    return sampler(schedule, networks, params, key, len(places), latent, places)


_energy, _gradient = (
    jax.jit(function, static_argnums=0)
    for function in (density.energy_at_data, density.score_at_data)
)


def in_units(
    experiment: Experiment, x: Shaped[Array | np.ndarray, "n *shape"]
) -> Float[np.ndarray, "n *shape"]:
    """Returns uint8 images in the networks' units; other points as they are."""
    x = np.asarray(x)
    return experiment.source.from_own_units(x) if x.dtype == np.uint8 else x
