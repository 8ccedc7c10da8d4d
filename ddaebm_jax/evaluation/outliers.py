"""Outlier detection: its metrics, and how well a trained run's scores do.

A score is larger for a point that is more likely an inlier, as the energy f(x, 0) is.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float

from ddaebm_jax import progress
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import detectors, outlier_sets
from ddaebm_jax.evaluation import scores as scores_lib
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players


class Estimate(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


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

    The probability that a random inlier scores above a random outlier, a tie counted
    as one half: 1 for a perfect detector, 0.5 for chance. Infinite scores are ordered
    like others.

    Raises:
      InputError: if either is empty or holds a NaN.
    """
    return _area(*_counts(*_ranks(inlier_scores, outlier_scores)))


def roc_curve(
    inlier_scores: Float[np.ndarray, " n"], outlier_scores: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Returns (false positive rate, true positive rate); inliers are the positives.

    From (0, 0) to (1, 1), a point for each distinct score as the threshold; straight
    lines between them enclose `auroc`.

    Raises:
      InputError: as `auroc`.
    """
    counts = _counts(*_ranks(inlier_scores, outlier_scores))
    tpr, fpr = (_cumulative(each) / each.sum() for each in counts)
    return fpr, tpr


def detection(
    inlier_scores: Float[np.ndarray, " n"],
    outlier_scores: Float[np.ndarray, " m"],
    seed: int = 0,
    num_bootstrap: int = 1_000,
    confidence: float = 0.95,
) -> Detection:
    """Returns the detection metrics with percentile bootstrap intervals.

    Each resample draws n of the inliers and m of the outliers, with replacement, by
    two spawned streams of the seed. The intervals reflect the finite test sets, not
    the randomness of training.

    Raises:
      InputError: as `auroc`.
    """
    *both, num = _ranks(inlier_scores, outlier_scores)
    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2)]
    # Sorted once: a resample only changes the number of scores at each rank. This
    # takes milliseconds where scikit-learn's metrics, which sort, take minutes.
    resamples, pairs = [], list(zip(rngs, both, strict=True))
    for _ in range(num_bootstrap):
        drawn = (rng.choice(ranks, len(ranks)) for rng, ranks in pairs)
        resamples.append(_metrics(*_counts(*drawn, num)))
    tail = (1.0 - confidence) / 2.0
    ends = np.quantile(resamples, (tail, 1.0 - tail), axis=0)
    return Detection(*map(Estimate, _metrics(*_counts(*both, num)), *ends.tolist()))


def _ranks(
    inlier_scores: np.ndarray, outlier_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns ranks among the distinct scores, the largest first, and their number."""
    _check_scores("inlier", inlier_scores)
    _check_scores("outlier", outlier_scores)
    both = np.concatenate([inlier_scores, outlier_scores]).astype(np.float64)
    distinct, ascending = np.unique(both, return_inverse=True)
    ranks = len(distinct) - 1 - ascending
    num_inliers = len(inlier_scores)
    return ranks[:num_inliers], ranks[num_inliers:], len(distinct)


def _check_scores(name: str, scores: np.ndarray) -> None:
    if not len(scores) or np.isnan(scores).any():
        raise InputError(
            f"{np.isnan(scores).sum()} of {len(scores)} {name} scores are NaN; numbers "
            "are needed, and at least one: check the model's training, or try another "
            "--checkpoint"
        )


def _counts(inliers: np.ndarray, outliers: np.ndarray, num: int) -> list[np.ndarray]:
    """Returns how many of either have each rank."""
    return [np.bincount(ranks, minlength=num) for ranks in (inliers, outliers)]


def _cumulative(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _area(inliers: np.ndarray, outliers: np.ndarray) -> float:
    area = np.trapezoid(_cumulative(inliers), _cumulative(outliers))
    return float(area / (inliers.sum() * outliers.sum()))


def _average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    found = np.cumsum(positives)
    # A resample may leave the first ranks empty.
    precision = found / np.maximum(found + np.cumsum(negatives), 1)
    return float(positives @ precision / found[-1])


def _fpr95(inliers: np.ndarray, outliers: np.ndarray) -> float:
    kept = np.cumsum(inliers)
    threshold = np.searchsorted(20 * kept, 19 * kept[-1])  # In whole numbers: exact.
    return float(outliers[: threshold + 1].sum() / outliers.sum())


def _metrics(inliers: np.ndarray, outliers: np.ndarray) -> tuple[float, ...]:
    """Returns the values of `Detection` from the numbers at each rank."""
    return (
        _area(inliers, outliers),
        _average_precision(inliers, outliers),
        _average_precision(outliers[::-1], inliers[::-1]),
        _fpr95(inliers, outliers),
    )


# Tables.


def format_detections(
    detections: Mapping[str, Mapping[str, Detection]],
    num_inliers: int,
    num_outliers: Mapping[str, int],
) -> str:
    """Returns a plain-text table from name of a set → name of a score → metrics.

    It says of how many inliers and outliers the figures are.
    """
    sizes = {name: f"{num_inliers}/{num}" for name, num in num_outliers.items()}
    rows = [
        ("outliers", "in/out", "score", "AUROC", "AUPR-in", "AUPR-out", "FPR95"),
        *(
            (name, sizes[name], score, *map(_formatted, found))
            for name, scores in detections.items()
            for score, found in scores.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _formatted(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.3f}, {estimate.high:.3f}]"


# A trained run.


class Measured(NamedTuple):
    """Scores of one set of inliers and several of outliers, and their metrics.

    Attributes:
      inlier_scores: name of a score → one number an image.
      outlier_scores: name of a set → the same of its images.
      detections: name of a set → name of a score → its metrics.
    """

    inlier_scores: dict[str, np.ndarray]
    outlier_scores: dict[str, dict[str, np.ndarray]]
    detections: dict[str, dict[str, Detection]]


def measure(
    experiment: Experiment,
    variables: Players,
    inliers: str,
    outliers: Sequence[str],
    seed: int,
    num_draws: int,
    limit: int,
    baselines: bool,
) -> Measured:
    """Measures how well scores of a run of images tell inliers from outliers.

    The scores are those of `scores.fit_scores`, fitted to `scores.fit_rows`; without
    the run's images those that are fitted to none. With `baselines` also those of
    `detectors.fit_pixel_detectors`, fitted to the training images.

    `inliers` and `outliers` are names for `outlier_sets.open_set`, which opens at most
    `limit` images of each. The seed is of all that is drawn.

    Raises InputError as that does, for too few training images, and for scores that
    are NaN.
    """
    source, data = experiment.source, experiment.config.data
    if baselines:
        detectors.check_num_images(len(source.image_set.train))
    # Everything is opened before anything is computed.
    known = outlier_sets.open_set(inliers, source, data, None, seed, limit)
    how = source, data, known, seed, limit
    others = {name: outlier_sets.open_set(name, *how) for name in outliers}
    names, rows = scores_lib.SCORES, None
    if source.image_set is not None:
        rows = scores_lib.fit_rows(source)
    else:
        logging.info("left out, as they need --in=test: %s", scores_lib.FITTED)
        names = [name for name in names if name not in scores_lib.FITTED]
    score = scores_lib.fit_scores(experiment, variables, names, rows, seed, num_draws)
    fitted = {}
    if baselines:
        with progress.phase("fitting the baselines to the training images"):
            train = images.stack(source.image_set.train)
            fitted = detectors.fit_pixel_detectors(train, seed)

    def scores(of: str, pixels: np.ndarray) -> dict[str, np.ndarray]:
        with progress.phase(f"scoring {len(pixels)} images of '{of}'"):
            found = score(pixels)
            found |= {name: detector(pixels) for name, detector in fitted.items()}
        for name, values in found.items():
            _check_scores(f"'{of}' '{name}'", values)  # Before other sets are scored.
        return found

    of_inliers = scores(inliers, known)
    of_outliers = {name: scores(name, pixels) for name, pixels in others.items()}
    detections = {
        name: {
            score: detection(of_inliers[score], values, seed)
            for score, values in of_set.items()
        }
        for name, of_set in of_outliers.items()
    }
    return Measured(of_inliers, of_outliers, detections)
