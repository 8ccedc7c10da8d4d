"""Metrics in the plane, where their values are known."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax.evaluation import plane

KEY = jax.random.key(0)


def cloud(seed: int, dim: int, rows: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


# Modes.

MODES = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], np.float32)


def test_mode_coverage_of_constructed_points():
    """3σ = 0.3 divides high quality from low, by the nearest mode."""
    samples = np.array(
        [[0.0, 0.29], [-0.2, 0.2], [4.29, 0.0], [0.0, 4.31], [2.0, 2.0]], np.float32
    )
    assert plane.mode_coverage(samples, MODES, 0.1) == (2, pytest.approx(3 / 5))
    assert plane.mode_coverage(MODES, MODES, 0.1) == (3, 1.0)
    assert plane.mode_coverage(MODES + 2.0, MODES, 0.1) == (0, 0.0)


def test_mode_coverage_of_the_mixture_itself():
    """A round Gaussian has 1 − e^{−4.5} of its mass within 3σ."""
    rng = np.random.default_rng(0)
    samples = MODES[rng.integers(0, 3, 20_000)] + 0.1 * rng.normal(size=(20_000, 2))
    found = plane.mode_coverage(samples.astype(np.float32), MODES, 0.1)
    assert found == (3, pytest.approx(1 - np.exp(-4.5), abs=0.003))


# Sliced Wasserstein.


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_sliced_wasserstein_of_a_shift(first: float, second: float):
    """A shift by d is |d|/√2 in the plane; the directions add a few percent."""
    x = cloud(0, 2)
    shift = np.array([[first, second]], np.float32)
    distance = plane.sliced_wasserstein(x, x + shift, KEY)
    expected = np.hypot(first, second) / np.sqrt(2)
    np.testing.assert_allclose(distance, expected, rtol=0.12, atol=1e-4)


def test_sliced_wasserstein_is_a_distance_of_sets():
    x, y = cloud(0, 2), cloud(1, 2) + 1.0
    forward = plane.sliced_wasserstein(x, y, KEY)
    assert plane.sliced_wasserstein(y, x, KEY) == pytest.approx(forward)
    assert plane.sliced_wasserstein(x[::-1], y, KEY) == pytest.approx(forward)
    assert plane.sliced_wasserstein(x, x[::-1], KEY) < 1e-6


# Jensen-Shannon.

masses = st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6)


@given(masses, masses, st.floats(-50, 50))
def test_jensen_shannon_by_hand(first, second, shift):
    """½KL(p‖m) + ½KL(q‖m), symmetric, and blind to normalisation."""
    p, q = np.array(first) / sum(first), np.array(second) / sum(second)
    m = (p + q) / 2
    expected = 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()
    log_p = (np.log(first) + shift).reshape(2, 3)
    log_q = np.log(second).reshape(2, 3)
    forward = plane.jensen_shannon(log_p, log_q)
    assert forward == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert plane.jensen_shannon(log_q, log_p) == pytest.approx(forward, abs=1e-12)


@pytest.mark.parametrize("nothing", [-1e3, -np.inf])
def test_jensen_shannon_ends(nothing: float):
    log_p = np.array([0.0, 0.0, nothing, nothing])
    assert plane.jensen_shannon(log_p, log_p) == 0.0
    assert plane.jensen_shannon(log_p, log_p[::-1]) == pytest.approx(np.log(2))
