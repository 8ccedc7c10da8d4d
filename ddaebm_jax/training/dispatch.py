"""Steps on the devices: their layout, their compilation, how many per dispatch."""

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax import progress, reference, sharding
from ddaebm_jax.diagnostics import Fault, Metrics
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.game import TrainState
from ddaebm_jax.models import Players
from ddaebm_jax.paths import cache_directory, user_path

# Steps per dispatch where the config leaves the choice: small networks are bound by the
# time of a dispatch, and matrix products lose nothing inside a scan.
_STEPS_PER_DISPATCH = {"mlp": 100, "ncsnpp": 10}
# Measured on CPUs: 6 s of gaussians25, with 67 arrays of weights, to 87 s of cifar10,
# with 778; on a slow core 112 s of digits, with 340.
_SECONDS_PER_ARRAY = 0.11, 0.33


class Dispatcher:
    """Takes steps of an experiment on the devices and in the layout of its config.

    Attributes:
      mesh: the devices over which the batch is split.
      steps: the steps, compiled for the layout.
      compile_seconds: time spent tracing and compiling so far.
    """

    def __init__(self, experiment: experiment_lib.Experiment) -> None:
        """Lays out the steps.

        Raises:
          InputError: if there are fewer devices, or the batch is not divisible.
        """
        config, layout = experiment.config, experiment.config.parallel
        self.mesh = sharding.make_mesh(
            layout.num_devices,
            config.data.batch_size,
            config.optimizer.accumulate,
            experiment.networks.group,
        )
        # With a sharded state XLA splits the step of the whole batch.
        axis_name = None if layout.fsdp else sharding.DATA_AXIS
        steps = experiment_lib.make_steps(experiment, axis_name)
        self._shapes = shapes = experiment_lib.state_shapes(experiment)
        if layout.mode == "pmap":
            self.steps = sharding.pmap_steps(steps, self.mesh)
        else:
            self.steps = sharding.jit_steps(steps, self.mesh, shapes, layout.fsdp)
        self._num_arrays = len(jax.tree.leaves(shapes.variables))
        self._experiment = experiment
        self._index = sharding.process_rows(self.mesh, config.data.batch_size)
        self._arrays = sharding.replicate(self.mesh, experiment.source.arrays)
        seed = experiment_lib.seed_argument(experiment.config.seed)
        self._seed = sharding.replicate(self.mesh, seed)
        self.set_levels(experiment.schedule)
        self._compiled: set[int] = set()
        self.compile_seconds = 0.0
        self.reseed(0)

    def init(self, variables: Players | None = None) -> TrainState:
        """Returns the state before the first step, on the devices.

        With the seed's weights, or these, which every process holds. A reference
        density is always that of the run's own rows.
        """
        state = experiment_lib.init_state(self._experiment)
        if variables is not None:
            fitted = reference.read(state.variables.energy)
            if fitted is not None:
                variables = reference.with_fitted(variables, fitted)
            averages = jax.tree.map(np.copy, variables)
            state = state.replace(variables=variables, ema=averages)
        return sharding.put(state, self._shardings())

    def like(self) -> TrainState:
        """Returns the state's shapes and shardings, to restore a checkpoint into."""
        return sharding.with_shardings(self._shapes, self._shardings())

    def reseed(self, trial: int) -> None:
        """Gives the steps from here on the noise of a trial; 0 is the first."""
        self._trial = sharding.replicate(self.mesh, np.int32(trial))

    def set_levels(self, schedule: Schedule) -> None:
        """Gives the steps from here on the levels of a schedule of as many steps."""
        self._schedule = sharding.replicate(self.mesh, schedule)

    def compiles(self, length: int) -> bool:
        """Returns whether a call of so many steps would compile them first."""
        return length not in self._compiled

    def __call__(
        self, state: TrainState, length: int, batches: np.ndarray | None = None
    ) -> tuple[TrainState, Metrics, Fault]:
        """Starts `length` steps; the given state's buffers are donated.

        Args:
          state: where to start.
          length: K.
          batches: this process's rows from the input stream, [K, rows, …]; None where
            there is no stream.
        """
        inputs = self.inputs(batches)
        if not self.compiles(length):
            return self.steps.collect(self.steps.program(length)(state, *inputs))
        hint = "less if an earlier run has done it"
        if jax.default_backend() == "cpu":
            low, high = (one * self._num_arrays for one in _SECONDS_PER_ARRAY)
            hint = f"{low:.0f} to {high:.0f} s, {hint}"
        start = time.monotonic()
        with progress.phase(f"compiling {length} steps", hint):
            # The call compiles, and then only starts the steps.
            result = self.steps.program(length)(state, *inputs)
        self._compiled.add(length)
        self.compile_seconds += time.monotonic() - start
        return self.steps.collect(result)

    def inputs(self, batches: np.ndarray | None = None) -> tuple[Any, ...]:
        """Returns the program's arguments after the state; see `__call__`."""
        constants = self._arrays, self._schedule, self._seed, self._trial
        return (*self.steps.place(batches, self._index), constants)

    def _shardings(self) -> TrainState:
        fsdp = self._experiment.config.parallel.fsdp
        return sharding.state_shardings(self.mesh, self._shapes, fsdp)


def use_compilation_cache(cache: ml_collections.ConfigDict) -> None:
    """Turns JAX's persistent compilation cache on, unless the config says no.

    A directory in JAX_COMPILATION_CACHE_DIR stands where the config names none.
    """
    if not cache.enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory = cache.directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    directory = directory or str(cache_directory("compiled"))
    if "://" not in directory:
        folder = user_path(directory, "compilation_cache.directory")
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            # JAX would say so for every program.
            logging.warning("%s cannot be written: no compiled program is kept", folder)
            jax.config.update("jax_enable_compilation_cache", False)
            return
        directory = folder
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Hundreds of small programs draw the first weights.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def steps_per_dispatch(model_name: str) -> int:
    """Returns K where the config leaves it open.

    On a CPU a convolution inside a scan is about ten times slower than outside.
    """
    if model_name == "ncsnpp" and jax.default_backend() == "cpu":
        return 1
    return _STEPS_PER_DISPATCH[model_name]


def next_stop(
    step: int,
    per_dispatch: int,
    total: int,
    intervals: Sequence[int] = (),
    moves: Sequence[int] = (),
) -> int:
    """Returns where the dispatch that starts at `step` ends.

    At the next multiple of `per_dispatch` or of an interval (0: never), or at a move of
    the levels, so that the cuts are the same in a resumed run as in an unbroken one.
    """
    every = [n for n in (per_dispatch, *intervals) if n > 0]
    stops = [(step // n + 1) * n for n in every] + [n for n in moves if n > step]
    return min(total, *stops)


def dispatch_end(config: ml_collections.ConfigDict, start: int) -> int:
    """Returns the step at which the dispatch from `start` ends; see `next_stop`."""
    train = config.train
    per_dispatch = train.steps_per_dispatch or steps_per_dispatch(config.model.name)
    names = "report", "picture", "evaluate", "checkpoint"
    intervals = [train[f"{name}_every"] for name in names]
    moves = config.levels.move_at
    return next_stop(start, per_dispatch, train.num_steps, intervals, moves)
