"""Each term of the game against NumPy and SciPy; the penalty by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DIM, GAME, NZ, SCHEDULE, normals, smooth_networks, x64
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ddaebm_jax import diffusion, losses, objective
from ddaebm_jax.game import Noise

BATCH = 6
T = jnp.array([0, 1, 2, 3, 2, 0])


def points(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return x_t, x_{t+1}, x̂_0."""
    return tuple(normals(i, BATCH, *shape) for i in range(3))


def posterior_mean(x0: jax.Array, x_next: jax.Array) -> np.ndarray:
    """Return c1_t x_0 + c2_t x_{t+1}, row by row."""
    c1, c2 = SCHEDULE.posterior_c1, SCHEDULE.posterior_c2
    rows = [c1[k] * x0[i] + c2[k] * x_next[i] for i, k in enumerate(np.asarray(T))]
    return np.asarray(rows, np.float64)


# The latent's terms.

moments = st.tuples(st.floats(-3, 3), st.floats(-4, 3))


@given(moments, moments)
def test_latent_kl_is_the_integral(first, second):
    """½(σ² + μ² − 1 − log σ²) against ∫ q log q/p, summed over dims."""
    total = 0.0
    for mu, logvar in (first, second):
        std = np.exp(0.5 * logvar)
        total += integrate.quad(
            lambda z, mu=mu, std=std: (
                stats.norm.pdf(z, mu, std)
                * (stats.norm.logpdf(z, mu, std) - stats.norm.logpdf(z))
            ),
            mu - 12 * std,
            mu + 12 * std,
        )[0]
    mu, logvar = jnp.array([first, second]).T
    (kl,) = objective.latent_kl(mu[None], logvar[None])
    np.testing.assert_allclose(kl, total, rtol=1e-4, atol=1e-5)


@given(moments, st.floats(-3, 3))
def test_latent_log_prob_is_a_gaussian_without_its_constant(moment, z):
    mu, logvar = moment
    pair = (jnp.full((1, 2), value) for value in (z, mu, logvar))
    (value,) = objective.latent_log_prob(*pair)
    log_prob = 2 * stats.norm.logpdf(z, mu, np.exp(0.5 * logvar))
    expected = -(log_prob + np.log(2 * np.pi))
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)


def test_latent_draw_has_the_posterior_s_moments():
    mu, logvar, eps = (normals(i, BATCH, NZ) for i in range(3))
    z = objective.sample_latent(mu, logvar, eps)
    expected = np.asarray(mu) + np.sqrt(np.exp(np.asarray(logvar))) * np.asarray(eps)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6)


def test_latent_log_prob_survives_an_underflowing_variance():
    (value,) = objective.latent_log_prob(
        jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.full((1, 1), -200.0)
    )
    np.testing.assert_allclose(value, -100.0 + 0.5e6, rtol=1e-5)


# The terms in data space, for points in the plane and for images.

SHAPES = [(2,), (4, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_reverse_potential(shape):
    x_fake, x_next, _ = points(shape)
    f, s = normals(7, BATCH), SCHEDULE
    rows = []
    for i, k in enumerate(np.asarray(T)):
        log_q = stats.norm.logpdf(x_next[i], s.a[k + 1] * x_fake[i], s.sigma[k + 1])
        rows.append(-(float(f[i]) + log_q.sum()))
    value = objective.reverse_potential(s, f, x_fake, x_next, T)
    np.testing.assert_allclose(value, rows, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("floor", [1e-2, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_nll(shape, floor, weighted):
    x_t, x_next, x0 = points(shape)
    s = SCHEDULE
    least = float(s.posterior_var[1]) if floor is None else floor
    mean = posterior_mean(x0, x_next)
    rows = []
    for i, k in enumerate(np.asarray(T)):
        std = np.sqrt(max(float(s.posterior_var[k]), least))
        row = -stats.norm.logpdf(x_t[i], mean[i], std).sum()
        rows.append(row * float(s.recon_weight[k + 1]) if weighted else row)
    least = objective.variance_floor(s, floor)
    weight = s.recon_weight if weighted else None
    value = objective.reconstruction_nll(s, x_t, x0, x_next, T, least, weight)
    np.testing.assert_allclose(value, rows, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_mse(shape):
    x_t, x_next, x0 = points(shape)
    gaps = (np.asarray(x_t) - posterior_mean(x0, x_next)) ** 2
    value = objective.reconstruction_mse(SCHEDULE, x_t, x0, x_next, T)
    rows = gaps.reshape(BATCH, -1).sum(axis=1)
    np.testing.assert_allclose(value, rows, rtol=1e-5)


# The energy's terms.


def energy_in_numpy(params: dict, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    hidden = np.tanh(x @ params["w"] + params["b"][t])
    return (hidden @ params["v"] + params["c"][t])[:, 0]


def test_energy_gradient_by_brute_force():
    """The gradient in θ, penalty included, against finite differences in float64.

    Of f + log q in x_t, and of the whole loss in θ along random directions.
    """
    rng = np.random.default_rng(0)
    s = SCHEDULE
    a, beta = (np.asarray(v, np.float64)[np.asarray(T) + 1] for v in (s.a, s.beta))
    x_t, x_next, x_fake = rng.normal(size=(3, BATCH, DIM))
    t = np.asarray(T)
    networks = smooth_networks()
    params = networks.init(jax.random.key(0)).energy["params"]
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}

    def conditional(p, x):
        gap = x_next - a[:, None] * x
        log_q = -0.5 * (gap**2).sum(1) / beta - 0.5 * DIM * np.log(2 * np.pi * beta)
        return energy_in_numpy(p, x, t) + log_q

    def loss(p, gamma, energy_l2):
        f_real = energy_in_numpy(p, x_t, t)
        value = energy_in_numpy(p, x_fake, t) - f_real + energy_l2 * f_real**2
        if gamma is None:
            return value.mean()
        for step in 1e-5 * np.eye(DIM):
            slope = conditional(p, x_t + step) - conditional(p, x_t - step)
            value = value + 0.5 * gamma * (slope / 2e-5) ** 2
        return value.mean()

    with x64():
        unread = dict.fromkeys(
            ("eps_t", "eps_next", "eps_post"), jnp.zeros((BATCH, DIM))
        )
        unread |= dict.fromkeys(("z", "eps_z"), jnp.zeros((BATCH, NZ)))
        keys = jax.random.split(jax.random.key(0), BATCH)
        noise = Noise(t=jnp.asarray(t), dropout=keys, **unread)
        pair = losses.Pair(jnp.asarray(x_t), jnp.asarray(x_next), noise)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def value_and_grad(p, gamma, energy_l2):
            game = GAME._replace(energy_l2=energy_l2)
            fake = losses.Negatives(jnp.asarray(x_fake))
            return jax.value_and_grad(
                lambda p: losses.energy_loss(
                    game, s, networks, pair, fake, gamma, {"params": p}
                )[0]
            )(p)

        start = jax.tree.map(jnp.asarray, params)
        for weights in ((None, 0.0), (0.5, 0.0), (0.5, 0.3)):
            value, gradient = value_and_grad(start, *weights)
            np.testing.assert_allclose(value, loss(params, *weights), rtol=1e-6)
            for _ in range(4):
                way = {k: rng.normal(size=v.shape) for k, v in params.items()}
                ends = [
                    loss({k: v + h * way[k] for k, v in params.items()}, *weights)
                    for h in (1e-4, -1e-4)
                ]
                along = sum((np.asarray(gradient[k]) * way[k]).sum() for k in way)
                np.testing.assert_allclose(
                    along, (ends[0] - ends[1]) / 2e-4, rtol=1e-4, atol=1e-6
                )


def test_a_schedule_of_one_step_has_no_own_variance_floor():
    schedule = diffusion.make_schedule(1)
    assert objective.variance_floor(schedule, 0.5) == 0.5
    with pytest.raises(ValueError, match="one step"):
        objective.variance_floor(schedule, None)
