"""Weighted negatives: with many of them the gradient is that of the likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from helpers import GAME, NZ, SCHEDULE, STEPS, smooth_networks

from ddaebm_jax import diffusion, losses
from ddaebm_jax.game import draw_noise
from ddaebm_jax.proposal import Proposal, ProposalNoise, draw

_SMOOTH = smooth_networks(dim=1)
# Confined, so that few points far out do not carry the whole integral.
NETWORKS = _SMOOTH._replace(
    energy=lambda variables, x, t, rngs=None: (
        _SMOOTH.energy(variables, x, t) - 0.5 * (x**2).sum(axis=1)
    )
)
GRID = jnp.linspace(-12.0, 12.0, 4_001)[:, None]
WIDTH = float(GRID[1, 0] - GRID[0, 0])


@pytest.mark.parametrize(("floor", "defensive"), [(2.0, 0.0), (0.02, 0.5)])
@pytest.mark.parametrize("t", range(STEPS))
def test_gradient_of_many_negatives_is_exact(t: int, floor: float, defensive: float):
    """In one dimension, where ∫ exp f(x, t) q(x_{t+1}|x) dx is a sum over a grid."""
    num = 60_000
    variables = NETWORKS.init(jax.random.key(3))
    proposal = Proposal(floor, defensive, latent=False, encoder=False)
    game = GAME._replace(num_negatives=num, proposal=proposal)
    noise = draw_noise(
        *(jax.random.key(0), jnp.int32(0), jnp.arange(2), STEPS, (1,), NZ),
        *(num, defensive),
    ).replace(t=jnp.full(2, t))
    x_t, x_next = jnp.array([[0.3], [-0.8]]), jnp.array([[0.9], [-1.1]])
    pair = losses.Pair(x_t, x_next, noise)

    def exact(energy):
        def log_normalizer(x_next):
            times = jnp.full(len(GRID), t)
            spread = jnp.broadcast_to(x_next, GRID.shape)
            log_p = NETWORKS.energy(energy, GRID, times)
            log_p = log_p + diffusion.log_q(SCHEDULE, spread, GRID, times)
            return jax.nn.logsumexp(log_p) + jnp.log(WIDTH)

        f_real = NETWORKS.energy(energy, x_t, noise.t)
        return (jax.vmap(log_normalizer)(x_next) - f_real).mean()

    def sampled(energy):
        negatives = losses.weighted_negatives(game, SCHEDULE, NETWORKS, variables, pair)
        loss = losses.energy_loss
        return loss(game, SCHEDULE, NETWORKS, pair, negatives, None, energy)[0]

    expected, expected_grads = quick.jit(jax.value_and_grad(exact))(variables.energy)
    value, grads = quick.jit(jax.value_and_grad(sampled))(variables.energy)
    np.testing.assert_allclose(value, expected, atol=0.02)
    for actual, right in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        np.testing.assert_allclose(actual, right, atol=0.02)


def test_weights_are_finite_where_the_encoder_overflows():
    networks = smooth_networks(dim=1)._replace(
        posterior=lambda variables, x, x_next, t: (
            jnp.full((len(x), NZ), 1e30),
            jnp.full((len(x), NZ), 300.0),
        )
    )
    num = 8
    normal = jax.random.normal(jax.random.key(0), (num, NZ))
    noise = ProposalNoise(
        is_defensive=jnp.arange(num) < 4,
        z=normal,
        eps=normal[:, :1],
        uniform=jnp.full(num, 0.5),
    )
    variables, ones = networks.init(jax.random.key(3)), jnp.ones((num, 1))
    t = jnp.ones(num, jnp.int32)
    drawn = draw(Proposal(0.02, 0.5), SCHEDULE, networks, variables, ones, t, noise)
    assert np.isfinite(drawn.x).all()
    log_weights = networks.energy(variables.energy, drawn.x, t) + drawn.log_ratio
    assert np.isfinite(log_weights).all()
