"""The task `impute` of `--mode=restore`: rows whose empty cells are filled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ddaebm_jax import progress
from ddaebm_jax.commands import common
from ddaebm_jax.data.table_files import TableOptions, read_table_file
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import imputation
from ddaebm_jax.files import written_atomically
from ddaebm_jax.paths import user_path
from ddaebm_jax.reference import read as read_reference
from ddaebm_jax.training.trained_run import TrainedRun

# The interval of a cell, and the draws that it is taken from; values of a row that are
# so many times farther from the mean than all of training are refused.
_INTERVAL, _CELL_DRAWS, _FARTHEST = (5.0, 95.0), 200, 10.0


def impute(
    loaded: TrainedRun,
    input_path: str | Path,
    num_draws: int,
    header: str | None,
    seed: int,
    output: Path | None,
) -> Path:
    """Fill the empty cells of rows, write them, and return the path of the CSV."""
    table, data = loaded.experiment.source.table, loaded.experiment.config.data
    standardizer = table.standardizer
    reference = read_reference(loaded.variables.energy)
    if standardizer.whitening is not None or reference is None:
        raise InputError(
            "--task=impute needs a run with model.reference and without data.whiten, "
            "such as those of configs/table.py; train one"
        )
    how = header or data.header, "--header", data.label_column, tuple(data.drop_columns)
    options = TableOptions(*how, columns=table.columns, may_miss=True)
    file = read_table_file(user_path(input_path, "--input"), options)
    rows, known = file.rows, ~np.isnan(file.rows)
    if not known.any(axis=1).all() or known.all():
        empty = file.row_name(int(np.argmin(known.any(axis=1))))
        found = "no cell is empty" if known.all() else f"{empty} has no number"
        raise InputError(f"--input={input_path}: {found}; there is nothing to go by")
    whole = standardizer.transform(np.where(known, rows, standardizer.mean), "--input")
    most = _FARTHEST * np.abs(table.train).max()
    for i, j in np.argwhere(np.abs(whole) > most)[:1].tolist():
        raise InputError(
            f"--input={input_path}: {file.row_name(i)}, column {file.columns[j]} is "
            f"{rows[i, j]:g}, {abs(whole[i, j]):.3g} standard deviations from the mean "
            f"of training; at most {most:.3g} are allowed; correct the cell or empty it"
        )
    model, num = (loaded.experiment, loaded.variables), max(num_draws, _CELL_DRAWS)
    num_cells, gaps = int((~known).sum()), ~known.all(axis=1)
    with progress.phase(f"filling {num_cells} cells of {len(rows)} rows"):
        drawn = imputation.draw_cells(*model, whole[gaps], known[gaps], num, seed)
    drawn = standardizer.inverse(drawn.reshape(-1, rows.shape[1])).reshape(drawn.shape)
    filled, draws = rows.copy(), rows[:, None].repeat(num_draws, axis=1)
    filled[gaps] = np.where(known[gaps], rows[gaps], drawn.mean(axis=1))
    draws[gaps] = drawn[:, :num_draws]
    path = output or common.claimed(loaded.workdir / "filled.csv", ".npz")
    names, cells, places = file.text or (table.columns, filled, slice(None))
    cells = cells.astype(object)
    cells[:, places] = np.where(known, cells[:, places], filled)
    _write_csv(path, names, cells)
    intervals = common.claimed(path.with_name(f"{path.stem}-intervals.csv"))
    figures = filled[gaps], drawn.std(1), *np.percentile(drawn, _INTERVAL, axis=1)
    lines = [
        (np.flatnonzero(gaps)[i], table.columns[j], *(v[i, j] for v in figures))
        for i, j in np.argwhere(~known[gaps])
    ]
    _write_csv(intervals, ("row", "column", "mean", "std", "5%", "95%"), lines)
    with written_atomically(common.claimed(path.with_suffix(".npz"))) as output_file:
        columns = np.array(table.columns)
        np.savez(output_file, draws=draws, known=known, columns=columns)
    logging.info("filled %d cells of %d rows", num_cells, len(rows))
    return path


def _write_csv(path: Path, header: Sequence[str] | None, rows: Any) -> None:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=header)
    how = {"index": False, "header": header is not None, "lineterminator": "\n"}
    with written_atomically(path) as file:
        file.write(frame.to_csv(**how).encode())
