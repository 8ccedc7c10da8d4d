"""How well a score tells inliers from outliers, and what standard detectors reach.

A score is larger for a point that is more likely an inlier, as the energy f(x, 0) is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

# FPR95: the share of the inliers that is kept, in whole numbers, and so exact.
_KEPT_OF = (19, 20)

# Of the baselines on pixels. The held-out part chooses hyperparameters.
_MOST_TRAINING_IMAGES = 10_000
_HELD_OUT_OF = 10
_BANDWIDTHS = np.geomspace(0.01, 1.0, 25)
_COMPONENTS = (1, 5, 10, 20)
_MOST_FULL_DIMS = 256
# The square of one of 255 levels: what an 8-bit pixel cannot resolve.
_PIXEL_VARIANCE = 1.0 / 255.0**2
_PCA_VARIANCE = 0.95
# Rows scored at once, and squared distances held at once (32 MiB).
_SCORED_ROWS, _CHUNK_CELLS = 1_000, 2**22


class Estimate(NamedTuple):
    """A figure with its interval.

    Attributes:
      value: of the scores as they are.
      low: the interval's lower end; None where there is none.
      high: its upper end.
    """

    value: float
    low: float | None
    high: float | None


class Detection(NamedTuple):
    """How well a score tells inliers from outliers.

    Attributes:
      auroc: area under the ROC curve (`auroc`).
      aupr_in: average precision with inliers as the positives,
        Σ_k (recall_k − recall_{k−1})·precision_k over the distinct scores.
      aupr_out: the same with outliers as the positives, of the negated scores.
      fpr95: share of the outliers that score at or above the largest threshold that
        keeps at least 95% of the inliers.
    """

    auroc: Estimate
    aupr_in: Estimate
    aupr_out: Estimate
    fpr95: Estimate


def auroc(
    inlier_scores: Float[np.ndarray, " n"], outlier_scores: Float[np.ndarray, " m"]
) -> float:
    """Returns the area under the ROC curve.

    The probability that an inlier drawn at random scores above an outlier drawn at
    random, a tie counted as one half: 1 for a perfect detector, 0.5 for chance.
    Infinite scores are ordered like others.

    Args:
      inlier_scores: larger means more likely an inlier; any unit.
      outlier_scores: in the same unit.

    Raises:
      ValueError: if either is empty or holds a NaN.
    """
    return float(_auroc(*_tally(*_places(inlier_scores, outlier_scores))))


def _places(
    inlier_scores: np.ndarray, outlier_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns each score's place among the distinct ones, the largest first.

    And how many distinct ones there are. All figures depend on these only.
    """
    for name, scores in (("inlier", inlier_scores), ("outlier", outlier_scores)):
        if not len(scores):
            raise ValueError(
                f"there are no {name} scores; AUROC needs at least one of each kind: "
                "give a test set with inliers and outliers"
            )
        missing = np.flatnonzero(np.isnan(scores))
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(scores)} {name} scores are NaN, the first "
                f"at {missing[0]}; check the model's training"
            )
    both = np.concatenate([inlier_scores, outlier_scores]).astype(np.float64)
    distinct, ascending = np.unique(both, return_inverse=True)
    places = len(distinct) - 1 - ascending
    num_inliers = len(inlier_scores)
    return places[:num_inliers], places[num_inliers:], len(distinct)


def _tally(
    inlier_places: np.ndarray, outlier_places: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of inliers, and of outliers, at each place."""
    return (
        np.bincount(inlier_places, minlength=num),
        np.bincount(outlier_places, minlength=num),
    )


def _auroc(inliers: np.ndarray, outliers: np.ndarray) -> float:
    # Pairs in whole numbers: twice the outliers below each inlier, and the ties.
    below = outliers.sum() - np.cumsum(outliers)
    pairs = inliers @ (2 * below + outliers)
    return pairs / (2.0 * inliers.sum() * outliers.sum())


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    found = np.cumsum(positives)
    # A resample may leave the first places empty.
    precision = found / np.maximum(found + np.cumsum(negatives), 1)
    return positives @ precision / found[-1]


def _fpr95(inliers: np.ndarray, outliers: np.ndarray) -> float:
    part, whole = _KEPT_OF
    kept = np.cumsum(inliers)
    threshold = np.searchsorted(whole * kept, part * kept[-1])
    return outliers[: threshold + 1].sum() / outliers.sum()


def _figures(inliers: np.ndarray, outliers: np.ndarray) -> tuple[float, ...]:
    """Returns the fields of `Detection` from the numbers at each place."""
    return (
        float(_auroc(inliers, outliers)),
        float(_average_precision(inliers, outliers)),
        float(_average_precision(outliers[::-1], inliers[::-1])),
        float(_fpr95(inliers, outliers)),
    )


def detection(
    inlier_scores: Float[np.ndarray, " n"],
    outlier_scores: Float[np.ndarray, " m"],
    seed: int = 0,
    num_bootstrap: int = 1_000,
    confidence: float = 0.95,
) -> Detection:
    """Returns the detection figures with percentile bootstrap intervals.

    Each resample draws n of the inliers and m of the outliers, with replacement. The
    interval tells of the test sets' chance, not of the training's.

    Args:
      inlier_scores: larger means more likely an inlier; infinite ones are allowed.
      outlier_scores: in the same unit.
      seed: of the resamples; its two spawned streams draw the inliers, the outliers.
      num_bootstrap: resamples; 0: no interval.
      confidence: of the interval, in (0, 1).

    Raises:
      ValueError: as `auroc`, or for a number out of range.
    """
    if num_bootstrap < 0 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"num_bootstrap is {num_bootstrap} and confidence is {confidence}; at "
            "least 0, and a number between 0 and 1, are needed"
        )
    inliers, outliers, num = _places(inlier_scores, outlier_scores)
    values = _figures(*_tally(inliers, outliers, num))
    if not num_bootstrap:
        return Detection(*(Estimate(value, None, None) for value in values))
    streams = [
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)
    ]
    resamples = np.empty((num_bootstrap, len(values)))
    # The scores are sorted once: a resample only changes how many lie at each place.
    for row in resamples:
        drawn = (
            places[rng.integers(len(places), size=len(places))]
            for rng, places in zip(streams, (inliers, outliers), strict=True)
        )
        row[:] = _figures(*_tally(*drawn, num))
    tail = (1.0 - confidence) / 2.0
    ends = np.quantile(resamples, (tail, 1.0 - tail), axis=0)
    return Detection(
        *(
            Estimate(value, float(low), float(high))
            for value, low, high in zip(values, *ends, strict=True)
        )
    )


def roc_curve(
    inlier_scores: Float[np.ndarray, " n"], outlier_scores: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Returns (false positive rate, true positive rate); inliers are the positives.

    From (0, 0) to (1, 1), a point for each distinct score as the threshold; straight
    lines between them enclose `auroc`.

    Raises:
      ValueError: as `auroc`.
    """
    inliers, outliers = _tally(*_places(inlier_scores, outlier_scores))
    rates = [np.cumsum(counts) / counts.sum() for counts in (outliers, inliers)]
    fpr, tpr = (np.concatenate([[0.0], rate]) for rate in rates)
    return fpr, tpr


def format_detections(detections: Mapping[str, Mapping[str, Detection]]) -> str:
    """Returns a plain-text table: a line for each score on each set of outliers.

    Args:
      detections: name of a set of outliers → name of a score → its figures.

    Raises:
      ValueError: if there is none.
    """
    rows = [
        (outliers, score, *map(_shown, figures))
        for outliers, scores in detections.items()
        for score, figures in scores.items()
    ]
    if not rows:
        raise ValueError("there are no detection figures; give at least one")
    rows = [("outliers", "score", "AUROC", "AUPR-in", "AUPR-out", "FPR95"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def _shown(estimate: Estimate) -> str:
    if estimate.low is None:
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def labelled_auroc(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> float:
    """Returns `auroc` of scores whose labels are 0 (inlier) or 1 (outlier).

    Raises:
      ValueError: for another label, or as `auroc`.
    """
    other = np.setdiff1d(labels, (0, 1))
    if len(other):
        raise ValueError(
            f"labels hold {other[0]}; allowed: 0 (inlier), 1 (outlier); write them so"
        )
    return auroc(scores[labels == 0], scores[labels == 1])


def baseline_aurocs(
    train: Float[np.ndarray, "n d"],
    test: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, " m"],
    seed: int,
) -> dict[str, float]:
    """Returns the AUROC of four scikit-learn detectors, by name.

    Isolation forest, one-class SVM and local outlier factor keep scikit-learn's
    default hyperparameters. The Gaussian kernel density takes Scott's bandwidth,
    n^(−1/(d+4)), which suits columns of standard deviation 1.

    Args:
      train: inliers, standardised.
      test: inliers and outliers, standardised alike.
      labels: 0 (inlier) or 1 (outlier) for each test row.
      seed: of the isolation forest, the only random one.

    Raises:
      ValueError: as `labelled_auroc`.
      ModuleNotFoundError: without scikit-learn.
    """
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import KernelDensity, LocalOutlierFactor
    from sklearn.svm import OneClassSVM

    detectors = {
        "isolation forest": IsolationForest(random_state=seed),
        "one-class SVM": OneClassSVM(),
        "local outlier factor": LocalOutlierFactor(novelty=True),
        "kernel density": KernelDensity(bandwidth="scott"),
    }
    return {
        name: labelled_auroc(
            np.asarray(detector.fit(train).score_samples(test), np.float64), labels
        )
        for name, detector in detectors.items()
    }


def format_aurocs(aurocs: Mapping[str, Sequence[float]]) -> str:
    """Returns a plain-text table: one line a method, mean ± std over seeds.

    The standard deviation is the sample's (it divides by n − 1); with one seed it is
    left out.

    Args:
      aurocs: for each method, one AUROC a seed.

    Raises:
      ValueError: if there is no method, or the methods differ in their seeds' number.
    """
    counts = {name: len(values) for name, values in aurocs.items()}
    if not counts or len(set(counts.values())) != 1 or not min(counts.values()):
        raise ValueError(
            f"numbers of seeds by method: {counts}; at least one method, and the "
            "same number of seeds, at least 1, for each are needed"
        )
    seeds = next(iter(counts.values()))
    width = max(len("method"), *map(len, counts))
    heading = "AUROC" if seeds == 1 else f"AUROC, mean ± std over {seeds} seeds"
    lines = [f"{'method':<{width}}  {heading}"]
    for name, values in aurocs.items():
        figure = f"{np.mean(values):.4f}"
        if seeds > 1:
            figure += f" ± {np.std(values, ddof=1):.4f}"
        lines.append(f"{name:<{width}}  {figure}")
    return "\n".join(lines)


# --- Baselines on pixels ----------------------------------------------------------


def fit_baselines(
    train_pixels: UInt8[np.ndarray, "n h w c"], seed: int
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Fits four standard detectors to pixels, scaled to [0, 1] and flattened.

    - `kernel density`: the log density of Gaussian kernels of one bandwidth.
    - `Gaussian mixture`: its log density; scikit-learn's, with 1, 5, 10 or 20
      components, of full covariance up to 256 numbers an image, else diagonal.
      (1/255)² is added to the variances: where training pixels never change, a grey
      level is what an 8-bit pixel cannot resolve.
    - `PCA reconstruction error`: minus the squared distance to the hyperplane of the
      principal components that keep 95% of the variance.
    - `isolation forest`: scikit-learn's, with its default hyperparameters.

    Nothing is chosen by outliers: the bandwidth (of 25 from 0.01 to 1) and the number
    of components are those with the largest likelihood of a random tenth of the
    images, fitted to the others; then all of them are fitted. At most 10,000 images
    are used, chosen at random.

    Args:
      train_pixels: inliers, at least 20.
      seed: of the choice of images, the mixtures' start and the forest.

    Returns:
      For each name a function of uint8 images [m, h, w, c] that returns their scores,
      float64 [m]; larger means more likely an inlier.

    Raises:
      ValueError: for fewer images.
      ModuleNotFoundError: without scikit-learn.
    """
    if len(train_pixels) < 2 * _HELD_OUT_OF:
        raise ValueError(
            f"there are {len(train_pixels)} training images; at least "
            f"{2 * _HELD_OUT_OF} are needed, a tenth of which is held out: give more"
        )
    chosen = np.random.default_rng(seed).permutation(len(train_pixels))
    rows = _unit_rows(train_pixels[chosen[:_MOST_TRAINING_IMAGES]])
    num_held_out = len(rows) // _HELD_OUT_OF
    held_out, fitted = rows[:num_held_out], rows[num_held_out:]
    scorers = {
        "kernel density": _fit_kernel_density(rows, fitted, held_out),
        "Gaussian mixture": _fit_mixture(rows, fitted, held_out, seed),
        "PCA reconstruction error": _fit_pca(rows),
        "isolation forest": _fit_forest(rows, seed),
    }
    return {name: partial(_score_images, scorer) for name, scorer in scorers.items()}


def _unit_rows(images: np.ndarray) -> np.ndarray:
    # Not −1 for the width, which NumPy cannot tell where there is no image.
    width = math.prod(images.shape[1:])
    return images.reshape(len(images), width).astype(np.float64) / 255.0


def _score_images(scorer: Callable, images: UInt8[np.ndarray, "n h w c"]) -> np.ndarray:
    scores = np.empty(len(images))
    for start in range(0, len(images), _SCORED_ROWS):
        part = slice(start, start + _SCORED_ROWS)
        scores[part] = scorer(_unit_rows(images[part]))
    return scores


def _fit_kernel_density(
    rows: np.ndarray, fitted: np.ndarray, held_out: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    likelihoods = _log_kernel_densities(held_out, fitted, _BANDWIDTHS).mean(axis=1)
    best = _BANDWIDTHS[[likelihoods.argmax()]]
    return lambda points: _log_kernel_densities(points, rows, best)[0]


def _log_kernel_densities(
    points: np.ndarray, centres: np.ndarray, bandwidths: np.ndarray
) -> np.ndarray:
    """Returns log 1/n Σ_i N(x; x_i, h²I) for each bandwidth h and point x.

    By matrix products: scikit-learn's trees are far slower where, as for pixels, they
    cannot leave any centre out.
    """
    dims = centres.shape[1]
    norms = (centres**2).sum(axis=1)
    result = np.empty((len(bandwidths), len(points)))
    step = max(1, _CHUNK_CELLS // len(centres))
    for start in range(0, len(points), step):
        part = points[start : start + step]
        squares = norms - 2.0 * (part @ centres.T)
        squares += (part**2).sum(axis=1, keepdims=True)
        nearest = squares.min(axis=1, keepdims=True)
        squares -= nearest
        for row, h in zip(result, bandwidths, strict=True):
            total = np.exp(squares / (-2.0 * h**2)).sum(axis=1)
            row[start : start + step] = np.log(total) - nearest[:, 0] / (2.0 * h**2)
    constants = np.log(len(centres)) + dims * np.log(np.sqrt(2.0 * np.pi) * bandwidths)
    return result - constants[:, None]


def _fit_mixture(
    rows: np.ndarray, fitted: np.ndarray, held_out: np.ndarray, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    from sklearn.mixture import GaussianMixture

    def fit(num: int, points: np.ndarray) -> GaussianMixture:
        full = points.shape[1] <= _MOST_FULL_DIMS
        mixture = GaussianMixture(
            num,
            covariance_type="full" if full else "diag",
            reg_covar=_PIXEL_VARIANCE,
            random_state=seed,
        )
        return mixture.fit(points)

    numbers = [num for num in _COMPONENTS if num <= len(fitted)]
    likelihoods = [fit(num, fitted).score(held_out) for num in numbers]
    return fit(numbers[int(np.argmax(likelihoods))], rows).score_samples


def _fit_pca(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    from sklearn.decomposition import PCA

    solver = "covariance_eigh" if rows.shape[1] <= len(rows) else "full"
    pca = PCA(_PCA_VARIANCE, svd_solver=solver).fit(rows)

    def score(points: np.ndarray) -> np.ndarray:
        residuals = points - pca.inverse_transform(pca.transform(points))
        return -(residuals**2).sum(axis=1)

    return score


def _fit_forest(rows: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    from sklearn.ensemble import IsolationForest

    return IsolationForest(random_state=seed).fit(rows).score_samples
