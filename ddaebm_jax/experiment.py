"""What a config describes, built: data, schedule, networks, game and optimisers.

Nothing here holds a device's state. All randomness is a function of (seed, step).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float

from ddaebm_jax import colour, diffusion, models, reference, sharding
from ddaebm_jax import game as game_lib
from ddaebm_jax.data import Source, open_source, reference_fit
from ddaebm_jax.data.batches import Batches
from ddaebm_jax.diagnostics import Fault, Metrics
from ddaebm_jax.game import Game, Optimizers, TrainState
from ddaebm_jax.proposal import Proposal
from ddaebm_jax.step import make_step, scan_steps


class Experiment(NamedTuple):
    """What a config describes.

    Attributes:
      config: the config.
      source: the data.
      schedule: the diffusion.
      networks: the apply functions.
      game: weights and switches.
      optimizers: one per player.
    """

    config: ml_collections.ConfigDict
    source: Source
    schedule: diffusion.Schedule
    networks: models.Networks
    game: Game
    optimizers: Optimizers


def build(
    config: ml_collections.ConfigDict,
    workdir: Path | None = None,
    open_images: bool = True,
) -> Experiment:
    """Builds what a valid config describes.

    Args:
      config: the config.
      workdir: a run directory that has kept its table; None: the table is read anew.
      open_images: False: images are not opened, for modes that need none.

    Raises:
      InputError: if the data cannot be opened.
    """
    source = open_source(config.data, config.seed, workdir, open_images)
    return build_from(config, source)


def build_from(config: ml_collections.ConfigDict, source: Source) -> Experiment:
    """Builds what a valid config describes on data that are open already.

    Where `diffusion.time_eps` is None, the noise of level 0 is the bandwidth of the
    table's rows.
    """
    if config.diffusion.time_eps is None:
        config = config.copy_and_resolve_references()
        source = source._replace(noise=reference_fit.bandwidth(source.table.train))
        time = diffusion.time_of_noise(source.noise, config.diffusion)
        config.diffusion.time_eps = time
    schedule = diffusion.make_schedule(**config.diffusion)
    return Experiment(
        config=config,
        source=source,
        schedule=schedule,
        networks=build_networks(config, source, schedule),
        game=build_game(config.game, config.train.num_steps),
        optimizers=build_optimizers(config.optimizer, config.train.num_steps),
    )


def with_times(experiment: Experiment, times: Sequence[float]) -> Experiment:
    """Returns an experiment with other levels, at these times."""
    config = experiment.config.copy_and_resolve_references()
    config.diffusion.times = tuple(times)
    schedule = diffusion.make_schedule(**config.diffusion)
    networks = experiment.networks
    if config.model.reference:
        networks = build_networks(config, experiment.source, schedule)
    return experiment._replace(config=config, schedule=schedule, networks=networks)


def with_levels_of(experiment: Experiment, saved: Mapping[str, Any]) -> Experiment:
    """Returns an experiment with the levels that a checkpoint's config holds."""
    process = experiment.config.diffusion
    times = saved.get("diffusion", {}).get("times", process.times)
    moved = tuple(times) != process.times
    return with_times(experiment, times) if moved else experiment


def build_networks(
    config: ml_collections.ConfigDict,
    source: Source,
    schedule: diffusion.Schedule,
    axis_name: str | None = None,
) -> models.Networks:
    """Returns the networks, the energy with its reference if it has one."""
    networks = models.build(config.model, source.event_shape, axis_name)
    networks = colour.with_colour(networks, source.colour)
    if num := config.model.reference:
        limit = None if source.holds_images else config.model.residual
        kind = config.model.reference_kind
        networks = reference.with_reference(networks, schedule, num, limit, kind)
    return networks


def build_game(section: ml_collections.ConfigDict, num_steps: int) -> Game:
    """Returns the game, with γ's geometric decay over a run of `num_steps`."""
    values = dict(section)
    first, final = section.gamma, values.pop("gamma_final")
    if final is not None:
        values["gamma"] = lambda step: first * (final / first) ** (step / num_steps)
    values["negatives_from"] = round(section.negatives_from * num_steps)
    own = {"defensive": "defensive", "prior_std": "defensive_std"}
    own["floor"] = "negatives_floor"
    proposal = {name: values.pop(field) for name, field in own.items()}
    encoder = section.latent and section.posterior
    proposal = Proposal(**proposal, latent=section.latent, encoder=encoder)
    return Game(**values, proposal=proposal)


def build_optimizers(section: ml_collections.ConfigDict, num_steps: int) -> Optimizers:
    """Returns the optimisers, with their rates' decay over a run of `num_steps`."""
    energy_rate = section.energy_learning_rate
    if energy_rate is None:
        energy_rate = section.learning_rate
    return game_lib.make_optimizers(
        learning_rate(section, section.learning_rate, num_steps),
        learning_rate(section, energy_rate, num_steps),
        section.beta1,
        section.beta2,
        section.max_grad_norm,
    )


def learning_rate(
    section: ml_collections.ConfigDict, rate: float, num_steps: int
) -> optax.ScalarOrSchedule:
    """Returns a rate's schedule over a run of `num_steps`."""
    ratio = section.final_learning_rate / rate
    if section.schedule == "cosine":
        return optax.cosine_decay_schedule(rate, num_steps, alpha=ratio)
    if section.schedule == "exponential":
        return optax.exponential_decay(rate, num_steps, ratio)
    return rate


class Keys(NamedTuple):
    """A run's keys, one for each purpose."""

    weights: Array
    data: Array
    noise: Array


def seed_argument(seed: int) -> np.uint32:
    """Returns the uint32 with the same `run_keys` as a seed of any size."""
    return np.uint32(seed % 2**32)


def run_keys(seed: int | np.uint32 | Array) -> Keys:
    """Returns the keys of a run with this seed."""
    return Keys(*(jax.random.fold_in(jax.random.key(seed), i) for i in range(3)))


def init_state(experiment: Experiment) -> TrainState:
    """Returns the state before the first step, a function of the seed and the data.

    It is computed on the host's CPU, whose compiler is faster at the hundreds of small
    programs of the first weights than an accelerator's.
    """
    with sharding.on_host():
        state = blank_state(experiment, run_keys(experiment.config.seed).weights)
    if not experiment.config.model.reference:
        return state
    source = experiment.source
    if source.table is not None:
        return with_reference_of(experiment, state, source.table.train)
    most = reference_fit.most_fitted(source.event_shape)
    data = source.some_training_images(most)
    return with_reference_of(experiment, state, data)


def blank_state(experiment: Experiment, key: Array) -> TrainState:
    """Returns the state before the first step, its reference not fitted yet."""
    return game_lib.init_state(
        key, experiment.networks, experiment.optimizers, experiment.game
    )


def with_reference_of(
    experiment: Experiment, state: TrainState, data: Float[np.ndarray, "n *shape"]
) -> TrainState:
    """Returns a state whose reference density is fitted to data."""
    model = experiment.config.model
    how = model.reference, model.reference_kind
    fitted = reference_fit.fit(data, experiment.schedule, *how)
    return state.replace(
        variables=reference.with_fitted(state.variables, fitted),
        ema=reference.with_fitted(state.ema, fitted),
    )


def state_shapes(experiment: Experiment) -> TrainState:
    """Returns the shapes of the state."""
    return _shapes(experiment.networks, experiment.optimizers, experiment.game)


@lru_cache(maxsize=8)  # Tracing U-Nets takes seconds.
def _shapes(*parts: Any) -> TrainState:
    return jax.eval_shape(lambda: game_lib.init_state(jax.random.key(0), *parts))


def evaluation_state(experiment: Experiment) -> TrainState:
    """Returns the shapes of the state, replicated over the mesh for evaluation."""
    mesh = sharding.mesh_for_evaluation(experiment.config.parallel.num_devices)
    shapes = state_shapes(experiment)
    return sharding.with_shardings(shapes, sharding.state_shardings(mesh, shapes))


def make_steps(
    experiment: Experiment, axis_name: str | None = None
) -> Callable[..., tuple[TrainState, Metrics, Fault]]:
    """Returns (length, state, batches, index, constants) → (state, metrics, fault).

    `length` steps on the device; see `step.scan_steps`. Noise is drawn inside, each
    example's from a key of its own, and so are the batches of sources without an input
    stream (`batches` is None). The constants are the source's arrays, the schedule,
    the seed (`seed_argument`), so that one program serves all seeds, and the trial; one
    other than 0 has other noise.

    Args:
      experiment: what the config describes.
      axis_name: as in `step.make_step` and `models.build`.
    """

    def draw_and_step(index, constants, *inputs):
        arrays, schedule, seed, trial = constants
        step = make_keyed_step(experiment._replace(schedule=schedule), axis_name)
        return step(run_keys(seed), index, arrays, trial, *inputs)

    return partial(scan_steps, draw_and_step)


def make_keyed_step(
    experiment: Experiment, axis_name: str | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns (keys, index, arrays, trial, state, batch) → (state, metrics).

    One step of `make_steps` for a run of any seed, by its `Keys`.
    """
    config = experiment.config
    schedule = experiment.schedule
    networks = build_networks(config, experiment.source, schedule, axis_name)
    step = make_step(
        experiment.game,
        experiment.schedule,
        networks,
        experiment.optimizers,
        config.optimizer.ema_decay,
        axis_name,
        config.optimizer.accumulate,
    )
    num_steps, shape, nz = config.diffusion.num_steps, networks.event_shape, networks.nz

    def keyed_step(keys, index, arrays, trial, state, batch):
        reseeded = jax.random.fold_in(keys.noise, trial)
        noise_key = jnp.where(trial > 0, reseeded, keys.noise)
        row_keys = game_lib.example_keys(keys.data, state.step, index)
        x0 = experiment.source.draw(arrays, batch, row_keys)
        noise = game_lib.draw_noise(
            *(noise_key, state.step, index, num_steps, shape, nz),
            experiment.game.num_negatives,
            experiment.game.proposal.defensive,
        )
        return step(state, x0, noise)

    return keyed_step


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
    )
