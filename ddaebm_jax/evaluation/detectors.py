"""Standard outlier detectors, the baselines of the energy.

None of them sees an outlier before it scores one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ddaebm_jax.errors import InputError

_MAX_FITTED = 10_000  # Rows or images; more are too many for all distances.
# Of the detectors of pixels.
_HELD_OUT_OF = 10  # Also the fewest images, so that one is held out.
_BANDWIDTHS = np.geomspace(0.01, 1.0, 25)
_COMPONENTS = (1, 5, 10, 20)
_MAX_FULL_DIMS = 256
# The square of one of 255 levels: what an 8-bit pixel cannot resolve.
_PIXEL_VARIANCE = 1.0 / 255.0**2
# Added to variances of standardised columns; scikit-learn's own default.
_ROW_VARIANCE = 1e-6
_PCA_VARIANCE = 0.95
# Memory of the distances that are held at once.
_DISTANCES_MIB = 64

Scorer = Callable[[np.ndarray], np.ndarray]


def table_scores(
    train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "m d"], seed: int
) -> dict[str, Float[np.ndarray, " m"]]:
    """Returns the scores of test rows by `table_detectors`, by name.

    Training rows, of which at most 10,000 random ones are used, are inliers. Larger
    scores mean more likely an inlier.
    """
    order = np.random.default_rng(seed).permutation(len(train))
    train = train[np.sort(order[:_MAX_FITTED])]
    return {
        name: np.asarray(detector.fit(train).score_samples(test), np.float64)
        for name, detector in table_detectors(seed).items()
    }


def table_detectors(seed: int) -> dict[str, Any]:
    """Returns four scikit-learn detectors, still to be fitted, by name.

    Isolation forest, one-class SVM and local outlier factor keep scikit-learn's
    default hyperparameters. The Gaussian kernel density takes Scott's bandwidth,
    n^(−1/(d+4)), which suits columns of standard deviation 1. The seed is the forest's.
    """
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import KernelDensity, LocalOutlierFactor
    from sklearn.svm import OneClassSVM

    return {
        "isolation forest": IsolationForest(random_state=seed),
        "one-class SVM": OneClassSVM(),
        "local outlier factor": LocalOutlierFactor(novelty=True),
        "kernel density": KernelDensity(bandwidth="scott"),
    }


def density_baselines(train: Float[np.ndarray, "n d"], seed: int) -> dict[str, Scorer]:
    """Fits a kernel density and a Gaussian mixture; each returns log densities, nats.

    Bandwidth (of 25 from 0.01 to 1) and number of components (1, 5, 10, 20 or 40, of
    full covariance up to 256 columns) are those with the largest likelihood of a random
    tenth of the rows, fitted to the others; then all rows are fitted, at most 10,000.

    Raises:
      InputError: if there are fewer than 10 rows.
    """
    if len(train) < _HELD_OUT_OF:
        raise InputError(
            f"{len(train)} training rows; a tenth of them is held out, and so at least "
            f"{_HELD_OUT_OF} are needed"
        )
    rows, fitted, held_out = _parts(np.asarray(train, np.float64), seed)
    components = (*_COMPONENTS, 40)
    return {
        "kernel_density": _fit_kernel_density(rows, fitted, held_out),
        "gaussian_mixture": _fit_mixture(
            rows, fitted, held_out, seed, _ROW_VARIANCE, components
        ),
    }


def check_num_images(num: int) -> None:
    """Raises InputError if `fit_pixel_detectors` needs more training images."""
    if num < _HELD_OUT_OF:
        raise InputError(
            f"--baselines: {num} training images; at least {_HELD_OUT_OF} are needed, "
            "as a tenth is held out; leave --baselines out, or train on more"
        )


def fit_pixel_detectors(
    train_pixels: UInt8[np.ndarray, "n h w c"], seed: int
) -> dict[str, Scorer]:
    """Fits five standard detectors to pixels, scaled to [0, 1] and flattened.

    - `kernel density`: the log density of Gaussian kernels of one bandwidth.
    - `kernel density on PCA`: the same of the principal components of all images that
      keep 95% of the variance.
    - `Gaussian mixture`: its log density; scikit-learn's, with 1, 5, 10 or 20
      components, of full covariance up to 256 numbers an image, else diagonal.
      (1/255)² is added to the variances: where training pixels never change, a grey
      level is what an 8-bit pixel cannot resolve.
    - `PCA reconstruction error`: minus the squared distance to the hyperplane of the
      principal components that keep 95% of the variance.
    - `isolation forest`: scikit-learn's, with its default hyperparameters.

    The bandwidths (of 25 from 0.01 to 1) and the number of components are those with
    the largest likelihood of a random tenth of the images, fitted to the others; then
    all of them are fitted. At most 10,000 images are used, chosen at random. The seed
    is of both choices, the mixtures' start and the forest.

    Returns:
      For each name a function of uint8 images [m, h, w, c] that returns their scores,
      float64 [m]; larger means more likely an inlier.

    Raises:
      InputError: as `check_num_images`.
    """
    from sklearn.ensemble import IsolationForest

    check_num_images(len(train_pixels))
    rows, fitted, held_out = map(_unit_rows, _parts(train_pixels, seed))
    pca = _principal_components(rows)
    density = _fit_kernel_density(*map(pca.transform, (rows, fitted, held_out)))
    scorers = {
        "kernel density": _fit_kernel_density(rows, fitted, held_out),
        "kernel density on PCA": lambda points: density(pca.transform(points)),
        "Gaussian mixture": _fit_mixture(
            rows, fitted, held_out, seed, _PIXEL_VARIANCE, _COMPONENTS
        ),
        "PCA reconstruction error": lambda points: _minus_residuals(pca, points),
        "isolation forest": IsolationForest(random_state=seed).fit(rows).score_samples,
    }
    return {
        name: lambda images, scorer=scorer: scorer(_unit_rows(images))
        for name, scorer in scorers.items()
    }


def _parts(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns at most 10,000 random rows, nine tenths of these, and the rest."""
    chosen = np.random.default_rng(seed).permutation(len(rows))
    rows = rows[chosen[:_MAX_FITTED]]
    num_held_out = len(rows) // _HELD_OUT_OF
    return rows, rows[num_held_out:], rows[:num_held_out]


def _unit_rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _fit_kernel_density(
    rows: np.ndarray, fitted: np.ndarray, held_out: np.ndarray
) -> Scorer:
    likelihoods = _log_kernel_densities(held_out, fitted, _BANDWIDTHS).mean(axis=0)
    best = _BANDWIDTHS[[likelihoods.argmax()]]
    return lambda points: _log_kernel_densities(points, rows, best)[:, 0]


def _log_kernel_densities(
    points: np.ndarray, centres: np.ndarray, bandwidths: np.ndarray
) -> Float[np.ndarray, "points bandwidths"]:
    """Returns log 1/n Σ_i N(x; x_i, h²I) for each point x and bandwidth h.

    From all distances: scikit-learn's trees are far slower where, as for pixels, they
    cannot leave any centre out.
    """
    from scipy.special import logsumexp
    from sklearn.metrics import pairwise_distances_chunked

    def log_sums(distances: np.ndarray, _: int) -> np.ndarray:
        exponents = ((distances / h) ** 2 / -2.0 for h in bandwidths)
        return np.stack([logsumexp(x, axis=1) for x in exponents], axis=1)

    sums = pairwise_distances_chunked(
        points, centres, reduce_func=log_sums, working_memory=_DISTANCES_MIB
    )
    normaliser = centres.shape[1] * np.log(np.sqrt(2.0 * np.pi) * bandwidths)
    return np.concatenate(list(sums)) - np.log(len(centres)) - normaliser


def _fit_mixture(
    rows: np.ndarray,
    fitted: np.ndarray,
    held_out: np.ndarray,
    seed: int,
    variance: float,
    components: tuple[int, ...],
) -> Scorer:
    from sklearn.mixture import GaussianMixture

    def fit(num: int, points: np.ndarray) -> GaussianMixture:
        full = points.shape[1] <= _MAX_FULL_DIMS
        mixture = GaussianMixture(
            num,
            covariance_type="full" if full else "diag",
            reg_covar=variance,
            random_state=seed,
        )
        return mixture.fit(points)

    numbers = [num for num in components if num <= len(fitted)]
    likelihoods = [fit(num, fitted).score(held_out) for num in numbers]
    return fit(numbers[int(np.argmax(likelihoods))], rows).score_samples


def _principal_components(rows: np.ndarray) -> Any:
    from sklearn.decomposition import PCA

    solver = "covariance_eigh" if rows.shape[1] <= len(rows) else "full"
    return PCA(_PCA_VARIANCE, svd_solver=solver).fit(rows)


def _minus_residuals(pca: Any, points: np.ndarray) -> np.ndarray:
    residuals = points - pca.inverse_transform(pca.transform(points))
    return -(residuals**2).sum(axis=1)
