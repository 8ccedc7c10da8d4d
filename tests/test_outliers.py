"""Detection metrics by scikit-learn's, their intervals, and a run's detection."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from stubs import experiment

from ddaebm_jax import models
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import outliers as outliers_lib
from ddaebm_jax.evaluation.outliers import Estimate, auroc, detection, roc_curve

FEW = settings(max_examples=50)
# Few distinct values, so that ties are the rule; the extremes too.
tied = st.sampled_from([-np.inf, -1e30, -1.0, 0.0, 0.5, 1.0, 7.0, np.inf])


def scores(elements):
    return hnp.arrays(np.float64, st.integers(1, 30), elements=elements)


def test_scores_of_no_use_are_refused():
    with pytest.raises(InputError, match="0 of 0 inlier scores"):
        auroc(np.ones(0), np.ones(2))
    with pytest.raises(InputError, match="1 of 3 outlier scores are NaN"):
        auroc(np.ones(2), np.array([0.0, 1.0, np.nan]))


def ranked(inliers, outliers):
    """Labels, and finite scores in the same order and with the same ties."""
    labels = np.repeat([1, 0], [len(inliers), len(outliers)])
    both = np.concatenate([inliers, outliers])
    return labels, np.unique(both, return_inverse=True)[1]


def plain_fpr95(inliers, outliers):
    """The largest threshold that keeps 95% of the inliers, tried one by one."""
    for threshold in sorted(inliers, reverse=True):
        if 20 * (inliers >= threshold).sum() >= 19 * len(inliers):
            return (outliers >= threshold).mean()
    raise AssertionError


def plain_figures(inliers, outliers):
    labels, places = ranked(inliers, outliers)
    return (
        metrics.roc_auc_score(labels, places),
        metrics.average_precision_score(labels, places),
        metrics.average_precision_score(1 - labels, -places),
        plain_fpr95(inliers, outliers),
    )


@FEW
@given(st.sampled_from([tied, st.floats(-5, 5)]), st.data())
def test_metrics_are_scikit_learns_ties_and_infinities_too(elements, data):
    inliers, outliers = (data.draw(scores(elements)) for _ in range(2))
    found = [each.value for each in detection(inliers, outliers, num_bootstrap=1)]
    expected = plain_figures(inliers, outliers)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[0] == auroc(inliers, outliers)
    curve = roc_curve(inliers, outliers)
    expected = metrics.roc_curve(*ranked(inliers, outliers), drop_intermediate=False)
    np.testing.assert_allclose(curve, expected[:2], atol=1e-12)
    assert np.trapezoid(*curve[::-1]) == pytest.approx(found[0], abs=1e-12)


def test_intervals_are_those_of_resampling_the_scores_themselves():
    rng = np.random.default_rng(0)
    # Ties, and fewer outliers than inliers.
    inliers, outliers = rng.integers(0, 9, 23) / 2.0, rng.integers(-3, 6, 11) / 2.0
    found = detection(inliers, outliers, 5, num_bootstrap=60, confidence=0.8)
    a, b = (np.random.default_rng(s) for s in np.random.SeedSequence(5).spawn(2))
    resampled = [
        plain_figures(
            inliers[a.integers(23, size=23)], outliers[b.integers(11, size=11)]
        )
        for _ in range(60)
    ]
    low, high = np.quantile(resampled, (0.1, 0.9), axis=0)
    np.testing.assert_allclose([e.low for e in found], low, atol=1e-12)
    np.testing.assert_allclose([e.high for e in found], high, atol=1e-12)
    assert detection(inliers, outliers, 5, 60, 0.8) == found
    assert detection(inliers, outliers, 6, 60, 0.8) != found


def test_table_of_detections():
    known = outliers_lib.Detection(*[Estimate(0.91234, 0.9012, 0.9229)] * 4)
    other = outliers_lib.Detection(*[Estimate(0.5, 0.25, 0.75)] * 4)
    rows = {"svhn": {"energy": known}, "noise": {"e": other}}
    text = outliers_lib.format_detections(rows, 60, {"svhn": 30, "noise": 1})
    assert text.splitlines() == [
        "outliers  in/out  score   AUROC                  AUPR-in                "
        "AUPR-out               FPR95",
        "svhn      60/30   energy  " + "  ".join(["0.9123 [0.901, 0.923]"] * 4),
        "noise     60/1    e       " + "  ".join(["0.5000 [0.250, 0.750]"] * 4),
    ]


def darkness(variables, x, t, rngs=None):
    return -(x.reshape(len(x), -1) + 1.0).sum(axis=1)


def measure(energy, num_train=25, baselines=True):
    dark = np.random.default_rng(0).integers(0, 60, (40, 4, 4, 1), np.uint8)
    image_set = images.ImageSet("made", (4, 4, 1), dark[:num_train], dark[25:], "")
    networks = models.Networks(
        *(
            None,
            energy,
            lambda v, x, t, z: 0.5 * x,
            lambda v, x, y, t: (x[:, 0, 0],) * 2,
        ),
        *(None, None),
        event_shape=(4, 4, 1),
        nz=1,
    )
    made = experiment((4, 4, 1), networks, image_set, batch_size=8)
    players = models.Players({}, None, None)
    sets = "test", ["inverted", "noise"]
    return outliers_lib.measure(made, players, *sets, 0, 1, 10, baselines)


def test_what_cannot_be_measured_is_refused_before_more_work(monkeypatch):
    def broken(variables, x, t, rngs=None):
        return darkness(variables, x, t) * np.nan

    with pytest.raises(InputError, match=r"25 of 25 inliers to fit .*not finite"):
        measure(broken, baselines=False)
    monkeypatch.setattr(outliers_lib.outlier_sets, "open_set", None)
    with pytest.raises(InputError, match=r"--baselines: 9 training .*at least 10"):
        measure(darkness, num_train=9)


def test_a_run_is_measured_on_named_sets():
    """Of an energy that knows that images are dark."""
    found, names = measure(darkness), ["inverted", "noise"]
    assert list(found.detections) == list(found.outlier_scores) == names
    assert found.inlier_scores["energy"].shape == (10,)
    assert len(found.inlier_scores) == 10  # Five of the model, five baselines.
    for name in names:
        of_set = found.outlier_scores[name]
        assert of_set.keys() == found.detections[name].keys()
        assert of_set.keys() == found.inlier_scores.keys()
        assert found.detections[name]["energy"].auroc == (1.0, 1.0, 1.0)
        expected = detection(found.inlier_scores["energy"], of_set["energy"], 0)
        assert found.detections[name]["energy"] == expected
