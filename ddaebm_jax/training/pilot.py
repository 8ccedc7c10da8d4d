"""The pilot run of `diffusion.time=equal_cost`, which places the levels."""

from collections.abc import Sequence

import jax
import ml_collections
from absl import logging

from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax import progress
from ddaebm_jax.data import Source
from ddaebm_jax.evaluation import placement
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players
from ddaebm_jax.training import dispatch, many

# Levels of a pilot, evenly in the log signal-to-noise ratio.
_STEPS = 16


def with_times(
    configs: Sequence[ml_collections.ConfigDict], sources: Sequence[Source]
) -> list[ml_collections.ConfigDict]:
    """Returns the configs with the times that a pilot run of each one finds.

    A pilot is the recipe with 16 steps, trained for `levels.pilot_steps` and then
    dropped. Configs that have their times are returned as they are.

    Args:
      configs: valid ones, alike but for the seed.
      sources: the data of each.

    Raises:
      DivergedError: if a pilot's costs are not finite.
    """
    due = [i for i, config in enumerate(configs) if needs_pilot(config)]
    pilots = [experiment_lib.build_from(_pilot(configs[i]), sources[i]) for i in due]
    found = list(configs)
    for i, (pilot, variables) in zip(due, _train(pilots), strict=True):
        steps = configs[i].diffusion.num_steps
        times = placement.equal_cost_times(pilot, variables, steps)
        found[i] = configs[i].copy_and_resolve_references()
        found[i].diffusion.times = times
        logging.info("levels of equal cost: diffusion.times=%s", times)
    return found


def needs_pilot(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a config leaves its times to a pilot run."""
    return config.diffusion.time == "equal_cost" and not config.diffusion.times


def _pilot(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.diffusion.time, config.diffusion.num_steps = "log_snr", _STEPS
    config.train.num_steps, config.levels.move_at = config.levels.pilot_steps, ()
    return config


def _train(pilots: Sequence[Experiment]) -> list[tuple[Experiment, Players]]:
    """Returns the pilots with their networks after the last step."""
    if not pilots:
        return []
    with progress.phase("training a pilot run for the levels of the diffusion"):
        if pilots[0].source.holds_images:
            return [(pilot, _train_alone(pilot)) for pilot in pilots]
        trained = many.train(pilots, len(pilots))
        return [(run.experiment, run.state.ema) for run in trained]


def _train_alone(pilot: Experiment) -> Players:
    """Returns the networks of a pilot on images, trained over the mesh."""
    dispatcher = dispatch.Dispatcher(pilot)
    state, step = dispatcher.init(), 0
    batches = experiment_lib.open_batches(pilot)
    try:
        while step < pilot.config.train.num_steps:
            start, step = step, dispatch.dispatch_end(pilot.config, step)
            rows = None if batches is None else batches.next(step - start)
            state, *_ = dispatcher(state, step - start, rows)
    finally:
        if batches is not None:
            batches.close()
    return jax.block_until_ready(state.ema)
