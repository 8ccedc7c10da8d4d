"""Metrics of a model in the plane: of its samples and of its density."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

# Of the directions of sliced distances, so that they compare.
PROJECTION_SEED = 1_003


class ModeCoverage(NamedTuple):
    """Modes with at least one high-quality sample, and the share of such samples.

    They lie within 3σ of a mode's centre, as 1 − e^{−4.5} = 0.989 of the mixture does.
    """

    modes_found: int
    high_quality: float


def mode_coverage(
    samples: Float[np.ndarray, "n 2"], modes: Float[np.ndarray, "m 2"], std: float
) -> ModeCoverage:
    """Returns the modes found and the share of high-quality samples of a mixture.

    The mixture's components have the given centres and one standard deviation.
    """
    distances = np.linalg.norm(samples[:, None, :] - modes[None, :, :], axis=-1)
    good = distances.min(axis=1) <= 3.0 * std
    return ModeCoverage(
        modes_found=len(np.unique(distances.argmin(axis=1)[good])),
        high_quality=float(good.mean()),
    )


def sliced_wasserstein(
    first: Float[Array | np.ndarray, "n dim"],
    second: Float[Array | np.ndarray, "n dim"],
    key: Array,
    num_projections: int = 500,
) -> float:
    """Returns the sliced 2-Wasserstein distance of two samples of equal size.

    The root of the mean, over random directions, of the squared 2-Wasserstein
    distance of the projections (Bonneel et al. 2015).
    """
    normals = jax.random.normal(key, (num_projections, first.shape[1]))
    directions = np.asarray(normals, np.float64).T
    directions /= np.linalg.norm(directions, axis=0)
    # Optimal transport on a line pairs points of equal rank.
    ranked = [np.sort(np.asarray(x) @ directions, axis=0) for x in (first, second)]
    return float(np.sqrt(((ranked[0] - ranked[1]) ** 2).mean()))


def jensen_shannon(
    log_p: Float[Array | np.ndarray, "*cells"],
    log_q: Float[Array | np.ndarray, "*cells"],
) -> float:
    """Returns the Jensen-Shannon divergence of two grids of log masses, in nats.

    Each is normalised over the cells first. 0 for equal ones, log 2 = 0.693 for
    disjoint ones.
    """
    from scipy.special import rel_entr, softmax

    p, q = (softmax(np.asarray(x, np.float64)) for x in (log_p, log_q))
    mixture = (p + q) / 2.0
    divergence = rel_entr(p, mixture).sum() + rel_entr(q, mixture).sum()
    return max(0.0, float(divergence / 2.0))
