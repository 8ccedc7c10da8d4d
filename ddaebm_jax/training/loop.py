"""The training loop: dispatches of K steps, and what is due between them.

It contains no mathematics. The state is in plain sight, and every dispatch is a pure
function of it, so that a resumed run is bit-identical to an unbroken one.
"""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging
from clu import parameter_overview

from ddaebm_jax import config as config_lib
from ddaebm_jax import errors, progress
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.data import open_source
from ddaebm_jax.data.batches import Batches
from ddaebm_jax.diagnostics import Fault, Metrics
from ddaebm_jax.evaluation import image_quality, pictures, placement
from ddaebm_jax.evaluation import metrics as metrics_lib
from ddaebm_jax.game import TrainState
from ddaebm_jax.models import Players
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import dispatch, pilot, processes, run_directory
from ddaebm_jax.training.checkpoints import Checkpoints
from ddaebm_jax.training.preemption import Preemption, Stopped
from ddaebm_jax.training.reports import Reports
from ddaebm_jax.training.trained_run import initial_variables


@dataclasses.dataclass
class Run:
    """A run that trains: what it works with, and its state on the host."""

    config: ml_collections.ConfigDict  # With the times of a pilot run.
    experiment: experiment_lib.Experiment
    workdir: Path
    dispatcher: dispatch.Dispatcher
    batches: Batches | None  # The input stream, where there is one.
    meter: image_quality.Meter | None  # Inception features, where they are wanted.
    checkpoints: Checkpoints
    reports: Reports
    first: Players | None  # Weights to start from, of train.init_from.
    trial: int = 0  # Number of rollbacks, which seeds the noise.


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train, or continue training, in a run directory.

    Args:
      config: the recipe.
      workdir: the run directory: new, or one of the same config, whose newest
        checkpoint is restored then.

    Returns:
      The final figures, as written to `report.json`.

    Raises:
      InputError: for a bad config, bad data, or a directory that is not this run's or
        is in use; nothing has been written then.
      TrainingError: if a loss or gradient is not finite, again and again, a
        checkpoint cannot be written, or the last one, which is saved, not be measured.
      LostProcessError: if another process cannot be reached.
      Stopped: after SIGTERM or SIGINT, when everything is saved.
    """
    started, workdir = time.monotonic(), user_path(workdir, "--workdir")
    config_lib.validate(config)
    config = config_lib.with_absolute_paths(config)
    config = run_directory.with_saved_times(workdir, config)
    try:
        processes.check_devices()
        processes.check_same_config(config)
        with contextlib.ExitStack() as stack:
            run = _open(config, workdir, stack)
            config = run.config
            state, first_step = _restore(run)
            # The evaluation of this step is done again: its end is not known.
            again = _is_due(config.train.evaluate_every, first_step, config)
            run.reports.rewind(first_step, first_step - again)
            if processes.is_first_process():
                run_directory.update_config(workdir, config)
                run.experiment.source.save(workdir)
            if first_step == 0 and config.levels.move_at:
                run.reports.write(0, placement.levels_to_report(run.experiment))
            with Preemption() as preemption:
                state = _loop(run, state, first_step, preemption)
            return _finish(run, state, first_step, started)
    except Exception as error:
        if processes.is_lost_process(error):
            raise errors.LostProcessError(error) from error
        raise


def _open(
    config: ml_collections.ConfigDict, workdir: Path, stack: contextlib.ExitStack
) -> Run:
    """Build what a config describes and open its run directory; `stack` closes all."""
    if processes.is_first_process():
        run_directory.check(workdir, config)
        stack.enter_context(run_directory.lock(workdir))
    processes.wait_for_all("the run directory is locked")
    dispatch.use_compilation_cache(config.compilation_cache)
    with progress.phase(f"opening the data '{config.data.name}'"):
        source = open_source(config.data, config.seed)
    (config,) = pilot.with_times([config], [source])
    experiment = experiment_lib.build_from(config, source)
    first = None
    if config.train.init_from and not Checkpoints(workdir, read_only=True).steps():
        first = initial_variables(config.train.init_from, experiment)
    dispatcher = dispatch.Dispatcher(experiment)
    meter = image_quality.open_meter(experiment)
    batches = experiment_lib.open_batches(experiment)
    if batches is not None:
        stack.callback(batches.close)
    new = not (workdir / run_directory.CONFIG_FILE).exists()
    if processes.is_first_process() and new:
        run_directory.write_config(workdir, config)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)

    def close(kind: Any, error: BaseException | None, trace: Any) -> None:
        # Closing waits for the save under way and for the other processes.
        failed = isinstance(error, Exception) and jax.process_count() > 1
        if not failed and not isinstance(error, KeyboardInterrupt):
            checkpoints.close()

    stack.push(close)
    reports = Reports(workdir, config, experiment.source.holds_images)
    stack.callback(reports.close)
    shapes = experiment_lib.state_shapes(experiment).variables._asdict()
    table_of = parameter_overview.get_parameter_overview
    for name, value in shapes.items():
        if params := value["params"]:
            progress.log(f"{name}\n{table_of(params, include_stats=False)}")
    tools = dispatcher, batches, meter, checkpoints, reports, first
    return Run(config, experiment, workdir, *tools)


def _restore(run: Run) -> tuple[TrainState, int]:
    """Return the newest intact state and its step; restore host-side state with it.

    Raises:
      InputError: if it lies beyond the end of the run, or belongs to other data.
    """
    found, steps = None, run.checkpoints.steps()
    if steps:
        with progress.phase(f"restoring step {steps[-1]}"):
            found = run.checkpoints.restore_newest(run.dispatcher.like())
    if found is None:
        with progress.phase("making the initial state"):
            state, step, info = run.dispatcher.init(run.first), 0, {}
    else:
        step, state, info = found
    total = run.experiment.config.train.num_steps
    if step > total:
        raise errors.InputError(
            f"{run.workdir} has a checkpoint at step {step}, beyond train.num_steps "
            f"{total}; raise it, or name a new --workdir"
        )
    source = run.experiment.source
    # Imported weights come without data (None).
    if info.get("data") not in (None, source.metadata()):
        raise errors.InputError(
            f"the data '{source.name}' are not those that {run.workdir} was trained "
            "on; bring the old files back, or name a new --workdir"
        )
    saved = info.get("config", run.config.to_dict())
    run.experiment = experiment_lib.with_levels_of(run.experiment, saved)
    run.dispatcher.set_levels(run.experiment.schedule)
    run.trial = info.get("trial", 0)
    run.dispatcher.reseed(run.trial)
    if run.batches is not None:
        beginning = {**run.batches.state(), "batches": 0}
        run.batches.restore(info.get("input") or beginning)
    return state, step


def _loop(run: Run, state: TrainState, step: int, preemption: Preemption) -> TrainState:
    """Take all steps that are left, with reports, checkpoints, pictures, evaluations.

    In this order: a step that is evaluated is saved first.

    Raises:
      Stopped: for a signal, when everything is saved.
    """
    config, train = run.experiment.config, run.experiment.config.train
    total, previous, stop = train.num_steps, None, None
    if _is_due(train.evaluate_every, step, config):
        _evaluate(run, state, step)
    while step < total and stop is None:
        start, step = step, dispatch.dispatch_end(config, step)
        evaluate = _is_due(train.evaluate_every, step, config)
        draw = _is_due(train.picture_every, step, config)
        save = step % train.checkpoint_every == 0 or step == total or evaluate
        move = step in config.levels.move_at
        bad = None
        # The rate before leaves out compilation, and ends before that of a used state.
        compiles = run.dispatcher.compiles(step - start)
        if compiles or evaluate or draw or save or move:
            bad, previous = _report(run, previous), None
        batches = None if run.batches is None else run.batches.next(step - start)
        state, metrics, fault = run.dispatcher(state, step - start, batches)
        current = step, step - start, metrics, fault

        stop = preemption.poll(start, step)
        run.checkpoints.poll()
        evaluate, draw = evaluate and stop is None, draw and stop is None
        save = save or stop is not None

        # Metrics are fetched while the next steps are under way, those of a state that
        # is used at once.
        bad = bad or _report(run, previous)
        if compiles:
            run.reports.restart_clock(start)
        if bad is None and (evaluate or draw or save or move):
            bad, current = _report(run, current), None
        previous = current
        if bad is not None:
            previous = None
            del state
            state, step = _roll_back(run, bad)
            continue

        if move:
            _move_levels(run, state, step)
        if stop is not None or step == total:
            run.checkpoints.save_whole(state, _info(run))
        elif save:
            run.checkpoints.save(state, _info(run))
        if evaluate or draw:
            run.checkpoints.wait()
        if draw:
            _draw(run, state, step)
        if evaluate:
            _evaluate(run, state, step)
        if evaluate or draw:
            run.reports.restart_clock(step)
    if stop is not None:
        raise Stopped(stop, step, total)
    return state


def _is_due(every: int, step: int, config: ml_collections.ConfigDict) -> bool:
    """Return whether an action is due; at the end of the run come the final ones."""
    return every > 0 and 0 < step < config.train.num_steps and step % every == 0


def _report(
    run: Run, dispatched: tuple[int, int, Metrics, Fault] | None
) -> Fault | None:
    """Fetch the metrics of a dispatch and report them; return its fault, if any."""
    if dispatched is None:
        return None
    step, length, metrics, fault = dispatched
    metrics, fault_step = jax.device_get((metrics, fault.step))
    if fault_step:
        return jax.device_get(fault)
    run.reports.add(step, length, metrics)
    return None


def _info(run: Run) -> dict[str, Any]:
    """Return the host-side state that a checkpoint holds besides the state."""
    return {
        "config": run.experiment.config.to_dict(),
        "data": run.experiment.source.metadata(),
        "input": None if run.batches is None else run.batches.state(),
        "trial": run.trial,
    }


def _move_levels(run: Run, state: TrainState, step: int) -> None:
    """Move the levels towards equal cost; the next checkpoint keeps them."""
    run.experiment = placement.with_moved_levels(run.experiment, state.ema)
    run.dispatcher.set_levels(run.experiment.schedule)
    run.reports.write(step, placement.levels_to_report(run.experiment))


def _roll_back(run: Run, fault: Fault) -> tuple[TrainState, int]:
    """Return to the newest good checkpoint, with fresh noise from there on.

    Raises:
      DivergedError: if that has been done as often as the config allows.
    """
    trial, most = run.trial, run.experiment.config.recovery.max_rollbacks
    run.checkpoints.wait()
    if trial >= most:
        last = max(run.checkpoints.steps(), default=None)
        kept = "there is no checkpoint" if last is None else f"step {last} is kept"
        raise errors.DivergedError(
            f"{fault.describe()}; recovery.max_rollbacks is {most}, and the run has "
            f"gone back {trial} times; {kept}. Try a lower optimizer.learning_rate, a "
            "higher game.gamma, or optimizer.max_grad_norm, in a new --workdir"
        )
    state, step = _restore(run)
    run.reports.rewind(step)
    run.trial = trial + 1
    run.dispatcher.reseed(run.trial)
    progress.log(
        f"{fault.describe()}: back to step {step}, with fresh noise ({run.trial} of at "
        f"most {most} times)",
        logging.WARNING,
    )
    return state, step


def _evaluate(run: Run, state: TrainState, step: int) -> None:
    """Evaluate on the way.

    A failure is only warned of, unless other processes wait in the midst of it.
    """
    fewer = run.experiment.config.evaluation.num_samples_on_the_way or None
    try:
        with progress.phase(f"evaluating step {step}"):
            found = metrics_lib.evaluate(run.experiment, state.ema, run.meter, fewer)
    except Exception as error:
        if jax.process_count() > 1:
            raise
        text = f"the evaluation of step {step} failed: {errors.one_line(error)}"
        progress.log(text, logging.WARNING)
        return
    run.reports.write(step, {f"evaluation/{k}": v for k, v in found.items()})
    _save_best(run, state, found)


def _save_best(run: Run, state: TrainState, found: dict[str, Any]) -> None:
    """Keep the state if its FID is the lowest so far."""
    if run.meter is not None:
        info = _info(run) | {"input": None}
        run.checkpoints.save_best(state, info, found["fid"])


def _draw(run: Run, state: TrainState, step: int) -> None:
    """Draw the averaged model's pictures and the curves so far.

    A failure skips them, as above. All processes sample together; the first one keeps
    the pictures.
    """
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(progress.phase(f"drawing pictures of step {step}"))
            run.reports.draw_curves(f"{run.experiment.source.name}, step {step}")
            directory = run.workdir / "samples"
            if not processes.is_first_process():
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            drawn = pictures.draw_pictures(run.experiment, state.ema, directory, step)
            run.reports.show(step, drawn.files, drawn.histograms)
    except Exception as error:
        if jax.process_count() > 1:
            raise
        text = f"the pictures of step {step} cannot be drawn: {errors.one_line(error)}"
        progress.log(text, logging.WARNING)


def _finish(
    run: Run, state: TrainState, first_step: int, started: float
) -> dict[str, Any]:
    """Draw and evaluate the last state, and write the report; return it.

    Raises:
      TrainingError: if it cannot be evaluated.
    """
    config, step = run.experiment.config, run.experiment.config.train.num_steps
    num, fewer = config.evaluation.num_samples, config.evaluation.num_samples_on_the_way
    inputs = run.experiment, state.ema, run.meter
    _draw(run, state, step)
    try:
        with progress.phase(f"evaluating step {step}"):
            found = compared = metrics_lib.evaluate(*inputs)
            if run.meter is not None and fewer not in (0, num):
                compared = metrics_lib.evaluate(*inputs, fewer)
    except Exception as error:
        is_ours = isinstance(error, errors.InputError)
        reason = error if is_ours else errors.one_line(error)
        raise errors.TrainingError(
            f"the model cannot be evaluated ({reason}); step {step} is saved: the same "
            "command evaluates it again, in less memory with a lower "
            f"evaluation.batch_size ({config.evaluation.batch_size})"
        ) from error
    _save_best(run, state, compared)
    report = {
        "step": step,
        "figures": found,
        "compile_seconds": run.dispatcher.compile_seconds,
        "resumed_from_step": first_step,
        "rollbacks": run.trial,
        "device": f"{run.dispatcher.mesh.size} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {"jax": jax.__version__},
        "parameters": {
            name: sum(leaf.size for leaf in jax.tree.leaves(value["params"]))
            for name, value in state.variables._asdict().items()
        },
        "seconds": time.monotonic() - started,
    }
    if processes.is_first_process():
        run_directory.write_report(run.workdir, report)
    run.reports.write(step, {f"final/{name}": value for name, value in found.items()})
    run.reports.draw_curves(f"{run.experiment.source.name}, step {step}")
    return report
