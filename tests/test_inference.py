"""Scores of points by a quadratic energy, in closed form; samples in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULE, STEPS, smooth_networks
from stubs import experiment

from ddaebm_jax import models, sampling
from ddaebm_jax.data import images
from ddaebm_jax.evaluation import inference

# f(x, t) = −½ p_t ‖x − m‖² + c_t.
PRECISION = np.array([2.0, 1.0, 0.5, 0.25])
CONSTANT = np.array([1.0, -3.0, 0.5, 2.0])
VARIABLES = {"p": jnp.asarray(PRECISION, "f"), "c": jnp.asarray(CONSTANT, "f")}
MEAN = 0.25


def quadratic(variables, x, t, rngs=None):
    squares = ((x - MEAN) ** 2).reshape(x.shape[0], -1).sum(axis=1)
    return -0.5 * variables["p"][t] * squares + variables["c"][t]


NETWORKS = models.Networks(*[quadratic] * 6, event_shape=(3, 2, 1), nz=1)
PLAYERS = models.Players(VARIABLES, None, None)


def scored(x, seed=0, num_draws=2, num_devices=1, chunk=4):
    made = experiment((3, 2, 1), NETWORKS, num_devices=num_devices, batch_size=chunk)
    return inference.outlier_scores(made, PLAYERS, x, seed, num_draws)


def points(rows=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (rows, 3, 2, 1)).astype(np.float32)


def test_scores_at_the_data_are_closed_forms():
    x = points()
    found = scored(x)
    distance = np.sqrt(((x - MEAN) ** 2).sum(axis=(1, 2, 3)))
    energy = -0.5 * PRECISION[0] * distance**2 + CONSTANT[0]
    np.testing.assert_allclose(found["energy"], energy, rtol=1e-5)
    norm = -PRECISION[0] * distance
    np.testing.assert_allclose(found["gradient norm"], norm, rtol=1e-5)


def test_noise_is_that_of_the_point_the_draw_and_the_time():
    x, seed, num_draws = points(5), 3, 2
    total = np.zeros(len(x))
    for i, draw, t in np.ndindex(len(x), num_draws, STEPS):
        key = jax.random.key(seed)
        for number in (i, draw, t):
            key = jax.random.fold_in(key, number)
        eps = np.asarray(jax.random.normal(key, x[i].shape))
        x_t = SCHEDULE.a_cum[t] * x[i] + SCHEDULE.sigma_cum[t] * eps
        total[i] += quadratic(VARIABLES, x_t[None], jnp.array([t]))[0]
    found = scored(x, seed, num_draws)["energy over t"]
    np.testing.assert_allclose(found, total / num_draws, rtol=1e-5)
    other = scored(x, seed + 1, num_draws)["energy over t"]
    assert (other != found).all()


BYTES = np.random.default_rng(0).integers(0, 256, (7, 3, 2, 1), np.uint8)


@pytest.mark.parametrize(
    ("x", "how"),
    [
        (points(), {"chunk": 1}),
        (points(), {"chunk": 50}),
        (points(), {"num_devices": 3}),
        (points(5), {}),
        (BYTES, {}),
    ],
)
def test_scores_depend_on_the_point_and_its_number_only(x, how):
    """Not on chunks, devices, later points, or whether images are bytes."""
    whole = np.asarray(images.to_float(BYTES)) if x is BYTES else points()
    expected = scored(whole)
    for name, values in scored(x, **how).items():
        np.testing.assert_allclose(values, expected[name][: len(x)], rtol=1e-5)


def test_samples_do_not_depend_on_chunks_and_devices():
    """Sample i is a function of (seed, i), also as the end of its trajectory."""
    networks = smooth_networks()
    variables = networks.init(jax.random.key(0))
    made = experiment((3, 2, 1), networks, num_devices=3, batch_size=4)
    found = inference.draw_samples(made, variables, 7, seed=3)
    sample = jax.jit(sampling.sample, static_argnums=(1, 4))
    expected = sample(SCHEDULE, networks, variables.generator, jax.random.key(3), 7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    trajectories = inference.draw_trajectories(made, variables, 5, seed=3)
    assert trajectories.shape == (5, STEPS + 1, 2)
    np.testing.assert_allclose(trajectories[:, -1], found[:5], rtol=1e-4, atol=1e-5)
    chunks = list(inference.draw_images(made, variables, 7, seed=3))
    assert [len(chunk) for chunk in chunks] == [6, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), images.to_uint8(found))
