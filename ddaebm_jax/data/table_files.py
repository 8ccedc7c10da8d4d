"""Tables of numbers from CSV files, by pandas, and from NPZ files.

CSV: comma-separated numbers in UTF-8. The first line is a header if none of its cells
is a number; without one the columns are `column_0`, `column_1`, ….

NPZ: the table is the array `x`, or the only 2-D array.
"""

import csv
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddaebm_jax.errors import InputError, listed, one_line, shown
from ddaebm_jax.files import choose_array, npz_headers, open_regular, read_npz

# Largest CSV file, bytes; longest line, characters; most columns.
MAX_CSV_BYTES = 256 * 2**20
MAX_CSV_LINE = 2**20
MAX_CSV_COLUMNS = 2**16
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
    there is one.

    Raises:
      FileNotFoundError: if there is no such file.
      InputError: for a file that cannot be used; the message names the place and the
        value found.
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
    bad = np.argwhere(~(np.abs(table.rows) <= LARGEST))
    if len(bad):
        i, j = bad[0]
        raise InputError(
            f"{path}: {table.row_name(int(i))}, column {shown(table.columns[j])} is "
            f"{table.rows[i, j]}; finite numbers of size at most {LARGEST:.2g} are "
            "allowed; fill in missing values or drop the row"
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

    line, cells = next(_csv_rows(path), (0, []))
    if not cells:
        raise InputError(f"{path}: the file is empty; a row of numbers is needed")
    names = _csv_header(path, line, cells)
    columns = names or tuple(f"column_{j}" for j in range(len(cells)))
    try:
        with open_regular(path, MAX_CSV_BYTES) as file:
            frame = pd.read_csv(
                file,
                header=0 if names else None,
                dtype=np.float64,
                na_filter=False,
                encoding="utf-8-sig",
            )
        # pandas takes the first of too many columns for an index.
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError("rows longer than the header")
    except (ValueError, pd.errors.ParserError) as error:
        raise _csv_fault(path, columns, names is not None, error) from error
    rows, labels = frame.to_numpy(), None
    if labelled and label_column is not None:
        if label_column not in columns or len(columns) == 1:
            raise InputError(
                f"{path}: no column {shown(label_column)} for label_column beside "
                f"others; found: {listed(map(shown, columns))}"
            )
        label = columns.index(label_column)
        labels, rows = rows[:, label], np.delete(rows, label, axis=1)
        columns = columns[:label] + columns[label + 1 :]

    def row_name(i: int) -> str:
        later = itertools.islice(_csv_rows(path), i + (names is not None), None)
        return f"line {next(later)[0]}"

    return TableFile(columns, rows, labels, row_name)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of the rows that are not blank.

    For the header, and for messages: pandas does not tell where it fails.
    """
    with (
        open_regular(path, MAX_CSV_BYTES) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
    ):
        rows = csv.reader(iter(lambda: text.readline(MAX_CSV_LINE), ""), strict=True)
        try:
            for cells in rows:
                if len(cells) > 1 or "".join(cells).strip():
                    yield rows.line_num, cells
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 text after line {rows.line_num} "
                f"({error.reason}); save it as a CSV in UTF-8"
            ) from error
        except csv.Error as error:
            raise InputError(
                f"{path}: line {rows.line_num} is not CSV ({error}); save the table "
                "again as comma-separated values"
            ) from error


def _number(cell: str) -> float | None:
    """The cell's number, or None. Python's 1_000 is not a number here."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _csv_header(path: Path, line: int, cells: list[str]) -> tuple[str, ...] | None:
    """The columns' names, or None if the first line holds numbers."""
    if len(cells) > MAX_CSV_COLUMNS:
        raise InputError(
            f"{path}: line {line} has {len(cells)} columns; at most {MAX_CSV_COLUMNS} "
            "are allowed; save the table as NPZ"
        )
    numbers = [_number(cell) is not None for cell in cells]
    if all(numbers):
        return None
    if any(numbers):
        j = numbers.index(False)
        raise InputError(
            f"{path}: line {line}, column {j + 1} is {shown(cells[j])} beside cells "
            "that are numbers; a first line holds only names or only numbers; rename "
            "the columns or correct the cell"
        )
    names = tuple(cell.strip() for cell in cells)
    for j, name in enumerate(names):
        if not name or name in names[:j]:
            fault = f"{shown(name)} a second time" if name else "empty"
            raise InputError(
                f"{path}: line {line}, column {j + 1} of the header is {fault}; every "
                "column needs a name of its own (pandas: to_csv with index=False)"
            )
    return names


def _csv_fault(
    path: Path, columns: tuple[str, ...], header: bool, error: Exception
) -> InputError:
    """Returns an error that names the first cell that is no finite number."""
    for line, cells in itertools.islice(_csv_rows(path), header, None):
        if len(cells) != len(columns):
            return InputError(
                f"{path}: line {line} has {len(cells)} columns, the first line has "
                f"{len(columns)}; every line needs as many; add or remove cells there"
            )
        for name, cell in zip(columns, cells, strict=True):
            number = _number(cell)
            if number is None or not abs(number) <= LARGEST:
                return InputError(
                    f"{path}: line {line}, column {shown(name)} is {shown(cell)}; a "
                    "finite number is needed; drop the column or write it as numbers, "
                    "fill in missing values, and separate cells by commas"
                )
    return InputError(
        f"{path}: not a CSV of numbers ({one_line(error)}); save the table again"
    )


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
        if 8 * np.prod(array.shape, dtype=float) > MAX_NPZ_BYTES:
            raise InputError(
                f"{path}: the array {array} takes more than {MAX_NPZ_BYTES} bytes as "
                "float64, which is the most that is allowed; split the table"
            )
        if array.dtype.kind not in "biufO":  # Objects are refused when read.
            raise InputError(
                f"{path}: the array {array} does not hold real numbers; integers, "
                "floats and booleans are allowed; convert it before saving"
            )
    found = read_npz(path, MAX_NPZ_BYTES, [array.name for array in chosen])
    rows, *labels = (found[array.name].astype(np.float64) for array in chosen)
    columns = tuple(f"column_{j}" for j in range(rows.shape[1]))
    return TableFile(
        columns,
        rows,
        labels[0] if labels else None,
        lambda i: f"row {i} (counted from 0)",
    )
