"""Several runs at once on one device, by `vmap` over their stacked states.

Small networks leave a device idle, and a program costs as much to compile for one run
as for many. Every run keeps its seed and its data, and so its numbers, up to rounding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ddaebm_jax import config as config_lib
from ddaebm_jax import progress
from ddaebm_jax.diagnostics import Fault, energy_gaps_by_t
from ddaebm_jax.errors import InputError, listed
from ddaebm_jax.evaluation import placement
from ddaebm_jax.experiment import Experiment, init_state, make_keyed_step, run_keys
from ddaebm_jax.game import TrainState
from ddaebm_jax.step import scan_steps
from ddaebm_jax.training.dispatch import next_stop, steps_per_dispatch

# The runs step together; with a step each, `lax.cond` would take both branches.
_AXES = TrainState(step=None, variables=0, ema=0, opt_energy=0, opt_generator=0)


class Trained(NamedTuple):
    """What became of a run.

    Attributes:
      experiment: the run's, with its last levels.
      state: the last state, on the host.
      metrics: means of the metrics of each dispatch, with its last step; see
        `diagnostics.energy_gaps_by_t`.
      fault: the first step with a metric that is not finite; None: there was none.
      seconds: the run's share of the time, compilation included.
    """

    experiment: Experiment
    state: TrainState
    metrics: list[dict[str, float]]
    fault: Fault | None
    seconds: float


def train(experiments: Sequence[Experiment], together: int) -> Iterator[Trained]:
    """Trains runs from their first step to the last, and yields them in order.

    Nothing is kept on disk. A run with a fault goes on to the end beside the others.

    Args:
      experiments: of one event shape and, but for seed, data, and the levels that
        follow from the data, of one config.
      together: most runs that train at once; one program serves all of them.

    Raises:
      InputError: if the experiments differ in more, or read streams of images.
    """
    _check_alike(experiments)
    num_chunks = -(-len(experiments) // together)
    size = -(-len(experiments) // num_chunks)
    runs = _stack(*((run_keys(e.config.seed), e.source.arrays) for e in experiments))
    take_steps = _program(experiments[0])
    for start in range(0, len(experiments), size):
        # The last chunk repeats its last run, so that its shapes are the others'.
        chunk = np.minimum(np.arange(start, start + size), len(experiments) - 1)
        inputs, started = _at(runs, chunk), time.monotonic()
        group = [experiments[i] for i in chunk]
        state = _init(group)
        with progress.loop_bar(group[0].config.train.num_steps, "step") as bar:
            how = take_steps, bar, state
            group, state, metrics, faults = _train_chunk(group, *how, *inputs)
        seconds = (time.monotonic() - started) / len(set(chunk))
        for place in range(len(set(chunk))):
            one = _at(state.replace(step=None), place).replace(step=state.step)
            lines = [{"step": step} | of_step[place] for step, of_step in metrics]
            yield Trained(group[place], one, lines, faults.get(place), seconds)


def _check_alike(experiments: Sequence[Experiment]) -> None:
    first = experiments[0]
    for one in experiments:
        if one.source.image_set is not None:
            raise InputError(
                f"{one.source.name}: runs on streams of images do not train together; "
                "train them one by one"
            )
        found = config_lib.differences(first.config, one.config)
        differing = [
            name
            for name in found
            if name not in ("seed", "diffusion.time_eps", "diffusion.times")
            and (name[:5] != "data." or name == "data.batch_size")
        ]
        if differing or first.source.event_shape != one.source.event_shape:
            raise InputError(
                f"runs of shapes {first.source.event_shape} and "
                f"{one.source.event_shape}, whose configs differ in "
                f"{listed(differing)}, do not train together; group them by both"
            )


def _stack(*trees: Any) -> Any:
    """Stacks pytrees; leaves shorter than the longest of their place are padded."""

    def one(*leaves: Any) -> Any:
        if np.ndim(leaves[0]) == 0:
            return jnp.stack([jnp.asarray(leaf) for leaf in leaves])
        length = max(map(len, leaves))
        rest = [(0, 0)] * (np.ndim(leaves[0]) - 1)
        padded = [np.pad(leaf, [(0, length - len(leaf)), *rest]) for leaf in leaves]
        return jnp.asarray(np.stack(padded))

    return jax.tree.map(one, *trees)


def _at(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[places], tree)


def _init(experiments: Sequence[Experiment]) -> TrainState:
    """Returns the stacked states before the first step."""
    states = list(map(init_state, experiments))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked.replace(step=states[0].step)


def _program(experiment: Experiment) -> Callable:
    """Returns (length, keys, arrays, schedules, states) → as `step.scan_steps`."""
    index = jnp.arange(experiment.config.data.batch_size)

    def one_run(length, keys, arrays, schedule, state):
        step = make_keyed_step(experiment._replace(schedule=schedule))
        inputs = keys, index, arrays, jnp.int32(0)
        return scan_steps(step, length, state, None, *inputs)

    @partial(jax.jit, static_argnums=0, donate_argnums=4)
    def take_steps(length, keys, arrays, schedules, states):
        run = jax.vmap(partial(one_run, length), (0, 0, 0, _AXES), (_AXES, 0, 0))
        return run(keys, arrays, schedules, states)

    return take_steps


def _train_chunk(
    group: list[Experiment],
    take_steps: Callable,
    bar: tqdm,
    state: TrainState,
    *inputs: Any,
) -> tuple[
    list[Experiment],
    TrainState,
    list[tuple[int, list[dict[str, float]]]],
    dict[int, Fault],
]:
    """Returns the runs, their stacked states after the last step, metrics and faults.

    The metrics are those of each run at the end of each dispatch.
    """
    config = group[0].config
    train, moves = config.train, config.levels.move_at
    per_dispatch = train.steps_per_dispatch or steps_per_dispatch(config.model.name)
    step, schedules = 0, _stack(*(one.schedule for one in group))
    reported, faults = [], {}
    while step < train.num_steps:
        stop = next_stop(step, per_dispatch, train.num_steps, moves=moves)
        state, *found = take_steps(stop - step, *inputs, schedules, state)
        metrics, found = jax.device_get(found)
        places = range(len(group))
        of_runs = [energy_gaps_by_t(_at(metrics, place)) for place in places]
        reported.append((stop, of_runs))
        bar.update(stop - step)
        step = stop
        for place in map(int, np.flatnonzero(found.step)):
            faults.setdefault(place, _at(found, place))
        if step in moves:
            for place in {*places} - {*faults}:
                variables = jax.device_get(_at(state.ema, place))
                group[place] = placement.with_moved_levels(group[place], variables)
            schedules = _stack(*(one.schedule for one in group))
    return group, jax.device_get(state), reported, faults
