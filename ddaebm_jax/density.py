"""Energies, scores, and the parts of likelihoods: pure functions of rows.

The normaliser of exp f(·, 0) comes from sequential Monte Carlo over the levels T … 0
(Del Moral et al. 2006). Targets are exp f(·, t), and N(0, I) at level T; a particle
moves by the proposal g, and the backward kernel is the forward process, extended by
q_ψ for the latent. The product of mean incremental weights is an unbiased estimate of
∫ exp f(x, 0) dx, whatever the networks.

The generator's own bound needs no normaliser: log p_φ(x_0) ≥ E log w, w the weight of a
path x_0 … x_T, of which `reconstruction_error` gives a step; the log of the mean of K
weights is a tighter one (Burda et al. 2016, arXiv 1509.00519).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddaebm_jax import diffusion, objective
from ddaebm_jax import proposal as proposal_lib
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks, Players
from ddaebm_jax.proposal import Proposal, ProposalNoise


def energy_at_data(
    networks: Networks, variables: Any, x: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Returns f(x, 0), the unnormalised log density of data, nats.

    Args:
      networks: the apply functions.
      variables: the energy's.
      x: points.
    """
    return networks.energy(variables, x, jnp.zeros((x.shape[0],), jnp.int32))


def score_at_data(
    networks: Networks, variables: Any, x: Float[Array, "batch *shape"]
) -> Float[Array, "batch *shape"]:
    """Returns ∇_x f(x, 0), the model's score."""
    return objective.energy_and_score(
        lambda points: energy_at_data(networks, variables, points), x
    )[1]


class Move(NamedTuple):
    """Points one level down.

    Attributes:
      x: x_t.
      log_target: f(x_t, t), nats.
      log_weight: the log incremental weight, nats.
    """

    x: Float[Array, "batch *shape"]
    log_target: Float[Array, " batch"]
    log_weight: Float[Array, " batch"]


def denoise_weighted(
    proposal: Proposal,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    x_next: Float[Array, "batch *shape"],
    log_target_next: Float[Array, " batch"],
    t: Int[Array, " batch"],
    noise: ProposalNoise,
) -> Move:
    """Moves points from level t+1 to level t, and weighs them.

    w = exp(f(x_t, t) − f(x_{t+1}, t+1))·q(x_{t+1}|x_t)·q_ψ(z|x_t, x_{t+1})/g(x_t, z).

    Args:
      proposal: the settings of g.
      schedule: the diffusion.
      networks: the apply functions.
      variables: of all three.
      x_next: x_{t+1}.
      log_target_next: f(x_{t+1}, t+1); of level T log N(x; 0, I).
      t: which step.
      noise: of the draws.
    """
    model = schedule, networks, variables
    x, log_ratio = proposal_lib.draw(proposal, *model, x_next, t, noise)
    log_target = networks.energy(variables.energy, x, t)
    return Move(x, log_target, log_target + log_ratio - log_target_next)


def langevin(
    log_target: Callable[[Float[Array, "batch *shape"]], Float[Array, " batch"]],
    x: Float[Array, "batch *shape"],
    step_size: Float[Array, ""] | float,
    eps: Float[Array, "batch *shape"],
    uniform: Float[Array, " batch"],
) -> tuple[Float[Array, "batch *shape"], Float[Array, " batch"]]:
    """Returns points after one Metropolis-adjusted Langevin move, and acceptance.

    The target stays invariant (Roberts & Tweedie 1996). A move that is not finite is
    rejected.

    Args:
      log_target: x → log density up to a constant, example by example.
      x: points.
      step_size: h; the proposal is N(x + ½h²∇log_target(x), h² I).
      eps: standard normal.
      uniform: of [0, 1).
    """

    def log_kernel(to: Array, start: Array, score: Array) -> Array:
        residual = to - start - 0.5 * step_size**2 * score
        return -0.5 * objective.sum_over_dims(residual**2) / step_size**2

    f, score = objective.energy_and_score(log_target, x)
    moved = x + 0.5 * step_size**2 * score + step_size * eps
    f_moved, score_moved = objective.energy_and_score(log_target, moved)
    log_ratio = f_moved - f + log_kernel(x, moved, score_moved)
    log_ratio = log_ratio - log_kernel(moved, x, score)
    acceptance = jnp.exp(jnp.minimum(jnp.nan_to_num(log_ratio, nan=-jnp.inf), 0.0))
    accepted = diffusion.per_example(uniform < acceptance, x)
    return jnp.where(accepted, moved, x), acceptance


def reconstruction_error(
    proposal: Proposal,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    x_t: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    eps: Float[Array, "batch *shape"],
    eps_z: Float[Array, "batch nz"],
) -> tuple[Array, Array, Float[Array, " batch"]]:
    """Returns x_{t+1}, the residual of x_t's reconstruction, and its log weight.

    x_{t+1} ~ q(·|x_t) and z ~ q_ψ(·|x_t, x_{t+1}), from `eps` and `eps_z`; the residual
    is x_t − c1 G(x_{t+1}, t, z) − c2 x_{t+1}; the weight is
    log N(z; 0, I) − log q_ψ(z|x_t, x_{t+1}) − log q(x_{t+1}|x_t), nats.
    """
    x_next = diffusion.diffuse_one_step(schedule, x_t, t, eps)
    mu = logvar = jnp.zeros_like(eps_z)
    if proposal.encoder:
        mu, logvar = networks.posterior(variables.posterior, x_t, x_next, t)
    z = objective.sample_latent(mu, logvar, eps_z)
    if not proposal.latent:
        z = jnp.zeros_like(z)
    x0_pred = networks.generator(variables.generator, x_next, t, z)
    residual = x_t - diffusion.posterior_mean(schedule, x0_pred, x_next, t)
    log_posterior = objective.gaussian_log_prob(z, mu, logvar)
    log_weight = objective.log_standard_normal(z) - log_posterior
    return x_next, residual, log_weight - diffusion.log_q(schedule, x_next, x_t, t)


def grid_points(extent: float, cells: int) -> Float[Array, "points 2"]:
    """Returns the centres of cells×cells squares that tile [−extent, extent]².

    The first coordinate varies slowest.
    """
    width = 2.0 * extent / cells
    centres = -extent + width * (jnp.arange(cells) + 0.5)
    first, second = jnp.meshgrid(centres, centres, indexing="ij")
    return jnp.stack([first.ravel(), second.ravel()], axis=1)


def evaluate_in_chunks(
    function: Callable[[Any], Array], x: Array | np.ndarray, chunk: int = 20_000
) -> Array:
    """Applies a jitted row-wise function to many rows, a chunk at a time.

    The last chunk is padded with its first row, so that one program serves all. There
    must be a row.
    """
    rows = x.shape[0]
    chunk = min(chunk, rows)
    parts = []
    for start in range(0, rows, chunk):
        part = x[start : start + chunk]
        missing = chunk - part.shape[0]
        if missing:
            # On the host, rows stay there until their turn.
            xp = np if isinstance(part, np.ndarray) else jnp
            part = xp.concatenate([part, xp.repeat(part[:1], missing, axis=0)])
        parts.append(function(part)[: chunk - missing])
    return jnp.concatenate(parts)
