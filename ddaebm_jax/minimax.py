"""The game: its state, its noise, one step, and K steps in one dispatch.

A step is a pure function of (state, batch, noise): it never draws its own
randomness, so that it can be replayed, compared with another implementation number
by number, and split over devices without changing its result.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ddaebm_jax import diffusion, objective
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks, Players

# Numbers, but for the vectors by t; see `energy_loss`.
Metrics = dict[str, Float[Array, "..."]]
# Shares of examples, by t, with a term that is not finite: to find a fault by.
_BY_T = ("energy/gap_sum_by_t", "energy/share_by_t")
_NOT_FINITE = ("energy/not_finite_by_t", "generator/not_finite_by_t")


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

    A t that no example has had is left out, and so is what only tells faults.
    """
    values = {name: v for name, v in metrics.items() if name not in _NOT_FINITE}
    sums = np.asarray(values.pop("energy/gap_sum_by_t"))
    shares = np.asarray(values.pop("energy/share_by_t"))
    values |= {
        f"energy/gap_t{t}": gap / share
        for t, (gap, share) in enumerate(zip(sums, shares, strict=True))
        if share > 0
    }
    return {name: float(value) for name, value in values.items()}


@flax.struct.dataclass
class Fault:
    """The first of some steps with a number that is not finite.

    Attributes:
      step: the step that was taken there, counted from 1; 0: there was none.
      metrics: that step's; of no meaning where there was none.
    """

    step: Int[Array, ""]
    metrics: Metrics

    def describe(self) -> str:
        """Says what is not finite, at which step and t; for a fault on the host.

        Where the energy's terms are not, the others cannot be: they are left out.
        """
        terms = [
            name
            for name, value in self.metrics.items()
            if name not in (*_NOT_FINITE, *_BY_T) and not np.isfinite(value)
        ]
        player = "energy/" if any("energy/" in name for name in terms) else ""
        shares = [
            np.asarray(self.metrics[name])
            for name in _NOT_FINITE
            if name in self.metrics and name.startswith(player)
        ]
        bad = np.flatnonzero(sum(share != 0 for share in shares))
        where = f"t = {', '.join(map(str, bad))}" if len(bad) else "no t by itself"
        named = ", ".join(name for name in terms if name.startswith(player))
        return f"{named} not finite at step {int(self.step)}, {where}"


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
      loss, metrics. Some of them are vectors [T]: `energy/gap_sum_by_t`, the batch's
      mean of (f(x_t) − f(x̃_t))·1[t], and `energy/share_by_t`, that of 1[t]. Averaged
      over steps and devices and then divided, they give each t's mean gap.
      `energy/not_finite_by_t` is the mean of 1[t] over examples with an energy or a
      score that is not finite.
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
        finite = jnp.isfinite(f_fake + f_real) & _finite_examples(score)
    else:
        f_real = energy_of(x_t, DROPOUT_ENERGY_REAL)
        penalty = jnp.zeros(())
        finite = jnp.isfinite(f_fake + f_real)
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
        "energy/not_finite_by_t": _shares_by_t(schedule, ~finite, t),
    }


def _finite_examples(x: Float[Array, "batch *shape"]) -> Bool[Array, " batch"]:
    return jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)


def _finite_moments(
    mu: Float[Array, "batch nz"], logvar: Float[Array, "batch nz"]
) -> Bool[Array, " batch"]:
    """Whether mean and variance are finite."""
    return _finite_examples(mu) & _finite_examples(jnp.exp(logvar))


def _shares_by_t(
    schedule: Schedule, chosen: Bool[Array, " batch"], t: Int[Array, " batch"]
) -> Float[Array, " steps"]:
    of_step = jax.nn.one_hot(t, schedule.num_steps)
    return chosen.astype(of_step.dtype) @ of_step / t.shape[0]


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
    finite = jnp.isfinite(f_fake) & _finite_examples(x0_pred)
    metrics = {"generator/reverse_potential": potential}
    stats = variables.posterior.get("batch_stats", {})

    if game.has_encoder and game.lambda_z > 0:
        (mu, logvar), stats = networks.train_posterior(
            _with_stats(variables.posterior, stats), x_fake, x_next, t
        )
        finite &= _finite_moments(mu, logvar)
        latent = objective.latent_log_prob(noise.z, mu, logvar)
        loss = loss + game.lambda_z * latent
        metrics["generator/latent_log_prob"] = latent

    if game.has_forward:
        if game.has_encoder:
            (mu, logvar), stats = networks.train_posterior(
                _with_stats(variables.posterior, stats), x_t, x_next, t
            )
            finite &= _finite_moments(mu, logvar)
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
            finite &= _finite_examples(x0_pred)
        recon = _reconstruction(game, schedule, x_t, x0_pred, x_next, t)
        loss = loss + game.lambda_f * recon
        metrics["generator/reconstruction"] = recon
    metrics["generator/not_finite_by_t"] = _shares_by_t(schedule, ~finite, t)
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


class _FirstPass(NamedTuple):
    """What the generator makes of a batch from the prior z.

    Attributes:
      x_t: real points at level t.
      x_next: their successors.
      x0_pred: x̂_0.
      x_fake: x̃_t.
      pull_back: gradient of x̂_0 → gradient in φ.
      stats: the generator's new running averages.
    """

    x_t: Array
    x_next: Array
    x0_pred: Array
    x_fake: Array
    pull_back: Callable[[Array], tuple[Any]]
    stats: Any


class _Rules(NamedTuple):
    """What a step goes by; see `make_step`."""

    game: Game
    schedule: Schedule
    networks: Networks
    optimizers: Optimizers
    axis_name: str | None
    accumulate: int

    def first_pass(self, variables: dict, x0: Array, noise: Noise) -> _FirstPass:
        t = noise.t
        x_t, x_next = diffusion.diffuse_pair(
            self.schedule, x0, t, noise.eps_t, noise.eps_next
        )
        z = noise.z if self.game.latent else jnp.zeros_like(noise.z)

        def forward(params):
            return self.networks.train_generator(
                _with_params(variables, params),
                x_next,
                t,
                z,
                rngs=dropout_keys(noise, DROPOUT_GENERATOR_PRIOR),
            )

        x0_pred, pull_back, stats = jax.vjp(forward, variables["params"], has_aux=True)
        x_fake = diffusion.sample_posterior(
            self.schedule, x0_pred, x_next, t, noise.eps_post
        )
        return _FirstPass(x_t, x_next, x0_pred, x_fake, pull_back, stats)

    def energy_gradient(
        self, variables: dict, step: Array, first: _FirstPass, noise: Noise
    ) -> tuple[Any, Metrics]:
        """Returns the gradient in θ of a batch, or of a part of one, and metrics."""

        def loss_and_grads(gamma):
            def loss(params):
                return energy_loss(
                    self.schedule,
                    self.networks,
                    _with_params(variables, params),
                    first.x_t,
                    first.x_next,
                    first.x_fake,
                    noise,
                    gamma,
                    self.game.energy_l2,
                )

            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
                variables["params"]
            )
            return grads, metrics

        gamma = self.game.gamma
        if not callable(gamma) and gamma == 0:
            return loss_and_grads(None)
        if callable(gamma):
            gamma = gamma(step)
        if self.game.lazy_reg == 1:
            return loss_and_grads(gamma)
        return jax.lax.cond(
            step % self.game.lazy_reg == 0,
            lambda: loss_and_grads(gamma),
            lambda: loss_and_grads(None),
        )

    def generator_gradient(
        self, variables: Players, first: _FirstPass, noise: Noise
    ) -> tuple[tuple[Any, Any], Metrics, Any]:
        """Returns the gradients in φ and ψ, metrics, and the posterior's averages.

        Args:
          variables: the energy's are updated.
          first: of the generator before this step.
          noise: of this step.
        """

        def loss(x0_pred, generator_params, posterior_params):
            return generator_loss(
                self.game,
                self.schedule,
                self.networks,
                variables._replace(
                    generator=_with_params(variables.generator, generator_params),
                    posterior=_with_params(variables.posterior, posterior_params),
                ),
                x0_pred,
                first.x_t,
                first.x_next,
                noise,
            )

        params = (variables.generator["params"], variables.posterior["params"])
        (grad_x0, direct, grad_posterior), (metrics, stats) = jax.grad(
            loss, argnums=(0, 1, 2), has_aux=True
        )(first.x0_pred, *params)
        (grad_generator,) = first.pull_back(grad_x0)
        if self.game.has_second_pass:
            grad_generator = jax.tree.map(jnp.add, grad_generator, direct)
        return (grad_generator, grad_posterior), metrics, stats

    def mean_over_devices(self, tree: Any, as_one: bool = False) -> Any:
        """Averages over the devices; `as_one`: as one array, however XLA orders it."""
        if self.axis_name is None:
            return tree
        if not as_one:
            return jax.lax.pmean(tree, self.axis_name)
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        return unravel(jax.lax.pmean(flat, self.axis_name))

    def gradients(self, state: TrainState, x0: Array, noise: Noise) -> "_Gradients":
        """Returns how to get each player's gradient for a whole batch."""
        if self.accumulate == 1:
            first = self.first_pass(state.variables.generator, x0, noise)
            return _Gradients(
                lambda: self.energy_gradient(
                    state.variables.energy, state.step, first, noise
                ),
                lambda variables: self.generator_gradient(variables, first, noise),
                first.stats,
            )

        # The first pass is computed again for the second player: all that its gradient
        # needs does not fit, or there would be no parts.
        def of_energy(x0, noise):
            first = self.first_pass(state.variables.generator, x0, noise)
            return self.energy_gradient(
                state.variables.energy, state.step, first, noise
            )

        def of_generator(variables, x0, noise):
            first = self.first_pass(variables.generator, x0, noise)
            return self.generator_gradient(variables, first, noise)

        def over_parts(one):
            group = self.networks.group
            return mean_over_parts(one, (x0, noise), self.accumulate, group)

        return _Gradients(
            lambda: over_parts(of_energy),
            lambda variables: over_parts(
                lambda x0, noise: of_generator(variables, x0, noise)
            ),
            {},
        )


class _Gradients(NamedTuple):
    """The players' gradients of one batch.

    Attributes:
      energy: () → (gradient in θ, metrics).
      generator: variables with the updated energy → (gradients in φ and ψ, metrics,
        the posterior's running averages).
      stats: the generator's running averages.
    """

    energy: Callable[[], tuple[Any, Metrics]]
    generator: Callable[[Players], tuple[tuple[Any, Any], Metrics, Any]]
    stats: Any


def mean_over_parts(
    one: Callable[..., Any], inputs: Any, parts: int, group: int = 1
) -> Any:
    """Returns the mean of a function over the parts of a batch, one after another.

    Part i has every `parts`-th group of examples from the i-th on, so that each device
    finds its share of every part among its own examples.

    Args:
      one: batch arrays → a pytree of numbers that are means over the batch.
      inputs: pytrees of arrays [batch, …].
      parts: how many.
      group: consecutive examples that stay together.
    """

    def split(leaf):
        rest = leaf.shape[1:]
        leaf = leaf.reshape(-1, parts, group, *rest).swapaxes(0, 1)
        return leaf.reshape(parts, -1, *rest)

    inputs = jax.tree.map(split, inputs)
    shapes = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, one(*part)), None

    total, _ = jax.lax.scan(add, zeros, inputs)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def make_step(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    optimizers: Optimizers,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
    accumulate: int = 1,
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
      axis_name: the mapped axis over which gradients and metrics are averaged;
        None where the step sees the whole batch.
      accumulate: parts in which each player goes through the batch, averaging their
        gradients; the first pass is then computed for each player. Not with networks
        that keep running averages of the batch.

    Returns:
      A pure function (state, x_0, noise) → (state, metrics).
    """
    rules = _Rules(game, schedule, networks, optimizers, axis_name, accumulate)

    def play_energy(state: TrainState, gradients: _Gradients):
        grads, metrics = rules.mean_over_devices(gradients.energy())
        params = state.variables.energy["params"]
        updates, opt_state = optimizers.energy.update(grads, state.opt_energy, params)
        metrics["energy/grad_norm"] = optax.tree.norm(grads)
        metrics["energy/update_norm"] = optax.tree.norm(updates)
        energy = _with_params(
            state.variables.energy, optax.apply_updates(params, updates)
        )
        return energy, opt_state, metrics

    def play_generator(state: TrainState, variables: Players, gradients: _Gradients):
        """`variables`: the energy's are updated."""
        found = gradients.generator(variables)
        # Statistics of batches, which meet in the backward pass too, would part them.
        with_statistics = bool(found[-1])
        grads, metrics, stats = rules.mean_over_devices(found, with_statistics)
        params = (variables.generator["params"], variables.posterior["params"])
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
        gradients = rules.gradients(state, x0, noise)
        energy, opt_energy, metrics = play_energy(state, gradients)
        stats = rules.mean_over_devices(gradients.stats)
        variables = state.variables._replace(
            energy=energy, generator=_with_stats(state.variables.generator, stats)
        )
        variables, opt_generator, generator_metrics = play_generator(
            state, variables, gradients
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
) -> tuple[TrainState, Metrics, Fault]:
    """Takes `length` steps in one `lax.scan`.

    Args:
      one: (state, input) → (state, metrics).
      state: where to start.
      inputs: a pytree with a leading axis of `length`, or None where `one` makes
        its own input from the state's step.
      length: K.

    Returns:
      The last state, the metrics averaged over the K steps, and the first of the steps
      with a metric that is not finite.
    """
    start = state.step
    if length == 1:
        first = None if inputs is None else jax.tree.map(lambda x: x[0], inputs)
        state, metrics = one(state, first)
        step = jnp.where(_all_finite(metrics), 0, start + 1)
        return state, metrics, Fault(step, metrics)
    state, metrics = jax.lax.scan(one, state, inputs, length=length)
    bad = ~jax.vmap(_all_finite)(metrics)
    place = jnp.argmax(bad)
    fault = Fault(
        jnp.where(bad.any(), start + 1 + place, 0),
        jax.tree.map(lambda x: x[place], metrics),
    )
    return state, jax.tree.map(lambda x: x.mean(axis=0), metrics), fault


def _all_finite(metrics: Metrics) -> Bool[Array, ""]:
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics)]
    return jnp.stack(leaves).all()
