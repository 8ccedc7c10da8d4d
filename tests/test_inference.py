"""Samples, drawn in chunks."""

import jax
import numpy as np
from helpers import SCHEDULE, STEPS, smooth_networks
from stubs import experiment

from ddaebm_jax import sampling
from ddaebm_jax.data import images
from ddaebm_jax.evaluation import inference


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
