"""Normalisers and likelihoods against closed forms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GAME, SCHEDULE, STEPS

from ddaebm_jax import density, diffusion, objective
from ddaebm_jax.evaluation import likelihood, particles
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Networks, Players
from ddaebm_jax.proposal import Proposal

DIM = 2
LOG_Z = 0.7  # Of every energy: f = log N(x; 0, I) + LOG_Z.


def gaussian_networks(shift: float = 0.0, spread: float = 1.0) -> Networks:
    """Return networks of data N(0, I), whose every level is N(0, I).

    p(x_t|x_{t+1}) = N(a x_{t+1}, β I). With c1 G = a x_{t+1} − c2 x_{t+1} + k z, and
    variance r² of the rest, k² = β − r², the generator is exact, and so is the
    posterior N(k(x_t − a x_{t+1})/β, r²/β I). The generator's mean is moved by `shift`,
    and its latent stretched by `spread`.
    """
    r = jnp.exp(0.5 * SCHEDULE.posterior_log_var)

    def parts(x_next, t):
        def column(values):
            return diffusion.per_example(values, x_next)

        a, beta = column(SCHEDULE.a[t + 1]), column(SCHEDULE.beta[t + 1])
        return a, beta, jnp.sqrt(beta - column(r[t]) ** 2), column(r[t])

    def energy(variables, x, t, rngs=None):
        del variables, t
        return objective.log_standard_normal(x) + LOG_Z

    def generator(variables, x_next, t, z, rngs=None):
        a, _, k, _ = parts(x_next, t)
        c1 = diffusion.per_example(SCHEDULE.posterior_c1[t], x_next)
        c2 = diffusion.per_example(SCHEDULE.posterior_c2[t], x_next)
        return ((a - c2) * x_next + spread * k * z + shift) / c1

    def posterior(variables, x_t, x_next, t):
        a, beta, k, r = parts(x_next, t)
        logvar = jnp.log(r**2 / beta) * jnp.ones_like(x_t)
        return k * (x_t - a * x_next) / beta, logvar

    return Networks(*(None, energy, generator, posterior, None, None, (DIM,)), nz=DIM)


def experiment(networks: Networks, defensive: float = 0.0) -> Experiment:
    """Return what sampling reads of an experiment, on one device."""
    config = SimpleNamespace(
        parallel=SimpleNamespace(num_devices=1),
        evaluation=SimpleNamespace(batch_size=100),
    )
    proposal = Proposal(1e-9, defensive, 1.0)
    return Experiment(
        config=config,
        source=SimpleNamespace(holds_images=False),
        schedule=SCHEDULE,
        networks=networks,
        game=GAME._replace(proposal=proposal),
        optimizers=None,
    )


NO_VARIABLES = Players({}, {}, {})


@pytest.mark.parametrize("defensive", [0.0, 0.25])
def test_exact_networks_give_log_z_without_variance(defensive: float):
    """So they do with a defensive part of ς = 1, which is exact here, too."""
    exact = experiment(gaussian_networks(), defensive)
    found = particles.run_particles(exact, NO_VARIABLES, 500, 3, seed=0)
    np.testing.assert_allclose(found.estimate.runs, LOG_Z, atol=1e-3)
    assert found.estimate.error < 1e-3
    np.testing.assert_allclose(found.estimate.effective, 1.0, atol=1e-3)
    assert found.x.shape == (1_500, DIM) and found.estimate.acceptance is None
    np.testing.assert_allclose(found.x.mean(axis=0), 0.0, atol=0.12)
    np.testing.assert_allclose(np.cov(found.x.T), np.eye(DIM), atol=0.15)


@pytest.mark.parametrize("moves", [0, 2])
def test_log_z_of_wrong_networks_is_unbiased(moves: int):
    """The mean of Ẑ over runs is Z within its error, and the particles are right."""
    wrong = experiment(gaussian_networks(shift=0.15, spread=1.1), 0.1)
    num = 200
    found = particles.run_particles(wrong, NO_VARIABLES, 400, num, 1, moves)
    z = np.exp(np.array(found.estimate.runs) - LOG_Z)
    error = z.std(ddof=1) / np.sqrt(num)
    assert 0.0 < error < 0.02
    assert abs(z.mean() - 1.0) < 4.0 * error
    assert abs(found.estimate.log_z - LOG_Z) < 4.0 * found.estimate.error
    np.testing.assert_allclose(found.estimate.error, error / z.mean(), rtol=1e-6)
    assert all(0.0 < share < 1.0 for share in found.estimate.effective)
    np.testing.assert_allclose(found.x.mean(axis=0), 0.0, atol=0.03)
    np.testing.assert_allclose(np.cov(found.x.T), np.eye(DIM), atol=0.04)
    if moves:
        assert all(0.4 < rate < 0.75 for rate in found.estimate.acceptance)


def test_hopeless_networks_are_refused():
    far = experiment(gaussian_networks(shift=40.0))
    estimate = particles.run_particles(far, NO_VARIABLES, 500, 2, seed=0).estimate
    assert "particles count" in estimate.refusal
    fine = experiment(gaussian_networks())
    estimate = particles.run_particles(fine, NO_VARIABLES, 500, 2, seed=0).estimate
    assert estimate.refusal is None


def test_langevin_leaves_its_target_alone():
    """N(1, 0.5²) stays so, at a step size at which moves are rejected."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = 1.0 + 0.5 * jax.random.normal(keys[0], (40_000, 1))

    @jax.jit
    def move(x, keys):
        eps = jax.random.normal(keys[0], x.shape)
        uniform = jax.random.uniform(keys[1], x.shape[:1])
        log_target = lambda x: -0.5 * (((x - 1.0) / 0.5) ** 2).sum(axis=1)  # noqa: E731
        return density.langevin(log_target, x, 0.8, eps, uniform)

    for key in jax.random.split(keys[1], 20):
        x, acceptance = move(x, jax.random.split(key))
    assert 0.3 < acceptance.mean() < 0.95
    assert abs(x.mean() - 1.0) < 0.015 and abs(x.std() - 0.5) < 0.01


def test_systematic_resampling_keeps_weights():
    weights = np.array([0.0, 0.5, 0.3, 0.2])
    for uniform in (0.0, 0.4, 0.999):
        counts = np.bincount(particles.systematic(weights, uniform), minlength=4)
        assert (np.abs(counts - 4 * weights) < 1).all() and counts.sum() == 4


def test_consistency_of_exact_networks():
    exact = experiment(gaussian_networks())
    rows = np.random.default_rng(0).normal(size=(50, DIM)).astype(np.float32)
    gaps = likelihood.consistency(exact, NO_VARIABLES, rows, num_draws=4)
    assert len(gaps) == STEPS
    np.testing.assert_allclose(gaps, 0.0, atol=2e-3)


def test_bound_of_an_exact_generator_is_the_likelihood():
    rng = np.random.default_rng(0)
    train, rows = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (20_000, 40))
    found = likelihood.generator_bound(
        experiment(gaussian_networks()), NO_VARIABLES, train, rows, num_paths=4
    )
    np.testing.assert_allclose(
        found, objective.log_standard_normal(jnp.asarray(rows)), atol=0.05
    )
    shifted = experiment(gaussian_networks(shift=0.3))
    worse = likelihood.generator_bound(shifted, NO_VARIABLES, train, rows, 4)
    assert worse.mean() < found.mean()
