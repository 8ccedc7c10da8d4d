"""The normaliser of exp f(·, 0), and its samples, by sequential Monte Carlo.

The mathematics is in `density`. Steps run in chunks over the mesh; resampling is done
on the host, where all particles are known. Several processes call these functions
together, and each gets the result.
"""

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from scipy.special import logsumexp

from ddaebm_jax import density, objective, progress
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Networks, Players
from ddaebm_jax.proposal import Proposal, ProposalNoise

# Particles are resampled where fewer than this share of them count.
_RESAMPLE_BELOW = 0.5
# Fewer particles that count do not carry an estimate.
LEAST_EFFECTIVE = 100
# Of Langevin moves: acceptance that the step size is adapted to (Roberts & Rosenthal
# 1998), and rounds and particles of the adaptation.
_ACCEPTANCE, _ROUNDS, _ADAPTING = 0.574, 30, 1_000
PARTICLES_SEED = 1_004
# Numbers folded into a run's key; levels t take 0 … T−1.
_START, _RESAMPLE, _LANGEVIN, _ADAPTING_KEY = 10_000, 20_000, 30_000, 40_000


class Estimate(NamedTuple):
    """log Ẑ of several independent runs.

    Attributes:
      log_z: log of the mean of the runs' Ẑ, nats; each Ẑ is unbiased for ∫exp f(x, 0).
      error: standard error of `log_z` from the spread of the runs, nats.
      runs: log Ẑ of each run.
      effective: by level, T−1 … 0: the share of particles that count (effective sample
        size over their number) before resampling, the least of the runs.
      acceptance: by level, the mean acceptance of Langevin moves; None without them.
      num_particles: of each run.
    """

    log_z: float
    error: float
    runs: tuple[float, ...]
    effective: tuple[float, ...]
    acceptance: tuple[float, ...] | None
    num_particles: int

    @property
    def refusal(self) -> str | None:
        """Why the estimate cannot be used; None if it can."""
        share = min(self.effective)
        if not share * self.num_particles >= LEAST_EFFECTIVE:
            level = len(self.effective) - 1 - int(np.argmin(self.effective))
            return (
                f"at level {level} {share * self.num_particles:.0f} of "
                f"{self.num_particles} particles count, and {LEAST_EFFECTIVE} are "
                "needed: the generator is too far from the energy"
            )
        return None


class Particles(NamedTuple):
    """Equally weighted particles at level 0: samples of the energy itself."""

    x: Float[np.ndarray, "n *shape"]
    estimate: Estimate


def measure(experiment: Experiment, variables: Players) -> Particles:
    """Runs particles, as many as the config's evaluation section says."""
    settings = experiment.config.evaluation
    counts = settings.num_particles, settings.num_runs
    return _as_configured(experiment, variables, *counts, PARTICLES_SEED)


def draw_from_energy(
    experiment: Experiment, variables: Players, num: int, seed: int
) -> Float[np.ndarray, "n *shape"]:
    """Returns samples of the energy itself, exp f(·, 0), a function of (seed, num).

    They are chosen at random from at least four times as many particles of one run.

    Raises:
      InputError: if too few particles count.
    """
    num_particles = max(experiment.config.evaluation.num_particles, 4 * num)
    found = _as_configured(experiment, variables, num_particles, 1, seed)
    if found.estimate.refusal is not None:
        raise InputError(
            f"--sampler=energy: {found.estimate.refusal}; train with "
            "game.num_negatives above 1, or take --sampler=generator"
        )
    return found.x[np.random.default_rng(seed).permutation(num_particles)[:num]]


def _as_configured(
    experiment: Experiment, variables: Players, num: int, num_runs: int, seed: int
) -> Particles:
    settings, game = experiment.config.evaluation, experiment.game
    wide = game.proposal._replace(defensive=settings.defensive)
    experiment = experiment._replace(game=game._replace(proposal=wide))
    moves = settings.langevin_moves
    return run_particles(experiment, variables, num, num_runs, seed, moves)


def run_particles(
    experiment: Experiment,
    variables: Players,
    num_particles: int,
    num_runs: int,
    seed: int,
    num_moves: int = 0,
) -> Particles:
    """Runs sequential Monte Carlo from level T to level 0, several times.

    Args:
      experiment: the trained experiment.
      variables: of all three networks.
      num_particles: of each run.
      num_runs: independent runs; from 2 on their spread gives the error.
      seed: of everything that is drawn.
      num_moves: Langevin moves of every particle at each level.
    """
    sizes = None
    if num_moves:
        sizes = _adapt(experiment, variables, min(num_particles, _ADAPTING), seed)
    runs = []
    for number in range(num_runs):
        key = jax.random.fold_in(jax.random.key(seed), number)
        run = _Run(experiment, variables, num_particles, key)
        runs.append(run.take(sizes, num_moves))
        shares = np.round(run.effective, 3).tolist()
        progress.log(
            f"sequential Monte Carlo, run {number + 1} of {num_runs}: log Z "
            f"{run.log_z:.4f}, shares that count {shares}"
        )
    log_z = np.array([run.log_z for run in runs])
    mean = float(logsumexp(log_z) - math.log(num_runs))
    spread = np.exp(log_z - mean).std(ddof=1) if num_runs > 1 else math.nan
    acceptance = None
    if num_moves:
        acceptance = tuple(np.mean([run.acceptance for run in runs], axis=0).tolist())
    return Particles(
        np.concatenate([run.x for run in runs]),
        Estimate(
            log_z=mean,
            error=float(spread / math.sqrt(num_runs)),
            runs=tuple(log_z.tolist()),
            effective=tuple(np.min([r.effective for r in runs], axis=0).tolist()),
            acceptance=acceptance,
            num_particles=num_particles,
        ),
    )


class _Run:
    """One run: its particles and what it has found so far, on the host."""

    def __init__(
        self, experiment: Experiment, variables: Players, num: int, key: Array
    ) -> None:
        self._experiment, self._variables = experiment, variables
        self._num, self._key = num, key
        start = partial(_start, experiment.networks)
        self.x, self.log_target = inference.by_rows(experiment, start, num, (), (key,))
        self.log_weights = np.zeros(num)
        self.log_z = 0.0
        self.effective: list[float] = []
        self.acceptance: list[float] = []

    def take(self, sizes: list[float] | None, num_moves: int) -> "_Run":
        """Goes through all levels."""
        for t in reversed(range(self._experiment.schedule.num_steps)):
            self.descend(t)
            if sizes is not None:
                self.acceptance.append(self.langevin(t, sizes[t], num_moves))
        return self

    def descend(self, t: int) -> None:
        """Moves particles to level t, and resamples them where few count."""
        experiment = self._experiment
        step = partial(_descend, experiment.networks, experiment.game.proposal)
        rows = self.x, self.log_target
        shared = self._key, self._variables, experiment.schedule, np.int32(t)
        move = inference.by_rows(experiment, step, self._num, rows, shared)
        self.x, self.log_target = move.x, move.log_target
        self.log_weights += move.log_weight
        total = logsumexp(self.log_weights)
        weights = np.exp(self.log_weights - total)
        self.effective.append(float(1.0 / (self._num * (weights**2).sum())))
        if t == 0 or self.effective[-1] < _RESAMPLE_BELOW:
            self.log_z += float(total - math.log(self._num))
            uniform = jax.random.uniform(jax.random.fold_in(self._key, _RESAMPLE + t))
            kept = systematic(weights, float(uniform))
            self.x, self.log_target = self.x[kept], self.log_target[kept]
            self.log_weights = np.zeros(self._num)

    def langevin(self, t: int, size: float, num_moves: int, start: int = 0) -> float:
        """Moves particles within level t; returns the mean acceptance."""
        accepted = []
        move = partial(_langevin, self._experiment.networks)
        for number in range(start, start + num_moves):
            numbers = np.array([t, number], np.int32)
            shared = self._key, self._variables.energy, numbers, np.float32(size)
            self.x, self.log_target, acceptance = inference.by_rows(
                self._experiment, move, self._num, (self.x,), shared
            )
            accepted.append(acceptance.mean())
        return float(np.mean(accepted))


def systematic(
    weights: Float[np.ndarray, " n"], uniform: float
) -> Shaped[np.ndarray, " n"]:
    """Returns n indices, each i about n·weights[i] times (Kitagawa 1996).

    Args:
      weights: that sum to 1.
      uniform: one number in [0, 1).
    """
    num = len(weights)
    places = (uniform + np.arange(num)) / num
    return np.minimum(np.searchsorted(np.cumsum(weights), places, "right"), num - 1)


def _adapt(
    experiment: Experiment, variables: Players, num: int, seed: int
) -> list[float]:
    """Returns step sizes by level, found on particles of their own."""
    key = jax.random.fold_in(jax.random.key(seed), _ADAPTING_KEY)
    run = _Run(experiment, variables, num, key)
    sizes, size = {}, 0.5
    for t in reversed(range(experiment.schedule.num_steps)):
        run.descend(t)
        for number in range(_ROUNDS):
            rate = run.langevin(t, size, 1, number)
            size *= math.exp(2.0 * (rate - _ACCEPTANCE) / math.sqrt(1.0 + number))
        sizes[t] = size
    return [sizes[t] for t in range(experiment.schedule.num_steps)]


def row_normals(key: Array, places: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Returns normals of several shapes for every row, from a key of its own."""

    def one(place: Array) -> list[Array]:
        own = jax.random.fold_in(key, place)
        return [
            jax.random.normal(jax.random.fold_in(own, number), shape)
            for number, shape in enumerate(shapes)
        ]

    return jax.vmap(one)(places)


def proposal_noise(
    networks: Networks, proposal: Proposal, key: Array, places: Array
) -> ProposalNoise:
    """Returns the noise of one draw from g for every row; see `proposal.draw`."""
    shapes = (networks.nz,), networks.event_shape, (), ()
    z, eps, *normal = row_normals(key, places, *shapes)
    part, uniform = (jax.scipy.stats.norm.cdf(choice) for choice in normal)
    is_defensive = part < proposal.defensive
    return ProposalNoise(is_defensive=is_defensive, z=z, eps=eps, uniform=uniform)


# Networks are functions and so static: one program for all chunks of a run.


@partial(jax.jit, static_argnums=0)
def _start(networks, places, key):
    key = jax.random.fold_in(key, _START)
    (x,) = row_normals(key, places, networks.event_shape)
    return x, objective.log_standard_normal(x)


@partial(jax.jit, static_argnums=(0, 1))
def _descend(
    networks, proposal, places, x_next, log_target, key, variables, schedule, t
):
    noise = proposal_noise(networks, proposal, jax.random.fold_in(key, t), places)
    times = jnp.full(places.shape, t)
    return density.denoise_weighted(
        proposal, schedule, networks, variables, x_next, log_target, times, noise
    )


@partial(jax.jit, static_argnums=0)
def _langevin(networks, places, x, key, energy, numbers, size):
    key = reduce(jax.random.fold_in, (_LANGEVIN, *numbers), key)
    eps, choice = row_normals(key, places, networks.event_shape, ())
    times = jnp.full(places.shape, numbers[0])

    def log_target(points: Array) -> Array:
        return networks.energy(energy, points, times)

    uniform = jax.scipy.stats.norm.cdf(choice)
    x, acceptance = density.langevin(log_target, x, size, eps, uniform)
    return x, log_target(x), acceptance
