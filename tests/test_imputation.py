"""Missing cells: conditionals of the reference, corrected by what the network adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import smooth_networks
from scipy.special import logsumexp
from test_likelihood import experiment

from ddaebm_jax import diffusion, reference
from ddaebm_jax.evaluation import imputation

NUM = 4
SCHEDULE = diffusion.make_schedule(time_eps=1e-3)


def made(points: bool, gaussians: bool, dim: int = 2, wide: bool = False):
    """An experiment and variables whose energy has a reference of these parts."""
    rng = np.random.default_rng(0)
    found = reference.empty(NUM, (dim,))
    if gaussians:
        found.gaussians.log_weights[:2] = np.log([0.3, 0.7])
        found.gaussians.means[:2] = rng.normal(size=(2, dim))
        found.gaussians.variances[:2] = rng.uniform(0.2, 1.0, (2, dim))
        for k in range(2):
            found.gaussians.axes[k] = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    if points:
        found.points[:5] = rng.normal(size=(5, dim))
        found.log_weights[:5] = np.log(0.2)
    if wide:
        found = found._replace(gaussians=found.gaussians._replace(axes=None))
    plain = smooth_networks(dim=dim)
    networks = reference.with_reference(plain, SCHEDULE, NUM, limit=2.0)
    variables = plain.init(jax.random.key(1))
    variables = reference.with_fitted(variables, found)
    return experiment(networks)._replace(schedule=SCHEDULE), variables, networks


@pytest.mark.parametrize("wide", [False, True])
def test_draws_follow_the_energy_given_the_known_cells(wide: bool):
    """Against quadrature over the unknown one."""
    built, variables, networks = made(points=False, gaussians=True, wide=wide)
    rows = np.array([[0.3, np.nan], [np.nan, -0.8]], np.float32)
    known = ~np.isnan(rows)
    draws = imputation.draw_cells(built, variables, rows, known, 4_000, seed=0)
    grid = np.linspace(-6.0, 6.0, 4_001)
    for row, seen, drawn in zip(rows, known, draws, strict=True):
        x = np.where(seen, row, grid[:, None]).astype(np.float32)
        np.testing.assert_array_equal(drawn[:, seen], np.tile(row[seen], (4_000, 1)))
        t = jnp.zeros(len(x), jnp.int32)
        log_p = np.asarray(networks.energy(variables.energy, jnp.asarray(x), t))
        p = np.exp(log_p - logsumexp(log_p))
        mean = (p * grid).sum()
        std = np.sqrt((p * (grid - mean) ** 2).sum())
        cells = drawn[:, ~seen][:, 0]
        assert abs(cells.mean() - mean) < 5 * std / np.sqrt(1_000)
        assert cells.std() == pytest.approx(std, rel=0.1)


def test_rows_near_the_known_cells_give_theirs():
    built, variables, _ = made(points=True, gaussians=False)
    points = np.asarray(variables.energy["reference"]["points"])[:5]
    rows = np.array([[points[3, 0], 0.0]], np.float32)
    draws = imputation.draw_cells(
        built, variables, rows, np.array([[True, False]]), 50, seed=0
    )
    noise = float(SCHEDULE.sigma_cum[0] / SCHEDULE.a_cum[0])
    assert draws[0, :, 1].mean() == pytest.approx(points[3, 1], abs=noise)
    assert draws[0, :, 1].std() == pytest.approx(noise, rel=0.4)


def test_nothing_known_draws_from_the_energy_and_all_known_draws_nothing():
    built, variables, _ = made(points=True, gaussians=True, dim=3)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    known = np.array([[True] * 3, [False] * 3])
    draws = imputation.draw_cells(built, variables, rows, known, 20, seed=0)
    np.testing.assert_array_equal(draws[0], np.tile(rows[0], (20, 1)))
    assert draws[1].std(axis=0).min() > 0.1
    again = imputation.draw_cells(built, variables, rows, known, 20, seed=0)
    np.testing.assert_array_equal(draws, again)
    other = imputation.draw_cells(built, variables, rows, known, 20, seed=1)
    assert (draws[1] != other[1]).any()
