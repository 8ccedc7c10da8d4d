"""The parts of a training loop of one's own: the game without data or files."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from ddaebm_jax import config as config_lib
from ddaebm_jax import diffusion, models, reference
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax import game as game_lib
from ddaebm_jax.config import recipes
from ddaebm_jax.data import Source, reference_fit
from ddaebm_jax.errors import InputError
from ddaebm_jax.game import TrainState
from ddaebm_jax.step import make_step


class Game(NamedTuple):
    """The parts of a training loop; see `build`.

    Attributes:
      networks: pure functions of the three networks' variables.
      schedule: the diffusion.
      init: key → the state before the first step.
      step: (state, x_0 [batch, *event_shape], key) → (state, metrics), pure: jit it.
        The noise of a step depends on (key, state.step) only.
    """

    networks: models.Networks
    schedule: diffusion.Schedule
    init: Callable[[Array], TrainState]
    step: Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]


def build(
    config: str | ml_collections.ConfigDict,
    event_shape: tuple[int, ...],
    data: Float[np.ndarray, "n *shape"] | None = None,
) -> Game:
    """Builds what a loop of one's own needs: the game without data, files or devices.

    Args:
      config: a recipe, or its name; its section `data` is not read.
      event_shape: of one example, (d,) or (height, width, channels).
      data: standardised rows, or images in [−1, 1], for recipes with a reference
        density (`model.reference`) or noise that the rows choose.

    Raises:
      InputError: for a bad config, or if `data` is needed.
    """
    values = recipes.load(config) if isinstance(config, str) else config
    values = values.copy_and_resolve_references()
    num, chosen = values.model.reference, values.diffusion.time_eps is None
    if data is None and (num or chosen):
        raise InputError(
            "the recipe's model.reference or diffusion.time_eps follows from the data: "
            "give build(…, data=rows), or set them to 0 and to a number"
        )
    if chosen:
        noise = reference_fit.bandwidth(np.asarray(data))
        values.diffusion.time_eps = diffusion.time_of_noise(noise, values.diffusion)
    wrong = [p for p in config_lib.problems(values) if not p.startswith("data.")]
    axes = 3 if values.model.name == "ncsnpp" else 1
    if len(event_shape) != axes:
        wrong.append(
            f"event_shape is {event_shape}; networks of model.name = "
            f"'{values.model.name}' need {axes} axes"
        )
    if values.data.whiten:
        wrong.append("data.whiten follows from the data: whiten them, and leave it out")
    if wrong:
        raise InputError("; ".join(wrong))
    schedule = diffusion.make_schedule(**values.diffusion)
    source = Source("yours", tuple(event_shape), None, None)
    networks = experiment_lib.build_networks(values, source, schedule)
    game = experiment_lib.build_game(values.game, values.train.num_steps)
    optimizers = experiment_lib.build_optimizers(
        values.optimizer, values.train.num_steps
    )
    whole = make_step(
        game,
        schedule,
        networks,
        optimizers,
        values.optimizer.ema_decay,
        accumulate=values.optimizer.accumulate,
    )

    def init(key: Array) -> TrainState:
        state = game_lib.init_state(key, networks, optimizers, game)
        if not num:
            return state
        fitted = reference_fit.fit(np.asarray(data), schedule, num)
        return state.replace(
            variables=reference.with_fitted(state.variables, fitted),
            ema=reference.with_fitted(state.ema, fitted),
        )

    def step(
        state: TrainState, x0: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        noise = game_lib.draw_noise(
            *(key, state.step, jnp.arange(len(x0)), values.diffusion.num_steps),
            *(networks.event_shape, networks.nz),
            game.num_negatives,
            game.proposal.defensive,
        )
        return whole(state, x0, noise)

    return Game(networks, schedule, init, step)
