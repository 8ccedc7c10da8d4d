"""Steps on the devices: where they run, how many at once, and their compilation."""

import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ddaebm_jax import minimax
from ddaebm_jax import sharding as parallel
from ddaebm_jax.experiment import Experiment, make_dispatch, state_shapes
from ddaebm_jax.files import cache_directory
from ddaebm_jax.training.checkpoints import Checkpoints, Restored

# Steps a dispatch where the config leaves the choice: small networks are bound by
# the time of a dispatch; matrix products lose nothing inside a scan.
_STEPS_PER_DISPATCH = {"mlp": 100, "ncsnpp": 10}


def lay_out(experiment: Experiment) -> tuple[Mesh, parallel.Layout]:
    """Returns the devices that a config names, and how its steps run there.

    Raises:
      InputError: if there are fewer devices, or the batch is not divisible.
    """
    config, settings = experiment.config, experiment.config.parallel
    mesh = parallel.make_mesh(
        settings.num_devices,
        config.data.batch_size,
        config.optimizer.accumulate,
        experiment.networks.group,
    )
    return mesh, parallel.make_layout(settings.mode, mesh, settings.fsdp)


class Dispatcher:
    """Compiles the dispatch for each length once, and keeps count of the time.

    Attributes:
      num_devices: over which the batch is split.
      compile_seconds: spent compiling so far.
    """

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        mesh, layout = lay_out(experiment)
        self._layout = layout
        self._jitted = layout.jit(make_dispatch(experiment, layout.axis_name))
        self._inputs = (
            layout.place_data(experiment.source.arrays),
            layout.batch_index(config.data.batch_size),
        )
        self.num_devices = mesh.size
        self._compiled: dict[int, Any] = {}
        self.compile_seconds = 0.0
        self.start_trial(0)

    def start_trial(self, trial: int) -> None:
        """Gives the steps from here on the noise of a trial; 0 is the first."""
        self._trial = self._layout.place_data(np.int32(trial))

    def place(self, state: minimax.TrainState) -> minimax.TrainState:
        """Puts a copy of the state on the devices."""
        return self._layout.place(state)

    def saved(self, state: minimax.TrainState) -> minimax.TrainState:
        """Returns the state as checkpoints and evaluation want it."""
        return self._layout.saved(state)

    def restore(
        self, checkpoints: Checkpoints, experiment: Experiment
    ) -> Restored | None:
        """Restores the newest good state, whatever devices it was saved from.

        None where there is no checkpoint. See `Checkpoints.restore_newest`.
        """
        like = self._layout.restored_like(state_shapes(experiment))
        found = checkpoints.restore_newest(like)
        if found is None:
            return None
        return found._replace(state=self._layout.taken_up(found.state))

    def __call__(
        self, state: minimax.TrainState, length: int, batches: np.ndarray | None = None
    ) -> tuple[minimax.TrainState, minimax.Metrics, minimax.Fault]:
        """Starts `length` steps; the given state's buffers are used up.

        Args:
          state: where to start.
          length: K.
          batches: what the input stream gave for these steps, [K, batch, …].
        """
        if batches is not None:
            batches = self._layout.place_batches(batches)
        inputs = (state, *self._inputs, self._trial, batches)
        start, first = time.monotonic(), length not in self._compiled
        if first:
            self._compiled[length] = self._layout.compile(self._jitted, inputs, length)
        state, *told = self._compiled[length](*inputs)
        if first:
            # With the call, which may be what compiles; it only starts the steps.
            self.compile_seconds += time.monotonic() - start
        return state, *self._layout.metrics(told)


def use_compilation_cache(cache: ml_collections.ConfigDict) -> None:
    """Turns JAX's persistent compilation cache on, unless the config says no.

    A directory in JAX_COMPILATION_CACHE_DIR stands where the config names none.
    """
    if not cache.enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory = cache.directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not directory:
        directory = cache_directory("compiled")
    jax.config.update("jax_compilation_cache_dir", str(directory))


def steps_per_dispatch(model_name: str) -> int:
    """Returns K where the config leaves it open.

    On a CPU a convolution inside a scan is about ten times slower than outside.
    """
    if model_name == "ncsnpp" and jax.default_backend() == "cpu":
        return 1
    return _STEPS_PER_DISPATCH[model_name]


def next_stop(step: int, per_dispatch: int, total: int, intervals: list[int]) -> int:
    """Returns where the dispatch that starts at `step` ends.

    At the next multiple of `per_dispatch` or of an interval (0: never), so that
    the cuts are the same in a resumed run as in an unbroken one.
    """
    candidates = [n for n in (per_dispatch, *intervals) if n > 0]
    return min(total, *((step // n + 1) * n for n in candidates))


def dispatches(
    config: ml_collections.ConfigDict, start: int
) -> Iterator[tuple[int, int]]:
    """Yields (first step, step after the last) of every dispatch that is left."""
    train = config.train
    per_dispatch = train.steps_per_dispatch or steps_per_dispatch(config.model.name)
    intervals = [
        train.report_every,
        train.picture_every,
        train.evaluate_every,
        train.checkpoint_every,
    ]
    while start < train.num_steps:
        stop = next_stop(start, per_dispatch, train.num_steps, intervals)
        yield start, stop
        start = stop
