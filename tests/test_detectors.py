"""Baseline detectors, by closed forms where there are some."""

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from ddaebm_jax.data import tabular
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import detectors
from ddaebm_jax.evaluation.outliers import auroc

# Of rows.


def test_baselines_detect_and_repeat():
    table = tabular.load_breast_cancer(0, 0.3)
    first = detectors.table_scores(table.train, table.test, seed=0)
    inlier = table.test_labels == tabular.INLIER
    for values in first.values():
        assert 0.9 < auroc(values[inlier], values[~inlier]) < 1.0
    again = detectors.table_scores(table.train, table.test, seed=0)
    np.testing.assert_equal(again, first)


# Of pixels.


def gaussian_pixels(num, shape=(2, 2, 1)):
    """Pixels of one correlated Gaussian, rounded."""
    dims = int(np.prod(shape))
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dims, dims)) * 8 + 12 * np.eye(dims)
    values = 128 + rng.normal(size=(num, dims)) @ mixing
    return np.clip(np.round(values), 0, 255).astype(np.uint8).reshape(num, *shape)


def unit_rows(images):
    return images.reshape(len(images), -1) / 255.0


@pytest.fixture(scope="module")
def fitted_to_gaussian():
    return detectors.fit_pixel_detectors(gaussian_pixels(330)[:300], 0)


@pytest.mark.parametrize("num", [0, 1, 9, 10])
def test_few_images_are_enough_or_refused_in_one_line(num):
    images = gaussian_pixels(12, (4, 4, 1))
    if num < 10:
        with pytest.raises(InputError, match=f"{num} training images; .*at least 10"):
            detectors.fit_pixel_detectors(images[:num], 0)
    else:
        for score in detectors.fit_pixel_detectors(images[:num], 0).values():
            assert np.isfinite(score(images[num:])).all()


def test_detectors_tell_digits_from_others_and_repeat():
    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    images = images[np.random.default_rng(0).permutation(len(images))]
    train, test = images[:200], images[1500:]
    first, again = (detectors.fit_pixel_detectors(train, seed=1) for _ in range(2))
    noise = np.random.default_rng(0).integers(0, 256, test.shape, np.uint8)
    for name, score in first.items():
        found = score(test)
        assert (found.dtype, found.shape) == (np.float64, (len(test),))
        for outliers in (noise, 255 - test):
            assert auroc(found, score(outliers)) > 0.98, name
        np.testing.assert_array_equal(again[name](test), found)
        np.testing.assert_allclose(score(test[5:6]), found[5:6])


def test_mixture_of_a_gaussians_pixels_is_that_gaussian(fitted_to_gaussian):
    train, test = np.split(gaussian_pixels(330), [300])
    rows = unit_rows(train)
    # One grey level more of standard deviation.
    covariance = np.cov(rows.T, bias=True) + np.eye(4) / 255.0**2
    expected = stats.multivariate_normal(rows.mean(axis=0), covariance)
    found = fitted_to_gaussian["Gaussian mixture"](test)
    np.testing.assert_allclose(found, expected.logpdf(unit_rows(test)), rtol=1e-6)


def test_kernel_density_is_of_gaussians_of_a_good_width(fitted_to_gaussian):
    train, test = np.split(gaussian_pixels(330), [300])
    squares = ((unit_rows(test)[:, None] - unit_rows(train)) ** 2).sum(axis=2)

    def log_density(h):
        kernels = np.exp(-squares / (2 * h**2)) / (2 * np.pi * h**2) ** 2
        return np.log(kernels.mean(axis=1))

    found = fitted_to_gaussian["kernel density"](test)
    candidates = [log_density(h) for h in np.geomspace(0.01, 1.0, 25)]
    assert sum(np.allclose(each, found, rtol=1e-8) for each in candidates) == 1
    # No width of the grid is much better for fresh images.
    assert found.mean() > max(each.mean() for each in candidates) - 0.05


@pytest.mark.parametrize("num", [30, 200])
def test_pca_error_is_the_distance_to_the_plane_of_most_variance(num):
    """Fewer and more images than pixels; a line with 96% of the variance."""
    rng = np.random.default_rng(0)
    values = 128.0 + rng.integers(-1, 2, (num, 48))
    values[:, 0] += 50 * rng.choice([-1, 1], num)
    values[:, 1] += 7 * rng.choice([-1, 1], num)
    train = values.astype(np.uint8).reshape(num, 4, 4, 3)
    test = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    found = detectors.fit_pixel_detectors(train, 0)["PCA reconstruction error"](test)
    mean = unit_rows(train).mean(axis=0)
    _, sizes, axes = np.linalg.svd(unit_rows(train) - mean, full_matrices=False)
    shares = np.cumsum(sizes**2) / (sizes**2).sum()
    kept = axes[: 1 + np.searchsorted(shares, 0.95)]
    away = unit_rows(test) - mean
    expected = -((away - away @ kept.T @ kept) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
