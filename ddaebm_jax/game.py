"""The game: its weights and switches, its state, its noise and its optimisers.

Geng et al. 2024, section 4. A step (see `step`) is a pure function of state, batch and
`Noise`: it never draws its own randomness, so that it can be replayed, compared with
another implementation number by number, and split over devices without changing its
result.
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ddaebm_jax.models import Networks, Players
from ddaebm_jax.proposal import Proposal, ProposalNoise


class Game(NamedTuple):
    """Weights, variants and ablations of the game (section 4 of the paper).

    Attributes:
      gamma: γ, weight of the gradient penalty, a number or a schedule (step → γ);
        the number 0 leaves the penalty out.
      lazy_reg: apply the penalty at every n-th step, not multiplied by n.
      lambda_z: λ_z, weight of the entropy bound.
      lambda_f: λ_f, weight of the forward divergence; 0 leaves it out.
      energy_l2: α, weight of E f(x_t, t)² in the energy's loss; 0 (the paper) leaves
        it out. See `objective.energy_magnitude`.
      recon: `nll`, `weighted_nll` or `mse`.
      recon_latent: where the reconstruction takes z from: `posterior` or `prior`.
      recon_floor: least variance of the nll; None: s_1².
      latent: False: z ≡ 0 and no terms of q_ψ.
      posterior: False: no λ_z and KL terms, reconstruction from the prior z.
      divergence: `jeffreys`, or `reverse_kl` (the forward divergence is left out).
      noise_at_data: give generated points at level 0 the posterior's noise, too.
      num_negatives: K, weighted negatives of each x_{t+1}; 1: the paper's game.
      negatives_from: the step from which K are played; before it, one.
      negatives_gamma: γ from there on; None: `gamma`. `energy_l2` ends there.
      proposal: where the K come from.
    """

    gamma: optax.ScalarOrSchedule
    lazy_reg: int
    lambda_z: float
    lambda_f: float
    energy_l2: float
    recon: str
    recon_latent: str
    recon_floor: float | None
    latent: bool
    posterior: bool
    divergence: str
    noise_at_data: bool = False
    num_negatives: int = 1
    negatives_from: int = 0
    negatives_gamma: float | None = None
    proposal: Proposal = Proposal()

    @property
    def has_encoder(self) -> bool:
        """Whether q_ψ takes part."""
        return self.latent and self.posterior

    @property
    def has_forward(self) -> bool:
        """Whether the forward divergence KL(q ‖ p_φ) takes part."""
        return self.divergence == "jeffreys" and self.lambda_f > 0

    @property
    def has_second_pass(self) -> bool:
        """Whether the generator runs a second time, on z ~ q_ψ(z|x_t, x_{t+1})."""
        from_posterior = self.recon_latent == "posterior"
        return self.has_forward and self.has_encoder and from_posterior


class Optimizers(NamedTuple):
    """The players' optimisers.

    Attributes:
      energy: descends in θ.
      generator: descends in φ and ψ together.
    """

    energy: optax.GradientTransformation
    generator: optax.GradientTransformation


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: number of steps taken.
      variables: of each network: `params`, and `batch_stats` with batch norm.
      ema: exponential moving average of `variables`.
      opt_energy: state of the energy's optimiser.
      opt_generator: state of the generator's and posterior's optimiser.
    """

    step: Int[Array, ""]
    variables: Players
    ema: Players
    opt_energy: Any
    opt_generator: Any


@flax.struct.dataclass
class Noise:
    """All the randomness of one step, example by example.

    Attributes:
      t: which denoising step, uniform in {0, …, T−1}.
      eps_t: takes x_0 to x_t.
      eps_next: takes x_t to x_{t+1}.
      z: the generator's prior latent.
      eps_post: takes x̂_0 to x̃_t.
      eps_z: takes q_ψ's moments to a latent.
      dropout: one key per example; see `dropout_keys`.
      negatives: of K weighted negatives, leaves [batch, K, …]; None where K = 1.
    """

    t: Int[Array, " batch"]
    eps_t: Float[Array, "batch *shape"]
    eps_next: Float[Array, "batch *shape"]
    z: Float[Array, "batch nz"]
    eps_post: Float[Array, "batch *shape"]
    eps_z: Float[Array, "batch nz"]
    dropout: Array
    negatives: ProposalNoise | None = None

    def dropout_keys(self, call: int) -> Array:
        """Returns per-example dropout keys of one network call, named by a number."""
        return jax.vmap(lambda key: jax.random.fold_in(key, call))(self.dropout)


def example_keys(key: Array, step: Int[Array, ""], index: Int[Array, " batch"]):
    """Returns fold_in(fold_in(key, step), i) for every i in `index`.

    An example's key depends on its place in the global batch alone, whatever device
    holds it.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


def draw_noise(
    key: Array,
    step: Int[Array, ""],
    index: Int[Array, " batch"],
    num_steps: int,
    event_shape: tuple[int, ...],
    nz: int,
    num_negatives: int = 1,
    defensive: float = 0.0,
) -> Noise:
    """Draws the noise of step `step` for the examples `index` of the global batch.

    Args:
      key: the run's noise key.
      step: s.
      index: places in the global batch.
      num_steps: T.
      event_shape: shape of one example.
      nz: width of the latent.
      num_negatives: K; with 1 the weighted negatives' noise is left out, and the rest
        is the same for every K.
      defensive: δ; δ·K of the K come from the proposal's defensive part.
    """
    size = math.prod(event_shape)

    def one(example_key: Array):
        key_t, key_normal, key_dropout = jax.random.split(example_key, 3)
        t = jax.random.randint(key_t, (), 0, num_steps)
        normal = jax.random.normal(key_normal, (3 * size + 2 * nz,))
        return t, normal, key_dropout

    keys = example_keys(key, step, index)
    t, normal, dropout = jax.vmap(one)(keys)
    eps, latent = normal[:, : 3 * size], normal[:, 3 * size :]
    eps = eps.reshape(-1, 3, *event_shape)
    return Noise(
        t=t,
        eps_t=eps[:, 0],
        eps_next=eps[:, 1],
        eps_post=eps[:, 2],
        z=latent[:, :nz],
        eps_z=latent[:, nz:],
        dropout=dropout,
        negatives=None
        if num_negatives == 1
        else _draw_negatives(keys, num_negatives, defensive, event_shape, nz),
    )


def _draw_negatives(
    keys: Array, num: int, defensive: float, event_shape: tuple[int, ...], nz: int
) -> ProposalNoise:
    """Draws the noise of `num` proposals for each key, leaves [batch, num, …]."""
    size = math.prod(event_shape)

    def one(key: Array) -> tuple[Array, Array]:
        # Other numbers than the three of `draw_noise`'s split.
        key_normal, key_uniform = (jax.random.fold_in(key, i) for i in (3, 4))
        normal = jax.random.normal(key_normal, (num, size + nz))
        return normal, jax.random.uniform(key_uniform, (num,))

    normal, uniform = jax.vmap(one)(keys)
    is_defensive = jnp.arange(num) < round(num * defensive)
    return ProposalNoise(
        is_defensive=jnp.broadcast_to(is_defensive, (len(keys), num)),
        z=normal[:, :, size:],
        eps=normal[:, :, :size].reshape(-1, num, *event_shape),
        uniform=uniform,
    )


def make_optimizers(
    learning_rate: optax.ScalarOrSchedule,
    energy_learning_rate: optax.ScalarOrSchedule,
    beta1: float,
    beta2: float,
    max_grad_norm: float | None = None,
) -> Optimizers:
    """Returns Adam for each player, with optional clipping by the global norm.

    Args:
      learning_rate: of the generator and the posterior, a number or a schedule.
      energy_learning_rate: of the energy.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      max_grad_norm: clip each player's gradient to this norm; None: no clipping.
    """

    def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        transform = optax.adam(rate, b1=beta1, b2=beta2)
        if max_grad_norm is None:
            return transform
        return optax.chain(optax.clip_by_global_norm(max_grad_norm), transform)

    return Optimizers(energy=adam(energy_learning_rate), generator=adam(learning_rate))


def init_state(
    key: Array, networks: Networks, optimizers: Optimizers, game: Game
) -> TrainState:
    """Returns the state before the first step; averages start at the weights."""
    variables = networks.init(key)
    if not game.has_encoder:
        variables = variables._replace(posterior={"params": {}})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        ema=jax.tree.map(jnp.copy, variables),
        opt_energy=optimizers.energy.init(variables.energy["params"]),
        opt_generator=optimizers.generator.init(
            (variables.generator["params"], variables.posterior["params"])
        ),
    )
