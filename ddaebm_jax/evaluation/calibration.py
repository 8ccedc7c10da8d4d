"""P-values of scores by held-out inliers, and flags at a false discovery rate.

A score is larger for a point that is more likely an inlier.
"""

import numpy as np
from jaxtyping import Bool, Float

from ddaebm_jax.errors import InputError


def conformal_p_values(
    scores: Float[np.ndarray, " m"], calibration: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """Returns (1 + #{calibration scores ≤ score}) / (n + 1) of each score.

    Where an inlier's score and the calibration scores are exchangeable, its p-value is
    at most u with probability at most u (Bates et al. 2023, arXiv 2104.08279). A tie
    counts as at least as extreme; the smallest p-value is 1 / (n + 1).

    Raises:
      InputError: if there are no calibration scores, or some score is NaN.
    """
    if not len(calibration) or np.isnan(calibration).any():
        raise InputError(
            f"{np.isnan(calibration).sum()} of {len(calibration)} scores of held-out "
            "inliers are NaN; p-values need numbers, and at least one: check the "
            "model's training, or try another --checkpoint"
        )
    if np.isnan(scores).any():
        raise InputError(
            f"the score of row {np.isnan(scores).argmax()} (from 0) is NaN; a p-value "
            "needs a number: correct or drop the row, or try another --checkpoint"
        )
    at_most = np.searchsorted(np.sort(calibration), scores, side="right")
    return (1.0 + at_most) / (len(calibration) + 1.0)


def benjamini_hochberg(
    p_values: Float[np.ndarray, " m"], fdr: float
) -> Bool[np.ndarray, " m"]:
    """Returns which p-values are flagged by Benjamini and Hochberg's procedure (1995).

    With p_(1) ≤ … ≤ p_(m) and k the largest number for which p_(k) ≤ k·fdr/m, the k
    smallest. The expected share of inliers among the flagged is at most `fdr`, also of
    conformal p-values that share their calibration scores (Bates et al. 2023).

    Raises:
      InputError: unless 0 < fdr < 1.
    """
    check_fdr(fdr)
    ascending, ranks = np.sort(p_values), np.arange(1, len(p_values) + 1)
    # Conformal p-values meet the limit exactly, which must not fail by rounding.
    below = np.flatnonzero(ascending * len(p_values) <= fdr * ranks * (1 + 1e-12))
    if not len(below):
        return np.zeros(len(p_values), bool)
    return p_values <= ascending[below[-1]]


def check_fdr(fdr: float) -> None:
    """Raises InputError unless a false discovery rate is above 0 and below 1."""
    if not 0.0 < fdr < 1.0:
        raise InputError(
            f"--fdr is {fdr}; a rate above 0 and below 1 is needed, for example 0.1"
        )
