"""What a run is worth: figures, pictures, the best checkpoint, the report.

Several processes measure and draw together; the first one writes.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from ddaebm_jax import game
from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import TrainingError
from ddaebm_jax.evaluation import figures
from ddaebm_jax.files import write_json_atomically
from ddaebm_jax.training.checkpoint_files import CheckpointError, CheckpointWriteError
from ddaebm_jax.training.preemption import Interruption, Noted
from ddaebm_jax.training.run_directory import REPORT_FILE
from ddaebm_jax.training.runs import Run


def due(train: ml_collections.ConfigDict, step: int) -> tuple[str, ...]:
    """Returns what of `evaluate` and `draw` is due after a step that is not the last.

    After the last one comes what is final, and nothing is on the way any more.
    """
    if step >= train.num_steps:
        return ()
    intervals = {"evaluate": train.evaluate_every, "draw": train.picture_every}
    return tuple(
        name for name, every in intervals.items() if every > 0 and step % every == 0
    )


def measure(
    run: Run,
    saved: game.TrainState,
    step: int,
    wanted: tuple[str, ...],
    interruption: Interruption,
) -> tuple[str, ...]:
    """Evaluates and draws on the way.

    Args:
      run: the run.
      saved: its state, as checkpoints and evaluation want it.
      step: where it is.
      wanted: of `evaluate` and `draw`, what is to be done.
      interruption: notes signals, which cut it short.

    Returns:
      Of what is wanted, what a signal kept from being done.
    """
    try:
        if "evaluate" in wanted:
            fewer = run.experiment.config.evaluation.num_samples_on_the_way or None
            with interruption.at_once():
                found = figures.evaluate(run.experiment, saved.ema, run.meter, fewer)
            run.output.scalars(step, {f"evaluation/{k}": v for k, v in found.items()})
            if run.best is not None:
                _offer(run, saved, found)
            wanted = tuple(name for name in wanted if name != "evaluate")
        if "draw" in wanted:
            with interruption.at_once():
                _draw(run, saved, step)
    except Noted:
        return wanted
    return ()


def _offer(run: Run, state: game.TrainState, found: dict[str, Any]) -> None:
    """Lets a state compete for the lowest FID; all processes, or none."""
    reason = None
    try:
        run.best.check()
    except CheckpointWriteError as error:
        reason = error
    if parallel.all_agree(reason is None):
        try:
            run.best.offer(state, found, run.info)
        except CheckpointError as error:  # All processes have it.
            reason = error
    if reason is not None:
        logging.warning("the best checkpoint cannot be kept: %s", reason)


def _draw(run: Run, state: game.TrainState, step: int) -> None:
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


def report(run: Run, state: game.TrainState) -> dict[str, Any]:
    """Returns what is known of a run at its end."""
    return {
        "step": run.experiment.config.train.num_steps,
        "figures": _final_figures(run, state),
        "compile_seconds": run.dispatcher.compile_seconds,
        "resumed_from_step": run.start.step,
        "rollbacks": run.progress.trial,
        "device": f"{run.dispatcher.mesh.size} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {"jax": jax.__version__},
        "parameters": run.parameters,
    }


def _final_figures(run: Run, state: game.TrainState) -> dict[str, Any]:
    """Measures the last state, and lets it compete for the lowest FID."""
    found = figures.evaluate(run.experiment, state.ema, run.meter)
    if run.best is not None:
        settings = run.experiment.config.evaluation
        fewer, compared = settings.num_samples_on_the_way, found
        if fewer not in (0, settings.num_samples):
            compared = figures.evaluate(run.experiment, state.ema, run.meter, fewer)
        _offer(run, state, compared)
    return found


def finish(run: Run, state: game.TrainState, report: dict[str, Any]) -> None:
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
