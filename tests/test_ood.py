"""Detection figures: AUROC and its baselines."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ddaebm_jax.data import tabular
from ddaebm_jax.evaluation import ood

FEW = settings(max_examples=50, deadline=None)
# Few distinct values, so that ties are the rule; the extremes too.
tied = st.sampled_from([-np.inf, -1e30, -1.0, 0.0, 0.5, 1.0, 7.0, np.inf])


def scores(elements):
    return hnp.arrays(np.float64, st.integers(1, 30), elements=elements)


@FEW
@given(scores(st.floats(-5, 5)), scores(st.floats(-5, 5)))
def test_auroc_is_scikit_learns(inliers, outliers):
    labels = np.repeat([1, 0], [len(inliers), len(outliers)])
    expected = roc_auc_score(labels, np.concatenate([inliers, outliers]))
    assert ood.auroc(inliers, outliers) == pytest.approx(expected, abs=1e-12)


@FEW
@given(scores(tied), scores(tied))
def test_auroc_counts_pairs_and_ties_as_half(inliers, outliers):
    above = inliers[:, None] > outliers[None, :]
    equal = inliers[:, None] == outliers[None, :]
    expected = (above + 0.5 * equal).mean()
    assert ood.auroc(inliers, outliers) == pytest.approx(expected, abs=1e-12)


@FEW
@given(scores(tied), scores(tied))
def test_auroc_of_the_reverse_is_the_rest(first, second):
    assert ood.auroc(first, second) + ood.auroc(second, first) == pytest.approx(1.0)


@FEW
@given(scores(st.integers(-50, 50)), scores(st.integers(-50, 50)))
def test_auroc_keeps_under_increasing_maps(inliers, outliers):
    mapped = [np.exp(0.1 * x) - 3.0 for x in (inliers, outliers)]
    assert ood.auroc(*mapped) == ood.auroc(inliers, outliers)


def test_auroc_at_the_ends():
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0], np.float32)
    assert ood.auroc(high, low) == 1.0
    assert ood.auroc(low, high) == 0.0
    assert ood.auroc(low, low) == 0.5


@pytest.mark.parametrize("empty", ["inlier", "outlier"])
def test_auroc_needs_both_kinds(empty):
    some = {"inlier_scores": np.ones(2), "outlier_scores": np.ones(2)}
    some[f"{empty}_scores"] = np.ones(0)
    with pytest.raises(ValueError, match=f"no {empty} scores"):
        ood.auroc(**some)


def test_auroc_refuses_nan():
    with pytest.raises(ValueError, match=r"1 of 3 outlier scores are NaN.*at 2"):
        ood.auroc(np.ones(2), np.array([0.0, 1.0, np.nan]))


def test_labelled_auroc_splits_by_label():
    values, labels = np.array([3.0, 0.0, 1.0, 2.0]), np.array([0, 1, 1, 0])
    assert ood.labelled_auroc(values, labels) == 1.0
    assert ood.labelled_auroc(-values, labels) == 0.0
    with pytest.raises(ValueError, match="labels hold 2"):
        ood.labelled_auroc(values, np.array([0, 1, 2, 0]))


def test_baselines_detect_and_repeat():
    table = tabular.load_breast_cancer(0, 0.3)
    split = (table.train, table.test, table.test_labels)
    first = ood.baseline_aurocs(*split, seed=0)
    assert list(first) == [
        "isolation forest",
        "one-class SVM",
        "local outlier factor",
        "kernel density",
    ]
    assert all(0.9 < value < 1.0 for value in first.values())
    assert ood.baseline_aurocs(*split, seed=0) == first
    other = ood.baseline_aurocs(*split, seed=1)
    changed = [name for name in first if other[name] != first[name]]
    assert changed == ["isolation forest"]


def test_kernel_density_baseline_is_scotts():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 2)), 2 * rng.normal(size=(30, 2))
    labels = np.arange(30) % 2
    squares = ((test[:, None] - train[None]) ** 2).sum(axis=2)
    density = np.exp(-squares / (2 * 40 ** (-2 / 6))).sum(axis=1)
    expected = ood.labelled_auroc(density, labels)
    assert ood.baseline_aurocs(train, test, labels, 0)["kernel density"] == expected


def test_table_of_figures():
    text = ood.format_aurocs({"energy f(x, 0)": [0.9, 1.0], "other": [0.5, 0.5]})
    assert text == (
        "method          AUROC, mean ± std over 2 seeds\n"
        "energy f(x, 0)  0.9500 ± 0.0707\n"
        "other           0.5000 ± 0.0000"
    )
    assert ood.format_aurocs({"a": [0.25]}) == "method  AUROC\na       0.2500"


@pytest.mark.parametrize("aurocs", [{}, {"a": []}, {"a": [0.5], "b": [0.5, 0.5]}])
def test_uneven_table_is_refused(aurocs):
    with pytest.raises(ValueError, match="seeds"):
        ood.format_aurocs(aurocs)
