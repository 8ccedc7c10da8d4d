"""The players' losses and gradients: the terms of `objective`, weighted by a `Game`.

Geng et al. 2024, section 4. Every function is pure; a loss comes with its terms, one
value per example.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddaebm_jax import diagnostics, diffusion, objective, proposal
from ddaebm_jax.diagnostics import Metrics
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.game import Game, Noise
from ddaebm_jax.models import Networks, Players

# Numbers of the network calls, each of which has a dropout mask of its own.
GENERATOR_PRIOR, GENERATOR_POSTERIOR = 0, 1
ENERGY_FAKE, ENERGY_REAL, ENERGY_GENERATOR_STEP = 2, 3, 4


class Pair(NamedTuple):
    """Real points at level t and their successors, with the step's noise."""

    x_t: Float[Array, "batch *shape"]
    x_next: Float[Array, "batch *shape"]
    noise: Noise


class FirstPass(NamedTuple):
    """The generator's pass from the prior z, which both players share.

    Attributes:
      x0_pred: x̂_0.
      x_fake: x̃_t.
      pullback: gradient in x̂_0 → gradient in φ.
      stats: the generator's running averages after the pass.
    """

    x0_pred: Float[Array, "batch *shape"]
    x_fake: Float[Array, "batch *shape"]
    pullback: Callable[[Array], tuple[Any]]
    stats: Any


class Negatives(NamedTuple):
    """Points that the energy is pushed down at, K for each x_{t+1}.

    Attributes:
      x: x̃_t.
      log_ratio: b, see `proposal`; None: one point each, as in the paper.
    """

    x: Float[Array, "batch *shape"] | Float[Array, "batch draws *shape"]
    log_ratio: Float[Array, "batch draws"] | None = None


def weighted_negatives(
    game: Game, schedule: Schedule, networks: Networks, variables: Players, pair: Pair
) -> Negatives:
    """Returns K draws from the proposal for each x_{t+1}; no gradient flows back."""
    num = game.num_negatives
    flat = partial(jax.tree.map, lambda leaf: leaf.reshape(-1, *leaf.shape[2:]))
    drawn = proposal.draw(
        game.proposal,
        schedule,
        networks,
        variables,
        pair.x_next,
        pair.noise.t,
        flat(pair.noise.negatives),
    )
    drawn = jax.lax.stop_gradient(drawn)
    return Negatives(*jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]), drawn))


def generator_pass(
    game: Game, schedule: Schedule, networks: Networks, variables: Players, pair: Pair
) -> FirstPass:
    """Returns x̂_0 and x̃_t from the prior z, with the way back to φ."""
    noise = pair.noise
    z = noise.z if game.latent else jnp.zeros_like(noise.z)

    def generate(params):
        return networks.train_generator(
            replaced(variables.generator, params=params),
            pair.x_next,
            noise.t,
            z,
            rngs=noise.dropout_keys(GENERATOR_PRIOR),
        )

    params = variables.generator["params"]
    x0_pred, pullback, stats = jax.vjp(generate, params, has_aux=True)
    x_fake = diffusion.sample_posterior(
        schedule, x0_pred, pair.x_next, noise.t, noise.eps_post, game.noise_at_data
    )
    return FirstPass(x0_pred, x_fake, pullback, stats)


def energy_gradient(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    pair: Pair,
    first: FirstPass,
    step: Array,
) -> tuple[Any, Metrics]:
    """Returns the gradient in θ and metrics.

    The paper's game before step `negatives_from`, and K weighted negatives from it on.
    """
    gamma = game.gamma(step) if callable(game.gamma) else game.gamma

    def gradient(negatives: Negatives, gamma: Any, energy: Any) -> tuple[Any, dict]:
        loss = partial(energy_loss, game, schedule, networks, pair, negatives)
        return jax.grad(loss, argnums=1, has_aux=True)(gamma, energy)

    def penalised(negatives: Negatives, gamma: Any) -> tuple[Any, dict]:
        if not callable(game.gamma) and isinstance(gamma, float | int) and gamma == 0:
            return gradient(negatives, None, variables.energy)
        if game.lazy_reg == 1:
            return gradient(negatives, gamma, variables.energy)
        return jax.lax.cond(
            step % game.lazy_reg == 0,
            lambda energy: gradient(negatives, gamma, energy),
            lambda energy: gradient(negatives, None, energy),
            variables.energy,
        )

    def weighted() -> tuple[Any, dict]:
        negatives = weighted_negatives(game, schedule, networks, variables, pair)
        own = game.negatives_gamma
        return penalised(negatives, gamma if own is None else own)

    def paper() -> tuple[Any, dict]:
        return penalised(Negatives(first.x_fake), gamma)

    if game.num_negatives == 1:
        grads, terms = paper()
    elif game.negatives_from == 0:
        grads, terms = weighted()
    else:
        grads, terms = jax.lax.cond(step >= game.negatives_from, weighted, paper)
    metrics = diagnostics.summary("energy", terms, pair.noise.t, schedule.num_steps)
    return grads["params"], metrics


def energy_loss(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    pair: Pair,
    negatives: Negatives,
    gamma: Float[Array, ""] | float | None,
    variables: dict,
) -> tuple[Float[Array, ""], dict[str, Float[Array, " batch"]]]:
    """Returns the energy's loss and its terms.

    Args:
      game: weights and switches.
      schedule: the diffusion.
      networks: the apply functions.
      pair: real points.
      negatives: the generator's points at level t, or weighted ones.
      gamma: γ at this step; None: the penalty is not computed.
      variables: the energy's.
    """
    (x_t, x_next, noise), t = pair, pair.noise.t

    def f(x: Array, call: int) -> Array:
        return networks.energy(variables, x, t, rngs=noise.dropout_keys(call))

    if negatives.log_ratio is None:
        f_fake = normalizer = f(negatives.x, ENERGY_FAKE)
    else:
        f_fake, normalizer, share = _energy_of_weighted(
            networks, variables, negatives, t, noise.dropout_keys(ENERGY_FAKE)
        )
    if gamma is None:
        f_real = f(x_t, ENERGY_REAL)
        gamma, penalty = 0.0, jnp.zeros_like(f_real)
    elif networks.residual is not None:
        # Of what is learnt only: the reference and log q are as they should be.
        _, score = objective.energy_and_score(
            lambda x: networks.residual(variables, x, t), x_t
        )
        f_real, penalty = f(x_t, ENERGY_REAL), objective.gradient_penalty(score)
    else:
        f_real, score = objective.energy_and_score(lambda x: f(x, ENERGY_REAL), x_t)
        penalty = objective.gradient_penalty(
            score + diffusion.score_log_q(schedule, x_next, x_t, t)
        )
    loss = normalizer - f_real + gamma * penalty
    if game.energy_l2 > 0 and negatives.log_ratio is None:
        loss = loss + game.energy_l2 * objective.energy_magnitude(f_real)
    terms = {"real": f_real, "fake": f_fake, "gradient_penalty": penalty}
    if game.num_negatives > 1:
        single = negatives.log_ratio is None
        terms["effective_negatives"] = jnp.ones_like(f_real) if single else share
    return loss.mean(), {"loss": loss, **terms}


def _energy_of_weighted(
    networks: Networks, variables: dict, negatives: Negatives, t: Array, keys: Array
) -> tuple[Array, Array, Array]:
    """Returns Σ_k w_k f(x̃^k), log (1/K)Σ_k exp(f(x̃^k) + b^k), and the share in use.

    w = softmax(f + b); the gradient of the second in θ weighs the K by w.
    """
    num = negatives.log_ratio.shape[1]
    keys = jax.vmap(lambda key: jax.random.split(key, num))(keys).reshape(-1)
    x = negatives.x.reshape(-1, *negatives.x.shape[2:])
    f = networks.energy(variables, x, jnp.repeat(t, num), rngs=keys).reshape(-1, num)
    log_weights = f + negatives.log_ratio
    mean = (jax.nn.softmax(log_weights, axis=1) * f).sum(axis=1)
    share = objective.effective_share(log_weights)
    return mean, objective.log_mean_exp(log_weights), share


def generator_gradient(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    pair: Pair,
    first: FirstPass,
) -> tuple[tuple[Any, Any], Metrics, dict[str, Any]]:
    """Returns the gradients in φ and ψ, metrics, and running averages by player."""

    def loss(x0_pred, generator, posterior):
        players = variables._replace(
            generator=replaced(variables.generator, params=generator),
            posterior=replaced(variables.posterior, params=posterior),
        )
        return generator_loss(game, schedule, networks, players, pair, x0_pred)

    params = (variables.generator["params"], variables.posterior["params"])
    (in_x0, second, in_posterior), (terms, stats) = jax.grad(
        loss, argnums=(0, 1, 2), has_aux=True
    )(first.x0_pred, *params)
    (in_generator,) = first.pullback(in_x0)
    if game.has_second_pass:
        in_generator = jax.tree.map(jnp.add, in_generator, second)
    metrics = diagnostics.summary("generator", terms, pair.noise.t, schedule.num_steps)
    averages = {"generator": first.stats, "posterior": stats}
    averages = {player: value for player, value in averages.items() if value}
    return (in_generator, in_posterior), metrics, averages


def generator_loss(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    pair: Pair,
    x0_pred: Float[Array, "batch *shape"],
) -> tuple[Float[Array, ""], tuple[dict[str, Float[Array, " batch"]], Any]]:
    """Returns the loss of generator and posterior, its terms, and running averages.

    Args:
      game: weights and switches.
      schedule: the diffusion.
      networks: the apply functions.
      variables: of the networks; the energy's are the updated ones.
      pair: real points.
      x0_pred: x̂_0 of the first pass.

    Returns:
      loss, (terms, the posterior's running averages).
    """
    (x_t, x_next, noise), t = pair, pair.noise.t
    x_fake = diffusion.sample_posterior(
        schedule, x0_pred, x_next, t, noise.eps_post, game.noise_at_data
    )
    rngs = noise.dropout_keys(ENERGY_GENERATOR_STEP)
    f_fake = networks.energy(variables.energy, x_fake, t, rngs=rngs)
    potential = objective.reverse_potential(schedule, f_fake, x_fake, x_next, t)
    loss, terms = potential, {"reverse_potential": potential}
    posterior = variables.posterior

    def moments(x: Array) -> tuple[Array, Array]:
        nonlocal posterior
        found, stats = networks.train_posterior(posterior, x, x_next, t)
        posterior = replaced(posterior, batch_stats=stats) if stats else posterior
        return found

    if game.has_encoder and game.lambda_z > 0:
        terms["latent_log_prob"] = objective.latent_log_prob(noise.z, *moments(x_fake))
        loss = loss + game.lambda_z * terms["latent_log_prob"]
    if game.has_forward and game.has_encoder:
        mu, logvar = moments(x_t)
        terms["latent_kl"] = objective.latent_kl(mu, logvar)
        loss = loss + game.lambda_f * terms["latent_kl"]
    if game.has_second_pass:
        z = objective.sample_latent(mu, logvar, noise.eps_z)
        rngs = noise.dropout_keys(GENERATOR_POSTERIOR)
        x0_pred, _ = networks.train_generator(
            variables.generator, x_next, t, z, rngs=rngs
        )
    if game.has_forward:
        terms["reconstruction"] = reconstruction(game, schedule, pair, x0_pred)
        loss = loss + game.lambda_f * terms["reconstruction"]
    stats = posterior.get("batch_stats", {})
    return loss.mean(), ({"loss": loss, **terms}, stats)


def reconstruction(
    game: Game, schedule: Schedule, pair: Pair, x0_pred: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Returns the reconstruction term that `game.recon` names."""
    points = (pair.x_t, x0_pred, pair.x_next, pair.noise.t)
    if game.recon == "mse":
        return objective.reconstruction_mse(schedule, *points)
    floor = objective.variance_floor(schedule, game.recon_floor)
    weight = schedule.recon_weight if game.recon == "weighted_nll" else None
    return objective.reconstruction_nll(schedule, *points, floor=floor, weight=weight)


def replaced(variables: dict, **collections: Any) -> dict:
    """Returns a network's variables with collections (`params`, …) replaced."""
    return {**variables, **collections}
