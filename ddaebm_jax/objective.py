"""The terms of the game, each a function of its own (Geng et al. 2024, section 4).

Energy step, descent in θ:
  E[f(x̃_t) − f(x_t)] + γ/2·E‖∇_{x_t}[f(x_t) + log q(x_{t+1}|x_t)]‖²
(with a reference density, the penalty is of the gradient of what is learnt only).
With K weighted negatives log_mean_exp(f(x̃_t^k) + b^k) takes the place of f(x̃_t), and
the step is maximum likelihood of the conditional energy; see `proposal`.
Generator step, descent in φ and ψ together:
  reverse_potential + λ_z·latent_log_prob + λ_f·(reconstruction + latent_kl)

A term is one value per example; its mean over the batch estimates the expectation.
Terms take what the networks gave, or an apply function, and know nothing else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddaebm_jax import diffusion
from ddaebm_jax.diffusion import Schedule

# Keeps (z−μ)²/σ² finite where the encoder's variance underflows.
_LATENT_VARIANCE_FLOOR = 1e-6


def sum_over_dims(x: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """Returns the sum over every axis but the first."""
    return x.reshape(x.shape[0], -1).sum(axis=1)


def energy_and_score(
    energy: Callable[[Float[Array, "batch *shape"]], Float[Array, " batch"]],
    x: Float[Array, "batch *shape"],
) -> tuple[Float[Array, " batch"], Float[Array, "batch *shape"]]:
    """Returns f(x) and ∇_x f(x), example by example, from one forward pass.

    Args:
      energy: x → f(x); row i of the result may depend on row i of x only.
      x: the points.
    """
    f, pullback = jax.vjp(energy, x)
    (score,) = pullback(jnp.ones_like(f))
    return f, score


def gradient_penalty(score: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """Returns ½‖score‖², the penalty before its weight γ.

    Args:
      score: ∇_{x_t}[f(x_t, t) + log q(x_{t+1}|x_t)] at real x_t, the score of the
        conditional model density.
    """
    return 0.5 * sum_over_dims(score**2)


def energy_magnitude(f_real: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """Returns f(x_t, t)² at real points, before its weight α; not in the paper.

    The game fixes f only through the generator's response, which is weak between
    separate modes, so that their heights drift. This term pulls them back, and sets f's
    constant to about 0 on data. Du & Mordatch 2019 (arXiv 1903.08689) regularise real
    and generated energies alike.
    """
    return f_real**2


def reverse_potential(
    schedule: Schedule,
    f_fake: Float[Array, " batch"],
    x_fake: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Returns −f(x̃_t, t) − log q(x_{t+1}|x̃_t), the potential of KL(p_φ ‖ p_θ)."""
    return -(f_fake + diffusion.log_q(schedule, x_next, x_fake, t))


def latent_log_prob(
    z: Float[Array, "batch nz"],
    mu: Float[Array, "batch nz"],
    logvar: Float[Array, "batch nz"],
) -> Float[Array, " batch"]:
    """Returns −log q_ψ(z | x̃_t, x_{t+1}) without its constant.

    ½Σ logvar + ½Σ (z−μ)²/(1e-6 + exp logvar). Its mean bounds the generator's entropy:
    H(p_φ) ≥ const − mean.
    """
    squares = (z - mu) ** 2 / (_LATENT_VARIANCE_FLOOR + jnp.exp(logvar))
    return 0.5 * (logvar + squares).sum(axis=1)


def latent_kl(
    mu: Float[Array, "batch nz"], logvar: Float[Array, "batch nz"]
) -> Float[Array, " batch"]:
    """Returns KL(N(μ, diag exp logvar) ‖ N(0, I)), nats."""
    return 0.5 * (jnp.exp(logvar) + mu**2 - 1.0 - logvar).sum(axis=1)


def sample_latent(
    mu: Float[Array, "batch nz"],
    logvar: Float[Array, "batch nz"],
    eps: Float[Array, "batch nz"],
) -> Float[Array, "batch nz"]:
    """Returns z = μ + exp(½ logvar)·ε, a reparameterised draw from q_ψ."""
    return mu + jnp.exp(0.5 * logvar) * eps


def reconstruction_nll(
    schedule: Schedule,
    x_t: Float[Array, "batch *shape"],
    x0_pred: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    floor: Float[Array, ""] | float,
    weight: Float[Array, " levels"] | None = None,
) -> Float[Array, " batch"]:
    """Returns −log N(x_t; c1 x̂_0 + c2 x_{t+1}, max(s_t², floor)), nats.

    Args:
      schedule: the diffusion.
      x_t: what is to be reconstructed.
      x0_pred: x̂_0.
      x_next: x_{t+1}.
      t: which step.
      floor: least variance; see `variance_floor`.
      weight: w_k by level; the example's term is multiplied by w_{t+1}.
    """
    log_var = jnp.maximum(schedule.posterior_log_var, jnp.log(floor))[t]
    log_var = diffusion.per_example(log_var, x_t)
    mean = diffusion.posterior_mean(schedule, x0_pred, x_next, t)
    nll = 0.5 * ((x_t - mean) ** 2 * jnp.exp(-log_var) + log_var + jnp.log(2 * jnp.pi))
    nll = sum_over_dims(nll)
    return nll if weight is None else nll * weight[t + 1]


def reconstruction_mse(
    schedule: Schedule,
    x_t: Float[Array, "batch *shape"],
    x0_pred: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Returns Σ_dims (x_t − (c1 x̂_0 + c2 x_{t+1}))²."""
    mean = diffusion.posterior_mean(schedule, x0_pred, x_next, t)
    return sum_over_dims((x_t - mean) ** 2)


def gaussian_log_prob(
    x: Float[Array, "batch *shape"],
    mean: Float[Array, "batch *shape"],
    log_var: Float[Array, " batch"] | Float[Array, "batch *shape"],
) -> Float[Array, " batch"]:
    """Returns Σ_dims log N(x; mean, exp log_var), nats; one variance a row or each."""
    if log_var.ndim < x.ndim:
        log_var = diffusion.per_example(log_var, x)
    squares = (x - mean) ** 2 * jnp.exp(-log_var)
    return -0.5 * sum_over_dims(squares + log_var + jnp.log(2 * jnp.pi))


def log_standard_normal(x: Float[Array, "batch *shape"]) -> Float[Array, " batch"]:
    """Returns log N(x; 0, I), nats."""
    return gaussian_log_prob(x, jnp.zeros_like(x), jnp.zeros(len(x)))


def log_mean_exp(log_weights: Float[Array, "batch draws"]) -> Float[Array, " batch"]:
    """Returns the log of each row's mean weight."""
    num = log_weights.shape[1]
    return jax.nn.logsumexp(log_weights, axis=1) - jnp.log(num)


def effective_share(log_weights: Float[Array, "batch draws"]) -> Float[Array, " batch"]:
    """Returns (Σw)²/(n Σw²) of each row, the effective sample size as a share of n.

    1: all weights are equal; 1/n: one draw has all the weight.
    """
    weights = jax.nn.softmax(log_weights, axis=1)
    return 1.0 / (log_weights.shape[1] * (weights**2).sum(axis=1))


def variance_floor(schedule: Schedule, floor: float | None) -> Float[Array, ""] | float:
    """Returns the least variance of the reconstruction.

    Args:
      schedule: the diffusion.
      floor: the variance itself (1e-2 on 2-D data), or None for s_1², the
        posterior's own value for t = 1 (images).

    Raises:
      ValueError: if `floor` is None and there is no t = 1.
    """
    if floor is not None:
        return floor
    if schedule.num_steps < 2:
        raise ValueError("a schedule of one step has no s_1²; give the floor a number")
    return jnp.exp(schedule.posterior_log_var[1])
