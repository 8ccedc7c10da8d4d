"""Tables of numbers from CSV files, by pandas, and from NPZ files.

CSV: comma-separated numbers in UTF-8. Blank lines, and columns that are blank on every
line, are left out; where cells may be missing, only blank lines at the end. Columns
without a header are `column_0`, `column_1`, ….

A first line with a cell that is no number is a header. One of numbers is a header if it
holds the names of the trained columns, or else if it is unlike every row below it:
evenly spaced, or in every column farther from the numbers below than these lie apart.
Either way a log line says so; `header` settles it.

NPZ: the table is the array `x` or `X`, or the only 2-D array; labels are `labels` or
`y`. A log line names the arrays that are not read.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
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
# An NPZ's arrays of labels, unless another is named.
_LABELS = ("labels", "y")
_MISSING = {"", "?", "-", "na", "n/a", "#n/a", "nan", "null", "none"}
# Rows with which a first line of numbers is compared.
_MIN_BELOW, _MAX_BELOW = 3, 1_000


class TableOptions(NamedTuple):
    """What is read of a file.

    Attributes:
      header: whether a CSV's first line is one: `auto`, `present` or `absent`.
      header_flag: the flag that sets it, for messages.
      label_column: column (CSV) or array (NPZ) of the labels of a table to train on;
        empty: none in a CSV, `labels` or `y` in an NPZ.
      drop_columns: columns, or arrays of an NPZ, that are no part of the table.
      id_column: column or array of the rows' names; empty: none.
      columns: of the model that rows are for, chosen by name where file and model have
        names, else by place, and without labels; None: a table to train on.
      may_miss: whether cells may be missing (empty, NaN, NA, …); they are NaN.
    """

    header: str = "auto"
    header_flag: str = "--config.data.header"
    label_column: str = ""
    drop_columns: tuple[str, ...] = ()
    id_column: str = ""
    columns: tuple[str, ...] | None = None
    may_miss: bool = False


class TableText(NamedTuple):
    """All cells of a CSV as text, its header if it has one, the table's columns."""

    header: tuple[str, ...] | None
    cells: np.ndarray
    places: list[int]


class TableFile(NamedTuple):
    """A table.

    Attributes:
      columns: names.
      rows: in float64.
      labels: of the rows, if they are read.
      row_name: row i → its place in the file.
      ids: the rows' names, if they are read.
      text: of a CSV, the whole file.
    """

    columns: tuple[str, ...]
    rows: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"] | None
    row_name: Callable[[int], str]
    ids: tuple[str, ...] | None = None
    text: TableText | None = None


def read_table_file(path: Path, options: TableOptions = TableOptions()) -> TableFile:  # noqa: B008
    """Reads a `.csv` or `.npz` file, and checks that numbers are finite in float32.

    Labels are 0 (inlier) or 1 (outlier). Raises FileNotFoundError, or InputError, which
    names the place and the value found.
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
    table = reader(path, options)
    if not table.rows.size:
        raise InputError(
            f"{path}: the table is empty ({'×'.join(map(str, table.rows.shape))}); at "
            "least one row and one column of numbers are needed"
        )
    return table


def are_positions(columns: Sequence[str]) -> bool:
    """Whether names only count columns: `column_0`, … or `0`, `1`, …."""
    numbered = all(re.fullmatch(r"column_\d+", name) for name in columns)
    return numbered or list(columns) == [str(j) for j in range(len(columns))]


def _select(
    path: Path, names: Sequence[str], options: TableOptions, has_header: bool
) -> list[int]:
    """Returns the places of a file's columns that make its table."""
    keys, model, ids = [*map(_key, names)], options.columns, options.id_column
    place, used = dict(zip(keys, range(len(keys)), strict=True)), Counter(keys)
    apart = [*filter(None, (options.label_column, ids)), *options.drop_columns]
    left_out = {*map(_key, apart)}
    chosen = [j for j, key in enumerate(keys) if key not in left_out]
    needed = apart if model is None else [ids] * bool(ids)
    if model is not None:
        named, of_model = (not are_positions(columns) for columns in (names, model))
        if has_header and {*map(_key, model)} <= {*keys}:
            chosen = [place[_key(name)] for name in model]
        elif named and of_model:
            needed += model
        else:
            if len(chosen) != len(model):  # Without what was left out in training.
                chosen = [j for j, name in enumerate(names) if not ids or name != ids]
            if len(chosen) != len(model):
                raise InputError(
                    f"{path}: {len(chosen)} columns found, {len(model)} needed; give "
                    "the columns that the model was trained on, by the names of "
                    "training, or in the same order and without labels"
                )
            if named or of_model:
                only, text = "file" if named else "model", "its columns are taken in "
                text = f"%s: {text}their order, as only the %s has names for them"
                logging.info(text, path, only)
    for name in needed:
        if _key(name) not in place:
            of_model = f"; the model was trained on {listed(model or ())}: give these"
            raise InputError(
                f"{path}: no column {shown(name)}; found: {listed(map(shown, names))}"
                + (of_model if name in (model or ()) else "; correct the name")
            )
    if names and not chosen:
        raise InputError(f"{path}: no column is left beside {listed(apart)}; keep some")
    for j in chosen if has_header else ():
        if not names[j] or used[keys[j]] > 1:
            raise InputError(
                f"{path}: column {j + 1} of the header is {shown(names[j])}, empty or "
                "used twice; give each a name of its own (in pandas: to_csv with "
                "index=False), or leave it out by data.drop_columns"
            )
    rest = [shown(names[j]) for j in sorted({*range(len(names))} - {*chosen})]
    if model is not None and rest:
        logging.info("%s: columns left out: %s", path, listed(rest))
    return chosen


def _check_finite(
    path: Path,
    rows: Float[np.ndarray, "n d"],
    row_name: Callable[[int], str],
    columns: Sequence[str],
    cells: np.ndarray,
    may_miss: bool,
) -> None:
    """Raises InputError with the first cell whose number float32 cannot hold."""
    for i, j in np.argwhere(~(np.abs(rows) <= LARGEST)).tolist():
        if may_miss and str(cells[i, j]).strip().lower() in _MISSING:
            continue
        raise InputError(
            f"{path}: {row_name(i)}, column {shown(columns[j])} is "
            f"{shown(str(cells[i, j]))}; a finite number of size at most {LARGEST:.2g} "
            "is needed; fill in missing values, write columns as numbers or drop them "
            "(data.drop_columns), and separate cells by commas"
        )


def _labels(
    path: Path, found: Sequence[Any], row_name: Callable[[int], str]
) -> Float[np.ndarray, " n"]:
    """Returns labels of numbers, booleans or text; InputError if not 0 or 1."""
    truth = {"true": OUTLIER, "false": INLIER}
    labels = [truth.get(str(one).lower(), _number(str(one))) for one in found]
    for i, label in enumerate(labels):
        if label not in (INLIER, OUTLIER):
            raise InputError(
                f"{path}: {row_name(i)} has the label {shown(str(found[i]))}; allowed: "
                "0 (inlier), 1 (outlier); write them so (scikit-learn's 1 and -1 as 0 "
                "and 1), or leave out what is no label by data.drop_columns"
            )
    return np.array(labels, np.float64)


# --- CSV ------------------------------------------------------------------------


def _read_csv(path: Path, options: TableOptions) -> TableFile:
    cells, lines = _cells(path, options.may_miss)
    names = tuple(cell.strip() for cell in cells[0]) if len(cells) else ()
    has_header = bool(names) and _has_header(path, names, cells[1:], options)
    if has_header:
        cells, lines = cells[1:], lines[1:]
    else:
        names = tuple(f"column_{j}" for j in range(cells.shape[1]))
    chosen = _select(path, names, options, has_header)
    rows = np.fromiter(map(_number, cells[:, chosen].flat), np.float64)
    rows = rows.reshape(len(cells), len(chosen))
    columns = tuple(names[j] for j in chosen)

    def row_name(i: int) -> str:
        return f"line {lines[i] + 1}"

    _check_finite(path, rows, row_name, columns, cells[:, chosen], options.may_miss)

    def column(name: str) -> tuple[str, ...]:
        place = [*map(_key, names)].index(_key(name))
        return tuple(cell.strip() for cell in cells[:, place])

    labels = ids = None
    if options.label_column and options.columns is None:
        labels = _labels(path, column(options.label_column), row_name)
    if options.id_column:
        ids = column(options.id_column)
    text = TableText(names if has_header else None, cells, chosen)
    return TableFile(columns, rows, labels, row_name, ids, text)


def _cells(path: Path, may_miss: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns a CSV's cells as text, and each row's line, without blanks.

    Those are lines and columns. Where cells may be missing, blank columns stay, and so
    do blank lines that others follow: such a line may be a row.
    """
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
            "as comma-separated values in UTF-8, without comments, with points as "
            "decimal separators, and with as many cells on every line (in R: write.csv "
            "with row.names=FALSE)"
        ) from error
    filled = np.fromiter((bool(cell.strip()) for cell in cells.flat), bool)
    filled = filled.reshape(cells.shape)
    lines = np.flatnonzero(filled.any(axis=1))
    if may_miss:
        lines = np.arange(lines.max(initial=-1) + 1)
        num = len(cells) - len(lines)
        text = "%s: %d blank lines at its end are left out"
        logging.log_if(logging.INFO, text, num > 0, path, num)
    blank = ~filled.any(axis=0) & (not may_miss)
    if len(lines) and blank.any():
        places = listed(np.flatnonzero(blank) + 1)
        logging.info("%s: columns left out, as they are blank: %s", path, places)
        cells = cells[:, ~blank]
    return cells[lines], lines


def _number(cell: str) -> float:
    """Returns the cell's number, or NaN; Python would read 1_000 and 12_3, too."""
    try:
        return math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan


def _key(name: str) -> str | float:
    """Returns what is the same for all ways to write a name that is a number."""
    number = _number(name)
    return name if math.isnan(number) else number


def _has_header(
    path: Path, first: tuple[str, ...], below: np.ndarray, options: TableOptions
) -> bool:
    """Whether the first line is a header; logged, unless all its cells are names."""
    numbers = [not math.isnan(_number(cell)) for cell in first]
    is_header = options.header == "present"
    if options.header != "auto":
        if not all(numbers):
            return is_header
    elif not all(numbers):
        # Names; blank is only that of an index, which no row leaves blank.
        is_index = not first[0] and bool(len(below)) and all(below[:, 0])
        is_header = is_index or any(
            not number and cell.lower() not in _MISSING
            for number, cell in zip(numbers, first, strict=True)
        )
        if not any(numbers):
            return is_header
    else:
        keys = {*map(_key, first)}
        of_model = bool(options.columns) and keys >= {*map(_key, options.columns)}
        is_header = of_model or (len(keys) == len(first) and _is_unlike(first, below))
    taken, other = "the header", "a row"
    if not is_header:
        taken, other = other, taken
    logging.info(
        "%s: its first line (%s) has numbers, and is taken for %s; %s=%s takes it for "
        "%s",
        *(path, listed(map(shown, first), 4), taken, options.header_flag),
        *("absent" if is_header else "present", other),
    )
    return is_header


def _is_unlike(first: tuple[str, ...], below: np.ndarray) -> bool:
    """Whether a first line of numbers differs from every row below; see above."""
    if len(below) < _MIN_BELOW:
        return False
    lines = [first, *below[:_MAX_BELOW]]
    values = np.array([[_number(cell) for cell in line] for line in lines])
    with np.errstate(all="ignore"):
        steps = np.diff(values, axis=1)
        step = steps[:, :1]
        even = (step != 0) & (np.abs(steps - step) <= 0.01 * np.abs(step))
        is_even, *others_are = even.all(axis=1)
        low, high = values[1:].min(axis=0), values[1:].max(axis=0)
        distance = np.maximum(low - values[0], values[0] - high)
        far = ~(distance <= high - low)  # True also above cells that are no numbers.
    evenly_spaced = len(first) > 2 and is_even and not any(others_are)
    return bool(evenly_spaced or far.all())


# --- NPZ ------------------------------------------------------------------------


def _read_npz(path: Path, options: TableOptions) -> TableFile:
    found, dropped, ids = npz_headers(path, MAX_NPZ_BYTES), options.drop_columns, None
    arrays = {name: array for name, array in found.items() if name not in dropped}
    label = next((name for name in _LABELS if name in arrays), "")
    label = options.label_column or label if options.columns is None else ""
    beside = {*_LABELS, options.label_column, options.id_column}
    table = choose_array(path, arrays, 2, beside)
    size = 8 * math.prod(table.shape)
    # Objects are refused when read.
    if size > MAX_NPZ_BYTES or table.dtype.kind not in "biufO" or len(table.shape) != 2:
        raise InputError(
            f"{path}: the array {table} is no 2-D table of real numbers of at most "
            f"{MAX_NPZ_BYTES} bytes as float64; convert it, or split it, and save rows "
            "× columns with numpy.savez(path, x=rows)"
        )
    num = table.shape[0]
    id_column = options.id_column
    for name, what in ((label, "data.label_column"), (id_column, "--id_column")):
        shape = arrays[name].shape if name in arrays else None
        if name and shape not in ((num,), (num, 1)):
            raise InputError(
                f"{path}: {what} needs a 1-D array {shown(name)} with a value for each "
                f"of the {num} rows; found: {listed(arrays.values())}; leave out what "
                "is no label by data.drop_columns"
            )
    names = [name for name in (table.name, label, options.id_column) if name]
    read = read_npz(path, MAX_NPZ_BYTES, names)
    columns = tuple(f"column_{j}" for j in range(table.shape[1]))
    dropped = tuple(name for name in dropped if name not in found)
    of_rows = TableOptions(drop_columns=dropped, columns=options.columns)
    chosen = _select(path, columns, of_rows, has_header=False)
    rows = read[table.name].astype(np.float64)[:, chosen]
    columns = tuple(columns[j] for j in chosen)
    labels, row_name = None, "row {} (counted from 0)".format
    _check_finite(path, rows, row_name, columns, rows, options.may_miss)
    if label:
        labels = _labels(path, read[label].reshape(-1).tolist(), row_name)
    if options.id_column:
        ids = tuple(map(str, read[options.id_column].reshape(-1).tolist()))
    return TableFile(columns, rows, labels, row_name, ids)
