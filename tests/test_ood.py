"""Detection figures, their intervals, and what standard detectors reach."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn import metrics
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from ddaebm_jax.data import tabular
from ddaebm_jax.evaluation import ood, plots

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


# The other figures.


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


def values_of(figures):
    return np.array([estimate.value for estimate in figures])


def plain_figures(inliers, outliers):
    labels, places = ranked(inliers, outliers)
    return np.array(
        [
            metrics.roc_auc_score(labels, places),
            metrics.average_precision_score(labels, places),
            metrics.average_precision_score(1 - labels, -places),
            plain_fpr95(inliers, outliers),
        ]
    )


@FEW
@given(st.sampled_from([tied, st.floats(-5, 5)]), st.data())
def test_figures_are_scikit_learns_ties_and_infinities_too(elements, data):
    inliers, outliers = (data.draw(scores(elements)) for _ in range(2))
    found = ood.detection(inliers, outliers, num_bootstrap=0)
    np.testing.assert_allclose(
        values_of(found), plain_figures(inliers, outliers), atol=1e-12
    )
    assert found.auroc.value == ood.auroc(inliers, outliers)
    assert all(e.low is None and e.high is None for e in found)


@pytest.mark.parametrize("num", [1, 19, 20, 21, 39, 40, 100])
def test_fpr95_keeps_no_fewer_and_no_more_than_95_percent(num):
    inliers = np.arange(num, dtype=float)
    outliers = np.arange(-5.0, num + 5) + 0.25
    found = ood.detection(inliers, outliers, num_bootstrap=0).fpr95.value
    threshold = inliers[num - -(-19 * num // 20)]
    assert found == (outliers >= threshold).mean() == plain_fpr95(inliers, outliers)


@FEW
@given(st.sampled_from([tied, st.floats(-5, 5)]), st.data())
def test_roc_curve_is_scikit_learns_and_encloses_the_auroc(elements, data):
    inliers, outliers = (data.draw(scores(elements)) for _ in range(2))
    fpr, tpr = ood.roc_curve(inliers, outliers)
    labels, places = ranked(inliers, outliers)
    expected = metrics.roc_curve(labels, places, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0], atol=1e-12)
    np.testing.assert_allclose(tpr, expected[1], atol=1e-12)
    area = np.trapezoid(tpr, fpr)
    assert area == pytest.approx(ood.auroc(inliers, outliers), abs=1e-12)


def test_roc_curves_are_drawn(tmp_path):
    path = tmp_path / "new" / "roc.png"
    high, low = two_normals(200, 0)
    curves = {"good": ood.roc_curve(high, low), "bad": ood.roc_curve(low, high)}
    plots.plot_roc(path, curves, "title")
    with Image.open(path) as image:
        both = np.asarray(image.convert("RGB"), int)
    plots.plot_roc(path, {"good": curves["good"]}, "title")
    with Image.open(path) as image:
        one = np.asarray(image.convert("RGB"), int)
    # The first curve lies above the diagonal, the second below.
    changed = np.argwhere((abs(both - one) > 60).any(axis=2))
    assert len(changed) and np.median(changed[:, 0]) > both.shape[0] / 2
    assert [file.name for file in path.parent.iterdir()] == ["roc.png"]


def test_intervals_are_those_of_resampling_the_scores_themselves():
    rng = np.random.default_rng(0)
    # Ties, and fewer outliers than inliers.
    inliers, outliers = rng.integers(0, 9, 23) / 2.0, rng.integers(-3, 6, 11) / 2.0
    found = ood.detection(inliers, outliers, 5, num_bootstrap=60, confidence=0.8)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(5).spawn(2)]
    resampled = [
        plain_figures(
            *(
                values[stream.integers(len(values), size=len(values))]
                for values, stream in zip((inliers, outliers), streams, strict=True)
            )
        )
        for _ in range(60)
    ]
    low, high = np.quantile(resampled, (0.1, 0.9), axis=0)
    np.testing.assert_allclose([e.low for e in found], low, atol=1e-12)
    np.testing.assert_allclose([e.high for e in found], high, atol=1e-12)
    assert ood.detection(inliers, outliers, 5, 60, 0.8) == found
    assert ood.detection(inliers, outliers, 6, 60, 0.8) != found


def two_normals(num, seed):
    """Scores of N(1, 1) and N(0, 1)."""
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, size=num), rng.normal(size=num)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Of two normals a unit apart the AUROC is Φ(1/√2)."""
    truth = stats.norm.cdf(1 / np.sqrt(2))
    covered = [
        found.low <= truth <= found.high
        for found in (
            ood.detection(*two_normals(60, seed), seed, 150, 0.8).auroc
            for seed in range(200)
        )
    ]
    # The standard error is 0.03.
    assert 0.7 < np.mean(covered) < 0.88


def test_intervals_shrink_with_the_number_of_scores():
    few, many = (
        ood.detection(*two_normals(num, 0), num_bootstrap=200) for num in (100, 10_000)
    )
    for a, b in zip(few, many, strict=True):
        assert a.low <= a.value <= a.high and b.low <= b.value <= b.high
        assert 4 < (a.high - a.low) / (b.high - b.low) < 25  # About √100.


@pytest.mark.parametrize(
    "settings", [{"num_bootstrap": -1}, {"confidence": 0.0}, {"confidence": 1.0}]
)
def test_intervals_of_no_use_are_refused(settings):
    with pytest.raises(ValueError, match=r"num_bootstrap is .* confidence is"):
        ood.detection(np.ones(2), np.zeros(2), **settings)


def test_detection_refuses_what_auroc_refuses():
    with pytest.raises(ValueError, match="no outlier scores"):
        ood.detection(np.ones(2), np.ones(0))
    with pytest.raises(ValueError, match="NaN"):
        ood.roc_curve(np.array([np.nan]), np.ones(2))


def test_table_of_detections():
    exact = ood.Detection(*[ood.Estimate(0.5, None, None)] * 4)
    known = ood.Estimate(0.91234, 0.9012, 0.9229)
    text = ood.format_detections(
        {"svhn": {"energy": ood.Detection(*[known] * 4)}, "noise": {"e": exact}}
    )
    cell = "0.9123 [0.901, 0.923]"
    assert text.splitlines() == [
        "outliers  score   AUROC                  AUPR-in                "
        "AUPR-out               FPR95",
        "svhn      energy  " + "  ".join([cell] * 4),
        "noise     e       " + "  ".join([f"{'0.5000':<21}"] * 4).rstrip(),
    ]
    with pytest.raises(ValueError, match="no detection figures"):
        ood.format_detections({"svhn": {}})


# Baselines on pixels.


@pytest.fixture(scope="module")
def digits():
    raw = load_digits().images
    images = np.round(raw * (255 / 16)).astype(np.uint8)[..., None]
    return images[np.random.default_rng(0).permutation(len(images))]


BASELINES = [
    "kernel density",
    "Gaussian mixture",
    "PCA reconstruction error",
    "isolation forest",
]


def test_baselines_on_pixels_tell_digits_from_others_and_repeat(digits):
    train, test = digits[:200], digits[1500:]
    first, again = (ood.fit_baselines(train, seed=1) for _ in range(2))
    assert list(first) == BASELINES
    noise = np.random.default_rng(0).integers(0, 256, test.shape, np.uint8)
    for name, score in first.items():
        found = score(test)
        assert (found.dtype, found.shape) == (np.float64, (len(test),))
        for outliers in (noise, 255 - test):
            assert ood.auroc(found, score(outliers)) > 0.98, name
        np.testing.assert_array_equal(again[name](test), found)
        np.testing.assert_allclose(score(test[5:6]), found[5:6])
        assert score(test[:0]).shape == (0,)


def gaussian_pixels(num, shape=(2, 2, 1), seed=0):
    """Pixels of one correlated Gaussian, rounded."""
    dims = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dims, dims)) * 8 + 12 * np.eye(dims)
    values = 128 + rng.normal(size=(num, dims)) @ mixing
    return np.clip(np.round(values), 0, 255).astype(np.uint8).reshape(num, *shape)


def unit_rows(images):
    return images.reshape(len(images), -1) / 255.0


def test_mixture_of_a_gaussians_pixels_is_that_gaussian():
    train, test = gaussian_pixels(400), gaussian_pixels(50)[::-1]
    rows = unit_rows(train)
    # One grey level more of standard deviation.
    covariance = np.cov(rows.T, bias=True) + np.eye(4) / 255.0**2
    expected = stats.multivariate_normal(rows.mean(axis=0), covariance)
    found = ood.fit_baselines(train, 0)["Gaussian mixture"](test)
    np.testing.assert_allclose(found, expected.logpdf(unit_rows(test)), rtol=1e-6)


def test_mixture_finds_separate_clusters():
    """Where no image is, between two clusters of many, the density is low."""
    rng = np.random.default_rng(0)
    levels = rng.choice([40, 210], 300)[:, None, None, None]
    train = (levels + rng.integers(-5, 6, (300, 2, 2, 1))).astype(np.uint8)
    between = np.full((1, 2, 2, 1), 125, np.uint8)
    score = ood.fit_baselines(train, 0)["Gaussian mixture"]
    assert score(between)[0] < score(train).min() - 50


def test_large_images_take_a_diagonal_mixture():
    train = gaussian_pixels(60, (10, 10, 3))
    rows = unit_rows(train)
    deviation = np.sqrt(rows.var(axis=0) + 1 / 255.0**2)
    expected = stats.norm(rows.mean(axis=0), deviation).logpdf(rows).sum(axis=1)
    found = ood.fit_baselines(train, 0)["Gaussian mixture"](train)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_kernel_density_is_of_gaussians_of_a_good_width():
    train, test = gaussian_pixels(300), gaussian_pixels(330)[300:]
    rows = unit_rows(train)
    squares = ((unit_rows(test)[:, None] - rows) ** 2).sum(axis=2)

    def log_density(h):
        kernels = np.exp(-squares / (2 * h**2)) / (2 * np.pi * h**2) ** 2
        return np.log(kernels.mean(axis=1))

    found = ood.fit_baselines(train, 0)["kernel density"](test)
    widths = [
        h
        for h in np.geomspace(0.01, 1.0, 25)
        if np.allclose(log_density(h), found, rtol=1e-8)
    ]
    assert len(widths) == 1
    # No width of the grid is much better for fresh images.
    best = max(log_density(h).mean() for h in np.geomspace(0.01, 1.0, 25))
    assert found.mean() > best - 0.05


def test_kernel_density_is_finite_far_away():
    train = np.zeros((30, 2, 2, 1), np.uint8)
    train[:, 0, 0, 0] = np.arange(30)
    far = np.full((1, 2, 2, 1), 255, np.uint8)
    found = ood.fit_baselines(train, 0)["kernel density"](far)
    assert np.isfinite(found).all() and found[0] < -100


@pytest.mark.parametrize("num", [30, 200])
def test_pca_error_is_the_distance_to_the_plane_of_most_variance(num):
    """Fewer and more images than pixels; a line with 96% of the variance."""
    rng = np.random.default_rng(0)
    along, across = np.eye(48)[0], np.eye(48)[1]
    values = 128.0 + rng.integers(-1, 2, (num, 48))
    values += 50 * rng.choice([-1, 1], num)[:, None] * along
    values += 7 * rng.choice([-1, 1], num)[:, None] * across
    train = values.astype(np.uint8).reshape(num, 4, 4, 3)
    rows = unit_rows(train)
    centred = rows - rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    shares = np.cumsum(sizes**2) / (sizes**2).sum()
    kept = axes[: 1 + np.searchsorted(shares, 0.95)]
    assert len(kept) == 1
    test = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    away = unit_rows(test) - rows.mean(axis=0)
    expected = -((away - away @ kept.T @ kept) ** 2).sum(axis=1)
    found = ood.fit_baselines(train, 0)["PCA reconstruction error"](test)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_large_training_sets_are_subsampled(digits, monkeypatch):
    monkeypatch.setattr(ood, "_MOST_TRAINING_IMAGES", 40)
    whole, chosen = digits[:100], np.random.default_rng(3).permutation(100)[:40]
    found = ood.fit_baselines(whole, 3)["PCA reconstruction error"](digits[-20:])
    rows, test = unit_rows(whole[chosen]), unit_rows(digits[-20:])
    mean = rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(rows - mean, full_matrices=False)
    shares = np.cumsum(sizes**2) / (sizes**2).sum()
    kept = axes[: 1 + np.searchsorted(shares, 0.95)]
    residual = (test - mean) - (test - mean) @ kept.T @ kept
    np.testing.assert_allclose(found, -(residual**2).sum(axis=1), rtol=1e-6)


def test_too_few_training_images_are_refused(digits):
    with pytest.raises(ValueError, match="there are 19 training images"):
        ood.fit_baselines(digits[:19], 0)
    assert list(ood.fit_baselines(digits[:20], 0)) == BASELINES
