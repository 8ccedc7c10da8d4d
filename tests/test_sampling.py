"""The sampler with exact generators, whose samples have a known law."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NZ, SCHEDULE, STEPS, normals, smooth_networks

from ddaebm_jax import sampling
from ddaebm_jax.models import Networks

MANY = 10_000


def with_generator(generator: Callable, dim: int, nz: int) -> Networks:
    """Return networks without anything but a generator."""
    others = ("init", "energy", "posterior", "train_generator", "train_posterior")
    return Networks(
        generator=generator, event_shape=(dim,), nz=nz, **dict.fromkeys(others)
    )


def trajectory(networks: Networks, number: int) -> np.ndarray:
    def run(key):
        return sampling.sample_trajectory(SCHEDULE, networks, {}, key, number)

    return float64(jax.jit(run)(jax.random.key(0)))


def float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def test_point_mass_follows_the_posterior_s_recursion():
    """For x̂_0 = c every level's mean and variance are known exactly."""
    point = jnp.array([2.0, -1.0])
    networks = with_generator(
        lambda variables, x, t, z, rngs=None: jnp.broadcast_to(point, x.shape), 2, 1
    )
    levels = trajectory(networks, MANY)
    assert levels.shape == (STEPS + 1, MANY, 2)
    c1, c2 = float64(SCHEDULE.posterior_c1), float64(SCHEDULE.posterior_c2)
    s2 = float64(SCHEDULE.posterior_var)
    mean, var = np.zeros(2), 1.0
    error = 5 / np.sqrt(MANY)
    for t in range(STEPS, -1, -1):
        x = levels[STEPS - t]
        np.testing.assert_allclose(x.mean(axis=0), mean, atol=error * np.sqrt(var))
        np.testing.assert_allclose(x.var(axis=0), var, rtol=2 * error)
        if t:
            mean = c1[t - 1] * float64(point) + c2[t - 1] * mean
            var = c2[t - 1] ** 2 * var + (s2[t - 1] if t > 1 else 0.0)
    # The last step adds no noise, so nearly nothing is left of x_T.
    assert np.abs(levels[-1] - np.asarray(point)).max() < 1e-2


def test_samples_of_the_true_posterior_have_the_data_s_law():
    """For Gaussian data, with G drawing from the true q(x_0 | x_{t+1})."""
    centre, spread = 1.5, 0.4
    a, noise = SCHEDULE.a_cum, SCHEDULE.sigma_cum

    def generator(variables, x, t, z, rngs=None):
        a_t, s_t = a[t + 1][:, None], noise[t + 1][:, None]
        total = (a_t * spread) ** 2 + s_t**2
        mean = centre + spread**2 * a_t / total * (x - a_t * centre)
        return mean + spread * s_t / jnp.sqrt(total) * z

    networks = with_generator(generator, 1, 1)
    levels = trajectory(networks, MANY)
    laws = [(1.0, 0.0)]  # The last step adds no noise.
    laws += [(float(a[k]), float(noise[k])) for k in range(1, STEPS + 1)]
    for x, (scale, level) in zip(levels, laws[::-1], strict=True):
        std = np.hypot(scale * spread, level)
        np.testing.assert_allclose(x.mean(), scale * centre, atol=0.05 * std)
        np.testing.assert_allclose(x.std(), std, rtol=0.04)


def test_times_descend_and_each_call_has_its_own_latent():
    calls = []

    def generator(variables, x, t, z, rngs=None):
        calls.append((np.asarray(t), np.asarray(z), np.asarray(x)))
        return variables["shift"] + 0.0 * x

    networks = with_generator(generator, 2, NZ)
    levels = sampling.sample_trajectory(
        SCHEDULE, networks, {"shift": jnp.float32(3.0)}, jax.random.key(0), 5
    )
    times = [t.tolist() for t, _, _ in calls]
    assert times == [[k] * 5 for k in reversed(range(STEPS))]
    for (_, _, x), level in zip(calls, levels[:-1], strict=True):
        np.testing.assert_array_equal(x, level)
    latents = np.concatenate([z.ravel() for _, z, _ in calls])
    assert len(np.unique(latents)) == STEPS * 5 * NZ
    assert abs(latents.mean()) < 0.5 and 0.6 < latents.std() < 1.4


@pytest.fixture(scope="module")
def smooth() -> tuple[Networks, dict]:
    networks = smooth_networks()
    return networks, networks.init(jax.random.key(0)).generator


def test_rows_are_independent(smooth):
    @jax.jit
    def denoise(x):
        return sampling.denoise(SCHEDULE, *smooth, jax.random.key(3), x)

    x_last = normals(0, 4, 2)
    levels = denoise(x_last)
    np.testing.assert_array_equal(levels[0], x_last)
    moved = denoise(x_last.at[2].add(1.0))
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(moved[:, others], levels[:, others])
    assert (np.asarray(moved)[:, 2] != np.asarray(levels)[:, 2]).any()


def test_more_samples_begin_with_the_fewer_ones(smooth):
    @functools.partial(jax.jit, static_argnums=1)
    def sample(seed: jax.Array, number: int):
        return sampling.sample(SCHEDULE, *smooth, jax.random.key(seed), number)

    few, more = sample(5, 2), sample(5, 4)
    np.testing.assert_allclose(more[:2], few, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sample(5, 4), more)
    assert (np.asarray(sample(6, 4)) != np.asarray(more)).all()


def test_without_latent_z_is_zero():
    def generator(variables, x, t, z, rngs=None):
        assert z.shape == (3, NZ)
        return x + variables["weight"] * z.sum(axis=1, keepdims=True)

    @functools.partial(jax.jit, static_argnums=1)
    def sample(weight, latent):
        networks, variables = with_generator(generator, 2, NZ), {"weight": weight}
        key = jax.random.key(0)
        return sampling.sample(SCHEDULE, networks, variables, key, 3, latent=latent)

    np.testing.assert_allclose(sample(1.0, False), sample(0.0, True), rtol=1e-6)
    assert (np.asarray(sample(1.0, True)) != np.asarray(sample(0.0, True))).any()
