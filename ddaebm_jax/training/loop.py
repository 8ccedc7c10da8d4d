"""The loop: takes the steps of a run, and ends in good order whatever stops it.

It owns no mathematics. State is in plain sight, and every dispatch is a pure function
of it. What the loop works with is opened by `runs`; what it shows, `measuring` does.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import ml_collections
from absl import logging

from ddaebm_jax import config as config_lib
from ddaebm_jax import diagnostics, game
from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import InputError, LostProcessError, OutOfStepError
from ddaebm_jax.training import dispatch, measuring, run_directory, runs
from ddaebm_jax.training.preemption import Interrupted, Interruption, Noted
from ddaebm_jax.training.runs import Run


class _NotFinite(Exception):
    """Some steps had a number that is not finite.

    Attributes:
      fault: on the host.
    """

    def __init__(self, fault: diagnostics.Fault) -> None:
        super().__init__(fault.describe())
        self.fault = fault


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
    metrics: diagnostics.Metrics
    fault: diagnostics.Fault


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
    with contextlib.ExitStack() as stack, _leaving_at_once(stack):
        _check_processes_agree(config)
        run_directory.open_workdir(workdir, config)
        parallel.wait_for_all("the run directory has been looked at")
        run, state = runs.open_run(stack, config, workdir)
        with Interruption() as interruption:
            state = _loop(run, state, interruption)
            interruption.all_saved(config.train.num_steps, config.train.num_steps)
            report = measuring.report(run, state)
            report["seconds"] = time.monotonic() - started
            measuring.finish(run, state, report)
    return report


@contextlib.contextmanager
def _leaving_at_once(stack: contextlib.ExitStack) -> Iterator[None]:
    """Leaves what is open as it is where closing it would hold up who leaves.

    Raises:
      LostProcessError: for an error that comes of other processes.
    """
    try:
        yield
    except (KeyboardInterrupt, OutOfStepError):
        # At once: what is open would wait for what is being saved, or for others.
        stack.pop_all()
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not parallel.comes_of_others(error):
            raise
        # What is open waits for the others when it is closed, and they are gone.
        stack.pop_all()
        raise LostProcessError(error) from error


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


def _loop(
    run: Run, state: game.TrainState, interruption: Interruption
) -> game.TrainState:
    """Takes all steps that are left, going back to a checkpoint after a fault."""
    first, owed = run.start.step, tuple(run.start.info.get("owed", ()))
    while True:
        try:
            return _advance(run, state, first, owed, interruption)
        except _NotFinite as error:
            fault = error.fault
        # Outside the handler, which would keep the bad state in memory.
        del state
        state, first = runs.roll_back(run, fault)
        owed = ()


def _advance(
    run: Run,
    state: game.TrainState,
    first: int,
    owed: tuple[str, ...],
    interruption: Interruption,
) -> game.TrainState:
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
    train = run.experiment.config.train
    taken: _Taken | None = None
    if owed:
        saved = state
        owed = measuring.measure(run, saved, first, owed, interruption)
        del saved
        if owed:
            _stop(run, state, first, owed, interruption.noted(first, first))
    for start, step in dispatch.dispatches(run.experiment.config, first):
        try:
            with interruption.at_once():
                batch = None if run.batches is None else run.batches.next(step - start)
        except Noted:
            if taken is not None:
                _look_at(run, taken)
            _stop(run, state, start, (), interruption.noted(start, start))
        before = run.dispatcher.compile_seconds
        state, metrics, fault = run.dispatcher(state, step - start, batch)
        if taken is not None:
            _look_at(run, taken)
        taken = _Taken(start, step, metrics, fault)
        compiled = run.dispatcher.compile_seconds - before
        if compiled > 0:
            run.output.message(f"compiled {step - start} steps in {compiled:.1f} s")
            run.output.restart_clock(start)
        stopping = interruption.noted(start, step)
        due = measuring.due(train, step)
        save = step % train.checkpoint_every == 0 or step == train.num_steps
        run.saver.look(meeting=step % train.report_every == 0)
        again = run.saver.due()
        if not (due or save or stopping or again):
            continue
        _look_at(run, taken)
        taken = None
        if stopping and step < train.num_steps:
            _stop(run, state, step, due, stopping)
        saved = state
        if due:
            left = measuring.measure(run, saved, step, due, interruption)
            if left:
                _stop(run, state, step, left, interruption.noted(step, step))
        # Last: a run resumed from here has missed nothing.
        if step == train.num_steps:
            run.saver.finish(saved, runs.checkpoint_info(run), wait=True)
        elif again:
            run.saver.finish(saved, runs.checkpoint_info(run), wait=False)
        elif save:
            run.saver.save(saved, runs.checkpoint_info(run))
        if due:
            run.output.restart_clock(step)
    return state


def _stop(
    run: Run,
    state: game.TrainState,
    step: int,
    owed: tuple[str, ...],
    by: signal.Signals | None,
) -> NoReturn:
    """Saves and leaves; what is owed is done when the run goes on.

    Raises:
      Interrupted: always.
    """
    info = {**runs.checkpoint_info(run), "owed": list(owed)}
    run.saver.finish(state, info, wait=True)
    total = run.experiment.config.train.num_steps
    raise Interrupted(by or signal.SIGTERM, step, total)


def _look_at(run: Run, taken: _Taken) -> None:
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
    if taken.step % train.report_every == 0 or taken.step == train.num_steps:
        values = average.take()
        run.output.report(taken.step, values)
        for warning in run.watch.warnings(values):
            logging.warning("step %d: %s", taken.step, warning)
