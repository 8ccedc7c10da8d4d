"""The parts of a training loop of one's own: the game without data or files."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from ddaebm_jax import config as config_lib
from ddaebm_jax import diffusion, models
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.config import recipes
from ddaebm_jax.data import Source, reference_fit
from ddaebm_jax.errors import InputError
from ddaebm_jax.game import TrainState


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
    shape = tuple(event_shape)
    source = Source("yours", shape, None, lambda arrays, batch, keys: batch)
    experiment = experiment_lib.build_from(values, source)
    keyed_step = experiment_lib.make_keyed_step(experiment)

    def init(key: Array) -> TrainState:
        state = experiment_lib.blank_state(experiment, key)
        if not num:
            return state
        return experiment_lib.with_reference_of(experiment, state, np.asarray(data))

    def step(
        state: TrainState, x0: Array, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        keys = experiment_lib.Keys(key, key, key)
        return keyed_step(keys, jnp.arange(len(x0)), None, 0, state, x0)

    return Game(experiment.networks, experiment.schedule, init, step)
