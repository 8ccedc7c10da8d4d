"""Where the levels of a diffusion lie, by their noise.

A level's noise σ_k = S_k/A_k is in units of the data: of a variance-exploding process
x + σε, which scaled by A = 1/√(1+σ²) is ours with S = σ/√(1+σ²).

Sources: levels evenly in the log signal-to-noise ratio follow Lu et al. 2022 (arXiv
2206.00927), those in a root of σ Karras et al. 2022 (arXiv 2206.00364). The cost of a
step is its term of the variational bound (Kingma et al. 2021, arXiv 2107.00630).
"""

import numpy as np
from jaxtyping import Float

_KARRAS_RHO = 7.0  # Karras et al. 2022, table 1.
# Least cost of a step, as a share of the mean: an estimate may be below zero.
_LEAST_COST = 1e-3


def noise_levels(
    num_steps: int, kind: str, first: float, last: float
) -> Float[np.ndarray, " levels"]:
    """Returns noise levels σ_0 … σ_T from `first` to `last`, float64, shape [T+1].

    Args:
      num_steps: T.
      kind: `log_snr`: evenly in the log signal-to-noise ratio −2 log σ, as DPM-Solver's
        steps (Lu et al. 2022). `karras`: evenly in σ^{1/ρ}, ρ = 7 (Karras et al. 2022,
        eq. 5, whose order is from σ_max down).
      first: σ_0 > 0.
      last: σ_T.

    Raises:
      ValueError: unless num_steps ≥ 1 and 0 < first < last.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is needed")
    if not 0.0 < first < last:
        raise ValueError(
            f"levels '{kind}' go from noise {first:.3g} to {last:.3g}; they need noise "
            "at level 0, and less than at level T: give a time_eps such as 1e-3"
        )
    share = np.arange(num_steps + 1) / num_steps
    if kind == "log_snr":
        return first ** (1.0 - share) * last**share
    low, high = first ** (1.0 / _KARRAS_RHO), last ** (1.0 / _KARRAS_RHO)
    return (low + share * (high - low)) ** _KARRAS_RHO


def equal_cost(
    sigma: Float[np.ndarray, " levels"],
    costs: Float[np.ndarray, " steps"],
    num_steps: int,
) -> Float[np.ndarray, " new_levels"]:
    """Returns T+1 noise levels between which every step costs the same.

    The ends stay. Between measured levels the cost is taken to grow evenly with log σ.
    With the exact p(x_t | x_{t+1}) costs of steps add up, and those of Gaussian data,
    covariance eigenvalues v_j, are differences of ½ Σ_j log(1 + v_j/σ²).

    Args:
      sigma: σ_0 < … < σ_M.
      costs: of the M steps between them, nats; small or negative ones, which only an
        estimate can be, count as a thousandth of their mean.
      num_steps: T.

    Raises:
      ValueError: for costs that are not finite, or whose sum is not positive.
    """
    mean = float(np.mean(costs))
    if not np.isfinite(costs).all() or mean <= 0.0:
        raise ValueError(
            f"the costs of the steps are {np.round(costs, 4).tolist()} nats; finite "
            "ones with a positive sum are needed"
        )
    total = np.append(0.0, np.cumsum(np.maximum(costs, _LEAST_COST * mean)))
    wanted = total[-1] * np.arange(num_steps + 1) / num_steps
    found = np.exp(np.interp(wanted, total, np.log(sigma)))
    found[0], found[-1] = sigma[0], sigma[-1]
    return found


def moved(
    sigma: Float[np.ndarray, " levels"],
    wanted: Float[np.ndarray, " levels"],
    limit: float,
) -> Float[np.ndarray, " levels"]:
    """Returns levels moved towards the wanted ones, each at most `limit` in log σ.

    They keep their order, as both arguments have it.
    """
    old = np.log(sigma)
    return np.exp(np.clip(np.log(wanted), old - limit, old + limit))
