"""What is done with a trained run: sample, score, evaluate.

Everything is restored from the run directory alone.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ddaebm_jax import checkpointing, train, writers
from ddaebm_jax.data import tabular, test_rows
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures
from ddaebm_jax.files import write_json_atomically
from ddaebm_jax.models import Players


class Run(NamedTuple):
    """A trained run.

    Attributes:
      workdir: its directory.
      experiment: what its config describes.
      variables: the averaged variables of its newest checkpoint.
      step: of that checkpoint.
    """

    workdir: Path
    experiment: train.Experiment
    variables: Players
    step: int


def load_run(workdir: str | Path) -> Run:
    """Restores a run from its directory, which is only read.

    Raises:
      InputError: if the directory holds no run or no checkpoint.
    """
    workdir = Path(workdir)
    config = train.read_config(workdir)
    train.use_compilation_cache(config.compilation_cache)
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise checkpointing.CheckpointError(checkpointing.no_checkpoint(workdir))
        info = checkpoints.info(step)
        experiment = train.build(config, workdir)
        if experiment.source.metadata() != info["data"]:
            raise InputError(
                f"the data kept in {workdir} are not those of its checkpoint {step}; "
                "copy the whole run directory again"
            )
        state = checkpoints.restore(train.init_state(experiment), step)
    finally:
        checkpoints.close()
    return Run(workdir, experiment, state.ema, step)


def free_path(path: Path) -> Path:
    """Returns `path`, or with -1, -2, … before its suffix if it is taken."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return candidate


def _output_path(given: str | None, default: Path, suffixes: tuple[str, ...]) -> Path:
    if not given:
        return free_path(default)
    path = Path(given)
    if path.suffix not in suffixes:
        raise InputError(
            f"--output={given} ends in '{path.suffix}'; allowed: {', '.join(suffixes)}"
        )
    if path.exists():
        raise InputError(f"--output={given} exists already; name another file")
    if not path.parent.is_dir():
        raise InputError(f"--output={given}: {path.parent} is not a directory")
    return path


def _standardizer(run: Run) -> tabular.Standardizer | None:
    table = run.experiment.source.table
    return None if table is None else table.standardizer


def sample(
    workdir: str | Path, num_samples: int, seed: int, output: str | None = None
) -> Path:
    """Draws samples into an NPZ (`x`, in the data's own units) and a picture.

    Args:
      workdir: the run directory.
      num_samples: how many.
      seed: sample i depends on (seed, i) only.
      output: the NPZ; None: a free name in the run directory.

    Returns:
      The NPZ's path; the picture lies beside it.
    """
    if num_samples < 1:
        raise InputError(f"--num_samples is {num_samples}; at least 1 is needed")
    run = load_run(workdir)
    path = _output_path(output, run.workdir / "samples.npz", (".npz",))
    levels = figures.draw_levels(run.experiment, run.variables, num_samples, seed)
    standardizer = _standardizer(run)
    samples = levels[-1]
    if standardizer is not None:
        samples = standardizer.inverse(samples)
    np.savez(path, x=samples, seed=seed, step=run.step)
    picture = free_path(path.with_suffix(".png"))
    title = f"{num_samples} samples, step {run.step}"
    if run.experiment.source.distribution is not None:
        extent = max(1e-6, 1.1 * float(np.abs(samples).max()))
        writers.plot_samples(picture, samples, extent, title)
    else:
        table = run.experiment.source.table
        standardized = levels[-1]
        writers.plot_table(
            picture,
            table.train,
            standardized,
            {
                name: figures.energies(run.experiment, run.variables, rows)
                for name, rows in (
                    ("held-out inliers", test_rows(table, tabular.INLIER)),
                    ("samples", standardized),
                )
            },
            title,
        )
    logging.info("wrote %s and %s", path, picture)
    return path


def score(workdir: str | Path, rows_path: str, output: str | None = None) -> Path:
    """Writes the energies f(x, 0) of rows; larger is more likely.

    Args:
      workdir: the run directory.
      rows_path: CSV or NPZ, in the data's own units.
      output: CSV (`energy`, a line a row) or NPZ (`energy`); None: a free name in the
        run directory.

    Returns:
      The written file's path.
    """
    run = load_run(workdir)
    (dim,) = run.experiment.source.event_shape
    table = run.experiment.source.table
    columns = None if table is None else table.columns
    rows = tabular.read_rows(rows_path, dim, _standardizer(run), columns)
    path = _output_path(output, run.workdir / "scores.csv", (".csv", ".npz"))
    energies = figures.energies(run.experiment, run.variables, rows)
    if path.suffix == ".npz":
        np.savez(path, energy=energies)
    else:
        np.savetxt(path, energies, fmt="%.9g", header="energy", comments="")
    logging.info("wrote the energies of %d rows to %s", len(rows), path)
    return path


def evaluate(workdir: str | Path) -> dict[str, Any]:
    """Measures the newest checkpoint; writes and returns `evaluation.json`.

    Where that is there already, a free name is taken.
    """
    run = load_run(workdir)
    found = figures.evaluate(run.experiment, run.variables)
    report = {"step": run.step, "figures": found}
    write_json_atomically(free_path(run.workdir / "evaluation.json"), report)
    return report
