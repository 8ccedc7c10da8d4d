"""Draws of x_0 given measurements, in chunks over the mesh.

The mathematics is in `restoration`. Leapfrog steps and resampling are done on the host:
a scan of convolutions is slow on a CPU. Several processes call these functions
together, and each gets the result.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Float

from ddaebm_jax import diffusion, restoration
from ddaebm_jax.evaluation import inference
from ddaebm_jax.evaluation.particles import proposal_noise, row_normals, systematic
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players
from ddaebm_jax.restoration import Measurement, NoisePath, State, Twisted

METHODS = "averaged", "noise_space", "particles", "direct"
# Particles of an image are resampled where fewer than this share of them count.
_RESAMPLE_BELOW = 0.5
# Of Hamiltonian Monte Carlo: acceptance that step sizes are adapted to (Beskos et al.
# 2013), leapfrog steps of a trajectory, and the first step size, in units of σ.
_ACCEPTANCE, _LEAPFROG_STEPS, _FIRST_STEP = 0.65, 8, 0.2
_ERRORS_SEED, _ERROR_SAMPLES = 1_010, 512
# Held-out images on which the generator's error is measured, and τ at the start of its
# fit, in units of [−1, 1].
ERROR_IMAGES, _FIRST_ERROR = 48, 0.3
# Added to a move's number, for the keys of its test and of the generator's error.
_TEST_KEYS, _ERROR_KEYS = 100_000, 200_000


class Search(NamedTuple):
    """Settings of the noise space.

    Attributes:
      num_steps: of Adam, while σ falls to that of the measurement.
      learning_rate: of Adam.
      first_std: σ at the first step, if that is more than the measurement's.
      num_moves: trajectories of Hamiltonian Monte Carlo after that; the second half
        gives draws.
    """

    num_steps: int = 100
    learning_rate: float = 0.1
    first_std: float = 1.0
    num_moves: int = 30


def noise_space(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    num_chains: int,
    seed: int,
    search: Search,
    error: Float[np.ndarray, "*shape"] | None = None,
) -> Float[np.ndarray, "n draws *shape"]:
    """Returns draws of p(x_0 | y) under the generator's law, plus its error given y.

    The chains take the generator to be exact; the error is drawn given what they found,
    which restores more than a likelihood that allows for it (docs/restoration.md).

    Every chain of an example gives a draw for each of the last half of its moves.

    Args:
      experiment: the trained experiment.
      variables: the generator's are used.
      measurement: of n examples, in the networks' units.
      num_chains: of each example.
      seed: of everything that is drawn.
      search: settings.
      error: τ of each pixel; see `generator_error`. None: the generator's images are
        taken to be exact.
    """
    num = len(measurement.y)
    known = _repeated(measurement, num_chains)
    chains = _Chains(experiment, variables, known, num * num_chains, seed)
    chains.descend(search)
    draws = []
    for number in range(search.num_moves):
        adapt = number < search.num_moves // 2
        x0 = chains.move(number, adapt)
        if not adapt:
            x0 = x0 if error is None else chains.with_error(number, x0, error)
            draws.append(x0.reshape(num, num_chains, *experiment.networks.event_shape))
    return np.concatenate(draws, axis=1)


def generator_error(
    experiment: Experiment,
    variables: Players,
    x: Float[np.ndarray, "n *shape"],
    seed: int,
    search: Search,
) -> Float[np.ndarray, "*shape"]:
    """Returns τ, how far the generator's images are from data, of each pixel.

    x_0 = x_0(ξ) + τ ε is fitted by stochastic expectation maximization: chains draw ξ
    given x, and τ² is the mean squared error of what they generate, one τ for all
    pixels while they move. The fit is slow and stopped after `search.num_moves`.

    Args:
      experiment: the trained experiment.
      variables: the generator's are used.
      x: data that training did not see, in the networks' units.
      seed: of everything that is drawn.
      search: settings.
    """
    std = np.full(len(x), _FIRST_ERROR, np.float32)
    known = Measurement(restoration.Identity(), x, std)
    chains = _Chains(experiment, variables, known, len(x), seed)
    chains.descend(search)
    squares = []
    for number in range(search.num_moves):
        found = ((chains.move(number, True) - x) ** 2).mean(axis=0)
        chains.assume(np.full_like(std, np.sqrt(found.mean())))
        if number >= search.num_moves // 2:
            squares.append(found)
    return np.sqrt(np.mean(squares, axis=0))


class _Chains:
    """Chains in noise space, on the host."""

    def __init__(
        self,
        experiment: Experiment,
        variables: Players,
        measurement: Measurement,
        num: int,
        seed: int,
    ) -> None:
        self._experiment, self._generator = experiment, variables.generator
        self._measurement, self._num, self._seed = measurement, num, seed
        self._path = self._normals(0)
        self._sizes = _FIRST_STEP * jnp.minimum(measurement.std, 1.0)

    def _normals(self, number: int) -> NoisePath:
        model = self._experiment.networks, self._experiment.schedule
        key = jax.random.fold_in(jax.random.key(self._seed), number)
        return _noise_path(*model, key, jnp.arange(self._num))

    def _potential(self, path: NoisePath, measurement: Measurement) -> Any:
        """Returns U, x_0, and the gradient of U."""
        experiment = self._experiment
        rows, tree = jax.tree.flatten((path, measurement))
        rows = tuple(map(np.asarray, rows))
        run = partial(_potential, experiment.networks, experiment.game.latent, tree)
        shared = self._generator, experiment.schedule
        found = inference.by_rows(experiment, run, self._num, rows, shared)
        return jax.tree.map(jnp.asarray, found)

    def assume(self, std: np.ndarray) -> None:
        """Goes on with another σ."""
        self._measurement = self._measurement._replace(std=std)

    def descend(self, search: Search) -> None:
        """Follows Adam, while σ falls geometrically to the measurement's.

        What it minimizes is U with ‖ξ − ξ_0‖² in place of ‖ξ‖², ξ_0 the start, and with
        noise of σ added to y (randomized maximum likelihood, Ba et al. 2021): of a
        linear generator the minimum is a draw of p(ξ | y), of others it is near one.
        The minimum of U itself would be the same for all chains, and they would stay.
        """
        rate, (_, y, std) = search.learning_rate, self._measurement
        rng, first = np.random.default_rng((self._seed, 1)), self._path
        eps = rng.standard_normal(y.shape, np.float32)
        moved = y + std.reshape(-1, *[1] * (y.ndim - 1)) * eps
        state = optax.adam(rate).init(first)
        for number in range(search.num_steps):
            logging.log_every_n_seconds(
                logging.INFO, "noise space: step %d of %d", 10, number, search.num_steps
            )
            share = (number + 1) / search.num_steps
            now = np.maximum(search.first_std, std) ** (1 - share) * std**share
            now = self._measurement._replace(y=moved, std=now.astype(np.float32))
            _, _, slope = self._potential(self._path, now)
            self._path, state = _adam_step(rate, first, self._path, state, slope)

    def move(self, number: int, adapt: bool) -> np.ndarray:
        """Takes a trajectory with its Metropolis test; returns x_0."""
        found = None

        def gradient(path: NoisePath) -> NoisePath:
            nonlocal found
            *found, slope = self._potential(path, self._measurement)
            return slope

        path, momentum = self._path, self._normals(1 + number)
        slope = gradient(path)
        before = State(path, momentum, *found)
        for _ in range(_LEAPFROG_STEPS):
            how = gradient, path, momentum, self._sizes, slope
            path, momentum, slope = restoration.leapfrog(*how)
        key = jax.random.fold_in(jax.random.key(self._seed), _TEST_KEYS + number)
        uniform = jax.random.uniform(key, (self._num,))
        after = State(path, momentum, *found)
        end, acceptance = restoration.accept(before, after, uniform)
        self._path = end.path
        text = "noise space: move %d, acceptance %.2f"
        logging.log_every_n_seconds(logging.INFO, text, 10, number, acceptance.mean())
        if adapt:
            rate = (acceptance - _ACCEPTANCE) / (1 + number) ** 0.5
            self._sizes = self._sizes * jnp.exp(rate)
        return np.asarray(end.x0)

    def with_error(self, number: int, x0: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Adds the generator's error to the points of a move."""
        rows, tree = jax.tree.flatten(self._measurement)
        key = jax.random.fold_in(jax.random.key(self._seed), _ERROR_KEYS + number)
        how = self._experiment, partial(_with_error, tree), self._num
        return inference.by_rows(*how, (x0, *map(np.asarray, rows)), (key, error))


class Restored(NamedTuple):
    """Draws by particles.

    Attributes:
      x: draws of each example.
      effective: the least share of an example's particles that count at some level.
    """

    x: Float[np.ndarray, "n draws *shape"]
    effective: Float[np.ndarray, " n"]


def particles(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    num_particles: int,
    seed: int,
    weighted: bool,
    num_predictions: int = 2,
) -> Restored:
    """Returns draws of p(x_0 | y) by twisted sequential Monte Carlo.

    Args:
      experiment: the trained experiment.
      variables: of all three networks.
      measurement: of n examples, in the networks' units.
      num_particles: of each example; as many draws come of them.
      seed: of everything that is drawn.
      weighted: whether the prior is exp f(·, 0); else it is the generator's law.
      num_predictions: draws of z that x̂_0 is the mean of.
    """
    num, key = len(measurement.y), jax.random.key(seed)
    errors = prediction_errors(experiment, variables, num_predictions)
    total = num * num_particles
    schedule = experiment.schedule
    rows, tree = jax.tree.flatten(_repeated(measurement, num_particles))

    def take(function: Any, t: int, *before: np.ndarray) -> Twisted:
        run = partial(function, experiment.networks, weighted, num_predictions, tree)
        shared = key, variables, schedule, errors, np.int32(t)
        return inference.by_rows(experiment, run, total, (*before, *rows), shared)

    start, move = (partial(f, experiment.game.proposal) for f in (_start, _move))
    found = take(start, schedule.num_steps)
    log_weights, effective = found.log_weight.reshape(num, -1), np.ones(num)
    for t in reversed(range(schedule.num_steps)):
        found, log_weights, shares = _resampled(found, log_weights, seed, t + 1)
        effective = np.minimum(effective, shares)
        found = take(move, t, found.x, found.x0, found.log_target)
        log_weights = log_weights + found.log_weight.reshape(num, -1)
    found, _, shares = _resampled(found, log_weights, seed, 0)
    shape = num, num_particles, *experiment.networks.event_shape
    return Restored(found.x.reshape(shape), np.minimum(effective, shares))


def _resampled(
    found: Twisted, log_weights: np.ndarray, seed: int, level: int
) -> tuple[Twisted, np.ndarray, np.ndarray]:
    """Resamples the particles of examples where few count, at level 0 of all."""
    num, count = log_weights.shape
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    weights = weights / weights.sum(axis=1, keepdims=True)
    shares = 1.0 / (count * (weights**2).sum(axis=1))
    rng = np.random.default_rng((seed, level))
    uniform = rng.random(num)
    places, log_weights = np.tile(np.arange(count), (num, 1)), log_weights.copy()
    for i in np.flatnonzero((shares < _RESAMPLE_BELOW) | (level == 0)):
        kept = rng.permutation(systematic(weights[i], uniform[i]))
        places[i], log_weights[i] = kept, 0.0
    kept = (places + count * np.arange(num)[:, None]).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[kept], found), log_weights, shares


def direct(
    experiment: Experiment,
    variables: Players,
    measurement: Measurement,
    num_draws: int,
    seed: int,
) -> Float[np.ndarray, "n draws *shape"]:
    """Returns what the sampler makes of y, from the level whose noise is like y's."""
    num, schedule = len(measurement.y), experiment.schedule
    level = restoration.entry_level(schedule, float(np.max(measurement.std)))
    _, y, std = _repeated(measurement, num_draws)
    run = partial(_from_level, experiment.networks, experiment.game.latent, level)
    shared = jax.random.key(seed), variables.generator, schedule
    drawn = inference.by_rows(experiment, run, len(y), (y, std), shared)
    return drawn.reshape(num, num_draws, *experiment.networks.event_shape)


def _repeated(measurement: Measurement, times: int) -> Measurement:
    return jax.tree.map(lambda leaf: np.repeat(leaf, times, axis=0), measurement)


def prediction_errors(
    experiment: Experiment, variables: Players, num_predictions: int
) -> Float[np.ndarray, " levels"]:
    """Returns τ_t², t = 0 … T, the mean squared error of x̂_0(x_t) on samples."""
    schedule, key = experiment.schedule, jax.random.key(_ERRORS_SEED)
    x0 = inference.draw_samples(experiment, variables, _ERROR_SAMPLES, _ERRORS_SEED)
    latent = experiment.game.latent
    run = partial(_prediction_error, experiment.networks, latent, num_predictions)
    found = [0.0]
    for level in range(1, schedule.num_steps + 1):
        shared = key, variables.generator, schedule, np.int32(level)
        squares = inference.by_rows(experiment, run, len(x0), (x0,), shared)
        found.append(float(squares.mean(dtype=np.float64)))
    return np.array(found, np.float32)


def _noise_path(networks, schedule, key, places):
    shape, steps = networks.event_shape, schedule.num_steps
    shapes = shape, (steps, networks.nz), (steps, *shape)
    return NoisePath(*row_normals(key, places, *shapes))


@partial(jax.jit, static_argnums=0)
def _adam_step(rate, first, path, state, slope):
    slope = jax.tree.map(jnp.subtract, slope, first)
    updates, state = optax.adam(rate).update(slope, state)
    return optax.apply_updates(path, updates), state


# Networks are functions and so static: one program for all chunks of a run.


@partial(jax.jit, static_argnums=(0, 1, 2))
def _potential(networks, latent, tree, places, *rest):
    *rows, generator, schedule = rest
    path, measurement = jax.tree.unflatten(tree, rows)

    def total(path):
        how = schedule, networks, generator, measurement
        values, x0 = restoration.potential(*how, path, latent)
        return values.sum(), (values, x0)

    slope, found = jax.grad(total, has_aux=True)(path)
    return *found, slope


@partial(jax.jit, static_argnums=0)
def _with_error(tree, places, x0, *rest):
    *rows, key, error = rest
    measurement = jax.tree.unflatten(tree, rows)
    eps, noise = row_normals(key, places, x0.shape[1:], measurement.y.shape[1:])
    return restoration.with_error(measurement, x0, error, eps, noise)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _from_level(networks, latent, level, places, y, std, key, generator, schedule):
    path = _noise_path(networks, schedule, key, places)
    start = restoration.entered(schedule, level, y, std, path.x_last)
    path = path._replace(x_last=start)
    return restoration.generate(schedule, networks, generator, path, latent, level)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prediction_error(networks, latent, num, places, x0, *rest):
    key, generator, schedule, level = rest
    shapes = networks.event_shape, (num, networks.nz)
    eps, z = row_normals(jax.random.fold_in(key, level), places, *shapes)
    levels = jnp.full(places.shape, level)
    z = z if latent else jnp.zeros_like(z)
    x = diffusion.diffuse(schedule, x0, levels, eps)
    found = restoration.predicted(networks, generator, x, levels, z)
    return ((found - x0) ** 2).reshape(len(x0), -1).mean(axis=1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _start(proposal, networks, weighted, num, tree, places, *rest):
    *rows, key, variables, schedule, errors, t = rest
    shapes = networks.event_shape, (num, networks.nz)
    x, z = row_normals(jax.random.fold_in(key, t), places, *shapes)
    z = z if proposal.latent else jnp.zeros_like(z)
    measurement = jax.tree.unflatten(tree, rows)
    return restoration.twisted_start(
        weighted, schedule, networks, variables, measurement, errors, x, z
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _move(proposal, networks, weighted, num, tree, places, x, x0, log_target, *rest):
    *rows, key, variables, schedule, errors, t = rest
    own = jax.random.fold_in(key, t)
    noise = proposal_noise(networks, proposal, own, places)
    (z,) = row_normals(jax.random.fold_in(own, 1), places, (num, networks.nz))
    return restoration.twisted_move(
        *(proposal, weighted, schedule, networks, variables),
        *(jax.tree.unflatten(tree, rows), errors),
        Twisted(x, x0, log_target, jnp.zeros_like(log_target)),
        *(jnp.full(places.shape, t), noise, z),
    )
