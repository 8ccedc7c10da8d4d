"""The loop: wires config, data, networks, steps, writers and checkpoints together.

It owns no mathematics. State is in plain sight, every dispatch is a pure function
of it, and all randomness is a function of (seed, step).
"""

import contextlib
import dataclasses
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array

from ddaebm_jax import (
    config as config_lib,
)
from ddaebm_jax import (
    diffusion,
    minimax,
    models,
    parallel,
    writers,
)
from ddaebm_jax.checkpointing import (
    BestCheckpoint,
    Checkpoints,
    CheckpointWriteError,
    Restored,
)
from ddaebm_jax.data import Source, open_source
from ddaebm_jax.data.images import Batches
from ddaebm_jax.errors import InputError, TrainingError
from ddaebm_jax.evaluation import figures, image_quality
from ddaebm_jax.files import (
    cache_directory,
    read_text,
    write_json_atomically,
    write_text_atomically,
)
from ddaebm_jax.interruption import Interrupted, Interruption, Noted
from ddaebm_jax.locking import LOCK_FILE, lock
from ddaebm_jax.recovery import EnergyWatch, Saver

CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"

_LARGEST_CONFIG = 2**20
# What errors say that come of other processes.
_OF_PROCESSES = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|gloo|connection|peer|heartbeat|barrier",
    re.IGNORECASE,
)

# Steps a dispatch where the config leaves the choice: small networks are bound by
# the time of a dispatch; matrix products lose nothing inside a scan.
_STEPS_PER_DISPATCH = {"mlp": 100, "ncsnpp": 10}


class LostProcessError(TrainingError):
    """Another process of the run is gone."""


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
    return parallel.JitLayout(mesh).restored_like(_state_shapes(experiment))


def _state_shapes(experiment: Experiment) -> minimax.TrainState:
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
      axis_name: as in `minimax.make_step`.
    """
    step = minimax.make_step(
        experiment.game,
        experiment.schedule,
        experiment.networks,
        experiment.optimizers,
        experiment.config.optimizer.ema_decay,
        axis_name,
        experiment.config.optimizer.accumulate,
    )
    seed = experiment.config.seed
    networks, num_steps = experiment.networks, experiment.schedule.num_steps

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


def lay_out(
    experiment: Experiment,
) -> tuple[Mesh, parallel.JitLayout | parallel.PmapLayout]:
    """Returns the devices that a config names, and how its steps run there.

    Raises:
      InputError: if there are fewer devices, or the batch is not divisible.
    """
    settings, networks = experiment.config.parallel, experiment.networks
    batch, parts = (
        experiment.config.data.batch_size,
        experiment.config.optimizer.accumulate,
    )
    mesh = parallel.make_mesh(settings.num_devices, batch, parts, networks.group)
    alone = batch // (mesh.size * parts) % networks.group == 0
    whole = networks.whole_batch or not alone
    return mesh, parallel.make_layout(settings.mode, mesh, settings.fsdp, whole)


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
        like = self._layout.restored_like(_state_shapes(experiment))
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
        if length not in self._compiled:
            start = time.monotonic()
            self._compiled[length] = self._jitted.lower(*inputs, length).compile()
            self.compile_seconds += time.monotonic() - start
        state, *told = self._compiled[length](*inputs)
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


def next_stop(step: int, per_dispatch: int, total: int, intervals: list[int]) -> int:
    """Returns where the dispatch that starts at `step` ends.

    At the next multiple of `per_dispatch` or of an interval (0: never), so that
    the cuts are the same in a resumed run as in an unbroken one.
    """
    candidates = [n for n in (per_dispatch, *intervals) if n > 0]
    return min(total, *((step // n + 1) * n for n in candidates))


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a directory is new, or a run of this very config; writes nothing.

    Raises:
      InputError: if the directory holds something else, or a run whose config
        differs in a field that changes the model or the data.
    """
    path = workdir / CONFIG_FILE
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; name a directory")
    if not path.exists():
        if any(
            found.suffix != ".partial" and found.name != LOCK_FILE
            for found in workdir.iterdir()
        ):
            raise InputError(
                f"--workdir={workdir} is not empty and holds no {CONFIG_FILE}, so it "
                "is not a run; name a new directory"
            )
        return
    changed = config_lib.differences(read_config(workdir), config)
    refused = {
        name: pair
        for name, pair in changed.items()
        if not name.startswith(config_lib.FREE_ON_RESUME)
        or (name == "train.num_steps" and config_lib.decays(config))
    }
    if refused:
        listed = ", ".join(
            f"{n} (was {o!r}, is {w!r})" for n, (o, w) in refused.items()
        )
        raise InputError(
            f"--workdir={workdir} belongs to another config: {listed}; give these "
            "fields their old values, or name a new --workdir"
        )
    for name, (old, new) in changed.items():
        logging.info("resuming with %s = %r (was %r)", name, new, old)


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """Reads the config of a run directory.

    Raises:
      InputError: if there is none, or it is not a config of this version.
    """
    path = workdir / CONFIG_FILE
    try:
        text = read_text(path, _LARGEST_CONFIG)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); --workdir must name a run "
            "directory that --mode=train has made"
        ) from error
    try:
        return config_lib.from_json(text)
    except config_lib.ConfigError as error:
        raise InputError(f"{path}: {error}") from error


def log_parameters(variables: models.Players) -> dict[str, int]:
    """Logs an overview of each network's parameters; returns their numbers."""
    try:
        from clu import parameter_overview
    except ImportError:
        parameter_overview = None
    counts = {}
    for name, value in variables._asdict().items():
        params = value["params"]
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
        if params and parameter_overview is not None:
            table = parameter_overview.get_parameter_overview(
                params, include_stats=False
            )
            logging.info("%s\n%s", name, table)
    logging.info("parameters: %s", counts)
    return counts


def _check_data(saved: dict | None, source: Source, workdir: Path) -> None:
    """Raises InputError if a run's data have changed since its checkpoint.

    Imported weights have no data of their own (None).
    """
    if saved is not None and saved != source.metadata():
        raise InputError(
            f"the data '{source.name}' are not those that {workdir} was trained on; "
            "bring the old files back, or name a new --workdir"
        )


class _NotFinite(Exception):
    """Some steps had a number that is not finite.

    Attributes:
      fault: on the host.
    """

    def __init__(self, fault: minimax.Fault) -> None:
        super().__init__(fault.describe())
        self.fault = fault


class _Average:
    """The mean of metrics between two reports."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        """Starts anew, or with what `state` returned."""
        saved = saved or {"steps": 0, "sums": {}}
        self._steps = saved["steps"]
        self._sums = {name: np.array(value) for name, value in saved["sums"].items()}

    def add(self, metrics: dict[str, np.ndarray], steps: int) -> None:
        for name, value in metrics.items():
            added = np.asarray(value, np.float64) * steps
            self._sums[name] = self._sums.get(name, 0.0) + added
        self._steps += steps

    def take(self) -> dict[str, float]:
        mean = {name: value / self._steps for name, value in self._sums.items()}
        self._sums, self._steps = {}, 0
        return minimax.with_gaps(mean)

    def state(self) -> dict[str, Any]:
        """Returns what has not been reported yet, as JSON values."""
        sums = {name: np.asarray(value).tolist() for name, value in self._sums.items()}
        return {"steps": self._steps, "sums": sums}


def steps_per_dispatch(model_name: str) -> int:
    """Returns K where the config leaves it open.

    On a CPU a convolution inside a scan is about ten times slower than outside.
    """
    if model_name == "ncsnpp" and jax.default_backend() == "cpu":
        return 1
    return _STEPS_PER_DISPATCH[model_name]


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


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, or goes on training, in a run directory.

    Args:
      config: the recipe.
      workdir: the run directory: new, or one of the same config, whose newest
        checkpoint is then taken up.

    Returns:
      The final figures, as written to `report.json`.

    Raises:
      InputError: for a bad config, bad data, or a directory that is not this run's or
        is in use; nothing has been written then.
      TrainingError: if a loss or gradient is not finite, again and again, or no
        checkpoint can be written.
      Interrupted: after SIGTERM or SIGINT, when all is saved.
    """
    workdir = Path(workdir)
    started = time.monotonic()
    config_lib.validate(config)
    _check_processes_agree(config)
    open_workdir(workdir, config)
    parallel.wait_for_all("the run directory has been looked at")
    with contextlib.ExitStack() as stack:
        # Soon, because data may take minutes to open; but nothing is made before.
        locked = parallel.all_agree(workdir.exists())
        if locked:
            stack.enter_context(lock(workdir))
        use_compilation_cache(config.compilation_cache)
        experiment = build(config)
        dispatcher = Dispatcher(experiment)
        start = init_state(experiment)
        counts = log_parameters(start.variables)
        meter = figures.open_meter(experiment)
        if not locked:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(workdir))
            open_workdir(workdir, config)  # Another run may have made it meanwhile.
            parallel.wait_for_all("the run directory is ours")
        run, state = _open_run(stack, experiment, workdir, dispatcher, meter, start)
        del start
        try:
            with Interruption() as interruption:
                state = dispatcher.saved(_loop(run, state, interruption))
                interruption.all_saved(config.train.num_steps, config.train.num_steps)
                report = {
                    **_report(run, state),
                    "parameters": counts,
                    "seconds": time.monotonic() - started,
                }
                _finish(run, state, report)
        except KeyboardInterrupt:
            # At once: what is open would wait for what is being saved.
            stack.pop_all()
            raise
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1 or not _OF_PROCESSES.search(str(error)):
                raise
            # What is open waits for the others when it is closed, and they are gone.
            stack.pop_all()
            raise LostProcessError(
                f"the other processes cannot be reached any more ({_first_line(error)})"
                "; one of them has ended or hangs: see its output. Start all of them "
                "again with the same command: the run goes on from its newest "
                "checkpoint"
            ) from error
    return report


def _report(run: "_Run", state: minimax.TrainState) -> dict[str, Any]:
    """Returns what is known of a run at its end."""
    return {
        "step": run.experiment.config.train.num_steps,
        "figures": _final_figures(run, state),
        "compile_seconds": run.dispatcher.compile_seconds,
        "resumed_from_step": run.start.step,
        "rollbacks": run.progress.trial,
        "device": f"{run.dispatcher.num_devices} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {"jax": jax.__version__},
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _check_processes_agree(config: ml_collections.ConfigDict) -> None:
    """Raises InputError, in every process, if one of them was given another config."""
    text = config_lib.to_json(config)
    found = parallel.differing_processes(text)
    if found is None:
        return
    process, first, other = found
    differences = config_lib.differences(
        config_lib.from_json(first), config_lib.from_json(other)
    )
    listed = ", ".join(
        f"{name} ({one!r} in process 0, {two!r} in process {process})"
        for name, (one, two) in differences.items()
    )
    raise InputError(
        f"the processes were given different configs: {listed}; start all of them with "
        "the same command"
    )


class _Start(NamedTuple):
    """Where a run starts, or goes on from a checkpoint.

    Attributes:
      step: the first that is not yet taken, counted from 0.
      info: of the checkpoint; empty at the beginning.
    """

    step: int
    info: dict[str, Any]


@dataclasses.dataclass
class _Progress:
    """What changes while a run goes on, besides its state.

    Attributes:
      average: of what has not been reported yet.
      trial: how often the run has gone back to a checkpoint.
    """

    average: _Average
    trial: int


class _Run(NamedTuple):
    """What the loop works with.

    Attributes:
      experiment: what the config describes.
      workdir: the run directory.
      dispatcher: takes the steps.
      batches: the input stream; None where there is none.
      checkpoints: the newest ones.
      saver: writes them.
      best: the one of the lowest FID; None without a meter.
      meter: measures images; None: not wanted.
      output: where reports go.
      watch: of the energies.
      info: what travels with every checkpoint.
      start: where this run starts or goes on.
      progress: how far it is.
    """

    experiment: Experiment
    workdir: Path
    dispatcher: Dispatcher
    batches: Batches | None
    checkpoints: Checkpoints
    saver: Saver
    best: BestCheckpoint | None
    meter: image_quality.Meter | None
    output: writers.Writers | writers.Silent
    watch: EnergyWatch
    info: dict[str, Any]
    start: _Start
    progress: _Progress


def _open_run(
    stack: contextlib.ExitStack,
    experiment: Experiment,
    workdir: Path,
    dispatcher: Dispatcher,
    meter: image_quality.Meter | None,
    start: minimax.TrainState,
) -> tuple[_Run, minimax.TrainState]:
    """Opens a run directory and all that must be closed; restores its newest state."""
    config, total = experiment.config, experiment.config.train.num_steps
    writes = parallel.is_first_process()
    if writes and not (workdir / CONFIG_FILE).exists():
        # First of all: from here on the directory is known as a run.
        write_text_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    stack.callback(checkpoints.close)
    found = dispatcher.restore(checkpoints, experiment)
    first = 0 if found is None else found.step
    if first > total:
        raise InputError(
            f"{workdir} has a checkpoint at step {first}, beyond train.num_steps "
            f"{total}; raise it, or name a new --workdir"
        )
    if found is not None:
        _check_data(found.info["data"], experiment.source, workdir)
    best = BestCheckpoint(workdir) if meter is not None else None
    if best is not None:
        stack.callback(best.close)
    batches = open_batches(experiment)
    if batches is not None:
        stack.callback(batches.close)
    output: writers.Writers | writers.Silent = writers.Silent()
    if writes:
        write_text_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))
        experiment.source.save(workdir)
        output = writers.Writers(
            workdir,
            first,
            total,
            config.train.tensorboard,
            config.data.batch_size if experiment.source.holds_images else None,
            () if found is None else found.info.get("waiting_metrics", ()),
        )
    stack.callback(output.close)
    output.message(
        f"training from step {first} to {total} in {workdir} on "
        f"{dispatcher.num_devices} {jax.default_backend()} device(s)"
    )
    recovery = config.recovery
    run = _Run(
        experiment=experiment,
        workdir=workdir,
        dispatcher=dispatcher,
        batches=batches,
        checkpoints=checkpoints,
        saver=Saver(checkpoints, recovery.save_patience),
        best=best,
        meter=meter,
        output=output,
        watch=EnergyWatch(recovery.max_energy, recovery.max_gap),
        info={"config": config.to_dict(), "data": experiment.source.metadata()},
        start=_Start(first, {} if found is None else found.info),
        progress=_Progress(_Average(), 0),
    )
    _take_up(run, run.start)
    return run, dispatcher.place(start) if found is None else found.state


def _take_up(run: _Run, start: _Start) -> None:
    """Puts all that has a position where a checkpoint was taken."""
    run.progress.average = _Average(start.info.get("unreported"))
    run.progress.trial = start.info.get("rollbacks", 0)
    run.dispatcher.start_trial(run.progress.trial)
    # Imported weights, and runs without a stream, have no position.
    if run.batches is not None and start.info.get("input") is not None:
        run.batches.restore(start.info["input"])


def _final_figures(run: _Run, state: minimax.TrainState) -> dict[str, Any]:
    """Measures the last state, and lets it compete for the lowest FID."""
    found = figures.evaluate(run.experiment, state.ema, run.meter)
    if run.best is not None:
        settings = run.experiment.config.evaluation
        fewer, compared = settings.num_samples_on_the_way, found
        if fewer not in (0, settings.num_samples):
            compared = figures.evaluate(run.experiment, state.ema, run.meter, fewer)
        _offer(run, state, compared)
    return found


def _offer(run: _Run, state: minimax.TrainState, found: dict[str, Any]) -> None:
    """Lets a state compete for the lowest FID; all processes, or none."""
    reason = None
    try:
        run.best.check()
    except CheckpointWriteError as error:
        reason = error
    if parallel.all_agree(reason is None):
        try:
            run.best.offer(state, found, run.info)
        except CheckpointWriteError as error:
            reason = error
    if reason is not None:
        logging.warning("the best checkpoint cannot be written: %s", reason)


def _finish(run: _Run, state: minimax.TrainState, report: dict[str, Any]) -> None:
    """Writes the final figures and pictures.

    Raises:
      TrainingError: if the report cannot be written.
    """
    step, failed = report["step"], None
    if parallel.is_first_process():
        try:
            write_json_atomically(run.workdir / REPORT_FILE, report)
        except OSError as error:
            failed = error.strerror
    if not parallel.all_agree(failed is None):
        raise TrainingError(
            f"{run.workdir / REPORT_FILE} cannot be written ({failed or 'process 0'}); "
            f"step {step} is saved: make room, and the same command measures again"
        )
    run.output.scalars(step, {f"final/{k}": v for k, v in report["figures"].items()})
    _draw(run, state, step)


def _draw(run: _Run, state: minimax.TrainState, step: int) -> None:
    """Draws the averaged model's pictures, into files and TensorBoard.

    All processes sample together; the first one keeps what is drawn. A picture that
    cannot be written is warned of.
    """
    with contextlib.ExitStack() as stack:
        directory = run.workdir / "samples"
        if not parallel.is_first_process():
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            pictures = figures.draw_pictures(run.experiment, state.ema, directory, step)
        except OSError as error:
            logging.warning(
                "the pictures of step %d cannot be written: %s", step, error
            )
            return
        for name, path in pictures.files.items():
            run.output.picture(step, name, path)
        run.output.histograms(step, pictures.histograms)


class _Taken(NamedTuple):
    """Steps that were started, and whose metrics have not been looked at.

    Attributes:
      start: the first of them.
      step: the one after the last.
      metrics: their mean, on the device.
      fault: the first of them that is not finite, on the device.
    """

    start: int
    step: int
    metrics: minimax.Metrics
    fault: minimax.Fault


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _loop(
    run: _Run, state: minimax.TrainState, interruption: Interruption
) -> minimax.TrainState:
    """Takes all steps that are left, going back to a checkpoint after a fault."""
    first, owed = run.start.step, tuple(run.start.info.get("owed", ()))
    while True:
        try:
            return _advance(run, state, first, owed, interruption)
        except _NotFinite as error:
            fault = error.fault
        # Outside the handler, which would keep the bad state in memory.
        del state
        state, first = _roll_back(run, fault)
        owed = ()


def _advance(
    run: _Run,
    state: minimax.TrainState,
    first: int,
    owed: tuple[str, ...],
    interruption: Interruption,
) -> minimax.TrainState:
    """Takes all steps that are left, with reports, pictures and checkpoints.

    Metrics are fetched when the next steps are already under way, so that the device
    does not wait; before anything is kept they are looked at first.

    Args:
      run: the run.
      state: where it is.
      first: the step there.
      owed: of `evaluate` and `draw`, what a signal kept from being done there.
      interruption: notes signals.

    Raises:
      _NotFinite: if a loss or gradient is not finite.
      Interrupted: for a signal, when all is saved.
    """
    config, total = run.experiment.config, run.experiment.config.train.num_steps
    train = config.train
    compiled = run.dispatcher.compile_seconds
    taken: _Taken | None = None
    stopping: signal.Signals | None = None

    def stop(step: int, owed: tuple[str, ...]) -> NoReturn:
        """Saves and leaves; what is owed is done when the run goes on."""
        by = stopping or interruption.noted(step, step)
        if taken is not None:
            _look_at(run, taken)
        info = {**_info(run), "owed": list(owed)}
        run.saver.finish(run.dispatcher.saved(state), info, wait=True)
        raise Interrupted(by or signal.SIGTERM, step, total)

    if owed:
        left = _measure(run, run.dispatcher.saved(state), first, owed, interruption)
        if left:
            stop(first, left)
    for start, step in dispatches(config, first):
        try:
            with interruption.at_once():
                batch = None if run.batches is None else run.batches.next(step - start)
        except Noted:
            stop(start, ())
        state, metrics, fault = run.dispatcher(state, step - start, batch)
        if taken is not None:
            _look_at(run, taken)
        taken = _Taken(start, step, metrics, fault)
        if run.dispatcher.compile_seconds > compiled:
            seconds = run.dispatcher.compile_seconds - compiled
            compiled = run.dispatcher.compile_seconds
            run.output.message(f"compiled {step - start} steps in {seconds:.1f} s")
            run.output.restart_clock(start)
        stopping = interruption.noted(start, step)
        due = tuple(
            name
            for name, every in (
                ("evaluate", train.evaluate_every),
                ("draw", train.picture_every),
            )
            if _due(step, every) and step < total
        )
        save = _due(step, train.checkpoint_every) or step == total
        run.saver.look()
        again = run.saver.due()
        if not (due or save or stopping or again):
            continue
        _look_at(run, taken)
        taken = None
        if stopping and step < total:
            stop(step, due)
        saved = run.dispatcher.saved(state)
        if due:
            left = _measure(run, saved, step, due, interruption)
            if left:
                stop(step, left)
        # Last: a run resumed from here has missed nothing.
        if step == total:
            run.saver.finish(saved, _info(run), wait=True)
        elif again:
            run.saver.finish(saved, _info(run), wait=False)
        elif save:
            run.saver.save(saved, _info(run))
        if due:
            run.output.restart_clock(step)
    return state


def _measure(
    run: _Run,
    saved: minimax.TrainState,
    step: int,
    due: tuple[str, ...],
    interruption: Interruption,
) -> tuple[str, ...]:
    """Evaluates and draws on the way; returns what a signal kept from being done."""
    try:
        if "evaluate" in due:
            fewer = run.experiment.config.evaluation.num_samples_on_the_way or None
            with interruption.at_once():
                found = figures.evaluate(run.experiment, saved.ema, run.meter, fewer)
            run.output.scalars(step, {f"evaluation/{k}": v for k, v in found.items()})
            if run.best is not None:
                _offer(run, saved, found)
            due = tuple(name for name in due if name != "evaluate")
        if "draw" in due:
            with interruption.at_once():
                _draw(run, saved, step)
    except Noted:
        return due
    return ()


def _info(run: _Run) -> dict[str, Any]:
    """Returns what a checkpoint taken now holds besides the state."""
    return {
        **run.info,
        "waiting_metrics": run.output.flush(),
        "input": None if run.batches is None else run.batches.state(),
        "unreported": run.progress.average.state(),
        "rollbacks": run.progress.trial,
    }


def _look_at(run: _Run, taken: _Taken) -> None:
    """Fetches the metrics of some steps, and reports where that is due.

    Raises:
      _NotFinite: if one of them is not finite.
    """
    train = run.experiment.config.train
    metrics, step = jax.device_get((taken.metrics, taken.fault.step))
    if step:
        raise _NotFinite(jax.device_get(taken.fault))
    average = run.progress.average
    average.add(metrics, taken.step - taken.start)
    if _due(taken.step, train.report_every) or taken.step == train.num_steps:
        values = average.take()
        run.output.report(taken.step, values)
        for warning in run.watch.warnings(values):
            logging.warning("step %d: %s", taken.step, warning)


def _roll_back(run: _Run, fault: minimax.Fault) -> tuple[minimax.TrainState, int]:
    """Goes back to the newest good checkpoint, with fresh noise from there on.

    Returns:
      Its state and step.

    Raises:
      TrainingError: if that has been done as often as the config allows.
    """
    config, trial = run.experiment.config, run.progress.trial
    most = config.recovery.max_rollbacks
    with contextlib.suppress(CheckpointWriteError):
        run.checkpoints.wait()
    if trial >= most:
        last = run.checkpoints.latest_step()
        kept = "there is no checkpoint" if last is None else f"step {last} is kept"
        raise TrainingError(
            f"{fault.describe()}; recovery.max_rollbacks is {most}, and the run has "
            f"gone back {trial} times; {kept}. Try a lower optimizer.learning_rate, a "
            "higher game.gamma, or optimizer.max_grad_norm, in a new --workdir"
        )
    found = run.dispatcher.restore(run.checkpoints, run.experiment)
    if found is None:
        state, start = init_state(run.experiment), _Start(0, {})
        state = run.dispatcher.place(state)
        if run.batches is not None:
            run.batches.restore({**run.batches.state(), "batches": 0})
    else:
        state, start = found.state, _Start(found.step, found.info)
    _take_up(run, start)
    if run.best is not None:
        run.best.forget_after(start.step)
    run.progress.trial = trial + 1
    run.dispatcher.start_trial(trial + 1)
    run.output.rewind(start.step)
    logging.warning(
        "%s: back to step %d, with fresh noise (%d of at most %d times)",
        fault.describe(),
        start.step,
        trial + 1,
        most,
    )
    return state, start.step
