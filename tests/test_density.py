"""Energies and scores at the data's level, grids, and evaluation in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import DIM, normals, smooth_networks
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax import density


def test_energy_and_score_are_those_of_level_0():
    networks = smooth_networks()
    variables = networks.init(jax.random.key(0)).energy
    x = normals(0, 4, DIM)

    def energy(row, t):
        return networks.energy(variables, row[None], jnp.full((1,), t, jnp.int32))[0]

    f = jax.jit(lambda x: density.energy_at_data(networks, variables, x))(x)
    score = jax.jit(lambda x: density.score_at_data(networks, variables, x))(x)
    by_row = jax.jit(jax.vmap(jax.value_and_grad(energy), (0, None)))
    expected, later = by_row(x, 0), by_row(x, 1)
    np.testing.assert_allclose(f, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score, expected[1], rtol=1e-5, atol=1e-6)
    assert (np.asarray(later[0]) != np.asarray(f)).all()


@given(st.floats(0.5, 5.0), st.sampled_from([1, 2, 5]))
def test_grid_tiles_the_square(extent: float, cells: int):
    grid = np.asarray(density.grid_points(extent, cells)).reshape(cells, cells, 2)
    width = 2 * extent / cells
    centres = -extent + width * (np.arange(cells) + 0.5)
    np.testing.assert_allclose(grid[:, 0, 0], centres, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grid[0, :, 1], centres, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grid[:, :1, 0], grid[:, -1:, 0])


@given(st.integers(1, 23), st.integers(1, 30))
def test_evaluation_in_chunks_is_that_of_the_whole(rows: int, chunk: int):
    x = np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2)
    sizes = []

    def function(part):
        sizes.append(len(part))
        return jnp.asarray(np.asarray(part).sum(axis=1))

    result = density.evaluate_in_chunks(function, jnp.asarray(x), chunk)
    np.testing.assert_array_equal(result, x.sum(axis=1))
    assert len(set(sizes)) == 1 and sizes[0] == min(chunk, rows)
