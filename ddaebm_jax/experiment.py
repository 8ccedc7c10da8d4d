"""What a config describes, built: data, schedule, networks, game and optimizers.

Nothing here owns a device's state. All randomness is a function of (seed, step).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array

from ddaebm_jax import diffusion, minimax, models
from ddaebm_jax import sharding as parallel
from ddaebm_jax.data import Source, open_source
from ddaebm_jax.data.images import Batches


class Experiment(NamedTuple):
    """What a config describes, built; nothing here has touched a device's state.

    Attributes:
      config: the config.
      source: the data.
      schedule: the diffusion.
      networks: the apply functions.
      game: weights and switches.
      optimizers: one a player.
    """

    config: ml_collections.ConfigDict
    source: Source
    schedule: diffusion.Schedule
    networks: models.Networks
    game: minimax.Game
    optimizers: minimax.Optimizers


def learning_rate(
    optimizer: ml_collections.ConfigDict, rate: float, num_steps: int
) -> optax.ScalarOrSchedule:
    """Returns the rate's schedule over a run of `num_steps`."""
    ratio = optimizer.final_learning_rate / rate
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(rate, num_steps, alpha=ratio)
    if optimizer.schedule == "exponential":
        return optax.exponential_decay(rate, num_steps, ratio)
    return rate


def build_game(game: ml_collections.ConfigDict, num_steps: int) -> minimax.Game:
    """Returns the game, with γ's decay over a run of `num_steps`."""
    values = dict(game)
    final = values.pop("gamma_final")
    if final is not None:
        ratio = final / game.gamma
        values["gamma"] = lambda step: game.gamma * ratio ** (step / num_steps)
    return minimax.Game(**values)


def build(
    config: ml_collections.ConfigDict,
    workdir: Path | None = None,
    open_images: bool = True,
) -> Experiment:
    """Builds what a valid config describes.

    Args:
      config: the config.
      workdir: a run directory that has kept its table; None: open it anew.
      open_images: False: images are not looked for, for modes that need none.

    Raises:
      InputError: if the data cannot be opened.
    """
    source = open_source(config.data, config.seed, workdir, open_images)
    optimizer, steps = config.optimizer, config.train.num_steps
    energy_rate = optimizer.energy_learning_rate
    if energy_rate is None:
        energy_rate = optimizer.learning_rate
    return Experiment(
        config=config,
        source=source,
        schedule=diffusion.make_schedule(**config.diffusion),
        networks=models.build(config.model, source.event_shape),
        game=build_game(config.game, steps),
        optimizers=minimax.make_optimizers(
            learning_rate(optimizer, optimizer.learning_rate, steps),
            learning_rate(optimizer, energy_rate, steps),
            optimizer.beta1,
            optimizer.beta2,
            optimizer.max_grad_norm,
        ),
    )


def _key(seed: int, purpose: str) -> Array:
    """Returns a key of its own for each purpose, so that no two runs share one."""
    purposes = ("weights", "data", "noise")
    return jax.random.fold_in(jax.random.key(seed), purposes.index(purpose))


def init_state(experiment: Experiment) -> minimax.TrainState:
    """Returns the state before the first step, a function of the seed."""
    return minimax.init_state(
        _key(experiment.config.seed, "weights"),
        experiment.networks,
        experiment.optimizers,
        experiment.game,
    )


def abstract_state(experiment: Experiment) -> minimax.TrainState:
    """Returns the shapes of the state, whole on every device, to restore one into."""
    mesh = parallel.mesh_for_evaluation(experiment.config.parallel.num_devices)
    return parallel.JitLayout(mesh).restored_like(state_shapes(experiment))


def state_shapes(experiment: Experiment) -> minimax.TrainState:
    """Returns the shapes of the state, which say nothing of devices."""
    return jax.eval_shape(lambda: init_state(experiment))


def make_dispatch(
    experiment: Experiment, axis_name: str | None = None
) -> Callable[..., Any]:
    """Returns (state, arrays, index, trial, batches, length) → (state, metrics, fault).

    K = length steps on the device. Noise is drawn inside, each example's from its own
    key, and so are the batches where no input stream gives them ([K, batch, …]). A
    trial other than 0 has noise of its own. See `minimax.scan_steps`.

    Args:
      experiment: what the config describes.
      axis_name: as in `minimax.make_step` and `models.build`.
    """
    config = experiment.config
    networks = models.build(config.model, experiment.source.event_shape, axis_name)
    step = minimax.make_step(
        experiment.game,
        experiment.schedule,
        networks,
        experiment.optimizers,
        config.optimizer.ema_decay,
        axis_name,
        config.optimizer.accumulate,
    )
    seed, num_steps = config.seed, experiment.schedule.num_steps

    def dispatch(state, arrays, index, trial, batches, length):
        data_key, noise_key = _key(seed, "data"), _key(seed, "noise")
        noise_key = jnp.where(
            trial > 0, jax.random.fold_in(noise_key, trial), noise_key
        )

        def one(state, batch):
            keys = minimax.example_keys(data_key, state.step, index)
            x0 = experiment.source.draw(arrays, batch, keys)
            noise = minimax.draw_noise(
                noise_key,
                state.step,
                index,
                num_steps,
                networks.event_shape,
                networks.nz,
            )
            return step(state, x0, noise)

        return minimax.scan_steps(one, state, batches, length)

    return dispatch


def open_batches(experiment: Experiment) -> Batches | None:
    """Opens the stream of images at its beginning; None where there is no stream.

    It gives this process's part of every global batch.
    """
    data, source = experiment.config.data, experiment.source
    if source.image_set is None:
        return None
    return Batches(
        num_records=len(source.image_set.train),
        batch_size=data.batch_size,
        seed=experiment.config.seed,
        records=None if data.on_device else source.image_set.train,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.num_threads,
        prefetch=data.prefetch,
        num_workers=data.num_workers,
        timeout=data.timeout,
    )
