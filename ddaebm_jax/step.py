"""One step of the game, and K steps in one `lax.scan`.

Geng et al. 2024, algorithm 1: the energy's update, then the generator's and the
posterior's against the updated energy, on the same draws.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ddaebm_jax import diagnostics, diffusion, losses
from ddaebm_jax.diagnostics import Fault, Metrics
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.game import Game, Noise, Optimizers, TrainState
from ddaebm_jax.losses import Pair, replaced
from ddaebm_jax.models import Networks, Players

Step = Callable[[TrainState, Array, Noise], tuple[TrainState, Metrics]]


def make_step(
    game: Game,
    schedule: Schedule,
    networks: Networks,
    optimizers: Optimizers,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
    accumulate: int = 1,
) -> Step:
    """Returns one step of the game: (state, x_0, noise) → (state, metrics), pure.

    Args:
      game: weights and switches.
      schedule: the diffusion.
      networks: the apply functions.
      optimizers: one per player.
      ema_decay: of the average of all three networks; 0: it equals the weights.
      axis_name: the mapped axis over which gradients and metrics are averaged; None
        where the step sees the whole batch.
      accumulate: number of parts in which each player goes through the batch, averaging
        gradients; the first pass is then computed once per player. Not with batch
        statistics.
    """
    first_pass = partial(losses.generator_pass, game, schedule, networks)
    energy_grads = partial(losses.energy_gradient, game, schedule, networks)
    generator_grads = partial(losses.generator_gradient, game, schedule, networks)
    if accumulate > 1:
        in_parts = partial(accumulated, first_pass, accumulate, networks.group)
        energy_grads = in_parts(energy_grads)
        generator_grads = in_parts(generator_grads)
    average = partial(mean_over_devices, axis_name)

    def step(state: TrainState, x0: Array, noise: Noise) -> tuple[TrainState, Metrics]:
        variables = state.variables
        drawn = noise.t, noise.eps_t, noise.eps_next
        x_t, x_next = diffusion.diffuse_pair(schedule, x0, *drawn)
        pair = Pair(x_t, x_next, noise)
        # With accumulation each part has a first pass of its own.
        first = first_pass(variables, pair) if accumulate == 1 else None

        # The energy, descent in θ.
        grads, metrics = average(energy_grads(variables, pair, first, state.step))
        params = variables.energy["params"]
        updates, opt_energy = optimizers.energy.update(grads, state.opt_energy, params)
        metrics |= _norms("energy", grads, updates)
        energy = optax.apply_updates(params, updates)
        variables = variables._replace(energy=replaced(variables.energy, params=energy))

        # Generator and posterior, descent in φ and ψ, against the updated energy.
        found = generator_grads(variables, pair, first)
        grads, generator_metrics, stats = average(found, as_one=bool(found[-1]))
        params = (variables.generator["params"], variables.posterior["params"])
        updates, opt_generator = optimizers.generator.update(
            grads, state.opt_generator, params
        )
        metrics |= generator_metrics | _norms("generator", grads[0], updates[0])
        if game.has_encoder:
            metrics |= _norms("posterior", grads[1], updates[1])
        generator, posterior = optax.apply_updates(params, updates)
        variables = variables._replace(
            generator=replaced(variables.generator, params=generator),
            posterior=replaced(variables.posterior, params=posterior),
        )
        for player, player_stats in stats.items():
            updated = replaced(getattr(variables, player), batch_stats=player_stats)
            variables = variables._replace(**{player: updated})

        return TrainState(
            step=state.step + 1,
            variables=variables,
            ema=optax.incremental_update(variables, state.ema, 1.0 - ema_decay),
            opt_energy=opt_energy,
            opt_generator=opt_generator,
        ), metrics

    return step


def _norms(player: str, grads: Any, updates: Any) -> Metrics:
    return {
        f"{player}/grad_norm": optax.tree.norm(grads),
        f"{player}/update_norm": optax.tree.norm(updates),
    }


def accumulated(
    first_pass: Callable, parts: int, group: int, gradient: Callable
) -> Callable:
    """Wraps a gradient function so that it goes through the batch in parts.

    Args:
      first_pass: (variables, pair) → FirstPass, computed for each part.
      parts: how many.
      group: consecutive examples that stay in one part.
      gradient: (variables, pair, first, …) → means over the batch.
    """

    def in_parts(variables: Players, pair: Pair, _: None, *rest: Any) -> Any:
        def one(part: Pair) -> Any:
            return gradient(variables, part, first_pass(variables, part), *rest)

        return mean_over_parts(one, pair, parts, group)

    return in_parts


def mean_over_parts(
    function: Callable[[Any], Any], batch: Any, parts: int, group: int = 1
) -> Any:
    """Returns the mean of a function over the parts of a batch, one after another.

    Part i has every `parts`-th group of examples from the i-th on, so that each device
    finds its share of every part among its own examples.

    Args:
      function: part of the batch → a pytree of means over it.
      batch: a pytree of arrays [batch, …].
      parts: how many.
      group: consecutive examples that stay together.
    """

    def split(leaf: Array) -> Array:
        rest = leaf.shape[1:]
        leaf = leaf.reshape(-1, parts, group, *rest).swapaxes(0, 1)
        return leaf.reshape(parts, -1, *rest)

    batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def mean_over_devices(axis_name: str | None, tree: Any, as_one: bool = False) -> Any:
    """Averages over a mapped axis.

    Args:
      axis_name: the axis; None: there is none.
      tree: what is averaged.
      as_one: as a single array. With batch statistics the backward pass has reductions
        of its own, between which XLA would not combine those of the gradients.
    """
    if axis_name is None:
        return tree
    if not as_one:
        return jax.lax.pmean(tree, axis_name)
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, axis_name))


def scan_steps(
    step: Callable[..., tuple[TrainState, Metrics]],
    length: int,
    state: TrainState,
    inputs: Any,
    *constants: Any,
) -> tuple[TrainState, Metrics, Fault]:
    """Takes `length` steps in one `lax.scan`.

    Args:
      step: (*constants, state, input) → (state, metrics).
      length: K.
      state: where to start.
      inputs: a pytree with a leading axis of `length`; None: the step makes its own.
      *constants: passed to every step.

    Returns:
      The last state, the metrics averaged over the K steps, and the first of the steps
      with a metric that is not finite.
    """
    step, start = partial(step, *constants), state.step
    if length == 1:
        # On a CPU a convolution in a scan is about ten times slower than outside.
        state, metrics = step(state, jax.tree.map(lambda x: x[0], inputs))
        metrics = jax.tree.map(lambda x: x[None], metrics)
    else:
        state, metrics = jax.lax.scan(step, state, inputs, length=length)
    fault = diagnostics.first_fault(metrics, start)
    return state, jax.tree.map(lambda x: x.mean(axis=0), metrics), fault
