"""A run that trains: all that it works with, opened, and taken up from a checkpoint."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from ddaebm_jax import (
    diagnostics,
    game,
    models,
)
from ddaebm_jax import (
    experiment as experiments,
)
from ddaebm_jax import (
    sharding as parallel,
)
from ddaebm_jax.data import Source
from ddaebm_jax.data.images import Batches
from ddaebm_jax.errors import InputError, TrainingError
from ddaebm_jax.evaluation import figures, image_quality
from ddaebm_jax.training import dispatch, reports
from ddaebm_jax.training.best_checkpoint import BestCheckpoint
from ddaebm_jax.training.checkpoint_files import CheckpointWriteError
from ddaebm_jax.training.checkpoints import Checkpoints, Restored
from ddaebm_jax.training.locking import lock
from ddaebm_jax.training.recovery import EnergyWatch, Saver
from ddaebm_jax.training.run_directory import CONFIG_FILE, open_workdir, write_config


class Start(NamedTuple):
    """Where a run starts, or goes on from a checkpoint.

    Attributes:
      step: the first that is not yet taken, counted from 0.
      info: of the checkpoint; empty at the beginning.
    """

    step: int
    info: dict[str, Any]


class Average:
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
        return diagnostics.energy_gaps_by_t(mean)

    def state(self) -> dict[str, Any]:
        """Returns what has not been reported yet, as JSON values."""
        sums = {name: np.asarray(value).tolist() for name, value in self._sums.items()}
        return {"steps": self._steps, "sums": sums}


@dataclasses.dataclass
class Progress:
    """What changes while a run goes on, besides its state.

    Attributes:
      average: of what has not been reported yet.
      trial: how often the run has gone back to a checkpoint.
    """

    average: Average
    trial: int


class Run(NamedTuple):
    """What a run works with while it trains.

    Attributes:
      experiment: what the config describes.
      workdir: the run directory.
      parameters: how many each network has.
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

    experiment: experiments.Experiment
    workdir: Path
    parameters: dict[str, int]
    dispatcher: dispatch.Dispatcher
    batches: Batches | None
    checkpoints: Checkpoints
    saver: Saver
    best: BestCheckpoint | None
    meter: image_quality.Meter | None
    output: reports.Writers | reports.Silent
    watch: EnergyWatch
    info: dict[str, Any]
    start: Start
    progress: Progress


def open_run(
    stack: contextlib.ExitStack, config: ml_collections.ConfigDict, workdir: Path
) -> tuple[Run, game.TrainState]:
    """Builds what a config describes, and opens its run directory.

    Args:
      stack: gets all that must be closed.
      config: the recipe.
      workdir: new, or looked at by `run_directory.open_workdir`.

    Returns:
      The run, and its newest state or the one before the first step.

    Raises:
      InputError: as `train.train`.
    """
    # Soon, because data may take minutes to open; but nothing is made before.
    locked = parallel.all_agree(workdir.exists())
    if locked:
        stack.enter_context(lock(workdir))
    dispatch.use_compilation_cache(config.compilation_cache)
    experiment = experiments.build(config)
    dispatcher = dispatch.Dispatcher(experiment)
    start = experiments.init_state(experiment)
    counts = _log_parameters(start.variables)
    meter = figures.open_meter(experiment)
    if not locked:
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(workdir))
        open_workdir(workdir, config)  # Another run may have made it meanwhile.
        parallel.wait_for_all("the run directory is ours")
    if parallel.is_first_process() and not (workdir / CONFIG_FILE).exists():
        # First of all: from here on the directory is known as a run.
        write_config(workdir, config)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    stack.callback(checkpoints.close)
    found = _newest(checkpoints, dispatcher, experiment, workdir)
    at = Start(0, {}) if found is None else Start(found.step, found.info)
    best = BestCheckpoint(workdir) if meter is not None else None
    if best is not None:
        stack.callback(best.close)
    batches = experiments.open_batches(experiment)
    if batches is not None:
        stack.callback(batches.close)
    output = _open_output(experiment, workdir, at)
    stack.callback(output.close)
    output.message(
        f"training from step {at.step} to {config.train.num_steps} in {workdir} on "
        f"{dispatcher.mesh.size} {jax.default_backend()} device(s)"
    )
    recovery = config.recovery
    run = Run(
        experiment=experiment,
        workdir=workdir,
        parameters=counts,
        dispatcher=dispatcher,
        batches=batches,
        checkpoints=checkpoints,
        saver=Saver(checkpoints, recovery.save_patience),
        best=best,
        meter=meter,
        output=output,
        watch=EnergyWatch(recovery.max_energy, recovery.max_gap),
        info={"config": config.to_dict(), "data": experiment.source.metadata()},
        start=at,
        progress=Progress(Average(), 0),
    )
    _take_up(run, at)
    return run, dispatcher.init() if found is None else found.state


def _newest(
    checkpoints: Checkpoints,
    dispatcher: dispatch.Dispatcher,
    experiment: experiments.Experiment,
    workdir: Path,
) -> Restored | None:
    """Restores the newest state; None where there is none yet.

    Raises:
      InputError: if it is beyond the end, or of other data.
    """
    total = experiment.config.train.num_steps
    found = checkpoints.restore_newest(dispatcher.like())
    if found is None:
        return None
    if found.step > total:
        raise InputError(
            f"{workdir} has a checkpoint at step {found.step}, beyond train.num_steps "
            f"{total}; raise it, or name a new --workdir"
        )
    _check_data(found.info["data"], experiment.source, workdir)
    return found


def _open_output(
    experiment: experiments.Experiment, workdir: Path, at: Start
) -> reports.Writers | reports.Silent:
    """Writes what a run directory keeps from the start; opens its reports.

    Only the first of several processes writes.
    """
    if not parallel.is_first_process():
        return reports.Silent()
    config = experiment.config
    write_config(workdir, config)
    experiment.source.save(workdir)
    return reports.Writers(
        workdir,
        at.step,
        config.train.num_steps,
        config.train.tensorboard,
        config.data.batch_size if experiment.source.holds_images else None,
        at.info.get("waiting_metrics", ()),
    )


def _log_parameters(variables: models.Players) -> dict[str, int]:
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


def _take_up(run: Run, start: Start) -> None:
    """Puts all that has a position where a checkpoint was taken."""
    run.progress.average = Average(start.info.get("unreported"))
    run.progress.trial = start.info.get("rollbacks", 0)
    run.dispatcher.reseed(run.progress.trial)
    # Imported weights, and runs without a stream, have no position.
    if run.batches is not None and start.info.get("input") is not None:
        run.batches.restore(start.info["input"])


def checkpoint_info(run: Run) -> dict[str, Any]:
    """Returns what a checkpoint taken now holds besides the state."""
    return {
        **run.info,
        # Lines are written before what they tell of is kept, or else kept with it.
        "waiting_metrics": run.output.flush(),
        "input": None if run.batches is None else run.batches.state(),
        "unreported": run.progress.average.state(),
        "rollbacks": run.progress.trial,
    }


def roll_back(run: Run, fault: diagnostics.Fault) -> tuple[game.TrainState, int]:
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
    found = run.checkpoints.restore_newest(run.dispatcher.like())
    if found is None:
        state, start = experiments.init_state(run.experiment), Start(0, {})
        state = run.dispatcher.init()
        if run.batches is not None:
            run.batches.restore({**run.batches.state(), "batches": 0})
    else:
        state, start = found.state, Start(found.step, found.info)
    _take_up(run, start)
    if run.best is not None:
        run.best.forget_after(start.step)
    run.progress.trial = trial + 1
    run.dispatcher.reseed(trial + 1)
    run.output.rewind(start.step)
    logging.warning(
        "%s: back to step %d, with fresh noise (%d of at most %d times)",
        fault.describe(),
        start.step,
        trial + 1,
        most,
    )
    return state, start.step
