"""The diffusion: noise schedules, the forward process, its Gaussian posterior.

Levels run k = 0 … T. Level 0 is data (with a trace of noise), level T is close to
N(0, I). A training pair is (x_t, x_{t+1}) with t in {0, …, T−1}; t is what every
network receives. Nothing here knows of networks.

Notation: β_k is the variance added on the way from level k−1 to k, a_k = √(1−β_k),
σ_k = √β_k, A_k = Π_{j≤k} a_j, S_k = √(1−A_k²), P_k = A_k².

Sources: Geng et al. 2024 (arXiv 2403.01666); Xiao et al. 2022 (arXiv 2112.07804);
the cosine schedule is eq. 17 of Nichol & Dhariwal 2021 (arXiv 2102.09672); levels
spaced by their noise are those of `levels`.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ddaebm_jax import levels

VARIANCES = ("vp", "geometric", "cosine")
SPACINGS = ("log_snr", "karras")
TIMES = ("uniform", "lsun", *SPACINGS)

_COSINE_OFFSET = 0.008
LARGEST_NOISE = 80.0  # Karras et al. 2022 (arXiv 2206.00364), table 1.


@flax.struct.dataclass
class Schedule:
    """Everything the forward process and its posterior need, by level or by t.

    Attributes:
      beta: β_k, variance added at level k, k = 0 … T.
      a: a_k = √(1−β_k).
      sigma: σ_k = √β_k.
      a_cum: A_k, the data's amplitude at level k; 1 at level 0 with `keep_scale`.
      sigma_cum: S_k, the standard deviation of the noise at level k.
      posterior_c1: c1_t, weight of x_0 in the mean of q(x_t | x_{t+1}, x_0).
      posterior_c2: c2_t, weight of x_{t+1} in that mean.
      posterior_var: s_t², variance of q(x_t | x_{t+1}, x_0), unclipped.
      posterior_log_var: log s_t², clipped below where the schedule was made so.
      recon_weight: w_k = 0.6·τ_k^{log(1/3)/log(1/2)}, the LSUN recipe's weights.
    """

    beta: Float[Array, " levels"]
    a: Float[Array, " levels"]
    sigma: Float[Array, " levels"]
    a_cum: Float[Array, " levels"]
    sigma_cum: Float[Array, " levels"]
    posterior_c1: Float[Array, " steps"]
    posterior_c2: Float[Array, " steps"]
    posterior_var: Float[Array, " steps"]
    posterior_log_var: Float[Array, " steps"]
    recon_weight: Float[Array, " levels"]

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return self.posterior_c1.shape[0]


def diffusion_times(
    num_steps: int, kind: str = "uniform", time_eps: float = 1e-3
) -> np.ndarray:
    """Returns the times τ_0 … τ_T in [0, 1], float64, shape [T+1].

    Args:
      num_steps: T, at least 1 (at least 2 for `lsun`).
      kind: `uniform`: τ_k = ε + (1−ε)·k/T. `lsun`: [0, s, 2s, …, (T−1)s, 999]/999
        with s = 1000 // (2(T−1)), the times of the authors' LSUN recipe.
      time_eps: ε, the time of level 0 (`uniform` only).

    Raises:
      ValueError: for an unknown kind or too few steps.
    """
    least = 2 if kind == "lsun" else 1
    if num_steps < least:
        raise ValueError(
            f"num_steps is {num_steps}; times '{kind}' need at least {least}"
        )
    if kind == "uniform":
        return time_eps + (1.0 - time_eps) * np.arange(num_steps + 1) / num_steps
    if kind == "lsun":
        stride = 1000 // (2 * (num_steps - 1))
        return np.append(stride * np.arange(num_steps), 999) / 999.0
    if kind == "equal_cost":
        raise ValueError(
            "the times of 'equal_cost' are not known; train, for a pilot run to find "
            "them, or give diffusion.times"
        )
    raise ValueError(f"times are '{kind}'; allowed: {', '.join(TIMES)}")


def spaced_times(
    num_steps: int,
    kind: str,
    time_eps: float,
    variance: str,
    beta_min: float,
    beta_max: float,
) -> np.ndarray:
    """Returns the times of levels spaced by their noise, float64, shape [T+1].

    Level 0 is that of `time_eps`, level T that of time 1 or of σ = 80, Karras et al.'s
    σ_max, if that is less (a cosine variance ends in noise alone); between the two lie
    `levels.noise_levels`. The other arguments are those of `marginal_variance`.
    """
    limits = variance, beta_min, beta_max
    first, last = noise_of_times(np.array([time_eps, 1.0]), *limits)
    sigma = levels.noise_levels(num_steps, kind, first, min(last, LARGEST_NOISE))
    return times_of_noise(sigma, *limits)


def noise_of_times(
    tau: np.ndarray, variance: str, beta_min: float, beta_max: float
) -> np.ndarray:
    """Returns σ(τ) = √(v/(1−v)), the noise in units of the data; v(1) may be 1."""
    v = marginal_variance(tau, variance, beta_min, beta_max)
    with np.errstate(divide="ignore"):
        return np.sqrt(v / (1.0 - v))


def times_of_noise(
    sigma: np.ndarray, variance: str, beta_min: float, beta_max: float
) -> np.ndarray:
    """Returns the times at which the noise is σ; undoes `noise_of_times`."""
    low, high = np.zeros_like(sigma), np.ones_like(sigma)
    for _ in range(80):  # Bisection: noise grows with time.
        middle = (low + high) / 2
        less = noise_of_times(middle, variance, beta_min, beta_max) < sigma
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return high


def marginal_variance(
    tau: np.ndarray, kind: str, beta_min: float, beta_max: float
) -> np.ndarray:
    """Returns v(τ), the variance of the noise at time τ, float64, shaped as `tau`.

    Args:
      tau: times in [0, 1].
      kind: `vp`: 1 − exp(−½τ²(β_max−β_min) − τβ_min). `geometric`:
        β_min(β_max/β_min)^τ, which needs β_max < 1. `cosine`: 1 − c(τ)/c(0),
        c(τ) = cos²(π/2·(τ+s)/(1+s)), s = 0.008; it reads no β.
      beta_min: lower end of the range of β.
      beta_max: upper end.

    Raises:
      ValueError: for an unknown kind or a range the kind cannot use.
    """
    tau = np.asarray(tau, np.float64)
    if kind == "cosine":
        angle = (tau + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET) * np.pi / 2
        start = _COSINE_OFFSET / (1.0 + _COSINE_OFFSET) * np.pi / 2
        return 1.0 - np.cos(angle) ** 2 / np.cos(start) ** 2
    if not 0.0 < beta_min < beta_max:
        raise ValueError(
            f"beta_min is {beta_min} and beta_max is {beta_max}; "
            "0 < beta_min < beta_max is needed"
        )
    if kind == "vp":
        return 1.0 - np.exp(-0.5 * tau**2 * (beta_max - beta_min) - tau * beta_min)
    if kind == "geometric":
        if beta_max >= 1.0:
            raise ValueError(
                f"beta_max is {beta_max}; a geometric variance needs it below 1"
            )
        return beta_min * (beta_max / beta_min) ** tau
    raise ValueError(f"variance is '{kind}'; allowed: {', '.join(VARIANCES)}")


def time_of_noise(std: float, process: Any) -> float:
    """Returns the time τ, at most 0.5, at which √v(τ) is `std`, of a `diffusion`."""
    limits = process.variance, process.beta_min, process.beta_max
    times = np.linspace(0.0, 0.5, 5_001)
    return float(np.interp(std**2, marginal_variance(times, *limits), times))


def level_times(
    num_steps: int,
    variance: str,
    beta_min: float,
    beta_max: float,
    time: str,
    time_eps: float,
    times: Sequence[float],
    **others: Any,
) -> np.ndarray:
    """Returns the times of a schedule's levels; see `schedule_values`."""
    del others
    if time in SPACINGS and not len(times):
        limits = variance, beta_min, beta_max
        return spaced_times(num_steps, time, time_eps, *limits)
    if not len(times):
        return diffusion_times(num_steps, time, time_eps)
    tau = np.asarray(times, np.float64)
    if len(tau) != num_steps + 1 or (np.diff(tau) <= 0).any():
        raise ValueError(
            f"times are {tau.tolist()}; num_steps + 1 = {num_steps + 1} of them, each "
            "above the one before, are needed"
        )
    return tau


def schedule_values(
    num_steps: int = 4,
    variance: str = "vp",
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    time: str = "uniform",
    time_eps: float = 1e-3,
    times: Sequence[float] = (),
    keep_scale: bool = False,
    max_beta: float = 0.999,
    min_posterior_var: float | None = None,
) -> dict[str, np.ndarray]:
    """Returns the fields of a schedule of T steps, float64, on the host.

    Args:
      num_steps: T.
      variance: `vp`, `geometric` or `cosine`; see `marginal_variance`.
      beta_min: lower end of the range of β.
      beta_max: upper end.
      time: `uniform` or `lsun`, see `diffusion_times`; `log_snr` or `karras`, see
        `spaced_times`; `equal_cost`: `times` are given.
      time_eps: time of level 0, except for `lsun`.
      times: τ_0 < … < τ_T, whatever `time` is; empty: those of `time`.
      keep_scale: x_0 is the data plus S_0 ε; else the noise of level 0 shrinks them.
      max_beta: β_k for k ≥ 1 is clipped to at most this.
      min_posterior_var: log s_t² is clipped below at its log (1e-4 on images);
        None: not clipped. With `lsun` times s_0² = 0, so a value is needed there.

    Raises:
      ValueError: for arguments out of range, or a schedule that cannot be used.
    """
    limits = variance, beta_min, beta_max
    tau = level_times(num_steps, *limits, time, time_eps, times)
    alpha_bar = 1.0 - marginal_variance(tau, *limits)
    beta = np.empty(num_steps + 1)
    beta[0] = 1.0 - alpha_bar[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        beta[1:] = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)
    alpha = 1.0 - beta
    p = np.cumprod(alpha)
    # 1 − P by recursion, (1−P_k) = β_k + α_k(1−P_{k−1}): no cancellation near data.
    one_minus_p = np.empty_like(p)
    one_minus_p[0] = beta[0]
    for k in range(1, num_steps + 1):
        one_minus_p[k] = beta[k] + alpha[k] * one_minus_p[k - 1]
    c1 = beta[1:] * np.sqrt(p[:-1]) / one_minus_p[1:]
    c2 = one_minus_p[:-1] * np.sqrt(alpha[1:]) / one_minus_p[1:]
    posterior_var = beta[1:] * one_minus_p[:-1] / one_minus_p[1:]
    if not (np.isfinite(beta).all() and (beta[1:] > 0).all() and (p > 0).all()):
        raise ValueError(
            f"variance '{variance}' with times '{time}', num_steps {num_steps}, "
            f"beta_min {beta_min} and beta_max {beta_max} gives β from "
            f"{beta.min():.3g} to {beta.max():.3g}; every step needs 0 < β < 1: take "
            "fewer steps or a narrower range"
        )
    scale = alpha[0] ** -0.5 if keep_scale else 1.0
    clipped = np.maximum(posterior_var, min_posterior_var or 0.0)
    if clipped.min() <= 0.0:
        raise ValueError(
            f"the posterior's variance is 0 at t = {int(posterior_var.argmin())} "
            f"(times '{time}') and min_posterior_var is {min_posterior_var}; give it "
            "a positive number, for example 1e-4"
        )
    exponent = np.log(0.2 / 0.6) / np.log(0.5)
    return {
        "beta": beta,
        "a": np.sqrt(alpha),
        "sigma": np.sqrt(beta),
        "a_cum": scale * np.sqrt(p),
        "sigma_cum": np.sqrt(one_minus_p),
        "posterior_c1": scale * c1,
        "posterior_c2": c2,
        "posterior_var": posterior_var,
        "posterior_log_var": np.log(clipped),
        "recon_weight": 0.6 * tau**exponent,
    }


def make_schedule(*args: Any, **kwargs: Any) -> Schedule:
    """Makes a schedule, stored as float32; see `schedule_values` for arguments."""
    values = schedule_values(*args, **kwargs)
    return Schedule(**{k: jnp.asarray(v, jnp.float32) for k, v in values.items()})


def per_example(values: Shaped[Array, " batch"], like: Array) -> Array:
    """Returns `values` with trailing axes of size 1, to scale `like` by example."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def diffuse(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    eps: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """Returns x_t = A_t x_0 + S_t ε, a draw from q(x_t | x_0) for ε ~ N(0, I).

    Levels from 0 to T are allowed.
    """
    a_cum = per_example(schedule.a_cum[t], x0)
    sigma_cum = per_example(schedule.sigma_cum[t], x0)
    return a_cum * x0 + sigma_cum * eps


def diffuse_one_step(
    schedule: Schedule,
    x_t: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    eps: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """Returns x_{t+1} = a_{t+1} x_t + σ_{t+1} ε, a draw from q(x_{t+1} | x_t)."""
    a = per_example(schedule.a[t + 1], x_t)
    sigma = per_example(schedule.sigma[t + 1], x_t)
    return a * x_t + sigma * eps


def diffuse_pair(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    eps_t: Float[Array, "batch *shape"],
    eps_next: Float[Array, "batch *shape"],
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """Returns the training pair (x_t, x_{t+1}), a draw from q(x_t, x_{t+1} | x_0)."""
    x_t = diffuse(schedule, x0, t, eps_t)
    return x_t, diffuse_one_step(schedule, x_t, t, eps_next)


def log_q(
    schedule: Schedule,
    x_next: Float[Array, "batch *shape"],
    x_t: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Returns log q(x_{t+1} | x_t) = Σ log N(x_{t+1}; a_{t+1} x_t, σ²_{t+1}), nats."""
    a = per_example(schedule.a[t + 1], x_t)
    beta = per_example(schedule.beta[t + 1], x_t)
    log_prob = -0.5 * ((x_next - a * x_t) ** 2 / beta + jnp.log(2 * jnp.pi * beta))
    return log_prob.reshape(log_prob.shape[0], -1).sum(axis=1)


def score_log_q(
    schedule: Schedule,
    x_next: Float[Array, "batch *shape"],
    x_t: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
) -> Float[Array, "batch *shape"]:
    """Returns ∇_{x_t} log q(x_{t+1} | x_t) = a_{t+1}(x_{t+1} − a_{t+1}x_t)/β_{t+1}."""
    a = per_example(schedule.a[t + 1], x_t)
    beta = per_example(schedule.beta[t + 1], x_t)
    return a * (x_next - a * x_t) / beta


def posterior_mean(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
) -> Float[Array, "batch *shape"]:
    """Returns c1_t x_0 + c2_t x_{t+1}, the mean of q(x_t | x_{t+1}, x_0)."""
    c1 = per_example(schedule.posterior_c1[t], x0)
    c2 = per_example(schedule.posterior_c2[t], x0)
    return c1 * x0 + c2 * x_next


def sample_posterior(
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    eps: Float[Array, "batch *shape"],
    noise_at_data: bool = False,
) -> Float[Array, "batch *shape"]:
    """Returns x_t ~ q(x_t | x_{t+1}, x_0); at t = 0 its mean, unless `noise_at_data`.

    Real points at level 0 carry noise: with `noise_at_data` it does not tell them from
    generated ones.
    """
    std = jnp.exp(0.5 * schedule.posterior_log_var[t])
    if not noise_at_data:
        std = jnp.where(t > 0, std, 0.0)
    mean = posterior_mean(schedule, x0, x_next, t)
    return mean + per_example(std, x0) * eps


def sample_prior(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns x_T ~ N(0, I) of the given shape, where sampling starts."""
    return jax.random.normal(key, shape)
