"""P-values and false discovery rates, by formulas and by simulation."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation.calibration import benjamini_hochberg, conformal_p_values

# Few values, so that ties are the rule; the extremes too.
tied = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf]), min_size=1)


@given(tied, tied)
def test_p_values_count_the_scores_that_are_no_larger(scores, calibration):
    found = conformal_p_values(np.array(scores), np.array(calibration))
    expected = [
        (1 + sum(c <= score for c in calibration)) / (len(calibration) + 1)
        for score in scores
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(st.one_of(tied, st.lists(st.floats(-9, 9), min_size=2, unique=True)))
def test_p_values_of_exchangeable_scores_are_super_uniform(scores):
    """Each left out once: uniform on the grid, and with ties nowhere above it."""
    scores = np.array([*scores, 100.0])
    num = len(scores)
    found = np.concatenate(
        [
            conformal_p_values(scores[i : i + 1], np.delete(scores, i))
            for i in range(num)
        ]
    )
    grid = np.arange(1, num + 1) / num
    if len(np.unique(scores)) == num:
        np.testing.assert_allclose(np.sort(found), grid, rtol=1e-12)
    for share in grid:
        assert (found <= share + 1e-9).mean() <= share + 1e-9


@given(st.lists(st.floats(0.001, 1), max_size=30), st.floats(0.01, 0.99))
def test_flags_are_those_of_adjusted_p_values(p_values, fdr):
    p_values = np.array(p_values)
    adjusted = stats.false_discovery_control(p_values) if len(p_values) else p_values
    if np.abs(adjusted - fdr).min(initial=1.0) > 1e-9:
        found = benjamini_hochberg(p_values, fdr)
        np.testing.assert_array_equal(found, adjusted <= fdr)


@given(st.data(), st.integers(1, 40), st.integers(1, 19))
def test_p_values_on_the_limit_are_flagged(data, num, twentieths):
    """Conformal p-values j/(n + 1), by exact arithmetic."""
    counts = st.lists(st.integers(1, num + 1), min_size=1, max_size=60)
    exact = sorted(Fraction(j, num + 1) for j in data.draw(counts))
    m, fdr = len(exact), Fraction(twentieths, 20)
    k = max((i for i in range(1, m + 1) if exact[i - 1] * m <= fdr * i), default=0)
    expected = [k > 0 and p <= exact[k - 1] for p in exact]
    found = benjamini_hochberg(np.array(exact, float), float(fdr))
    assert found.tolist() == expected


def test_the_false_discovery_rate_is_controlled():
    """With p-values that share their calibration scores; and outliers are found."""
    rng, false, found = np.random.default_rng(0), [], []
    for _ in range(400):
        calibration, inliers = rng.normal(size=200), rng.normal(size=40)
        outliers = rng.normal(-3.5, 1, size=10)
        p_values = conformal_p_values(np.r_[inliers, outliers], calibration)
        flagged = benjamini_hochberg(p_values, 0.2)
        false.append(flagged[:40].sum() / max(flagged.sum(), 1))
        found.append(flagged[40:].mean())
    error = np.std(false) / np.sqrt(len(false))
    # At π₀·fdr if all is independent; below fdr in any case.
    assert 0.1 < np.mean(false) < 0.16 + 3 * error
    assert np.mean(found) > 0.7


@pytest.mark.parametrize("fdr", [0.0, 1.0, -0.1, np.nan, np.inf])
def test_a_rate_that_is_none_is_refused(fdr):
    with pytest.raises(InputError, match=r"--fdr is .*above 0 and below 1"):
        benjamini_hochberg(np.ones(3), fdr)


def test_scores_of_no_use_are_refused():
    with pytest.raises(InputError, match="0 of 0 scores of held-out"):
        conformal_p_values(np.ones(2), np.ones(0))
    with pytest.raises(InputError, match="1 of 2 scores of held-out"):
        conformal_p_values(np.ones(2), np.array([1.0, np.nan]))
    with pytest.raises(InputError, match=r"score of row 1 \(from 0\) is NaN"):
        conformal_p_values(np.array([1.0, np.nan]), np.ones(2))
