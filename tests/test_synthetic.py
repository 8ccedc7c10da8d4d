"""Every distribution's draws against its density, and against other people's code."""

from collections.abc import Callable
from functools import cache

import jax
import numpy as np
import pytest
from sklearn import datasets

from ddaebm_jax import density
from ddaebm_jax.data import synthetic

DRAWS, BINS = 40_000, 40
NAMES = sorted(synthetic.SYNTHETIC)


@cache
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), DRAWS)


@cache
def drawer(name: str) -> Callable[[jax.Array], jax.Array]:
    distribution = synthetic.SYNTHETIC[name]()
    return jax.jit(lambda keys: synthetic.draw(distribution, keys))


@cache
def draws(name: str) -> np.ndarray:
    return np.asarray(drawer(name)(keys()))


@cache
def cell_masses(name: str) -> np.ndarray:
    """The density times the cell, on the grid that evaluation uses."""
    distribution = synthetic.SYNTHETIC[name]()
    points = density.grid_points(distribution.extent, distribution.cells)
    log_p = density.evaluate_in_chunks(jax.jit(distribution.log_density), points)
    area = (2 * distribution.extent / distribution.cells) ** 2
    return (
        np.exp(np.asarray(log_p, np.float64)).reshape([distribution.cells] * 2) * area
    )


def assert_same_law(points: np.ndarray, name: str):
    """Asserts that a histogram is as near the density as sampling allows.

    The total variation of n draws in bins of masses p is ½Σ√(2p(1−p)/πn) on average.
    """
    masses = cell_masses(name)
    extent, fold = synthetic.SYNTHETIC[name]().extent, len(masses) // BINS
    p = masses.reshape(BINS, fold, BINS, fold).sum(axis=(1, 3))
    counts, _, _ = np.histogram2d(*points.T, bins=BINS, range=[[-extent, extent]] * 2)
    share = counts / len(points)
    variation = 0.5 * np.abs(share - p).sum()
    expected = 0.5 * np.sqrt(2 * p * (1 - p) / (np.pi * len(points))).sum()
    assert variation < 1.2 * expected + 0.003, (variation, expected)


@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one(name: str):
    assert cell_masses(name).sum() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_density(name: str):
    assert_same_law(draws(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_depends_on_its_key_alone(name: str):
    """Not on its neighbours or its place, nor on an earlier call."""
    order = np.random.default_rng(0).permutation(DRAWS)
    again = drawer(name)(keys()[order])
    np.testing.assert_allclose(again, draws(name)[order], rtol=1e-5, atol=1e-6)
    assert len(np.unique(draws(name), axis=0)) > 0.99 * DRAWS


def test_gaussians25_is_the_paper_s():
    """25 modes, as often as each other, each with the paper's standard deviation."""
    points, std = draws("gaussians25"), 0.1 / 2.828
    axis = np.array([-4, -2, 0, 2, 4]) / 2.828
    nearest = np.abs(points[..., None] - axis).argmin(axis=-1)
    np.testing.assert_allclose((points - axis[nearest]).std(axis=0), std, rtol=0.02)
    share = np.bincount(nearest @ [5, 1], minlength=25) / DRAWS
    np.testing.assert_allclose(share, 1 / 25, atol=0.006)
    distribution = synthetic.gaussians25()
    assert distribution.mode_std == pytest.approx(std)
    modes = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    np.testing.assert_allclose(distribution.modes, modes, atol=1e-6)


def test_swissroll_is_scikit_learn_s():
    points, _ = datasets.make_swiss_roll(DRAWS, noise=1.0, random_state=0)
    assert_same_law(points[:, [0, 2]] / 5.0, "swissroll")


def test_pinwheel_is_the_usual_one():
    """The construction that the paper's code and its forebears share."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(DRAWS, 2)) * np.array([0.3, 0.1])
    features[:, 0] += 1.0
    arm = rng.integers(0, 5, DRAWS) * 2 * np.pi / 5
    angles = arm + 0.25 * np.exp(features[:, 0])
    cos, sin = np.cos(angles), np.sin(angles)
    rotations = np.stack([cos, -sin, sin, cos], axis=-1).reshape(-1, 2, 2)
    assert_same_law(2 * np.einsum("ti,tij->tj", features, rotations), "pinwheel")
