"""Tables of numbers from CSV files, by pandas, and from NPZ files.

CSV: comma-separated numbers in UTF-8. The first line is a header if none of its cells
is a number; without one the columns are `column_0`, `column_1`, …. Lines whose cells
are all blank are left out.

NPZ: the table is the array `x`, or the only 2-D array.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddaebm_jax.errors import InputError, listed, one_line, shown
from ddaebm_jax.files import choose_array, npz_headers, open_regular, read_npz

# Largest CSV file and longest first line, bytes.
MAX_CSV_BYTES = 256 * 2**20
MAX_CSV_LINE = 2**20
# Most bytes that a table may take as float64.
MAX_NPZ_BYTES = 512 * 2**20
# Largest number that float32 holds.
LARGEST = float(np.finfo(np.float32).max)

INLIER, OUTLIER = 0, 1


class TableFile(NamedTuple):
    """Columns' names, float64 rows, labels, and row i → its place, for messages."""

    columns: tuple[str, ...]
    rows: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"] | None
    row_name: Callable[[int], str]


def read_table_file(
    path: Path, label_column: str | None = None, labelled: bool = False
) -> TableFile:
    """Reads a `.csv` or `.npz` file, and checks that numbers are finite in float32.

    If it is `labelled`, the labels, 0 (inlier) or 1 (outlier), are the CSV's column or
    the NPZ's 1-D array of the name `label_column`; None: an NPZ's array `labels`, if
    there is one. Raises FileNotFoundError, or InputError, which names the place and
    the value found.
    """
    readers = {".csv": _read_csv, ".npz": _read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: the suffix is '{path.suffix}'; allowed: {', '.join(readers)}; "
            "save the table as one of these"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    table = reader(path, label_column, labelled)
    if not table.rows.size:
        raise InputError(
            f"{path}: the table is empty ({'×'.join(map(str, table.rows.shape))}); at "
            "least one row and one column of numbers are needed"
        )
    if table.labels is not None:
        bad = np.flatnonzero(~np.isin(table.labels, (INLIER, OUTLIER)))
        if len(bad):
            raise InputError(
                f"{path}: {table.row_name(int(bad[0]))} has the label "
                f"{table.labels[bad[0]]}; allowed: 0 (inlier), 1 (outlier); write "
                "the labels as 0 and 1"
            )
    return table


# --- CSV ------------------------------------------------------------------------


def _read_csv(path: Path, label_column: str | None, labelled: bool) -> TableFile:
    import pandas as pd

    try:
        with open_regular(path, MAX_CSV_BYTES) as file:
            if len(file.readline(MAX_CSV_LINE)) == MAX_CSV_LINE:
                raise ValueError(f"its first line is longer than {MAX_CSV_LINE} bytes")
            file.seek(0)
            # As text, so that a cell that is no number can be named.
            cells = pd.read_csv(
                file,
                header=None,
                dtype=object,
                na_filter=False,
                skip_blank_lines=False,
                encoding="utf-8-sig",
            ).to_numpy()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a CSV of numbers ({one_line(error)}); save the table again "
            "as comma-separated values in UTF-8, with as many cells on every line"
        ) from error
    lines = np.flatnonzero([any(cell.strip() for cell in row) for row in cells])
    columns = _csv_header(path, cells[lines[0]]) if len(lines) else ()
    if columns:
        lines = lines[1:]
    else:
        columns = tuple(f"column_{j}" for j in range(cells.shape[1]))
    rows = np.empty((len(lines), len(columns)))
    for row, line in zip(rows, lines, strict=True):
        for j, cell in enumerate(cells[line]):
            row[j] = _number(cell)
            if not abs(row[j]) <= LARGEST:
                raise InputError(
                    f"{path}: line {line + 1}, column {shown(columns[j])} is "
                    f"{shown(cell)}; a finite number of size at most {LARGEST:.2g} is "
                    "needed; fill in missing values, write columns as numbers or drop "
                    "them, and separate cells by commas"
                )
    labels = None
    if labelled and label_column is not None:
        if label_column not in columns or len(columns) == 1:
            raise InputError(
                f"{path}: no column {shown(label_column)} for label_column beside "
                f"others; found: {listed(map(shown, columns))}"
            )
        label = columns.index(label_column)
        labels, rows = rows[:, label], np.delete(rows, label, axis=1)
        columns = columns[:label] + columns[label + 1 :]
    return TableFile(columns, rows, labels, lambda i: f"line {lines[i] + 1}")


def _number(cell: str) -> float:
    """Returns the cell's number, or NaN."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _csv_header(path: Path, cells: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the columns; () if the first line holds numbers."""
    names = tuple(cell.strip() for cell in cells)
    numbers = [not math.isnan(_number(name)) for name in names]
    if all(numbers):
        return ()
    for j, name in enumerate(names):
        if any(numbers) and not numbers[j]:
            fault = "beside cells that are numbers; write only names or only numbers"
        elif not name or name in names[:j]:
            fault = "empty or used twice (in pandas: to_csv with index=False)"
        else:
            continue
        raise InputError(
            f"{path}: line 1, column {j + 1} of the header is {shown(name)}, {fault}; "
            "every column needs a name of its own"
        )
    return names


# --- NPZ ------------------------------------------------------------------------


def _read_npz(path: Path, label_column: str | None, labelled: bool) -> TableFile:
    arrays = npz_headers(path, MAX_NPZ_BYTES)
    chosen = [choose_array(path, arrays, 2)]
    if len(chosen[0].shape) != 2:
        raise InputError(
            f"{path}: the array {chosen[0]} is not 2-D; save rows × columns with "
            "numpy.savez(path, x=rows)"
        )
    label = label_column or ("labels" if "labels" in arrays else None)
    if labelled and label is not None:
        if label not in arrays or arrays[label].shape != chosen[0].shape[:1]:
            raise InputError(
                f"{path}: label_column needs a 1-D array {shown(label)} with a label "
                f"for each of the {chosen[0].shape[0]} rows; found: "
                f"{listed(arrays.values())}"
            )
        chosen.append(arrays[label])
    for array in chosen:
        size = 8 * math.prod(array.shape)
        # Objects are refused when read.
        if size > MAX_NPZ_BYTES or array.dtype.kind not in "biufO":
            raise InputError(
                f"{path}: the array {array} is no table of real numbers of at most "
                f"{MAX_NPZ_BYTES} bytes as float64; convert it to numbers, or split it"
            )
    found = read_npz(path, MAX_NPZ_BYTES, [array.name for array in chosen])
    rows, *labels = (found[array.name].astype(np.float64) for array in chosen)
    bad = np.argwhere(~(np.abs(rows) <= LARGEST))
    if len(bad):
        i, j = bad[0]
        raise InputError(
            f"{path}: row {i} (counted from 0), column 'column_{j}' is {rows[i, j]}; "
            f"a finite number of size at most {LARGEST:.2g} is needed; fill in missing "
            "values or drop the row"
        )
    columns = tuple(f"column_{j}" for j in range(rows.shape[1]))
    return TableFile(
        columns, rows, labels[0] if labels else None, "row {} (counted from 0)".format
    )
