"""Importance sampling from the conditional energies: the proposal g and its weights.

The conditional model p_θ(x_t | x_{t+1}) ∝ exp f(x_t, t)·q(x_{t+1}|x_t) is extended to
the latent by q_ψ(z | x_t, x_{t+1}). Draws (x, z) come from

  g = (1−δ)·N(z; 0, I)·N(x; c1 G(x_{t+1}, t, z) + c2 x_{t+1}, r_t² I)
      + δ·N(x; m, v I)·q_ψ(z | x, x_{t+1}),

the generator and a defensive part that covers what the generator misses (Hesterberg
1995): v = (1/ς² + a²_{t+1}/β_{t+1})⁻¹, m = v·a_{t+1}x_{t+1}/β_{t+1}, the exact
p(x_t|x_{t+1}) under the prior N(0, ς² I). A draw has the log weight f(x, t) + b,

  b = log q(x_{t+1}|x) + log q_ψ(z | x, x_{t+1}) − log g(x, z),

for which any q_ψ is exact and a good one lowers the variance. Without an encoder q_ψ
is N(0, I). With a reference density (see `reference`) the defensive part draws from
p_ref(x_t | x_{t+1}) instead.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddaebm_jax import diffusion, objective, reference
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks, Players

# Bounds of q_ψ's mean and log variance in the proposal.
_MOST_MEAN, _MOST_LOGVAR = 1e3, 15.0


class Proposal(NamedTuple):
    """The settings of g.

    Attributes:
      floor: least variance r_t² = max(s_t², floor); None: s_1².
      defensive: δ, share of the defensive part, in [0, 1).
      prior_std: ς, standard deviation of the prior in the defensive part.
      latent: False: z ≡ 0.
      encoder: whether there is a q_ψ; False: N(0, I) takes its place.
    """

    floor: float | None = None
    defensive: float = 0.0
    prior_std: float = 2.0
    latent: bool = True
    encoder: bool = True


@flax.struct.dataclass
class ProposalNoise:
    """The randomness of draws from g, one row each.

    Attributes:
      is_defensive: which part of g a draw comes from.
      z: the latent, or what q_ψ's moments are multiplied by.
      eps: noise of x.
      uniform: which Gaussian of a reference the defensive part draws from.
    """

    is_defensive: Bool[Array, " batch"]
    z: Float[Array, "batch nz"]
    eps: Float[Array, "batch *shape"]
    uniform: Float[Array, " batch"]


class Draws(NamedTuple):
    """Draws from g.

    Attributes:
      x: points at level t.
      log_ratio: b; the log weight is f(x, t) + b, nats.
    """

    x: Float[Array, "batch *shape"]
    log_ratio: Float[Array, " batch"]


def draw(
    proposal: Proposal,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
    noise: ProposalNoise,
) -> Draws:
    """Returns draws from g given each x_{t+1}, and their log ratios b.

    Networks are in evaluation mode. At t = 0 draws carry noise as at other levels.

    Args:
      proposal: the settings of g.
      schedule: the diffusion.
      networks: the apply functions.
      variables: the generator's and the posterior's are used, and a reference.
      x_next: x_{t+1}.
      t: which step.
      noise: the draws' randomness, one or as many for each x_{t+1}, in their order.
    """
    if proposal.defensive > 0.0:
        how = proposal, schedule, variables, x_next, t, noise
        x_defensive, log_defensive = _defensive_part(*how)
    num = len(noise.z) // len(x_next)
    x_next, t = jnp.repeat(x_next, num, axis=0), jnp.repeat(t, num)
    floor = objective.variance_floor(schedule, proposal.floor)
    log_var = jnp.maximum(schedule.posterior_log_var, jnp.log(floor))[t]
    std = diffusion.per_example(jnp.exp(0.5 * log_var), x_next)

    def moments(x: Array) -> tuple[Array, Array]:
        if not proposal.encoder:
            return jnp.zeros_like(noise.z), jnp.zeros_like(noise.z)
        mu, logvar = networks.posterior(variables.posterior, x, x_next, t)
        # Far from all data an encoder may overflow; a bounded q_ψ is as exact.
        mu = jnp.clip(mu, -_MOST_MEAN, _MOST_MEAN)
        return mu, jnp.clip(logvar, -_MOST_LOGVAR, _MOST_LOGVAR)

    def generator_mean(z: Array) -> Array:
        x0_pred = networks.generator(variables.generator, x_next, t, z)
        return diffusion.posterior_mean(schedule, x0_pred, x_next, t)

    z = noise.z if proposal.latent else jnp.zeros_like(noise.z)
    if proposal.defensive > 0.0 and proposal.latent:
        z_defensive = objective.sample_latent(*moments(x_defensive), noise.z)
        z = jnp.where(noise.is_defensive[:, None], z_defensive, z)
    mean = generator_mean(z)
    x = mean + std * noise.eps
    if proposal.defensive > 0.0:
        x = jnp.where(diffusion.per_example(noise.is_defensive, x), x_defensive, x)
    mu, logvar = moments(x)
    log_posterior = objective.gaussian_log_prob(z, mu, logvar)
    log_g = objective.log_standard_normal(z)
    log_g = log_g + objective.gaussian_log_prob(x, mean, log_var)
    if proposal.defensive > 0.0:
        log_g = jnp.logaddexp(
            jnp.log1p(-proposal.defensive) + log_g,
            jnp.log(proposal.defensive) + log_defensive(x) + log_posterior,
        )
    log_ratio = diffusion.log_q(schedule, x_next, x, t) + log_posterior - log_g
    return Draws(x, log_ratio)


def _defensive_part(
    proposal: Proposal,
    schedule: Schedule,
    variables: Players,
    x_next: Array,
    t: Array,
    noise: ProposalNoise,
) -> tuple[Array, Callable[[Array], Array]]:
    """Returns the defensive part's draws, and the function x → its log density."""
    num, known = len(noise.z) // len(x_next), reference.read(variables.energy)
    many_next, times = jnp.repeat(x_next, num, axis=0), jnp.repeat(t, num)
    if known is None:
        a, beta = schedule.a[times + 1], schedule.beta[times + 1]
        v = 1.0 / (proposal.prior_std**-2 + a**2 / beta)
        m = diffusion.per_example(v * a / beta, many_next) * many_next
        drawn = m + diffusion.per_example(jnp.sqrt(v), many_next) * noise.eps
        return drawn, lambda x: objective.gaussian_log_prob(x, m, jnp.log(v))
    marginal = reference.at_level(known, schedule, t + 1)
    flat_next = x_next.reshape(len(x_next), -1)
    log_marginal = jnp.repeat(reference.log_density(marginal, flat_next), num)

    def log_density(x: Array) -> Array:
        # By Bayes' rule: the energies need the first term, too.
        at_t = reference.at_level(known, schedule, times)
        at_t = reference.log_density(at_t, x.reshape(len(x), -1))
        return at_t + diffusion.log_q(schedule, many_next, x, times) - log_marginal

    given = reference.given_next(known, schedule, flat_next, t)
    eps = noise.eps.reshape(len(noise.eps), -1)
    drawn = reference.draw(given, noise.uniform, eps)
    return drawn.reshape(noise.eps.shape), log_density
