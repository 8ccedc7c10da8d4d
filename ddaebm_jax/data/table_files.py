"""Reads a table of numbers from a CSV or NPZ file.

Files are data from outside: sizes are bounded before anything is allocated, nothing
is ever unpickled, and every error names the file, the place and the value found.

CSV: comma-separated numbers in UTF-8. The first line is a header if none of its cells
is a number; without one the columns are `column_0`, `column_1`, ….

NPZ: the table is the array `x`, or the only 2-D array.
"""

import csv
import io
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddaebm_jax.data.npz_files import ArrayHeader, NpzFile, described, shown
from ddaebm_jax.errors import InputError
from ddaebm_jax.files import open_regular

# Largest CSV file that is read, bytes; longest line, characters; most columns.
MAX_CSV_BYTES = 256 * 2**20
MAX_CSV_LINE = 2**20
MAX_CSV_COLUMNS = 2**16
# Most bytes that an NPZ file may hold once decompressed, as its headers say, and
# most bytes that a table may take as float64.
MAX_NPZ_BYTES = 512 * 2**20

INLIER, OUTLIER = 0, 1

_LARGEST = float(np.finfo(np.float32).max)


class TableFile(NamedTuple):
    """What a file holds.

    Attributes:
      columns: names of the d columns.
      rows: their numbers, float64, finite in float32.
      labels: 0 (inlier) or 1 (outlier) for each row; None where there are none.
      row_name: the place of row i in the file, for messages.
    """

    columns: tuple[str, ...]
    rows: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"] | None
    row_name: Callable[[int], str]


def read_table_file(
    path: Path, label_column: str | None = None, labelled: bool = False
) -> TableFile:
    """Reads a file by its suffix, and checks that every number is usable.

    Args:
      path: ends in `.csv` or `.npz`.
      label_column: the CSV's column, or the NPZ's 1-D array, that holds the labels;
        None: none in a CSV, and in an NPZ the array `labels` if there is one.
      labelled: False: labels are not looked for.

    Raises:
      FileNotFoundError: if there is no such file.
      InputError: for a file that cannot be used; the message names the file, the
        place, the value found, what is allowed and what to try.
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
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; give the path of a file")
    table = reader(path, label_column, labelled)
    bad = np.argwhere(~(np.abs(table.rows) <= _LARGEST))
    if len(bad):
        i, j = bad[0]
        raise InputError(
            f"{path}: {table.row_name(i)}, column {shown(table.columns[j])} is "
            f"{table.rows[i, j]}; finite numbers of size at most {_LARGEST:.2g} are "
            "allowed; fill in missing values or drop the row"
        )
    if table.labels is not None:
        bad = np.flatnonzero(~np.isin(table.labels, (INLIER, OUTLIER)))
        if len(bad):
            raise InputError(
                f"{path}: {table.row_name(bad[0])} has the label "
                f"{table.labels[bad[0]]}; allowed: 0 (inlier), 1 (outlier); write "
                "the labels as 0 and 1"
            )
    return table


def _number(cell: str) -> float | None:
    """The cell's number, or None. Python's 1_000 is not a number here."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of a CSV file; blank lines are left out."""
    number = length = 0

    def bounded(text: io.TextIOWrapper) -> Iterator[str]:
        # A quote that is open could gather up the rest of the file.
        nonlocal number, length
        while line := text.readline(MAX_CSV_LINE + 1):
            number += 1
            length += len(line)
            if length > MAX_CSV_LINE:
                raise InputError(
                    f"{path}: the row at line {number} has more than {MAX_CSV_LINE} "
                    "characters, which no row of numbers needs; save the table again "
                    "with a row a line, or as NPZ"
                )
            yield line

    with (
        open_regular(path, MAX_CSV_BYTES) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
    ):
        try:
            for cells in csv.reader(bounded(text), strict=True):
                length = 0
                if len(cells) > MAX_CSV_COLUMNS:
                    raise InputError(
                        f"{path}: line {number} has {len(cells)} columns; at most "
                        f"{MAX_CSV_COLUMNS} are allowed; save the table as NPZ"
                    )
                if cells and (len(cells) > 1 or cells[0].strip()):
                    yield number, cells
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 text after line {number} "
                f"({error.reason}); save it as a CSV in UTF-8"
            ) from error
        except csv.Error as error:
            raise InputError(
                f"{path}: line {number} is not CSV ({error}); save the table again as "
                "comma-separated values"
            ) from error


def _csv_header(path: Path, line: int, cells: list[str]) -> tuple[str, ...] | None:
    """The columns' names, or None if the first line holds numbers."""
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


def _read_csv(path: Path, label_column: str | None, labelled: bool) -> TableFile:
    lines = _csv_lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path}: the file is empty; a row of numbers is needed")
    header = _csv_header(path, *first)
    width = len(first[1])
    columns = header or tuple(f"column_{j}" for j in range(width))
    label = _csv_label(path, columns, label_column) if labelled else None

    numbers, line_numbers = array("d"), array("q")

    def append(line: int, cells: list[str]) -> None:
        if len(cells) != width:
            raise InputError(
                f"{path}: line {line} has {len(cells)} columns, line {first[0]} has "
                f"{width}; every line needs as many; add or remove cells there"
            )
        for name, cell in zip(columns, cells, strict=True):
            number = _number(cell)
            if number is None:
                raise InputError(
                    f"{path}: line {line}, column {shown(name)} is {shown(cell)}; a "
                    "number is needed; drop the column or write it as numbers, fill "
                    "in missing values, and separate cells by commas"
                )
            numbers.append(number)
        line_numbers.append(line)
        if len(numbers) * numbers.itemsize > MAX_NPZ_BYTES:
            raise InputError(
                f"{path}: more than {MAX_NPZ_BYTES // numbers.itemsize} numbers, at "
                f"line {line}, which is the most that are allowed; split the table"
            )

    if header is None:
        append(*first)
    for line, cells in lines:
        append(line, cells)
    if not line_numbers:
        raise InputError(
            f"{path}: line {first[0]} is a header and no row follows; at least one "
            "row of numbers is needed"
        )
    rows = np.frombuffer(numbers, np.float64).reshape(-1, width)
    labels = None
    if label is not None:
        labels, rows = rows[:, label], np.delete(rows, label, axis=1)
        columns = columns[:label] + columns[label + 1 :]
    return TableFile(columns, rows, labels, lambda i: f"line {line_numbers[i]}")


def _csv_label(
    path: Path, columns: tuple[str, ...], label_column: str | None
) -> int | None:
    """The place of the label's column."""
    if label_column is None:
        return None
    if label_column not in columns:
        raise InputError(
            f"{path}: no column {shown(label_column)} for label_column; found: "
            f"{_listed(columns)}"
        )
    if len(columns) == 1:
        raise InputError(
            f"{path}: the label {shown(label_column)} is the only column; at "
            "least one other is needed"
        )
    return columns.index(label_column)


def _listed(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, not too many of them."""
    more = len(names) - most
    return ", ".join(map(shown, names[:most])) + (
        f" and {more} more" if more > 0 else ""
    )


_SAVE_AGAIN = "save it with numpy.savez(path, x=rows)"


def _read_npz(path: Path, label_column: str | None, labelled: bool) -> TableFile:
    with NpzFile(path, MAX_NPZ_BYTES, _SAVE_AGAIN) as file:
        table = _npz_table(path, file.arrays)
        rows = _npz_numbers(path, file, table)
        label = label_column
        if label is None and "labels" in file.arrays:
            label = "labels"
        labels = None
        if labelled and label is not None:
            chosen = _npz_labels(path, file.arrays, label, len(rows))
            labels = _npz_numbers(path, file, chosen)
    if not rows.size:
        raise InputError(
            f"{path}: the array {table} is empty; at least one row and one column "
            "are needed"
        )
    columns = tuple(f"column_{j}" for j in range(rows.shape[1]))
    return TableFile(columns, rows, labels, lambda i: f"row {i} (counted from 0)")


def _npz_table(path: Path, arrays: dict[str, ArrayHeader]) -> ArrayHeader:
    """Chooses the table among the arrays."""
    found = described(arrays)
    if "x" in arrays:
        if len(arrays["x"].shape) != 2:
            raise InputError(
                f"{path}: the array {arrays['x']} is not 2-D; rows × columns are "
                f"needed; {_SAVE_AGAIN}"
            )
        return arrays["x"]
    tables = [array for array in arrays.values() if len(array.shape) == 2]
    if len(tables) != 1:
        raise InputError(
            f"{path}: no array 'x' and {len(tables)} 2-D arrays where exactly one is "
            f"needed; found: {found}; {_SAVE_AGAIN}"
        )
    return tables[0]


def _npz_labels(
    path: Path, arrays: dict[str, ArrayHeader], name: str, num_rows: int
) -> ArrayHeader:
    if name not in arrays:
        raise InputError(
            f"{path}: no array {shown(name)} for label_column; found: "
            f"{described(arrays)}"
        )
    if arrays[name].shape != (num_rows,):
        raise InputError(
            f"{path}: the labels {arrays[name]} are not one for each of the "
            f"{num_rows} rows; save a 1-D array of that length"
        )
    return arrays[name]


def _npz_numbers(
    path: Path, file: NpzFile, array: ArrayHeader
) -> Float[np.ndarray, "..."]:
    """Reads one array as float64."""
    if array.size * 8 > MAX_NPZ_BYTES:
        raise InputError(
            f"{path}: the array {array} takes {array.size * 8} bytes as float64; at "
            f"most {MAX_NPZ_BYTES} are allowed; split the table"
        )
    if array.dtype.kind not in "biufO":
        raise InputError(
            f"{path}: the array {array} does not hold real numbers; integers, "
            "floats and booleans are allowed; convert it before saving"
        )
    with np.errstate(over="ignore"):
        return file.read(array).astype(np.float64)
