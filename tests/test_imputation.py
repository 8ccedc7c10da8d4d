"""Missing cells: conditionals of the reference, corrected by what the network adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import smooth_networks
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from test_likelihood import experiment

from ddaebm_jax import diffusion, reference
from ddaebm_jax.data import reference_fit
from ddaebm_jax.evaluation import imputation

NUM = 4
SCHEDULE = diffusion.make_schedule(time_eps=1e-3)
NOISE = float(SCHEDULE.sigma_cum[0] / SCHEDULE.a_cum[0])


def made(wide: bool = False, dim: int = 2, rows: np.ndarray | None = None):
    """An experiment and variables whose energy has a reference, or that of rows."""
    rng = np.random.default_rng(0)
    found = reference.empty(NUM, (dim,))
    found.gaussians.log_weights[:2] = np.log([0.3, 0.7])
    found.gaussians.means[:2] = rng.normal(size=(2, dim))
    found.gaussians.variances[:2] = rng.uniform(0.2, 1.0, (2, dim))
    for k in range(2):
        found.gaussians.axes[k] = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    found.points[:5] = rng.normal(size=(5, dim))
    found.log_weights[:5] = np.log(0.1)
    if wide:
        found = found._replace(gaussians=found.gaussians._replace(axes=None))
    if rows is not None:
        found = reference_fit.fit(rows, SCHEDULE, 1)
    plain = smooth_networks(dim=dim)
    networks = reference.with_reference(plain, SCHEDULE, NUM, limit=2.0)
    variables = plain.init(jax.random.key(1))
    variables = reference.with_fitted(variables, found)
    return experiment(networks)._replace(schedule=SCHEDULE), variables, networks


@pytest.mark.parametrize("wide", [False, True])
def test_draws_follow_both_halves_and_the_network(wide: bool):
    """Against quadrature over the unknown cell; of few points each half counts half."""
    built, variables, networks = made(wide=wide)
    rows = np.array([[0.3, np.nan], [np.nan, -0.8]], np.float32)
    known = ~np.isnan(rows)
    draws = imputation.draw_cells(built, variables, rows, known, 4_000, seed=0)
    grid = np.linspace(-6.0, 6.0, 4_001)
    parts = reference.read(variables.energy)
    each = parts.gaussians._replace(axes=(np.eye(2),) * 2) if wide else parts.gaussians
    covariances = [a * v @ a.T for a, v in zip(each.axes, each.variances, strict=False)]
    for row, seen, drawn in zip(rows, known, draws, strict=True):
        x = np.where(seen, row, grid[:, None]).astype(np.float32)
        np.testing.assert_array_equal(drawn[:, seen], np.tile(row[seen], (4_000, 1)))
        of_gaussians = sum(
            np.exp(each.log_weights[k]) * multivariate_normal(mean, covariance).pdf(x)
            for k, (mean, covariance) in enumerate(
                zip(each.means[:2], covariances[:2], strict=True)
            )
        )
        points = np.asarray(parts.points)[:5]
        squares = ((x[:, None] - points) ** 2).sum(axis=2)
        log_window = logsumexp(-0.5 * squares / NOISE**2, axis=1)
        t = jnp.zeros(len(x), jnp.int32)
        added = networks.residual(variables.energy, jnp.asarray(x), t)
        p = of_gaussians / of_gaussians.sum() + softmax(log_window)
        p = p * np.exp(added)
        p /= p.sum()
        mean = (p * grid).sum()
        std = np.sqrt((p * (grid - mean) ** 2).sum())
        cells = drawn[:, ~seen][:, 0]
        assert abs(cells.mean() - mean) < 5 * std / np.sqrt(1_000)
        assert cells.std() == pytest.approx(std, rel=0.1)


def error(rows: np.ndarray) -> tuple[float, float]:
    """Of the mean of draws of the last column, and of regression on the others."""
    train, test = rows[:400], rows[400:].astype(np.float32)
    built, variables, _ = made(dim=rows.shape[1], rows=train)
    known = np.ones(test.shape, bool)
    known[:, -1] = False
    draws = imputation.draw_cells(built, variables, test, known, 32, seed=0)
    inputs = [np.c_[one[:, :-1], np.ones(len(one))] for one in (train, test)]
    solved = np.linalg.lstsq(inputs[0], train[:, -1], rcond=None)[0]
    off = (draws.mean(axis=1) - test)[:, -1], inputs[1] @ solved - test[:, -1]
    return tuple(float(np.sqrt((one**2).mean())) for one in off)


def test_columns_that_depend_on_each_other_are_regressed():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(440, 6)) @ rng.normal(size=(6, 6))
    rows[:, -1] = rows[:, :-1].sum(axis=1) + 0.2 * rng.normal(size=440)
    ours, regression = error(rows / rows.std(axis=0))
    assert ours < 1.3 * regression


def test_a_curve_that_no_gaussian_describes_is_followed():
    rng = np.random.default_rng(0)
    angle = rng.uniform(-1.0, 1.0, 440)
    rows = np.stack([2 * angle, 3 * angle**2 - 1], axis=1)
    ours, regression = error(rows + 0.02 * rng.normal(size=rows.shape))
    assert ours < 0.2 * regression


def test_nothing_known_draws_from_the_energy_and_all_known_draws_nothing():
    built, variables, _ = made(dim=3)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    known = np.array([[True] * 3, [False] * 3])
    draws = imputation.draw_cells(built, variables, rows, known, 20, seed=0)
    np.testing.assert_array_equal(draws[0], np.tile(rows[0], (20, 1)))
    assert draws[1].std(axis=0).min() > 0.1
    again = imputation.draw_cells(built, variables, rows, known, 20, seed=0)
    np.testing.assert_array_equal(draws, again)
    other = imputation.draw_cells(built, variables, rows, known, 20, seed=1)
    assert (draws[1] != other[1]).any()
