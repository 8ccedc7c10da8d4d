"""How well a score tells inliers from outliers, and what standard detectors reach.

A score is larger for a point that is more likely an inlier, as the energy f(x, 0) is.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int


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
    ordered = np.sort(np.asarray(outlier_scores, np.float64))
    inliers = np.asarray(inlier_scores, np.float64)
    # Outliers below, and outliers below or equal: their mean counts ties as half.
    below = np.searchsorted(ordered, inliers, side="left")
    not_above = np.searchsorted(ordered, inliers, side="right")
    return float((below + not_above).sum() / (2.0 * len(inliers) * len(ordered)))


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
