"""Energies at the data's level, and normalisers against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DIM, smooth_networks
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax import density


def points(rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, DIM)), "f")


def test_energy_and_score_are_those_of_level_0():
    networks = smooth_networks()
    variables = networks.init(jax.random.key(0)).energy
    x = points(4)

    def at_zero(row):
        return networks.energy(variables, row[None], jnp.zeros((1,), jnp.int32))[0]

    @jax.jit
    def both(x):
        ours = (
            density.energy_at_data(networks, variables, x),
            density.score_at_data(networks, variables, x),
        )
        later = networks.energy(variables, x, jnp.ones((4,), jnp.int32))
        return ours, jax.vmap(jax.value_and_grad(at_zero))(x), later

    (f, score), expected, later = both(x)
    np.testing.assert_allclose(f, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score, expected[1], rtol=1e-5, atol=1e-6)
    assert (np.asarray(later) != np.asarray(f)).all()


@given(st.floats(0.5, 5.0), st.sampled_from([1, 2, 5]))
def test_grid_tiles_the_square(extent: float, cells: int):
    grid = np.asarray(density.grid_points(extent, cells)).reshape(cells, cells, 2)
    width = 2 * extent / cells
    centres = -extent + width * (np.arange(cells) + 0.5)
    np.testing.assert_allclose(grid[:, 0, 0], centres, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grid[0, :, 1], centres, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grid[:, :1, 0], grid[:, -1:, 0])


@given(st.integers(1, 23), st.integers(1, 30))
def test_chunks_change_nothing(rows: int, chunk: int):
    x = np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2)
    sizes = []

    def function(part):
        sizes.append(len(part))
        return jnp.asarray(np.asarray(part).sum(axis=1))

    result = density.evaluate_in_chunks(function, jnp.asarray(x), chunk)
    np.testing.assert_array_equal(result, x.sum(axis=1))
    assert len(set(sizes)) == 1 and sizes[0] == min(chunk, rows)


@pytest.mark.parametrize("shift", [0.0, -3.0, 500.0])
def test_normaliser_of_a_gaussian(shift: float):
    """log Z = log 2πσ² + shift, however large the shift."""
    mean, std = jnp.array([[0.3, -0.2]]), 0.4

    def log_density(x):
        return shift - 0.5 * ((x - mean) ** 2).sum(axis=1) / std**2

    log_p, log_z = density.log_density_on_grid(log_density, 4.0, 80)
    closed = np.log(2 * np.pi * std**2)
    np.testing.assert_allclose(log_z, closed + shift, rtol=1e-6, atol=1e-4)
    assert log_p.shape == (80, 80)
    np.testing.assert_allclose(np.exp(log_p).sum() * 0.1**2, 1.0, rtol=1e-3)
    grid = density.grid_points(4.0, 80)
    expected = log_density(grid).reshape(80, 80) - shift - closed
    np.testing.assert_allclose(log_p, expected, rtol=1e-4, atol=2e-3)


def test_grid_is_indexed_by_the_first_coordinate():
    log_p, _ = density.log_density_on_grid(lambda x: x[:, 0], 1.0, 4)
    assert (np.diff(log_p, axis=0) > 0).all()
    np.testing.assert_array_equal(np.diff(log_p, axis=1), 0.0)
