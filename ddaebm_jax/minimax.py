"""The game: its state, its noise, one step, and K steps in one dispatch.

A step is a pure function of (state, batch, noise): it never draws its own
randomness, so that it can be replayed, compared with another implementation number
by number, and split over devices without changing its result.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ddaebm_jax import diffusion, objective
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks, Players

# Numbers, but for the two vectors by t; see `energy_loss`.
Metrics = dict[str, Float[Array, "..."]]


class Game(NamedTuple):
    """What is played: weights, variants and ablations of section 4 of the paper.

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
        return (
            self.has_forward and self.has_encoder and self.recon_latent == "posterior"
        )


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
    """All that a step changes.

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


def with_gaps(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns averaged metrics as numbers: the vectors by t become mean gaps by t.

    A t that no example has had is left out.
    """
    values = dict(metrics)
    sums = np.asarray(values.pop("energy/gap_sum_by_t"))
    shares = np.asarray(values.pop("energy/share_by_t"))
    values |= {
        f"energy/gap_t{t}": gap / share
        for t, (gap, share) in enumerate(zip(sums, shares, strict=True))
        if share > 0
    }
    return {name: float(value) for name, value in values.items()}


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
      dropout: one key an example; networks fold in what tells their calls apart.
    """

    t: Int[Array, " batch"]
    eps_t: Float[Array, "batch *shape"]
    eps_next: Float[Array, "batch *shape"]
    z: Float[Array, "batch nz"]
    eps_post: Float[Array, "batch *shape"]
    eps_z: Float[Array, "batch nz"]
    dropout: Array


def example_keys(key: Array, step: Int[Array, ""], index: Int[Array, " batch"]):
    """Returns fold_in(fold_in(key, step), i) for every i in `index`.

    The key of an example depends on its place in the global batch and on nothing
    else, whatever device holds it.
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
) -> Noise:
    """Draws the noise of step `step` for the examples `index` of the global batch.

    Args:
      key: the run's noise key.
      step: s.
      index: places in the global batch, whose examples this call is for.
      num_steps: T.
      event_shape: shape of one example.
      nz: width of the latent.
    """
    size = 1
    for axis in event_shape:
        size *= axis

    def one(example_key: Array):
        key_t, key_normal, key_dropout = jax.random.split(example_key, 3)
        t = jax.random.randint(key_t, (), 0, num_steps)
        normal = jax.random.normal(key_normal, (3 * size + 2 * nz,))
        return t, normal, key_dropout

    t, normal, dropout = jax.vmap(one)(example_keys(key, step, index))
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
    )


def make_optimizers(
    learning_rate: optax.ScalarOrSchedule,
    energy_learning_rate: optax.ScalarOrSchedule,
    beta1: float,
    beta2: float,
    max_grad_norm: float | None = None,
) -> Optimizers:
    """Makes Adam for each player, with gradients clipped by global norm if asked.

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
    """Returns the state before the first step; the averages start at the weights."""
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


def _with_params(variables: dict, params: Any) -> dict:
    return {**variables, "params": params}


def _with_stats(variables: dict, stats: Any) -> dict:
    return {**variables, "batch_stats": stats} if stats else variables


def energy_loss(
    schedule: Schedule,
    networks: Networks,
    variables: dict,
    x_t: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    x_fake: Float[Array, "batch *shape"],
    noise: Noise,
    gamma: Float[Array, ""] | float | None,
    energy_l2: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the energy's loss and its parts.

    Args:
      schedule: the diffusion.
      networks: the apply functions.
      variables: the energy's.
      x_t: real points at level t.
      x_next: their successors.
      x_fake: the generator's points at level t.
      noise: of this step; t and the dropout keys are read.
      gamma: γ, the weight of the gradient penalty; None: it is not computed.
      energy_l2: α, the weight of the energy's magnitude.

    Returns:
      loss, metrics. Two of them are vectors [T]: `energy/gap_sum_by_t`, the batch's
      mean of (f(x_t) − f(x̃_t))·1[t], and `energy/share_by_t`, that of 1[t]. Averaged
      over steps and devices and then divided, they give each t's mean gap.
    """
    t = noise.t

    def energy_of(x, call):
        rngs = dropout_keys(noise, call)
        return networks.energy(variables, x, t, rngs=rngs)

    f_fake = energy_of(x_fake, DROPOUT_ENERGY_FAKE)
    if gamma is not None:
        f_real, score = objective.energy_and_score(
            lambda x: energy_of(x, DROPOUT_ENERGY_REAL), x_t
        )
        score = score + diffusion.score_log_q(schedule, x_next, x_t, t)
        penalty = objective.gradient_penalty(score)
    else:
        f_real = energy_of(x_t, DROPOUT_ENERGY_REAL)
        penalty = jnp.zeros(())
    loss = f_fake.mean() - f_real.mean() + (0.0 if gamma is None else gamma) * penalty
    if energy_l2 > 0:
        loss = loss + energy_l2 * objective.energy_magnitude(f_real)
    of_step = jax.nn.one_hot(t, schedule.num_steps)
    return loss, {
        "energy/loss": loss,
        "energy/real": f_real.mean(),
        "energy/fake": f_fake.mean(),
        "energy/gradient_penalty": penalty,
        "energy/gap_sum_by_t": (f_real - f_fake) @ of_step / t.shape[0],
        "energy/share_by_t": of_step.mean(axis=0),
    }


# What tells the calls of the networks apart when dropout keys are folded.
DROPOUT_GENERATOR_PRIOR = 0
DROPOUT_GENERATOR_POSTERIOR = 1
DROPOUT_ENERGY_FAKE = 2
DROPOUT_ENERGY_REAL = 3
DROPOUT_ENERGY_GENERATOR_STEP = 4


def dropout_keys(noise: Noise, call: int) -> Array:
    """Returns the per-example dropout keys of one call of a network."""
    return jax.vmap(lambda key: jax.random.fold_in(key, call))(noise.dropout)


def generator_loss(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    x0_pred: Float[Array, "batch *shape"],
    x_t: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    noise: Noise,
) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
    """Returns the loss of generator and posterior, its parts, and batch statistics.

    Args:
      game: the weights and switches.
      schedule: the diffusion.
      networks: the apply functions.
      variables: of the networks; the energy's are the updated ones.
      x0_pred: x̂_0 from the prior z, already computed; the gradient reaches the
        first pass of the generator through it.
      x_t: real points at level t.
      x_next: their successors.
      noise: of this step.

    Returns:
      loss, (metrics, the posterior's new running averages).
    """
    t = noise.t
    x_fake = diffusion.sample_posterior(schedule, x0_pred, x_next, t, noise.eps_post)
    f_fake = networks.energy(
        variables.energy,
        x_fake,
        t,
        rngs=dropout_keys(noise, DROPOUT_ENERGY_GENERATOR_STEP),
    )
    potential = objective.reverse_potential(schedule, f_fake, x_fake, x_next, t)
    loss = potential
    metrics = {"generator/reverse_potential": potential}
    stats = variables.posterior.get("batch_stats", {})

    if game.has_encoder and game.lambda_z > 0:
        (mu, logvar), stats = networks.train_posterior(
            _with_stats(variables.posterior, stats), x_fake, x_next, t
        )
        latent = objective.latent_log_prob(noise.z, mu, logvar)
        loss = loss + game.lambda_z * latent
        metrics["generator/latent_log_prob"] = latent

    if game.has_forward:
        if game.has_encoder:
            (mu, logvar), stats = networks.train_posterior(
                _with_stats(variables.posterior, stats), x_t, x_next, t
            )
            kl = objective.latent_kl(mu, logvar)
            loss = loss + game.lambda_f * kl
            metrics["generator/latent_kl"] = kl
        if game.has_second_pass:
            z = objective.sample_latent(mu, logvar, noise.eps_z)
            x0_pred, _ = networks.train_generator(
                variables.generator,
                x_next,
                t,
                z,
                rngs=dropout_keys(noise, DROPOUT_GENERATOR_POSTERIOR),
            )
        recon = _reconstruction(game, schedule, x_t, x0_pred, x_next, t)
        loss = loss + game.lambda_f * recon
        metrics["generator/reconstruction"] = recon
    metrics["generator/loss"] = loss
    return loss, (metrics, stats)


def _reconstruction(
    game: Game,
    schedule: Schedule,
    x_t: Float[Array, "batch *shape"],
    x0_pred: Float[Array, "batch *shape"],
    x_next: Float[Array, "batch *shape"],
    t: Int[Array, " batch"],
) -> Float[Array, ""]:
    if game.recon == "mse":
        return objective.reconstruction_mse(schedule, x_t, x0_pred, x_next, t)
    return objective.reconstruction_nll(
        schedule,
        x_t,
        x0_pred,
        x_next,
        t,
        floor=objective.variance_floor(schedule, game.recon_floor),
        weight=schedule.recon_weight if game.recon == "weighted_nll" else None,
    )


Step = Callable[[TrainState, Array, Noise], tuple[TrainState, Metrics]]


def make_step(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    optimizers: Optimizers,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> Step:
    """Makes one step of the game: the energy's, then the generator's and posterior's.

    The generator's first pass is computed once and shared by both players; the
    second player sees the updated energy.

    Args:
      game: weights and switches.
      schedule: the diffusion.
      networks: the apply functions.
      optimizers: one a player.
      ema_decay: of the average of all three networks; 0: it equals the weights.
      axis_name: the mapped axis over which gradients and metrics are averaged
        (`pmap`); None where one program sees the whole batch.

    Returns:
      A pure function (state, x_0, noise) → (state, metrics).
    """

    def mean_over_devices(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def play_energy(state: TrainState, x_t, x_next, x_fake, noise: Noise):
        variables = state.variables.energy

        def loss_and_grads(gamma):
            def loss(params):
                return energy_loss(
                    schedule,
                    networks,
                    _with_params(variables, params),
                    x_t,
                    x_next,
                    x_fake,
                    noise,
                    gamma,
                    game.energy_l2,
                )

            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
                variables["params"]
            )
            return grads, metrics

        gamma = game.gamma(state.step) if callable(game.gamma) else game.gamma
        if not callable(game.gamma) and gamma == 0:
            grads, metrics = loss_and_grads(None)
        elif game.lazy_reg == 1:
            grads, metrics = loss_and_grads(gamma)
        else:
            grads, metrics = jax.lax.cond(
                state.step % game.lazy_reg == 0,
                lambda: loss_and_grads(gamma),
                lambda: loss_and_grads(None),
            )
        grads, metrics = mean_over_devices((grads, metrics))
        updates, opt_state = optimizers.energy.update(
            grads, state.opt_energy, variables["params"]
        )
        params = optax.apply_updates(variables["params"], updates)
        metrics["energy/grad_norm"] = optax.tree.norm(grads)
        metrics["energy/update_norm"] = optax.tree.norm(updates)
        return _with_params(variables, params), opt_state, metrics

    def play_generator(state, variables, x0_pred, pull_back, x_t, x_next, noise):
        """`variables`: the energy's are updated; `pull_back`: x̂_0 → φ."""

        def loss(x0_pred, generator_params, posterior_params):
            return generator_loss(
                game,
                schedule,
                networks,
                variables._replace(
                    generator=_with_params(variables.generator, generator_params),
                    posterior=_with_params(variables.posterior, posterior_params),
                ),
                x0_pred,
                x_t,
                x_next,
                noise,
            )

        params = (variables.generator["params"], variables.posterior["params"])
        (grad_x0, direct, grad_posterior), (metrics, stats) = jax.grad(
            loss, argnums=(0, 1, 2), has_aux=True
        )(x0_pred, *params)
        (grad_generator,) = pull_back(grad_x0)
        if game.has_second_pass:
            grad_generator = jax.tree.map(jnp.add, grad_generator, direct)
        grads, metrics, stats = mean_over_devices(
            ((grad_generator, grad_posterior), metrics, stats)
        )
        updates, opt_state = optimizers.generator.update(
            grads, state.opt_generator, params
        )
        generator, posterior = optax.apply_updates(params, updates)
        metrics["generator/grad_norm"] = optax.tree.norm(grads[0])
        metrics["generator/update_norm"] = optax.tree.norm(updates[0])
        if game.has_encoder:
            metrics["posterior/grad_norm"] = optax.tree.norm(grads[1])
            metrics["posterior/update_norm"] = optax.tree.norm(updates[1])
        variables = variables._replace(
            generator=_with_params(variables.generator, generator),
            posterior=_with_stats(_with_params(variables.posterior, posterior), stats),
        )
        return variables, opt_state, metrics

    def step(state: TrainState, x0: Array, noise: Noise):
        variables = state.variables
        t = noise.t
        x_t, x_next = diffusion.diffuse_pair(
            schedule, x0, t, noise.eps_t, noise.eps_next
        )
        z = noise.z if game.latent else jnp.zeros_like(noise.z)

        def forward(params):
            return networks.train_generator(
                _with_params(variables.generator, params),
                x_next,
                t,
                z,
                rngs=dropout_keys(noise, DROPOUT_GENERATOR_PRIOR),
            )

        x0_pred, pull_back, stats = jax.vjp(
            forward, variables.generator["params"], has_aux=True
        )
        x_fake = diffusion.sample_posterior(
            schedule, x0_pred, x_next, t, noise.eps_post
        )
        energy, opt_energy, metrics = play_energy(state, x_t, x_next, x_fake, noise)
        variables = variables._replace(
            energy=energy,
            generator=_with_stats(variables.generator, mean_over_devices(stats)),
        )
        variables, opt_generator, generator_metrics = play_generator(
            state, variables, x0_pred, pull_back, x_t, x_next, noise
        )
        ema = variables
        if ema_decay > 0:
            ema = jax.tree.map(
                lambda average, new: average + (1.0 - ema_decay) * (new - average),
                state.ema,
                variables,
            )
        state = TrainState(
            step=state.step + 1,
            variables=variables,
            ema=ema,
            opt_energy=opt_energy,
            opt_generator=opt_generator,
        )
        return state, {**metrics, **generator_metrics}

    return step


def scan_steps(
    one: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    inputs: Any,
    length: int,
) -> tuple[TrainState, Metrics]:
    """Takes `length` steps in one `lax.scan`.

    Args:
      one: (state, input) → (state, metrics).
      state: where to start.
      inputs: a pytree with a leading axis of `length`, or None where `one` makes
        its own input from the state's step.
      length: K.

    Returns:
      The last state, and the metrics averaged over the K steps.
    """
    if length == 1:
        first = None if inputs is None else jax.tree.map(lambda x: x[0], inputs)
        return one(state, first)
    state, metrics = jax.lax.scan(one, state, inputs, length=length)
    return state, jax.tree.map(lambda x: x.mean(axis=0), metrics)
